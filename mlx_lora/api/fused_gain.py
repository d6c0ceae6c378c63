"""Measure how much of an adapter's gain a fused model keeps: the loss of the base, with the adapter, and fused.

The error of rounding does not tell it. An update is small and of low rank, the error is large and spread over all
directions, and a model bears one better than the other: in one model, rounding by 51 times the update left a third of the gain.

    kept = (loss of the base - loss of the fused model) / (loss of the base - loss with the adapter)
    KL   = mean over supervised tokens of sum over the vocabulary of p_adapter (log p_adapter - log p_fused)

One model is in memory at a time. For KL, the hidden states of the adapted model at the supervised tokens are kept, with its
head.

Shapes: P supervised positions, R of them at a time, D width, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.api.forgetting import GENERAL, Readout, log_probabilities, read_at_once
from mlx_lora.api.run_data import data_of_run, with_settings_of_run
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.data.load import load_eval_set
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.exporters.rounding import CalibrationTokens
from mlx_lora.models.convert import convert_model
from mlx_lora.models.load import Base, check_token_ids, load_base
from mlx_lora.trainer.adapter import adapter_template
from mlx_lora.trainer.held_out import held_out_plan
from mlx_lora.utils.hub import resolve_model
from mlx_lora.utils.progress import tracked

ROWS = 32  # measured, at most
GENERAL_ROWS = 16  # of general texts, where there are no others
LEAST_ROWS = 16  # of them, on a slow machine too: on fewer rows the share is chance
BASE_S = 20.0  # seconds for the base; with the adapter and fused, the same rows take about as long each
BATCH_TOKENS = 1024
MOST_DATA_BYTES = 20_000_000  # larger data of a run is only read on request (--data)
FADED = 0.9  # if less of the gain is kept, the ways out are named
LEAST_GAIN = 0.02  # nats per token; a share of less is a share of noise
CALIBRATION_TOKENS = 8_192


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

    def facts(self) -> dict[str, Any]:
        """Return the numbers by name, for JSON."""
        return {**asdict(self), "kept": self.kept}

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


@dataclass(frozen=True)
class GainMeter:
    """The losses of a base without and with an adapter, to compare fused models with.

    Attributes:
        loss_base, loss_adapter: in nats per supervised token.
        batches: of the rows.
        states: of the adapted model, for each batch.
        rows: how many there are.
        of: where they come from, in words.
        general: as in Gain.
    """

    loss_base: float
    loss_adapter: float
    batches: list[Batch]
    states: list[_States]
    rows: int
    of: str
    general: str | None

    @classmethod
    def of_adapter(
        cls, model: ModelSettings, adapter: Path, data: str | None, ignore_fingerprint: bool = False
    ) -> GainMeter:
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
        if data:
            (rows, of), general = given_rows(data, adapter, base), None
        else:
            rows, of, general = _rows_of_run(adapter, base)
        batches, measured = affordable_batches(base, rows)
        loss_base = loss_on(base, batches, "the base")
        load_adapter(base, adapter, ignore_fingerprint)
        states = list(_read(base, batches, "the adapter"))
        loss_adapter = _loss(iter(states))
        states = [replace(state, readout=state.readout.head_alone()) for state in states]
        return cls(loss_base, loss_adapter, batches, states, measured, f"{measured} {of}", general)

    def compare(self, fused: Base) -> Gain:
        """Measure a fused model's loss, and its KL from the adapted one."""
        loss, kl = _compared(self.states, _read(fused, self.batches, "the fused model"))
        return Gain(self.loss_base, self.loss_adapter, loss, self.rows, self.of, kl, self.general)


def read_back(path: Path) -> Base:
    """Load a merged model that was written as a folder or a GGUF file, without keeping a converted copy of it."""
    if path.is_dir():
        return load_base(ModelSettings(model=str(path)))
    with TemporaryDirectory() as folder:
        convert_model(resolve_model(str(path), None), Path(folder) / path.stem, target="carry")
        return load_base(ModelSettings(model=str(Path(folder) / path.stem)))


@dataclass(frozen=True)
class _States:
    """The hidden states of a batch at its supervised positions: (P, D), or (P, V) if the head cannot be split off."""

    readout: Readout
    states: mx.array
    targets: mx.array

    def tiles(self) -> Iterator[tuple[mx.array, mx.array]]:
        """Yield (R, V) log-probabilities and (R,) targets, a few positions at a time."""
        first = self.readout.logits(self.states[:1]) if len(self.targets) else self.states
        step = read_at_once(first.shape[-1])
        for start in range(0, len(self.targets), step):
            tile = slice(start, start + step)
            yield log_probabilities(self.readout.logits(self.states[tile])), self.targets[tile]


def _read(base: Base, batches: list[Batch], of: str) -> Iterator[_States]:
    """Yield the states of each batch."""
    readout = Readout(base.model, base.config)
    for batch in tracked(batches, f"Measuring {of}", len(batches), "batches"):
        at = np.flatnonzero(batch.mask)
        states = readout.states(mx.array(batch.inputs), mx.array(at))
        mx.eval(states)
        yield _States(readout, states, mx.array(batch.targets.reshape(-1)[at]))


def _losses(logs: mx.array, targets: mx.array) -> float:
    return -mx.take_along_axis(logs, targets[:, None], axis=-1).sum().item()


def _loss(batches: Iterator[_States]) -> float:
    """Return the mean loss of supervised tokens."""
    total, count = 0.0, 0
    for batch in batches:
        total += sum(_losses(logs, targets) for logs, targets in batch.tiles())
        count += len(batch.targets)
    return total / count


def _compared(adapted: list[_States], fused: Iterator[_States]) -> tuple[float, float | None]:
    """Return the fused model's mean loss, and its KL from the adapted one."""
    total, divergence, count, same = 0.0, 0.0, 0, True
    for before, after in zip(adapted, fused, strict=True):
        for (wanted, targets), (found, _) in zip(before.tiles(), after.tiles(), strict=True):
            total += _losses(found, targets)
            same = same and wanted.shape == found.shape
            if same:
                divergence += (mx.exp(wanted) * (wanted - found)).sum().item()
        count += len(after.targets)
    # A divergence is never negative, but its rounding may be.
    return total / count, max(0.0, divergence / count) if same else None


def loss_on(base: Base, batches: list[Batch], of: str) -> float:
    """Return the mean loss of supervised tokens.

    Args:
        base: with or without an adapter.
        batches: of rows.
        of: the model in words, for a display of the progress.
    """
    return _loss(_read(base, batches, of))


def affordable_batches(base: Base, rows: EncodedSet, seconds: float = BASE_S) -> tuple[list[Batch], int]:
    """Return batches of rows that are spaced by length, as many as are measured in this time, and the number of their rows."""
    rows = rows.select(spaced_by_length(rows, min(ROWS, rows.examples)))
    plan = held_out_plan(rows, replace(train_settings({}).loop, batch_tokens=BATCH_TOKENS))
    batches = list(plan.batches())
    batches = batches[: _affordable(base, batches, rows, seconds)]
    return batches, sum(int(batch.real.sum()) for batch in batches) // rows.group


def _affordable(base: Base, batches: list[Batch], rows: EncodedSet, seconds: float) -> int:
    """Return how many batches are measured in the time for them, at least those with the fewest rows."""
    _loss(_read(base, batches[:1], "speed"))  # compiles
    start = time.perf_counter()
    _loss(_read(base, batches[:1], "speed"))
    count = max(1, int(seconds / (time.perf_counter() - start)))
    least = min(LEAST_ROWS, rows.examples) * rows.group
    while sum(int(batch.real.sum()) for batch in batches[:count]) < least and count < len(batches):
        count += 1
    return count


# Which rows


def given_rows(data: str, adapter: Path, base: Base) -> tuple[EncodedSet, str]:
    """Return the rows of --data, read with the columns of the run that trained the adapter, and their source in words."""
    settings = with_settings_of_run(train_settings({"data": data}), ("data",), adapter)
    rows = load_eval_set(data, settings.data, base.hf_tokenizer)
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {data}")
    return rows, f"rows of {data}"


def rows_of_run(adapter: Path, base: Base) -> tuple[EncodedSet, str] | str:
    """Return the rows that the adapter's run held out and their source in words, or why there are none."""
    splits = data_of_run(adapter, base.hf_tokenizer, MOST_DATA_BYTES)
    if isinstance(splits, str):
        return splits
    held_out = splits.test or splits.valid
    return held_out or splits.train, f"{'held-out' if held_out else 'training'} rows of its run"


def _rows_of_run(adapter: Path, base: Base) -> tuple[EncodedSet, str, str | None]:
    """Return the rows that the adapter's run held out, or general texts and why."""
    found = rows_of_run(adapter, base)
    if not isinstance(found, str):
        return *found, None
    rows = load_eval_set(str(GENERAL / "text.jsonl"), train_settings({}).data, base.hf_tokenizer)
    return rows.select(spaced_by_length(rows, min(GENERAL_ROWS, rows.examples))), "rows of general texts", found


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
        splits = data_of_run(adapter, base.hf_tokenizer, MOST_DATA_BYTES)
        if isinstance(splits, str):
            return splits
        rows, of = splits.train, "the run's training rows"
    return CalibrationTokens.from_rows(rows, CALIBRATION_TOKENS, of)
