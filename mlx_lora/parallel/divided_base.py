"""The strategies in which a process keeps only a part of the frozen base.

Another way to keep a part is another class and a line in `strategy_of` (trainer/choose_strategy.py); parallel/offloaded_base.py
is one for a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.config.settings import shard_parts
from mlx_lora.parallel.ranks import Ranks, SeveralRanks
from mlx_lora.parallel.sharded_base import (
    await_messages,
    end_of_trial,
    first_ranks_choice,
    share_base,
    units_of,
    unshareable_words,
)
from mlx_lora.parallel.strategy import DataParallel
from mlx_lora.planner.fit import budget_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.several_macs import rank_part
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.models.load import Base
    from mlx_lora.planner.shapes import ModelShape


class ShardedBase(DataParallel):
    """Each rank computes some rows, and keeps a part of every block's weights; see parallel/sharded_base.py.

    Attributes:
        share: of this rank in the base, from 0 to 1; 1 until the base is divided.
    """

    lockstep = True
    divides_base = True
    whole_blocks = "it gets its weights in whole"

    def __init__(self, ranks: SeveralRanks, seed: int = 0):
        super().__init__(ranks, seed)
        self._several, self.share = ranks, 1.0

    def divide(self, base: Base, settings: TrainSettings) -> TrainSettings:
        ranks = self._several
        shares = shares_of(settings, ranks)
        alive = units_of(base.model).largest
        units = share_base(base.model, ranks, shares, base.stored)
        device.wait_beyond(mx.get_active_memory() + alive)  # until the run has a plan
        own = sum(unit.parts[ranks.rank] for unit in units)
        whole = sum(unit.bytes for unit in units)
        self.share = shares[ranks.rank]
        self.words = f"base shared by {ranks.size} processes ({own / 1e6:,.0f} of {whole / 1e6:,.0f} MB here)"
        checkpointing = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
        return replace(settings, loop=replace(settings.loop, grad_checkpoint=checkpointing, sample_tokens=0))

    def part_of(self, shape: ModelShape, model: nn.Module) -> ModelShape:
        return rank_part(shape, units_of(model), self.share)

    def check_checkpointing(self, config: dict[str, Any], left_out: bool) -> None:
        """Refuse blocks that are not checkpointed: each would keep its gathered weights until the backward pass.

        Raises:
            InputError: there are some, because they pass a state to each other.
        """
        if left_out:
            raise InputError(
                f"--shard-base: blocks of {config.get('model_type')} pass a state to the next block, so every block "
                "would have to keep its weights until the backward pass; leave --shard-base out"
            )

    def check_read(self, bad: mx.array, config: dict[str, Any]) -> None:
        if bad.any().item():
            raise InputError(unshareable_words(config))

    def end_of_trial(self, model: nn.Module) -> None:
        end_of_trial(model)

    def bound_memory(self, peak_bytes: int) -> None:
        device.wait_beyond(peak_bytes)

    def same_choice(self, model: nn.Module, choose: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        return first_ranks_choice(model, choose)

    def await_messages(self, model: nn.Module) -> None:
        await_messages(model)


def shares_of(settings: TrainSettings, ranks: Ranks) -> list[float]:
    """Return each rank's share of the base, which add up to 1.

    Raises:
        InputError: as many parts were given as there are not processes.
    """
    asked = settings.loop.shard_base
    if asked == "memory":
        parts: Sequence[float] = ranks.everyone(budget_of(settings.loop, this_machine(settings.model.dtype)))
    else:
        parts = shard_parts(asked) or [1.0] * ranks.size
    if len(parts) != ranks.size:
        raise InputError(f"--shard-base {asked}: {len(parts)} parts for {ranks.size} processes; give one for each")
    return [part / sum(parts) for part in parts]
