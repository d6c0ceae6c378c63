"""Fold an adapter into its base as one model folder, or several adapters of one base into one adapter, and measure what is kept.

A quantized base is rounded again, and no rule says beforehand which rounding is best: on a new grid for the sum of base
and update, all weights are rounded once more, and on the base's own grid, updates below half a step are lost. So without
a flag that chooses, layers are compensated if the rows that the adapter was trained on are on this disk. Where weights are
rounded each for itself (without these rows; experts and embeddings), the base's own grid is tried, then if too little is
kept a new one (with a budget of bits, in the other order), and the better of the two is what is left in the folder.

Merged adapters are measured beside each other on the rows that their runs held out.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np
import yaml

from mlx_lora.adapters.base import LINEAR, SWITCH
from mlx_lora.adapters.inject import adapt_layers, adapter_layers, remove_adapters, targets_of
from mlx_lora.adapters.merge import AdapterTerm, MergeSettings, merge_layer
from mlx_lora.adapters.qat import FUSED_ONLY
from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base, speaks_python
from mlx_lora.api.evaluate import GENERAL, MOST_SEEN_BYTES, data_of_run, with_settings_of_run, without_adapter
from mlx_lora.config.fields import flag_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.data_sets import find_sets
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.data.load import load_eval_set
from mlx_lora.evaluation.paired import Readout, token_losses
from mlx_lora.exporters.adapter_config import remove_earlier
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE, AdapterInfo, load_adapter, run_of, save_adapter
from mlx_lora.exporters.card import CardFacts, write_card
from mlx_lora.exporters.fuse import Rounding, Survival, is_rounded, write_fused
from mlx_lora.exporters.rounding import Budget, CalibrationTokens
from mlx_lora.exporters.sentence_transformers import write_form
from mlx_lora.models.convert import convert_model
from mlx_lora.models.folder import of_tower, write_json
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.models.load import Base, check_token_ids, load_base
from mlx_lora.models.quantize import AFFINE
from mlx_lora.objectives.embed import form_of_run, kept_choices
from mlx_lora.trainer.adapter import adapter_template
from mlx_lora.trainer.evaluate import held_out_plan
from mlx_lora.utils.errors import InputError, refuse
from mlx_lora.utils.files import check_writable, place_beside, replacing_file, replacing_folder
from mlx_lora.utils.hub import resolve_adapter, resolve_model
from mlx_lora.utils.progress import tracked

# A larger error of rounding, relative to the update, is not taken for harmless without measuring.
HARMLESS = 0.05
FINE_BITS = 8  # from so many bits on, rounding each weight for itself loses little
ROWS = 32  # measured, at most
GENERAL_ROWS = 16  # of general texts, where there are no others
LEAST_ROWS = 16  # of them, on a slow machine too: on fewer rows the share is chance
BASE_S = 20.0  # seconds for the base; with the adapter and fused, the same rows take about as long each
BATCH_TOKENS = 1024
FADED = 0.9  # if less of the gain is kept, the ways out are named
LEAST_GAIN = 0.02  # nats per token; a share of less is a share of noise
CALIBRATION_TOKENS = 8_192


@dataclass(frozen=True)
class FuseSettings:
    """What is written, and how.

    Attributes:
        out: folder.
        dequantize: make the whole model float.
        bits: of the fused layers of a quantized base; None: its own.
        compensate: round for the outputs of the layers; None: where the run's rows are on this disk.
        rows: for that, as `evaluate --data` takes them; None: the run's.
        budget: bytes that the model may take; None: layers keep their bits.
        data: rows to measure on; None: what the run held out.
        force: replace an existing model folder.
    """

    out: Path
    dequantize: bool = False
    bits: int | None = None
    compensate: bool | None = None
    rows: str | None = None
    budget: Budget | None = None
    data: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Fused:
    """A fused model that was written.

    Attributes:
        model_id: of the base.
        full: how many parameters were trained in full.
        rounding: of the model that is in the folder.
        survival: by layer.
        gain: what was measured; None: nothing needed to be.
    """

    model_id: str
    full: int
    rounding: Rounding
    survival: dict[str, Survival]
    gain: Gain | None = None

    def summary(self) -> dict[str, Any]:
        """Return the rounding error relative to the update, of the mean and of the worst layer, and the bits."""
        if not self.survival:
            return {"layers": 0, "bits": None, "error_mean": 0.0, "error_most": 0.0, "most_layer": None}
        most = max(self.survival, key=lambda path: self.survival[path].error)
        return {
            "layers": len(self.survival),
            "bits": min((s.bits for s in self.survival.values() if s.bits), default=None),
            "error_mean": sum(s.error for s in self.survival.values()) / len(self.survival),
            "error_most": self.survival[most].error,
            "most_layer": most,
        }


def fuse(model: ModelSettings, adapter: Path, asked: FuseSettings, ignore_fingerprint: bool = False) -> Fused:
    """Write the base with the adapter folded in, and measure how much of what the adapter learned is in it.

    Args:
        model: the base.
        adapter: its folder.
        asked: what is written, and how.
        ignore_fingerprint: as for load_adapter.

    Raises:
        InputError: an argument cannot be used.
        RunError: the written model cannot be read back.
    """
    ways: list[Rounding] = []
    if adapter.resolve().is_relative_to(asked.out.resolve()):
        raise InputError(f"--out {asked.out}: holds the adapter {adapter}; give another folder")

    def write(out: Path, number: int, *, force: bool) -> tuple[Fused, bool]:
        """Write the model rounded in one of the ways, and return what was written and whether it predicts tokens."""
        base = load_base(model)  # again for each way: writing changes it
        info = load_adapter(base, adapter, ignore_fingerprint, scores=None)
        if info.chat_template:  # rows are measured with it, and layers rounded for them
            base.hf_tokenizer.chat_template = info.chat_template
        scores, form = SCORE_WEIGHT in info.full, form_of_run(base, adapter)
        if asked.data and (scores or form):
            what, objective = ("a reward model has", "reward") if scores else ("embeddings have", "embed")
            raise InputError(
                f"--data: {what} no loss on answers; leave it out, and use evaluate --objective {objective}"
            )
        ways.extend([] if ways else ways_to_round(base, adapter, asked))
        survival = write_fused(base, out, info, ways[number], force=force, keep_dtype=model.dtype != "auto")
        if form:
            write_form(out, form, base.hf_tokenizer)
        return Fused(base.model_id, len(info.full), ways[number], survival), not (scores or form)

    best, predicts = write(asked.out, 0, force=asked.force)
    if not predicts or not (asked.data or best.summary()["error_mean"] > HARMLESS):
        return best
    meter = GainMeter(model, adapter, asked.data, ignore_fingerprint)
    written = replace(model, revision=None, bits=None)
    gain = meter.compare(load_base(replace(written, model=str(asked.out))))
    for number in range(1, len(ways)):
        if gain.kept is not None and gain.kept >= FADED:
            break
        with TemporaryDirectory(prefix=f".{asked.out.name}.", dir=place_beside(asked.out)) as folder:
            out = Path(folder) / asked.out.name
            other, _ = write(out, number, force=False)
            found = meter.compare(load_base(replace(written, model=str(out))))
            closer = found.loss_fused < gain.loss_fused  # by its loss, on texts of its run
            if gain.kept is None and found.kl is not None and gain.kl is not None:
                closer = found.kl < gain.kl
            if closer:
                with replacing_folder(asked.out) as place:
                    for file in out.iterdir():
                        file.rename(place / file.name)
                best, gain = other, found
    return replace(best, gain=gain)


def ways_to_round(base: Base, adapter: Path, asked: FuseSettings) -> list[Rounding]:
    """Return the ways of rounding that are tried, the likely best one first.

    Args:
        base: adapted.
        adapter: its folder.
        asked: what is written, and how.

    Raises:
        InputError: the base cannot be rounded as asked.
    """
    way = Rounding(asked.dequantize, asked.bits, compensate=bool(asked.compensate), budget=asked.budget)
    way.check(base)
    layers = [layer for layer in adapter_layers(base.model).values() if is_rounded(layer, way)]
    bits = asked.bits or min((layer.base.bits for layer in layers), default=FINE_BITS)
    linear = [layer for layer in layers if layer.OVER is LINEAR]
    if asked.compensate or asked.budget:
        tokens = calibration_tokens(base, adapter, asked.rows)
        if isinstance(tokens, str):
            flag = "--compensate" if asked.compensate else "--bits-budget"
            instead = " instead of --no-compensate" if asked.compensate is False else ""
            raise InputError(f"{flag}: needs rows like those of the run, and {tokens}; give --compensate FILE{instead}")
        way = replace(way, tokens=tokens, compensate=asked.compensate is not False)
    elif linear and bits < FINE_BITS and asked.compensate is None:
        tokens = calibration_tokens(base, adapter, None)
        if isinstance(tokens, CalibrationTokens):
            way = replace(way, compensate=True, tokens=tokens)
    plain = [layer for layer in layers if not way.compensate or layer.OVER is not LINEAR]
    if (asked.bits or 0) >= FINE_BITS or not any(layer.base.mode == AFFINE for layer in plain):
        return [way]
    grids = [way, replace(way, new_grid=True)]
    return grids[::-1] if way.budget and not way.compensate else grids  # more bits make a new grid's error smaller


# What was kept


@dataclass(frozen=True)
class Gain:
    """Mean losses on the same rows.

    Attributes:
        loss_base, loss_adapter, loss_fused: in nats per supervised token.
        rows: how many were measured.
        of: where they come from, in words.
        kl: of the fused model from the adapted one, in nats per supervised token; None: the vocabularies differ.
        general: why they are general texts, which the adapter was not trained for; None: they are not.
    """

    loss_base: float
    loss_adapter: float
    loss_fused: float
    rows: int
    of: str
    kl: float | None = None
    general: str | None = None

    @property
    def kept(self) -> float | None:
        """The share of the adapter's gain that the fused model has; None: the adapter gains nothing on these rows."""
        gain = self.loss_base - self.loss_adapter
        return (self.loss_base - self.loss_fused) / gain if gain > LEAST_GAIN and self.general is None else None

    def words(self) -> str:
        """Return the measurement as one sentence."""
        losses = f"base {self.loss_base:.2f}, with adapter {self.loss_adapter:.2f}, fused {self.loss_fused:.2f}"
        if self.kl is not None:
            losses += f"; KL {self.kl:.3f}"
        if self.general is not None:
            return (
                f"on {self.of}, the loss is {losses}; what the fused model keeps of the adapter's gain was not measured, "
                f"because {self.general}: measure it with --data FILE"
            )
        if self.kept is None:
            return f"the adapter does not lower the loss on {self.of} ({losses}); measure on others with --data FILE"
        share = "all" if self.kept >= 1 else "nothing" if self.kept <= 0 else f"{self.kept:.0%}"
        return f"the fused model keeps {share} of the adapter's gain in loss ({losses}; {self.of})"


NOT_MEASURED = {
    **dict.fromkeys(("loss_base", "loss_adapter", "loss_fused", "kept", "kl", "general")), "rows": 0, "of": None,
}  # fmt: skip


class GainMeter:
    """The losses of a base without and with an adapter, to compare fused models with."""

    def __init__(self, model: ModelSettings, adapter: Path, data: str | None, ignore_fingerprint: bool = False):
        """Measure the base and the adapter on some rows.

        Args:
            model: the base.
            adapter: the adapter's folder.
            data: as `evaluate --data` takes it; None: what the adapter's run held out, if that is on this disk, and general
                texts if not.
            ignore_fingerprint: as for load_adapter.

        Raises:
            InputError: `data` cannot be used.
        """
        base = load_base(model)
        if template := adapter_template(adapter):
            base.hf_tokenizer.chat_template = template
        general = None
        found = given_rows(data, adapter, base) if data else rows_of_run(adapter, base)
        if isinstance(found, str):
            rows = load_eval_set(str(GENERAL / "text.jsonl"), train_settings({}).data, base.hf_tokenizer)
            chosen = rows.select(spaced_by_length(rows, min(GENERAL_ROWS, rows.examples)))
            found, general = (chosen, "rows of general texts"), found
        rows, of = found
        self._batches, measured = affordable_batches(base, rows)
        adapted = without_adapter(base)
        load_adapter(adapted, adapter, ignore_fingerprint)
        before, after = Readout(base), Readout(adapted)
        head, self._states, losses, learned = after.head_alone(), [], [], []
        for batch in tracked(self._batches, "Measuring base and adapter", len(self._batches), "batches"):
            states = after.read(batch)
            of_base, (of_adapter,) = token_losses(before.read(batch), [states])
            losses.append(of_base)
            learned.append(of_adapter[0])
            self._states.append(replace(states, readout=head))
        self._before = Gain(_mean(losses), _mean(learned), math.nan, measured, f"{measured} {of}", None, general)

    def compare(self, fused: Base) -> Gain:
        """Measure a fused model's loss, and its KL from the adapted one."""
        readout, columns = Readout(fused), []
        batches = tracked(self._batches, "Measuring the fused model", len(self._batches), "batches")
        for states, batch in zip(self._states, batches, strict=True):
            columns += token_losses(states, [readout.read(batch)])[1]
        kl = _mean([divergence for _, divergence, _ in columns])
        # A divergence is never negative, but its rounding may be; there is none where the vocabularies differ.
        kl = None if math.isnan(kl) else max(0.0, kl)
        return replace(self._before, loss_fused=_mean([loss for loss, _, _ in columns]), kl=kl)


def _mean(parts: list[np.ndarray]) -> float:
    return float(np.concatenate(parts).mean(dtype=np.float64))


def read_back(path: Path) -> Base:
    """Load a merged model that was written as a folder or a GGUF file, without keeping a converted copy of it."""
    if path.is_dir():
        return load_base(ModelSettings(model=str(path)))
    with TemporaryDirectory() as folder:
        convert_model(resolve_model(str(path), None), Path(folder) / path.stem, target="carry")
        return load_base(ModelSettings(model=str(Path(folder) / path.stem)))


def loss_on(base: Base, batches: list[Batch], of: str) -> float:
    """Return the mean loss of supervised tokens.

    Args:
        base: with or without an adapter.
        batches: of rows.
        of: the model in words, for a display of the progress.
    """
    readout = Readout(base)
    tracked_batches = tracked(batches, f"Measuring {of}", len(batches), "batches")
    return _mean([token_losses(readout.read(batch))[0] for batch in tracked_batches])


def affordable_batches(base: Base, rows: EncodedSet, seconds: float = BASE_S) -> tuple[list[Batch], int]:
    """Return batches of rows that are spaced by length, as many as are measured in this time, and the number of their rows.

    On a slow machine, these are more than that: at least those with the fewest rows.
    """
    rows = rows.select(spaced_by_length(rows, min(ROWS, rows.examples)))
    plan = held_out_plan(rows, replace(train_settings({}).loop, batch_tokens=BATCH_TOKENS))
    batches = list(plan.batches())
    loss_on(base, batches[:1], "speed")  # compiles
    start = time.perf_counter()
    loss_on(base, batches[:1], "speed")
    count = max(1, int(seconds / (time.perf_counter() - start)))
    real = np.cumsum([int(batch.real.sum()) for batch in batches])  # rows up to each batch
    count = min(len(batches), max(count, int(np.searchsorted(real, min(LEAST_ROWS, rows.examples) * rows.group)) + 1))
    return batches[:count], int(real[count - 1]) // rows.group


# Which rows


def given_rows(data: str, adapter: Path, base: Base) -> tuple[EncodedSet, str]:
    """Return the rows of --data, read with the columns of the run that trained the adapter, and their source in words."""
    settings = with_settings_of_run(train_settings({"data": data}), ("data",), adapter)
    rows = load_eval_set(data, settings.data, base.hf_tokenizer)
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {data}")
    return rows, f"rows of {data}"


def rows_of_run(adapter: Path, base: Base) -> tuple[EncodedSet, str] | str:
    """Return the rows that the adapter's run held out and their source in words, or why there are none."""
    splits = data_of_run(adapter, base.hf_tokenizer, MOST_SEEN_BYTES)
    if isinstance(splits, str):
        return splits
    held_out = splits.test or splits.valid
    return held_out or splits.train, f"{'held-out' if held_out else 'training'} rows of its run"


def calibration_tokens(base: Base, adapter: Path, data: str | None) -> CalibrationTokens | str:
    """Return the tokens that a fused model is rounded for, of the rows that the adapter was trained on; or why there are none.

    The package's general texts are not among them: they are kept for measuring.

    Args:
        base: whose tokenizer has the adapter's chat template.
        adapter: its folder.
        data: rows instead of the run's, as `evaluate --data` takes them; None: the run's.

    Raises:
        InputError: `data` cannot be used.
    """
    if data:
        rows, of = given_rows(data, adapter, base)
    else:
        splits = data_of_run(adapter, base.hf_tokenizer, MOST_SEEN_BYTES)
        if isinstance(splits, str):
            return splits
        rows, of = splits.train, "the run's training rows"
    return CalibrationTokens.from_rows(rows, CALIBRATION_TOKENS, of)


# Several adapters as one

log = logging.getLogger(__name__)

FACTS_FILE, RUN_FILE = "merge.json", "run.yaml"
LENGTH = "max_seq_length"
MODEL_S = 10.0  # seconds for each model on each set of rows
MOST_WEIGHT = 100  # as for the server's blends
# These keep rows equal that are equal within a base's groups, so that a merged qa-lora is one.
KEEPS_GROUPS = ("cat", "linear", "magnitude_prune", "ties")

# What was merged


@dataclass(frozen=True)
class SetLosses:
    """The losses of all models on one set of rows, in nats per supervised token.

    Attributes:
        of: where the rows come from, in words.
        rows: how many were measured.
        base: without an adapter.
        adapters: by name, each alone and with weight 1.
        merged: of the merged adapter.
    """

    of: str
    rows: int
    base: float
    adapters: dict[str, float]
    merged: float


@dataclass(frozen=True)
class Merged:
    """A merged adapter that was written.

    Attributes:
        adapter: its folder.
        settings: how it was merged.
        weights: of the adapters, by folder or hub id as given.
        rank: the largest of its layers.
        layers: how many it has.
        losses: of each set of rows that was measured.
        not_measured: adapter -> why the rows of its run were not.
    """

    adapter: Path
    settings: MergeSettings
    weights: dict[str, float]
    rank: int
    layers: int
    losses: tuple[SetLosses, ...] = ()
    not_measured: Mapping[str, str] | None = None

    def facts(self) -> dict[str, Any]:
        """Return all of it by name, for JSON."""
        how = {name: value for name, value in asdict(self.settings).items() if name != "how" and value is not None}
        if self.settings.combination.prunes:
            how["density"] = self.settings.kept
        if self.settings.combination.prunes == "random":
            how["seed"] = self.settings.seed or 0
        return {
            "how": self.settings.name, **how, "adapters": self.weights, "rank": self.rank, "layers": self.layers,
            "losses": [asdict(one) for one in self.losses], "not_measured": dict(self.not_measured or {}),
        }  # fmt: skip


@speaks_python(adapter_path="adapters", adapter="adapters")
def merge(
    base: PublicBase | PathLike,
    adapters: Mapping[str, float] | Mapping[PathLike, float],
    *,
    out: PathLike,
    how: str = "cat",
    density: float | None = None,
    svd_rank: int | None = None,
    seed: int | None = None,
    majority_sign_method: str | None = None,
    data: str | None = None,
    evaluate: bool = True,
    force: bool = False,
    ignore_fingerprint: bool = False,
) -> Merged:
    """Merge adapters of one base into one, as `mlx-lora merge` does.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        adapters: folder or hub id -> weight. Weights need not add up to 1, and may be negative.
        out: folder of the merged adapter.
        how: cat (exactly the weighted sum; ranks add up), svd (the nearest of a lower rank), linear, ties, dare_linear ...
            as in PEFT's `add_weighted_adapter`; dare is dare_linear.
        density: the share of numbers that ties, dare and magnitude_prune keep (default: 0.5).
        svd_rank: of the ways that end in svd (default: the largest rank of the adapters).
        seed: of what dare drops (default: 0).
        majority_sign_method: total or frequency, of the ways with ties (default: total).
        data: rows to measure on, as for `evaluate`; None: those that the adapters' runs held out, where they are on this disk.
        evaluate: measure base, adapters and the merged one.
        force: replace a merged adapter in `out`.
        ignore_fingerprint: use adapters that were trained on another base of the same shape.

    Returns:
        The folder, rank and losses. The folder works as every adapter does.

    Raises:
        InputError: an argument cannot be used, or the adapters cannot be merged in this way.
    """
    settings = MergeSettings(how, density, svd_rank, seed, majority_sign_method)
    weights, folder = check_weights(adapters), check_out(Path(out), force)
    base = as_base(base, "merge")
    with base.loaded.lent() as lent:
        return merge_adapters(lent, weights, settings, folder, ignore_fingerprint, data, evaluate=evaluate)


def check_weights(adapters: Mapping[str, Any] | Mapping[PathLike, Any]) -> dict[str, float]:
    """Return the weights by folder or hub id.

    Raises:
        InputError: there is no adapter, or a weight is no number from -100 to 100.
    """
    if not adapters:
        raise InputError("--adapter: none; give each as DIR=WEIGHT")
    for adapter, weight in adapters.items():
        number = isinstance(weight, int | float) and not isinstance(weight, bool) and math.isfinite(weight)
        if not number or abs(weight) > MOST_WEIGHT:
            raise InputError(
                f"--adapter {os.fspath(adapter)}={weight}: the weight is not a number from -{MOST_WEIGHT} to {MOST_WEIGHT}; "
                "write DIR=WEIGHT"
            )
    return {os.fspath(adapter): float(weight) for adapter, weight in adapters.items()}


def check_out(out: Path, force: bool) -> Path:
    """Return a folder that may be written: a new or empty one, or with `force`, one that holds a merged adapter.

    Raises:
        InputError: it holds something else, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / FACTS_FILE).is_file():
            raise InputError(f"--out {out}: exists and is not a merged adapter; give a new folder")
        if not force:
            raise InputError(f"--out {out}: holds a merged adapter; give a new folder, or --force")
    check_writable(out, "--out", needed_bytes=1_000_000)
    return out


# Reading and merging


@dataclass(frozen=True)
class Source:
    """An adapter that is to be merged.

    Attributes:
        given: its folder or hub id, as it was given.
        folder: of its files.
        weight: in the sum.
        info: the facts about it.
        layers: path -> factors and scale.
    """

    given: str
    folder: Path
    weight: float
    info: AdapterInfo
    layers: dict[str, AdapterTerm]

    @classmethod
    def read(cls, base: Base, given: str, weight: float, ignore_fingerprint: bool) -> Source:
        """Read an adapter, and leave the base as it was.

        Raises:
            InputError: it is not for this base, or has parts that cannot be added up.
        """
        folder = resolve_adapter(given)
        info = load_adapter(base, folder, ignore_fingerprint)
        layers = adapter_layers(base.model)
        remove_adapters(base.model)
        beside = {layer.LAYER_TYPE for layer in layers.values() if layer.BESIDE}
        apart = next((path for path, layer in layers.items() if not layer.adapts_head), None)
        refuse(
            {
                f"--adapter {given}: trains {len(info.full)} parameters in full ({', '.join(info.full[:1])} ...), and only "
                "adapter weights are merged": info.full,
                f"--adapter {given}: changes the vision tower, and only language models are merged": any(
                    map(of_tower, layers)
                ),
                f"--adapter {given}: {FUSED_ONLY}": info.qat,
                f"--adapter {given}: is of the type {', '.join(beside)}, whose update is not a sum; merge LoRA adapters": (
                    beside
                ),
                f"--adapter {given}: adapts {apart} without the head, which is the same matrix here": apart,
            }
        )
        parts = {}
        for path, layer in layers.items():
            a, b = layer.plain_factors()
            if layer.OVER is SWITCH:
                a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
            parts[path] = AdapterTerm(a, b, layer.scale, weight)
            mx.eval(a, b)
            if not mx.isfinite(a.sum() + b.sum()).item():
                raise InputError(f"--adapter {given}: {path} has numbers that are not finite; give another checkpoint")
        return cls(given, folder, weight, info, parts)

    @property
    def rank(self) -> int:
        """The largest rank of its layers."""
        return max(part.rank for part in self.layers.values())


def merge_adapters(
    base: Base,
    weights: Mapping[str, float],
    settings: MergeSettings,
    out: Path,
    ignore_fingerprint: bool = False,
    data: str | None = None,
    *,
    evaluate: bool = True,
) -> Merged:
    """Write the merged adapter, and measure it.

    Args:
        base: without an adapter; it is left so.
        weights: of the adapters, by folder or hub id.
        settings: how they are merged.
        out: folder that may be written.
        ignore_fingerprint: as for load_adapter.
        data: rows to measure on; None: those of the adapters' runs.
        evaluate: whether anything is measured.

    Raises:
        InputError: the adapters cannot be merged in this way, or `data` cannot be used.
    """
    if data:
        find_sets(data)  # refused before the work if it is not there
    sources = [Source.read(base, given, weight, ignore_fingerprint) for given, weight in weights.items()]
    folders = [source.folder.resolve() for source in sources]
    if twice := [source.given for i, source in enumerate(sources) if folders[i] in folders[:i]]:
        raise InputError(f"--adapter {twice[0]}: given twice; give it once, with the sum of the weights")
    if out.resolve() in folders:
        raise InputError(f"--out {out}: is one of the adapters; give another folder")
    vectors = _vector_settings(sources)
    factors = merged_factors(sources, settings)
    ranks = [part.rank for part in factors.values()]
    merged = Merged(out, settings, dict(weights), max(ranks), len(ranks))

    templates, own_template = {source.info.chat_template for source in sources}, base.hf_tokenizer.chat_template
    template = templates.pop() if len(templates) == 1 else None
    if templates:
        log.info("The adapters have different chat templates; the merged one uses the model's own")
    grouped = settings.name in KEEPS_GROUPS and {source.info.method for source in sources} == {"qa-lora"}
    first, targets = sources[0].info, targets_of(base.model, factors)
    info = AdapterInfo(
        method="qa-lora" if grouped else "lora", rank=merged.rank, alpha=float(merged.rank), scale=1.0, dropout=0.0,
        num_layers=targets.num_layers, keys=targets.keys, base_model=first.base_model, base_revision=first.base_revision,
        base_fingerprint=base.fingerprint, chat_template=template,
    )  # fmt: skip
    with _adapted(base, factors):
        save_adapter(out, base.model, info)
    write_card(out, "mlx", base, info, CardFacts(objective=vectors.get("objective", CardFacts.objective)))
    remove_earlier(out, WEIGHTS_FILE, FACTS_FILE)
    if vectors:
        with replacing_file(out / RUN_FILE) as temporary:
            temporary.write_text(yaml.safe_dump(vectors, sort_keys=False, allow_unicode=True), encoding="utf-8")
    _keep(merged)
    log.info(f"{out}: {len(sources)} adapters merged into one of rank {merged.rank} ({settings.name})")
    if evaluate:
        try:
            losses, missing = _measured(base, sources, factors, template, data)
        finally:
            base.hf_tokenizer.chat_template = own_template
        merged = replace(merged, losses=losses, not_measured=missing)
        _keep(merged)
    return merged


def _keep(merged: Merged) -> None:
    """Write how the adapter was merged beside it."""
    with replacing_file(merged.adapter / FACTS_FILE) as temporary:
        write_json(temporary, merged.facts())


def _vector_settings(sources: Sequence[Source]) -> dict[str, Any]:
    """Return the settings of the runs that decide what a text's vector is, by name; none if the adapters are not of vectors.

    Raises:
        InputError: they differ, so that no vector is what the others were trained for.
    """
    found = []
    for source in sources:
        run = run_of(source.folder)
        found.append({"objective": "embed", **kept_choices(run)} if run.get("objective") == "embed" else {})
    lengths = [own.pop(LENGTH) for own in found if LENGTH in own]
    for source, own in zip(sources, found, strict=True):
        if differ := [name for name in {**found[0], **own} if found[0].get(name) != own.get(name)]:
            one, other = (f"{flag_of(differ[0])} {of.get(differ[0])}" for of in (found[0], own))
            raise InputError(
                f"--adapter {source.given}: was trained with {other}, and {sources[0].given} with {one}; merge adapters whose "
                "vectors are computed alike"
            )
    return {**found[0], LENGTH: max(lengths)} if lengths else found[0]


def merged_factors(sources: Sequence[Source], settings: MergeSettings) -> dict[str, AdapterTerm]:
    """Return the merged factors of every layer that one of the adapters has.

    Raises:
        InputError: ranks differ, and this way needs equal ones.
    """
    paths = list(dict.fromkeys(path for source in sources for path in source.layers))
    rank = settings.svd_rank or max(source.rank for source in sources)
    found = {}
    for path in tracked(paths, "Merging", len(paths), "layers"):
        parts = [source.layers[path] for source in sources if path in source.layers]
        found[path] = AdapterTerm(*merge_layer(path, parts, settings, rank), scale=1.0, weight=1.0)
    return found


@contextmanager
def _adapted(base: Base, factors: Mapping[str, AdapterTerm]) -> Iterator[None]:
    """Put factors onto a base inside the block."""
    adapt_layers(base.model, {path: (part.rank, part.scale) for path, part in factors.items()})
    for path, layer in adapter_layers(base.model).items():
        a, b = factors[path].a, factors[path].b
        if layer.OVER is SWITCH:
            a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
        layer.lora_a, layer.lora_b = a, b
    base.model.eval()
    try:
        yield
    finally:
        remove_adapters(base.model)


# Measuring


def _measured(
    base: Base, sources: Sequence[Source], factors: Mapping[str, AdapterTerm], template: str | None, data: str | None
) -> tuple[tuple[SetLosses, ...], dict[str, str]]:
    """Return the losses on each set of rows, and why the rows of a run are not among them.

    Args:
        base: without an adapter.
        sources: the adapters.
        factors: the merged ones.
        template: the chat template of the merged adapter; None: the model's own.
        data: rows to measure on; None: those of the adapters' runs, each with the chat template of its run.

    Raises:
        InputError: `data` cannot be used.
    """
    own, names = base.hf_tokenizer.chat_template, [source.folder.resolve().name for source in sources]
    if len(set(names)) < len(names):  # two folders have one name
        names = [source.given for source in sources]
    sets: dict[str, tuple[EncodedSet, str]] = {}
    missing: dict[str, str] = {}
    if data:
        base.hf_tokenizer.chat_template = template or own
        rows, of = given_rows(data, sources[0].folder, base)
        sets[rows.fingerprint] = rows, of
    else:
        for source, name in zip(sources, names, strict=True):
            base.hf_tokenizer.chat_template = source.info.chat_template or own
            found = rows_of_run(source.folder, base)
            if isinstance(found, str):
                missing[name] = found
            else:
                rows, of = found
                sets.setdefault(rows.fingerprint, (rows, of.replace("its run", name)))
    losses = []
    for rows, of in sets.values():
        batches, count = affordable_batches(base, rows, MODEL_S)
        alone, found = loss_on(base, batches, "the base"), {}
        for source, name in zip(sources, names, strict=True):
            with _adapted(base, source.layers):
                found[name] = loss_on(base, batches, name)
        with _adapted(base, factors):
            losses.append(SetLosses(of, count, alone, found, loss_on(base, batches, "the merged adapter")))
    return tuple(losses), missing
