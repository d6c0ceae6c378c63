"""Predict whether a run fits on several Macs, and whether their link or their chips decide the speed.

The plan is for Macs that share the base; beside it stands what the other ways to divide the run would do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from mlx_lora.config.rules import problems_with
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings, shard_parts
from mlx_lora.kernels.choose import KernelChoice
from mlx_lora.models.meta import outline_for
from mlx_lora.parallel.sharded_base import units_of
from mlx_lora.planner.fit import largest_batch, run_of
from mlx_lora.planner.several_macs import (
    Link,
    Mac,
    Split,
    Units,
    best,
    least_tokens,
    memory_shares,
    plan_macs,
    split_by_rows,
)
from mlx_lora.planner.shapes import KernelTerms, ModelShape, RunShape
from mlx_lora.planner.speed import CHIPS, find_chip, listed_ceilings
from mlx_lora.trainer.fit import outlined_shape
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

    def with_batch(self, max_seq_length: int, **size: int) -> SharedModel:
        """Return the same with other batches; `size` is of batch_tokens or batch_size."""
        data = replace(self.settings.data, max_seq_length=max_seq_length)
        loop = replace(self.settings.loop, **size)
        return replace(self, settings=replace(self.settings, data=data, loop=loop))


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
    return {**planned, "suggested": found and found[0]}


def equal_macs(settings: TrainSettings, count: int, link: Link) -> list[dict[str, Any]]:
    """Return a plan for `count` equal Macs of every chip and memory size.

    Raises:
        InputError: there is no such model, or the parts do not fit the Macs.
    """
    model = shared_model(settings)
    sizes = [MacSpec(chip.name, memory) for chip in CHIPS for memory in chip.memory_gib]
    return [planned_on(model, [mac] * count, link) for mac in sizes]


def planned_on(model: SharedModel, macs: Sequence[MacSpec], link: Link) -> dict[str, Any]:
    """Return a model's plan on some Macs, as JSON values, with each way to divide the run; one of them is `best`."""
    settings, units, first_trained = model.settings, model.units, model.shape.first_trained
    chosen, run, shares = _asked(model, macs)
    found = plan_macs(model.shape, units, run, chosen, shares, link)
    # Why the processes of the run cannot share its base, as `train` would say.
    problem = next(iter(problems_with(settings.to_flat(), "shard_base", split_of(settings))), "")
    splits = [Split(True, problem=problem) if problem else found, split_by_rows(model.shape, run, chosen, link)]
    computing_s, fastest = max(found.computing_s), best(splits)
    step_s = found.sending.step_s(computing_s)
    return {
        "fits": found.fits and not problem,
        "problem": problem or None,
        "macs": [
            {
                "name": mac.machine.name,
                "share": share,
                "computing_s": own_s,
                **{name: getattr(memory, name) for name in MEMORY_FACTS},
            }
            for mac, share, memory, own_s in zip(chosen, shares, found.memory, found.computing_s, strict=True)
        ],
        "shard_base": split_of(settings),
        "rank": settings.adapter.rank,
        "batch_tokens": run.positions,
        "batch_size": settings.loop.batch_size,
        "max_seq_length": run.width + 1,
        "grad_checkpoint": run.checkpointing,
        "units": {
            "blocks": len(units.blocks),
            "largest_bytes": max((*units.blocks, *units.tables)),
            "bytes": units.bytes,
        },
        "sent_bytes_per_step": found.sending.sent_bytes,
        "link_gbit_per_s": link.bytes_per_s * 8 / 1e9,
        "predicted": {
            "note": "predicted, not measured",
            "step_s": step_s,
            "computing_s": computing_s,
            "link_s": found.sending.link_s,
            "waiting_s": step_s - computing_s,
            "gradients_s": found.sending.sum_s,
            "decides": "link" if found.sending.link_s > computing_s else "chips",
            "tokens_per_s": run.positions / step_s,
            "sent_of_base": sum(size for size, _ in units.in_order(first_trained)) / max(1, units.bytes),
        },
        "least_batch_tokens": least_tokens(model.shape, units, run, chosen, shares, link),
        "splits": [
            {
                "name": split.words,
                "fits": not split.problem and split.fits,
                "tokens_per_s": split.tokens_per_s,
                "needed_bytes": split.most_needed_bytes,
                "verdict": split.verdict,
                "best": split is fastest,
            }
            for split in splits
        ],
        "whole_base_bytes": model.shape.base_bytes,
    }


def _asked(model: SharedModel, macs: Sequence[MacSpec]) -> tuple[list[Mac], RunShape, list[float]]:
    """Return the Macs, the largest batch and each Mac's part of the base, as the settings ask for them.

    A Mac may use what its system allows, and no more than --memory-budget.
    """
    settings, asked, chosen = model.settings, split_of(model.settings), []
    number_bytes = 4 if settings.model.dtype == "float32" else 2
    for mac in macs:
        chip = find_chip(mac.chip)
        machine = chip.machine(mac.memory_gb, number_bytes)
        usable = mac.working_set_bytes or machine.working_set_bytes
        if settings.loop.memory_budget is not None:
            usable = min(usable, int(settings.loop.memory_budget * 1e9))
        machine = replace(machine, kernels=KernelTerms(), working_set_bytes=usable)
        chosen.append(Mac(machine, listed_ceilings(chip, number_bytes)))
    parts = [1.0] * len(chosen) if asked == "even" else shard_parts(asked)
    if parts is not None and len(parts) != len(chosen):
        raise InputError(f"--shard-base {asked}: {len(parts)} parts for {len(chosen)} Macs; give one for each")
    shares = [part / sum(parts) for part in parts] if parts else memory_shares([mac.machine for mac in chosen])
    mode = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
    tokens = settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    rows, width = largest_batch(settings.data.max_seq_length - 1, settings, tokens)
    return chosen, run_of(settings, max(rows, len(macs)), width, mode), shares


def suggested(model: SharedModel, macs: Sequence[MacSpec], link: Link) -> tuple[str, SharedModel] | None:
    """Return the settings nearest to the asked ones with which a run fits, None if none of those that are tried does.

    They come as flags, with what to do on the Macs, and as the model with these settings. First with the memory that macOS gives the GPU by default, then with all but a few GB.
    """
    raised = [
        replace(mac, working_set_bytes=max(mac.memory_gb - FOR_MACOS_GB, 1) * GIB)
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
                return first + words, other
    return None


def _smaller_adapters(model: SharedModel) -> Iterator[tuple[str, SharedModel]]:
    """Yield the model with its parts by memory and adapters that take less and less memory, with their flags."""
    settings = model.settings
    split = "" if split_of(settings) == "memory" else "--shard-base memory "
    by_memory = replace(settings, loop=replace(settings.loop, shard_base="memory"))
    yield split, replace(model, settings=by_memory)
    smaller: list[tuple[str, dict[str, Any]]] = [
        (f"--rank {rank} ", {"rank": rank}) for rank in RANKS if rank < settings.adapter.rank
    ]
    if any(layer.experts > 1 and layer.rank for block in model.shape.blocks for layer in block.layers):
        smaller.append((f"--target-modules {ATTENTION} ", {"target_modules": ATTENTION}))
    for words, fields in smaller:
        adapter = replace(settings.adapter, **fields)
        yield split + words, shared_model(replace(by_memory, adapter=adapter))


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


def splits_line(splits: Sequence[dict[str, Any]]) -> str:
    """Return the ways to divide a run in a line of text, the best one last."""
    told = "; ".join(f"{split['name']} {split['verdict']}" for split in splits)
    chosen = next(split["name"] for split in splits if split["best"])
    return f"Ways to divide it (--parallel): {told}. Best: {chosen}"
