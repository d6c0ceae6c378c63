"""Merge several adapters of one base into one adapter folder, and measure it beside them on the rows that their runs held out."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import yaml

from mlx_lora.adapters.base import SWITCH
from mlx_lora.adapters.inject import adapt_layers, adapter_layers, remove_adapters, targets_of
from mlx_lora.adapters.merge import AdapterTerm, MergeSettings, merge_layer
from mlx_lora.adapters.qat import FUSED_ONLY
from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base
from mlx_lora.api.errors import speaks_python
from mlx_lora.api.fuse import affordable_batches, given_rows, loss_on, rows_of_run
from mlx_lora.config.fields import flag_of
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.files import find_sets
from mlx_lora.exporters.adapter_config import remove_earlier
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE, AdapterInfo, load_adapter, run_of, save_adapter
from mlx_lora.exporters.card import CardFacts, write_card
from mlx_lora.models.folder import write_json
from mlx_lora.models.load import Base
from mlx_lora.models.side_files import of_tower
from mlx_lora.objectives.embed import kept_choices
from mlx_lora.utils.errors import InputError, refuse
from mlx_lora.utils.files import check_writable, replacing_file
from mlx_lora.utils.hub import resolve_adapter
from mlx_lora.utils.progress import tracked

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
