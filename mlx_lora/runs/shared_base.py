"""Give each rank its part of a run's base, as --shard-base and --parallel say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_lora.models.kernel_choice import KernelChoice
from mlx_lora.models.load import Base
from mlx_lora.models.outline import Outline, outline_for
from mlx_lora.planner.macs_plan import rank_part
from mlx_lora.planner.shapes import ModelShape
from mlx_lora.planner.tensor_plan import TENSOR
from mlx_lora.planner.this_machine import this_machine
from mlx_lora.settings.checks import shard_parts
from mlx_lora.settings.config import LoopSettings, TrainSettings
from mlx_lora.system import device
from mlx_lora.system.distributed import Ranks, SeveralRanks
from mlx_lora.system.errors import InputError
from mlx_lora.training.base_shards import frozen_bytes, is_shared
from mlx_lora.training.checkpointing import Tape
from mlx_lora.training.run_fit import adapted_shape, outlined_shape
from mlx_lora.training.shared_tables import share_base, units_of
from mlx_lora.training.tensor_parallel import cut_model


@dataclass(frozen=True)
class SharedBase:
    """How a run's base is shared.

    Attributes:
        share: of this rank, from 0 to 1; None: blocks are not gathered.
        words: for the run header.
        cut_by: in how many parts layers are cut; 1: they are whole.
    """

    share: float | None = None
    words: str = ""
    cut_by: int = 1

    def shape(self, settings: TrainSettings, base: Base, kernels: KernelChoice) -> ModelShape:
        """Return the shape of this rank's part of the adapted model.

        Where it is a part, it is read from an outline: blocks that are gathered have no weights but their part, and the
        graphs of layers that are cut have messages in them.
        """
        if self.share is not None:
            return rank_shape(settings, self.share, kernels)
        if self.cut_by > 1:
            return outlined_shape(_outline(settings), settings, kernels, self.cut_by)
        return adapted_shape(base.model, base.config, settings, kernels=kernels)

    def checkpointing(self, own: str, ranks: Ranks) -> str:
        """Return a rank's checkpointing, and one for all ranks where a block that is computed again sends messages.

        Args:
            own: of this rank, which may have chosen it by its own memory.
            ranks: of the run.
        """
        return "block" if self.cut_by > 1 and len(set(ranks.everyone(own))) > 1 else own


def rank_shape(settings: TrainSettings, share: float, kernels: KernelChoice | None = None) -> ModelShape:
    """Return the shape of one rank's part of the adapted model.

    Args:
        settings: of the run.
        share: of the rank, from 0 to 1.
        kernels: see `adapted_shape`.
    """
    outline = _outline(settings)
    shape = outlined_shape(outline, settings, kernels)
    return rank_part(shape, units_of(outline.model), share)


def _outline(settings: TrainSettings) -> Outline:
    return outline_for(settings.model, device.compute_dtype(settings.model.dtype))


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


def in_parts(loop: LoopSettings) -> bool:
    """Return whether a rank keeps only a part of the base, so that its weights are read when it is known which."""
    return loop.shard_base != "off" or loop.parallel == TENSOR


def share_among(settings: TrainSettings, base: Base, ranks: Ranks) -> tuple[TrainSettings, SharedBase]:
    """Leave only this rank's part of the base in memory, if the settings say so.

    The base is cut at its layers (--parallel tensor) or between its bytes (--shard-base).

    Args:
        settings: of the run.
        base: adapted; its weights may not have been read yet.
        ranks: the processes of the run.

    Returns:
        The settings with what sharing decides, and how the base is shared.

    Raises:
        InputError: a single process, parts that do not fit the processes, or a model that cannot be shared.
    """
    if settings.loop.parallel == TENSOR:
        return _cut_among(settings, base, ranks)
    asked = settings.loop.shard_base
    if asked == "off":
        return settings, SharedBase()
    if not isinstance(ranks, SeveralRanks):
        raise InputError(
            f"--shard-base {asked}: this run is a single process; start several with mlx.launch, or leave it out"
        )
    shares = shares_of(settings, ranks)
    alive = units_of(base.model).largest
    units = share_base(base.model, ranks, shares, base.stored)
    device.wait_beyond(mx.get_active_memory() + alive)  # until the run has a plan
    checkpointing = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
    loop = replace(settings.loop, grad_checkpoint=checkpointing, sample_tokens=0)
    own = sum(unit.parts[ranks.rank] for unit in units)
    words = f"base shared by {ranks.size} processes ({own / 1e6:,.0f} of {sum(unit.bytes for unit in units) / 1e6:,.0f} MB here)"
    return replace(settings, loop=loop), SharedBase(shares[ranks.rank], words)


def _cut_among(settings: TrainSettings, base: Base, ranks: Ranks) -> tuple[TrainSettings, SharedBase]:
    """Leave this rank's part of each layer in memory; see `share_among`."""
    if not isinstance(ranks, SeveralRanks):
        raise InputError(
            "--parallel tensor: this run is a single process; start several with mlx.launch, or leave it out"
        )
    cut_model(base.model, base.config, ranks)
    own, whole = frozen_bytes(base.model), base.size_bytes
    words = f"layers cut among {ranks.size} processes ({own / 1e6:,.0f} of {whole / 1e6:,.0f} MB here)"
    # What tries kernels calls the model, so all ranks try the same ones.
    loop = replace(settings.loop, sample_tokens=0, kernels=ranks.from_first(settings.loop.kernels))
    return replace(settings, loop=loop), SharedBase(words=words, cut_by=ranks.size)


def check_blocks_are_apart(base: Base, tape: Tape | None) -> None:
    """Refuse a shared base whose blocks pass a state to each other.

    Args:
        base: of the run.
        tape: of the checkpointing; None: there is none.

    Raises:
        InputError: such blocks are not checkpointed, so each would keep its gathered weights until the backward pass.
    """
    if is_shared(base.model) and tape is not None and tape.left_out:
        raise InputError(
            f"--shard-base: blocks of {base.config.get('model_type')} pass a state to the next block, so every block "
            "would have to keep its weights until the backward pass; leave --shard-base out"
        )
