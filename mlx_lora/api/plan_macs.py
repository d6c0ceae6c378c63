"""Predict whether a run fits on several Macs, and whether their link or their chips decide the speed.

The plan is for Macs that share the base; beside it stands what the other ways to divide the run would do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlx_lora.config.rules import problems_with
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings, shard_parts
from mlx_lora.kernels.table import KernelChoice
from mlx_lora.models.meta import outline_for
from mlx_lora.parallel.sharded_base import units_of
from mlx_lora.planner.fit import largest_batch, run_of
from mlx_lora.planner.several_macs import (
    Link,
    Mac,
    MacsPlan,
    Split,
    Units,
    best,
    least_tokens,
    memory_shares,
    plan_macs,
    split_by_rows,
    split_with_shared_base,
)
from mlx_lora.planner.shapes import KernelTerms, ModelShape, RunShape
from mlx_lora.planner.speed import CHIPS, find_chip, listed_ceilings
from mlx_lora.trainer.model_shape import outlined_shape
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import GIB

# Thunderbolt 5 is sold as 80 Gbit/s; half of it is assumed for messages of a block's size, and was not measured.
LINK_GBIT = 40.0
MOST_GB = 4096
# What macOS needs in addition to the GPU's memory, where the limit for the GPU is raised by hand.
FOR_MACOS_GB = 4
LATENCY_S = 5e-5  # assumed, of a message
EQUAL_MACS = re.compile(r"(?P<count>\d{1,3})\s*[xX]\s*(?P<rest>.+)")
MEMORY_FACTS = ("fits", "peak_bytes", "needed_bytes", "budget_bytes", "parts", "phase")  # of a Mac, in the plan's JSON
# What takes less memory, in the order in which it is tried.
RANKS, LENGTHS = (16, 8, 4), (2048, 1024, 512)
ATTENTION = "q_proj,k_proj,v_proj,o_proj"


@dataclass(frozen=True)
class MacSpec:
    """One Mac as it is given.

    Attributes:
        chip: its name.
        memory_gb: as Apple sells it.
        working_set_bytes: that a run may use, as the Mac itself says; None: about two thirds or three quarters.
    """

    chip: str
    memory_gb: int
    working_set_bytes: int | None = None


def parse_macs(text: str) -> list[MacSpec]:
    """Return each Mac in `M4 Pro:48,M2 Max:32` or `2 x M4 Pro:48`; `M2 Max:32:28` has 28 GB for the GPU.

    Raises:
        InputError: it is written otherwise, or names one Mac only.
    """
    macs = []
    for part in text.split(","):
        several = EQUAL_MACS.fullmatch(part.strip())
        count = int(several["count"]) if several else 1
        chip, *sizes = (several["rest"] if several else part).split(":")
        numbers = [int(size) for size in sizes if size.strip().isdecimal() and len(size) < 6]
        if len(numbers) != len(sizes) or not 1 <= len(sizes) <= 2 or not min(numbers) >= 1 or not 1 <= count <= 256:
            raise InputError(f'--macs {text!r}: write chip and memory of each Mac, as in "M4 Pro:48,M2 Max:32"')
        memory_gb, *wired = numbers
        if memory_gb > MOST_GB or max(wired, default=0) > memory_gb:
            raise InputError(
                f"--macs {part.strip()}: no Mac has {max(numbers)} GB of {memory_gb} for its GPU; write at most {MOST_GB}"
            )
        macs += [MacSpec(find_chip(chip).name, memory_gb, wired[0] * GIB if wired else None)] * count
    if len(macs) < 2:
        raise InputError(f"--macs {text!r}: one Mac; use --chip and --memory-gb, or name two or more")
    return macs


@dataclass(frozen=True)
class SharedModel:
    """A model whose base Macs share, with its adapter.

    Attributes:
        settings: of the run.
        shape, units: of the model.
    """

    settings: TrainSettings
    shape: ModelShape
    units: Units

    @property
    def number_bytes(self) -> int:
        """Of an activation."""
        return 4 if self.settings.model.dtype == "float32" else 2

    def with_batch(self, max_seq_length: int, **size: int) -> SharedModel:
        """Return the same with other batches; `size` is of batch_tokens or batch_size."""
        data = dataclasses.replace(self.settings.data, max_seq_length=max_seq_length)
        loop = dataclasses.replace(self.settings.loop, **size)
        return dataclasses.replace(self, settings=dataclasses.replace(self.settings, data=data, loop=loop))


@lru_cache(maxsize=8)
def shared_model(settings: TrainSettings) -> SharedModel:
    """Return a model, from its config alone.

    Raises:
        InputError: there is no such model.
    """
    dtype = settings.model.dtype if settings.model.dtype != "auto" else "bfloat16"
    outline = outline_for(settings.model, device.compute_dtype(dtype))
    shape = outlined_shape(outline, settings, KernelChoice(settings.loop.kernels))
    return SharedModel(settings, shape, units_of(outline.model))


def plan_on_macs(settings: TrainSettings, macs: Sequence[MacSpec], link: Link) -> dict[str, Any]:
    """Return the plan of a run on several Macs that share its base, as JSON values.

    Args:
        settings: of the run; each row counts as --max-seq-length tokens, and a batch is that of all Macs together.
        macs: what it runs on.
        link: between them.

    Raises:
        InputError: there is no such chip or model, or the parts do not fit the Macs.
    """
    model = shared_model(settings)
    planned = planned_on(model, macs, link)
    found = None if planned["fits"] or planned["problem"] else suggested(model, macs, link)
    return {**planned, "suggested": found and found.words}


def equal_macs(settings: TrainSettings, count: int, link: Link) -> list[dict[str, Any]]:
    """Return a plan for `count` equal Macs of every chip and memory size.

    Raises:
        InputError: there is no such model, or the parts do not fit the Macs.
    """
    model = shared_model(settings)
    sizes = [MacSpec(chip.name, memory) for chip in CHIPS for memory in chip.memory_gib]
    return [planned_on(model, [mac] * count, link) for mac in sizes]


def planned_on(model: SharedModel, macs: Sequence[MacSpec], link: Link) -> dict[str, Any]:
    """Return a model's plan on some Macs, as JSON values."""
    chosen, run, shares = _asked(model, macs)
    found = plan_macs(model.shape, model.units, run, chosen, shares, link)
    problem = sharing_problem(model.settings)
    return {
        "fits": found.fits and not problem,
        "problem": problem or None,
        "macs": [
            {
                "name": mac.machine.name,
                "share": share,
                "computing_s": computing_s,
                **{name: getattr(memory, name) for name in MEMORY_FACTS},
            }
            for mac, share, memory, computing_s in zip(chosen, shares, found.memory, found.computing_s, strict=True)
        ],
        "shard_base": split_of(model.settings),
        "rank": model.settings.adapter.rank,
        "batch_tokens": run.positions,
        "batch_size": model.settings.loop.batch_size,
        "max_seq_length": run.width + 1,
        "grad_checkpoint": run.checkpointing,
        "units": {
            "blocks": len(model.units.blocks),
            "largest_bytes": max((*model.units.blocks, *model.units.tables)),
            "bytes": model.units.bytes,
        },
        "sent_bytes_per_step": found.sending.sent_bytes,
        "link_gbit_per_s": link.bytes_per_s * 8 / 1e9,
        "predicted": _predicted(found, run.positions, model),
        "least_batch_tokens": least_tokens(model.shape, model.units, run, chosen, shares, link),
        "splits": predicted_splits(model.settings, model.shape, run, chosen, link, found),
        "whole_base_bytes": model.shape.base_bytes,
    }


def _asked(model: SharedModel, macs: Sequence[MacSpec]) -> tuple[list[Mac], RunShape, list[float]]:
    """Return the Macs, the largest batch and each Mac's part of the base, as the settings ask for them."""
    settings = model.settings
    chosen = [_mac(mac, model.number_bytes, settings.loop.memory_budget) for mac in macs]
    mode = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
    tokens = settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    rows, width = largest_batch(settings.data.max_seq_length - 1, settings, tokens)
    return chosen, run_of(settings, max(rows, len(macs)), width, mode), _shares(settings, chosen)


@dataclass(frozen=True)
class Suggestion:
    """Settings with which a run fits.

    Attributes:
        words: flags, and what to do on the Macs.
        model: with these settings.
        macs: with more memory for the GPU, if that is what fits.
    """

    words: str
    model: SharedModel
    macs: Sequence[MacSpec]


def suggested(model: SharedModel, macs: Sequence[MacSpec], link: Link) -> Suggestion | None:
    """Return the settings nearest to the asked ones with which a run fits, None if none of those that are tried does.

    First with the memory that macOS gives the GPU by default, then with all but a few GB.
    """
    raised = [
        dataclasses.replace(mac, working_set_bytes=max(mac.memory_gb - FOR_MACOS_GB, 1) * GIB)
        if mac.working_set_bytes is None and mac.memory_gb > 2 * FOR_MACOS_GB
        else mac
        for mac in macs
    ]
    limits = {mac.memory_gb: more.working_set_bytes for mac, more in zip(macs, raised, strict=True) if mac != more}
    sizes = " or ".join(f"{limit >> 20} with {memory} GB" for memory, limit in sorted(limits.items()) if limit)
    command = f"`sudo sysctl iogpu.wired_limit_mb=N` on each Mac, N = {sizes}; then "
    smaller = [
        (f"{words}{flags}", other)
        for words, adapted in _smaller_adapters(model)
        for flags, other in _shorter_rows(adapted, len(macs))
    ]
    for given, first in ((macs, ""), (raised, command)):
        for words, other in smaller:
            chosen, run, shares = _asked(other, given)
            if plan_macs(other.shape, other.units, run, chosen, shares, link).fits:
                return Suggestion(first + words, other, given)
    return None


def _smaller_adapters(model: SharedModel) -> Iterator[tuple[str, SharedModel]]:
    """Yield the model with its parts by memory and adapters that take less and less memory, with their flags."""
    settings = model.settings
    split = "" if split_of(settings) == "memory" else "--shard-base memory "
    by_memory = dataclasses.replace(settings, loop=dataclasses.replace(settings.loop, shard_base="memory"))
    yield split, dataclasses.replace(model, settings=by_memory)
    smaller: list[tuple[str, dict[str, Any]]] = [
        (f"--rank {rank} ", {"rank": rank}) for rank in RANKS if rank < settings.adapter.rank
    ]
    if any(layer.experts > 1 and layer.rank for block in model.shape.blocks for layer in block.layers):
        smaller.append((f"--target-modules {ATTENTION} ", {"target_modules": ATTENTION}))
    for words, fields in smaller:
        adapter = dataclasses.replace(settings.adapter, **fields)
        yield split + words, shared_model(dataclasses.replace(by_memory, adapter=adapter))


def _shorter_rows(model: SharedModel, count: int) -> Iterator[tuple[str, SharedModel]]:
    """Yield the model with a row for each of `count` Macs, of the asked length and shorter, with the flags."""
    longest, by_examples = model.settings.data.max_seq_length, model.settings.loop.batch_size is not None
    examples = max(1, count // model.settings.objective.rows_per_example)
    for length in (longest, *(shorter for shorter in LENGTHS if shorter < longest)):
        words = "" if length == longest else f"--max-seq-length {length} "
        if by_examples:  # which --batch-tokens does not change
            yield f"{words}--batch-size {examples}", model.with_batch(length, batch_size=examples)
        else:
            tokens = count * (length - 1)
            yield f"{words}--batch-tokens {tokens}", model.with_batch(length, batch_tokens=tokens)


def split_of(settings: TrainSettings) -> str:
    """Return the --shard-base that a plan is for; without one, parts follow each Mac's memory."""
    return "memory" if settings.loop.shard_base == "off" else settings.loop.shard_base


def sharing_problem(settings: TrainSettings) -> str:
    """Return why the processes of a run cannot share its base, as `train` would say; empty: they can."""
    return next(iter(problems_with(settings.to_flat(), "shard_base", split_of(settings))), "")


def _mac(given: MacSpec, number_bytes: int, budget_gb: float | None) -> Mac:
    """Return a Mac, which may use what its system allows, and no more than --memory-budget."""
    chip = find_chip(given.chip)
    machine = dataclasses.replace(chip.machine(given.memory_gb, number_bytes), kernels=KernelTerms())
    if given.working_set_bytes:
        machine = dataclasses.replace(machine, working_set_bytes=given.working_set_bytes)
    if budget_gb is not None:
        machine = dataclasses.replace(machine, working_set_bytes=min(machine.working_set_bytes, int(budget_gb * 1e9)))
    return Mac(machine, listed_ceilings(chip, number_bytes))


def _shares(settings: TrainSettings, macs: list[Mac]) -> list[float]:
    """Return each Mac's part of the base: those of --shard-base, or in proportion to what each may use."""
    asked = split_of(settings)
    parts = shard_parts(asked)
    if asked == "even":
        parts = [1.0] * len(macs)
    if parts is None:
        return memory_shares([mac.machine for mac in macs])
    if len(parts) != len(macs):
        raise InputError(f"--shard-base {asked}: {len(parts)} parts for {len(macs)} Macs; give one for each")
    return [part / sum(parts) for part in parts]


def _predicted(found: MacsPlan, tokens: int, model: SharedModel) -> dict[str, Any]:
    computing_s = max(found.computing_s)
    return {
        "note": "predicted, not measured",
        "step_s": found.step_s,
        "computing_s": computing_s,
        "link_s": found.sending.link_s,
        "waiting_s": found.step_s - computing_s,
        "gradients_s": found.sending.sum_s,
        "decides": "link" if found.link_decides else "chips",
        "tokens_per_s": tokens / found.step_s,
        "sent_of_base": sum(model.units.of_step(model.shape.first_trained)) / max(1, model.units.bytes),
    }


# Other ways to divide the run


def predicted_splits(
    settings: TrainSettings, shape: ModelShape, batch: RunShape, macs: Sequence[Mac], link: Link, shared: MacsPlan
) -> list[dict[str, Any]]:
    """Return each way to divide a run and what is predicted of it, as JSON values; one of them is `best`.

    Args:
        settings: of the run.
        shape: of the whole adapted model.
        batch: of all Macs.
        macs, link: what it runs on.
        shared: the plan with a shared base.
    """
    problem = sharing_problem(settings)
    splits = [
        Split(True, problem=problem) if problem else split_with_shared_base(shared, batch.positions),
        split_by_rows(shape, batch, macs, link),
    ]
    chosen = best(splits)
    return [
        {
            "name": split.words,
            "fits": not split.problem and split.fits,
            "tokens_per_s": split.tokens_per_s,
            "needed_bytes": split.most_needed_bytes,
            "verdict": split.verdict,
            "best": split is chosen,
        }
        for split in splits
    ]


def splits_line(splits: Sequence[dict[str, Any]]) -> str:
    """Return the ways to divide a run in a line of text, the best one last."""
    told = "; ".join(f"{split['name']} {split['verdict']}" for split in splits)
    chosen = next(split["name"] for split in splits if split["best"])
    return f"Ways to divide it (--parallel): {told}. Best: {chosen}"
