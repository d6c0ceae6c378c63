"""Decide what the processes of a run divide, and whether its base is read from files, where the settings leave it open."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_lora.config.rules import problems_with
from mlx_lora.config.settings import DATA, TrainSettings
from mlx_lora.parallel.ranks import Ranks, SeveralRanks
from mlx_lora.parallel.strategy import SINGLE_DEVICE, DataParallel, dividing_flag, offloaded
from mlx_lora.trainer.fit import check_base_fits
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.parallel.strategy import Strategy

log = logging.getLogger(__name__)

AUTO = "auto"
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
    settings = settled_parallel(settings, ranks)
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


def settled_parallel(settings: TrainSettings, ranks: Ranks) -> TrainSettings:
    """Return the settings with what the processes divide.

    Args:
        settings: of the run.
        ranks: of the run; every one must call this.

    Raises:
        InputError: the model cannot be read, or its adapter does not fit it.
    """
    if settings.loop.parallel != AUTO:
        return settings
    if not isinstance(ranks, SeveralRanks):
        return replace(settings, loop=replace(settings.loop, parallel=DATA))
    from mlx_lora.trainer.choose_split import choose_split  # a single process loads no planner of several Macs

    return choose_split(settings, ranks)
