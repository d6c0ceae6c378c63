"""Choose what several processes divide, by the measured link and the planner's predictions (--parallel auto).

The link of the processes is measured for some seconds, and then plans are compared for what they could divide. The data
have not been read by then, so a batch is assumed to have a row for every process. Memory and time are the planner's; the
link, and each machine's peak rates, are measured.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace

import mlx.core as mx

from mlx_lora.config.rules import problems_with
from mlx_lora.config.settings import DATA, DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.models.meta import outline_for
from mlx_lora.parallel.hosts import probe_link
from mlx_lora.parallel.ranks import SeveralRanks
from mlx_lora.parallel.sharded_base import units_of
from mlx_lora.planner.fit import budget_of, fit, largest_batch, run_of
from mlx_lora.planner.machine import measure_ceilings, this_machine
from mlx_lora.planner.several_macs import Link, Mac, Split, best, memory_shares, plan_macs, split_by_rows
from mlx_lora.planner.shapes import KernelTerms, Machine, ModelShape, RunShape
from mlx_lora.planner.speed import Ceilings
from mlx_lora.trainer.fit import outlined_shape
from mlx_lora.utils import device

log = logging.getLogger(__name__)

PROBE_BYTES = 1 << 22  # seconds even at 100 Mbit/s


def choose_split(settings: TrainSettings, ranks: SeveralRanks) -> TrainSettings:
    """Return the settings with what the processes divide, and log the choice with its reasons.

    Args:
        settings: of the run; --parallel is `auto`.
        ranks: of the run; every one must call this.

    Raises:
        InputError: the model cannot be read, or its adapter does not fit it.
    """
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
    splits = _splits(settings, macs, link)
    chosen = best(splits)
    shared, words = ranks.from_first([chosen.shared, _choice_words(chosen, splits, link)])
    mx.clear_cache()
    mx.reset_peak_memory()  # the measurements' peak is not the run's
    loop = replace(settings.loop, parallel=DATA, shard_base="memory" if shared else "off")
    log.info(words)
    return replace(settings, loop=loop)


def _choice_words(chosen: Split, splits: Sequence[Split], link: Link) -> str:
    """Return the choice and its reasons in a line."""
    told = [f"{split.words} {split.verdict}" for split in splits]
    return (
        f"Parallel: {chosen.words}, by the measured link ({link.bytes_per_s * 8 / 1e9:.2g} Gbit/s each way, "
        f"{link.latency_s * 1e6:,.0f} us for a small message); predicted: {'; '.join(told)}"
    )


def _splits(settings: TrainSettings, macs: Sequence[Mac], link: Link) -> list[Split]:
    """Return what is predicted of each way to divide the run."""
    count, smallest = len(macs), min((mac.machine for mac in macs), key=lambda one: one.working_set_bytes)
    outline = outline_for(settings.model, device.compute_dtype(settings.model.dtype))
    whole = outlined_shape(outline, settings)
    by_rows = split_by_rows(whole, _batch(settings, count, (whole, smallest)), macs, link)
    problems = problems_with(settings.to_flat(), "shard_base", "memory")
    if problems:
        return [by_rows, Split(True, problem=problems[0])]
    batch, shares = _batch(settings, count), memory_shares([mac.machine for mac in macs])
    return [by_rows, plan_macs(whole, units_of(outline.model), batch, macs, shares, link)]


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
