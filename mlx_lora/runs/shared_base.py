"""Share a run's base among its ranks, as --shard-base says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_lora.models.kernel_choice import KernelChoice
from mlx_lora.models.load import Base
from mlx_lora.models.outline import outline_of
from mlx_lora.planner.macs_plan import rank_part
from mlx_lora.planner.shapes import ModelShape
from mlx_lora.planner.this_machine import this_machine
from mlx_lora.settings.checks import shard_parts
from mlx_lora.settings.config import TrainSettings
from mlx_lora.system import device
from mlx_lora.system.distributed import Ranks, SeveralRanks
from mlx_lora.system.errors import InputError
from mlx_lora.training.run_fit import outlined_shape
from mlx_lora.training.shared_tables import share_base, units_of


@dataclass(frozen=True)
class SharedBase:
    """How a run's base is shared.

    Attributes:
        share: of this rank, from 0 to 1; None: each rank has the whole base.
        words: for the run header.
    """

    share: float | None = None
    words: str = ""

    def shape(self, settings: TrainSettings, kernels: KernelChoice) -> ModelShape | None:
        """Return the shape of this rank's part of the adapted model, None if it has the whole base.

        It is read from an outline: the model itself has no weights but those of its part.
        """
        return None if self.share is None else rank_shape(settings, self.share, kernels)


def rank_shape(settings: TrainSettings, share: float, kernels: KernelChoice | None = None) -> ModelShape:
    """Return the shape of one rank's part of the adapted model.

    Args:
        settings: of the run.
        share: of the rank, from 0 to 1.
        kernels: see `adapted_shape`.
    """
    outline = outline_of(
        settings.model.model or "", settings.model.revision, device.compute_dtype(settings.model.dtype)
    )
    shape = outlined_shape(outline, settings, kernels)
    return rank_part(shape, units_of(outline.model), share)


def shares_of(settings: TrainSettings, ranks: Ranks) -> list[float]:
    """Return each rank's share of the base, which add up to 1.

    Raises:
        InputError: as many parts were given as there are not processes.
    """
    asked = settings.loop.shard_base
    if asked == "memory":
        parts: Sequence[float] = ranks.everyone(this_machine(settings.model.dtype).working_set_bytes)
    else:
        parts = shard_parts(asked) or [1.0] * ranks.size
    if len(parts) != ranks.size:
        raise InputError(f"--shard-base {asked}: {len(parts)} parts for {ranks.size} processes; give one for each")
    return [part / sum(parts) for part in parts]


def share_among(settings: TrainSettings, base: Base, ranks: Ranks) -> tuple[TrainSettings, SharedBase]:
    """Leave only this rank's part of the base in memory, if the settings say so.

    Args:
        settings: of the run.
        base: adapted; its weights may not have been read yet.
        ranks: the processes of the run.

    Returns:
        The settings with what sharing decides, and how the base is shared.

    Raises:
        InputError: a single process, parts that do not fit the processes, or a model that cannot be shared.
    """
    asked = settings.loop.shard_base
    if asked == "off":
        return settings, SharedBase()
    if not isinstance(ranks, SeveralRanks):
        raise InputError(f"--shard-base {asked}: there is one process; start several with mlx.launch, or leave it out")
    shares = shares_of(settings, ranks)
    alive = units_of(base.model).largest
    units = share_base(base.model, ranks, shares, base.stored)
    device.wait_beyond(mx.get_active_memory() + alive)  # until the run has a plan
    checkpointing = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
    loop = replace(settings.loop, grad_checkpoint=checkpointing, sample_tokens=0)
    own = sum(unit.parts[ranks.rank] for unit in units)
    words = f"base shared by {ranks.size} processes ({own / 1e6:,.0f} of {sum(unit.bytes for unit in units) / 1e6:,.0f} MB here)"
    return replace(settings, loop=loop), SharedBase(shares[ranks.rank], words)
