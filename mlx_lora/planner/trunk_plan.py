"""Decide whether to keep the output of the frozen blocks on disk, by bytes and predicted seconds.

With --num-layers, the blocks below the first adapted one compute the same numbers in every epoch. Kept on disk, they are
read instead of computed from the second epoch on. An epoch then costs only the adapted part, and reading.

Shapes: D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlx_lora.planner.shapes import Machine, ModelShape, Run
from mlx_lora.planner.speed import Ceilings, step_seconds
from mlx_lora.system.units import counted, gigabytes

# Assumed, not measured: what was just written comes from the system's page cache as long as it fits there.
DISK_BYTES_PER_S = 0.5e9
# `auto` leaves the rest of the free disk to others, and does not fill a disk for a small gain.
MOST_OF_FREE = 0.25
LEAST_SAVED = 0.03  # of the run's predicted time
ROOM_LEFT_BYTES = 10**9  # what `on` leaves free


def no_use(blocks: int, epochs: float, asked: str) -> str | None:
    """Return in a few words why there is nothing to keep, or nothing that is read again; None if there is.

    Args:
        blocks: frozen ones, below the first adapted one.
        epochs: of the run.
        asked: --cache-trunk.
    """
    if not blocks:
        return "no block below the first trained parameters; give --num-layers N to adapt only the last N blocks"
    if asked == "auto" and epochs <= 1:
        return "one epoch, in which nothing is read again"
    return None


@dataclass(frozen=True)
class TrunkPlan:
    """The costs of keeping the frozen blocks' output, all predicted.

    Attributes:
        blocks: the number of frozen blocks below the first adapted one.
        of_blocks: the number of all blocks.
        disk_bytes: for all rows.
        free_bytes: on the disk of the cache, without what is already kept there for this run.
        epochs: of the run.
        epoch_s: an epoch that computes everything, as the first does.
        later_s: an epoch that reads the frozen blocks' output.
        write_s: what writing adds to the first epoch.
    """

    blocks: int
    of_blocks: int
    disk_bytes: int
    free_bytes: int
    epochs: float
    epoch_s: float
    later_s: float
    write_s: float

    @property
    def saved_s(self) -> float:
        """The seconds by which the run is shorter; below 0 if it is longer."""
        return max(0.0, self.epochs - 1) * (self.epoch_s - self.later_s) - self.write_s

    @property
    def run_s(self) -> float:
        """The run's seconds if everything is computed in every epoch."""
        return self.epochs * self.epoch_s

    def problem(self, asked: str) -> str | None:
        """Return in a few words why nothing should be kept, None if it should.

        Args:
            asked: --cache-trunk.
        """
        if (unused := no_use(self.blocks, self.epochs, asked)) is not None:
            return unused
        need = f"{gigabytes(self.disk_bytes)} are needed"
        if self.disk_bytes > self.free_bytes - ROOM_LEFT_BYTES:
            return f"{need} on the cache's disk, which has {gigabytes(self.free_bytes)} free"
        if asked == "on":
            return None
        if self.disk_bytes > MOST_OF_FREE * self.free_bytes:
            return f"{need}, more than {MOST_OF_FREE:.0%} of the {gigabytes(self.free_bytes)} free on the cache's disk"
        if self.saved_s < LEAST_SAVED * self.run_s:
            return f"it would save {max(0.0, self.saved_s / self.run_s):.0%} of the run's time"
        return None

    def words(self) -> str:
        """Return what is kept and what that saves, for a header or a plan."""
        return (
            f"output of the {counted(self.blocks, 'frozen block')} kept on disk ({gigabytes(self.disk_bytes)}), epochs after the first "
            f"predicted {self.epoch_s / self.later_s:.1f}x as fast"
        )


def plan_trunk(
    shape: ModelShape,
    run: Run,
    machine: Machine,
    ceilings: Ceilings,
    positions: int,
    epochs: float,
    free_bytes: int,
    position_bytes: int | None = None,
) -> TrunkPlan:
    """Return the costs of keeping the frozen blocks' output.

    Args:
        shape: the model with its adapter.
        run: its largest batch and settings.
        machine, ceilings: to predict seconds.
        positions: of an epoch, without padding.
        epochs: of the run.
        free_bytes: on the cache's disk.
        position_bytes: kept for a position; None: D numbers of the compute dtype.
    """
    blocks = shape.first_trained
    size = positions * (position_bytes or shape.width * machine.number_bytes)
    share = positions / max(1, run.positions)
    above = replace(shape, blocks=shape.blocks[blocks:], first_trained=0)
    epoch_s, above_s = (share * step_seconds(one, run, machine, ceilings)[0] for one in (shape, above))
    moved_s = size / DISK_BYTES_PER_S
    return TrunkPlan(blocks, len(shape.blocks), size, free_bytes, epochs, epoch_s, above_s + moved_s, moved_s)
