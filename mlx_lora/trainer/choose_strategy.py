"""Decide what the processes of a run divide, and whether its base is read from files, where the settings leave it open.

With --parallel auto, the link of the processes is measured for some seconds, and then plans are compared for what they could
divide. The data have not been read by then, so a batch is assumed to have a row for every process. Memory and time are the
planner's; the link, and each machine's peak rates, are measured.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_lora.config.rules import problems_with
from mlx_lora.config.settings import DATA, DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.models.meta import outline_for
from mlx_lora.parallel.ranks import Ranks, SeveralRanks
from mlx_lora.parallel.strategy import SINGLE_DEVICE, DataParallel, dividing_flag, offloaded
from mlx_lora.planner.fit import budget_of, fit, largest_batch, run_of
from mlx_lora.planner.machine import measure_ceilings, this_machine
from mlx_lora.planner.shapes import KernelTerms, Machine, ModelShape, RunShape
from mlx_lora.planner.speed import Ceilings
from mlx_lora.trainer.fit import check_base_fits, outlined_shape
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.parallel.strategy import Strategy

log = logging.getLogger(__name__)

AUTO = "auto"
PROBE_BYTES = 1 << 22  # seconds even at 100 Mbit/s
READ_WORDS = "Base: does not fit in memory, so its blocks are read from its files when they are used (--offload-base)"


def choose_strategy(settings: TrainSettings, ranks: Ranks, fits: bool = False) -> tuple[TrainSettings, Strategy]:
    """Return the settings with what the processes divide, or read from files, and the strategy of that.

    Args:
        settings: of the run.
        ranks: of the run; every one must call this.
        fits: whether the base is in memory already, or is not trained.

    Raises:
        InputError: a single process is to divide its base, the model cannot be read or does not fit, or its adapter does not
            fit it.
    """
    if settings.loop.parallel == AUTO:
        if isinstance(ranks, SeveralRanks):
            settings = choose_split(settings, ranks)
        else:
            settings = replace(settings, loop=replace(settings.loop, parallel=DATA))
    settings = settings if fits else settled_offload(settings, ranks)
    return settings, strategy_of(settings, ranks)


def strategy_of(settings: TrainSettings, ranks: Ranks) -> Strategy:
    """Return the strategy that the settings name for these processes.

    Args:
        settings: of the run; --parallel is not `auto`.
        ranks: its processes.

    Raises:
        InputError: a single process is to divide its base.
    """
    loop = settings.loop
    if loop.offload_base == "on":
        if ranks.size > 1:
            raise InputError(
                f"--offload-base on in {ranks.size} processes: works in a single process; share the base instead (--shard-base)"
            )
        from mlx_lora.parallel.offloaded_base import (
            OffloadedBase,  # a run with the whole base in memory loads none of these
        )

        return OffloadedBase(
            loop.seed, activations=Path(settings.loop.adapter_path) if loop.offload_activations else None
        )
    if not dividing_flag(loop):
        return DataParallel(ranks, loop.seed) if ranks.size > 1 else SINGLE_DEVICE
    if not isinstance(ranks, SeveralRanks):
        raise InputError(
            f"--shard-base {loop.shard_base}: this run is a single process; start several with mlx.launch, or leave it out"
        )
    from mlx_lora.parallel.sharded_base import ShardedBase

    return ShardedBase(ranks, loop.seed)


def settled_offload(settings: TrainSettings, ranks: Ranks) -> TrainSettings:
    """Return the settings with whether the base is read from files: only if it does not fit otherwise.

    An outline decides, whose weights need not be read or downloaded in vain.

    Args:
        settings: of the run; what its processes divide is known by now.
        ranks: of the run.

    Raises:
        InputError: it does not fit in either way.
    """
    on = offloaded(settings)
    if settings.loop.offload_base == "on":
        settings = on
    if not may_read_base(settings, ranks):
        check_base_fits(settings)
        return settings
    try:
        check_base_fits(settings)
    except InputError as problem:
        try:
            check_base_fits(on)
        except InputError:
            raise problem from None
        log.info(READ_WORDS)
        return on
    return settings


def may_read_base(settings: TrainSettings, ranks: Ranks) -> bool:
    """Return whether it is open whether the base is read from files, and a run can."""
    may = settings.loop.offload_base == AUTO and ranks.size == 1
    return may and not problems_with(settings.to_flat(), "offload_base", "on")


def choose_split(settings: TrainSettings, ranks: SeveralRanks) -> TrainSettings:
    """Return the settings with what the processes divide, and log the choice with its reasons.

    Args:
        settings: of the run; --parallel is `auto`.
        ranks: of the run; every one must call this.

    Raises:
        InputError: the model cannot be read, or its adapter does not fit it.
    """
    # A single process loads no planner of several Macs.
    from mlx_lora.parallel.hosts import probe_link
    from mlx_lora.parallel.sharded_base import units_of
    from mlx_lora.planner.several_macs import Link, Mac, Split, best, memory_shares, plan_macs

    rates = probe_link(ranks, PROBE_BYTES)
    turns = ranks.size - 1
    measured = ranks.everyone([rates.latency_s / turns, rates.bytes_per_s])
    link = Link(min(rate for _, rate in measured), max(latency for latency, _ in measured))
    machine = this_machine(settings.model.dtype)
    own = [budget_of(settings.loop, machine), asdict(measure_ceilings(settings.model.dtype, rounds=3))]
    macs = [
        Mac(replace(machine, working_set_bytes=budget, kernels=KernelTerms()), Ceilings(**ceilings))
        for budget, ceilings in ranks.everyone(own)
    ]
    smallest = min((mac.machine for mac in macs), key=lambda one: one.working_set_bytes)
    outline = outline_for(settings.model, device.compute_dtype(settings.model.dtype))
    whole = outlined_shape(outline, settings)
    splits = [plan_macs(whole, _batch(settings, len(macs), (whole, smallest)), macs, link)]
    if problems := problems_with(settings.to_flat(), "shard_base", "memory"):
        splits.append(Split(True, problem=problems[0]))
    else:
        shares = memory_shares([mac.machine for mac in macs])
        batch = _batch(settings, len(macs))
        splits.append(plan_macs(whole, batch, macs, link, units_of(outline.model), shares))
    chosen = best(splits)
    reasons = (
        f"Parallel: {chosen.words}, by the measured link ({link.bytes_per_s * 8 / 1e9:.2g} Gbit/s each way, "
        f"{link.latency_s * 1e6:,.0f} us for a small message); predicted: "
        f"{'; '.join(f'{split.words} {split.verdict}' for split in splits)}"
    )
    shared, words = ranks.from_first([chosen.shared, reasons])
    mx.clear_cache()
    mx.reset_peak_memory()  # the measurements' peak is not the run's
    log.info(words)
    return replace(settings, loop=replace(settings.loop, parallel=DATA, shard_base="memory" if shared else "off"))


def _batch(settings: TrainSettings, count: int, of: tuple[ModelShape, Machine] | None = None) -> RunShape:
    """Return a batch of all ranks, with a row for each at least.

    Args:
        settings: of the run.
        count: of ranks.
        of: the shape and the machine that checkpointing, and tokens if they are open, must fit; None: blocks are computed
            again, and the tokens are the default.
    """
    loop, longest = settings.loop, settings.data.max_seq_length - 1
    tokens, mode = loop.batch_tokens or DEFAULT_BATCH_TOKENS, "block"
    width = longest if loop.batch_size else max(1, min(longest, tokens // count))
    if of is not None:
        fitted = fit(settings, *of, width)
        tokens, mode = fitted.batch_tokens, fitted.checkpointing
    rows, width = largest_batch(width, settings, tokens)
    return run_of(settings, max(rows, count), width, mode)
