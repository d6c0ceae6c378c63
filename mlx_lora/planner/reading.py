"""Predict what a step costs more if its base is read from its files (--offload-base).

    plan    the host plans a block in Python, and waits for it: no operation of the next block is planned meanwhile
    wait    a block is read while the block before it is planned and computed, so a pass waits only for what reading takes longer
    copy    what was read is copied into the device's arrays, while nothing is computed or read

The blocks are read in the forward pass and, where something is trained, in the backward pass. The last block stays between the two
passes, and the first one between two batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.planner.fit import largest_batch, run_of
from mlx_lora.planner.shapes import Machine, ModelShape
from mlx_lora.planner.speed import Ceilings, forward_seconds, step_seconds

# Of a Mac's SSD, reading large blocks; not measured. Published figures are from 1.5 (M2 with 256 GB) to 7 GB/s.
ASSUMED_BYTES_PER_S = 3e9
# Of a Mac's memory, copied by one thread; not measured.
ASSUMED_COPIED_PER_S = 20e9
# The Python of a block in one pass: measured on a 2-core x86 processor (docs/measurements.md), assumed for any other.
BLOCK_PLANNED_S = 6e-3


@dataclass(frozen=True)
class Reading:
    """The reading of one micro-batch.

    Attributes:
        blocks: bytes of each; a mixture's with all of its experts, which are read in whole.
        first_trained: the first block that has a backward pass.
        bytes_per_s: of the disk.
        copied_per_s: bytes per second, from the buffer that is read into to arrays.
        source: of these two: `measured here` or `assumed`.
        block_planned_s: seconds of Python for a block in one pass.
        head: bytes of the head, which is read between the two passes, a slice at a time.
    """

    blocks: Sequence[int]
    first_trained: int
    bytes_per_s: float
    copied_per_s: float
    source: str
    block_planned_s: float = BLOCK_PLANNED_S
    head: int = 0

    @property
    def forward_bytes(self) -> int:
        """Read in the forward pass, with the head."""
        return sum(self.blocks[1:]) + self.head

    @property
    def backward_bytes(self) -> int:
        """Read in the backward pass."""
        return sum(self.blocks[self.first_trained : -1])

    @property
    def copying_s(self) -> float:
        """Seconds of a micro-batch in which weights are copied."""
        return (self.forward_bytes + self.backward_bytes) / self.copied_per_s

    @property
    def planning_s(self) -> float:
        """Seconds of a micro-batch in which blocks are planned."""
        return sum(self._planning())

    def waiting_s(self, forward_s: float, step_s: float) -> float:
        """Return the seconds of a micro-batch in which only the disk works.

        Args:
            forward_s, step_s: of computing the forward pass alone, and everything.
        """
        return sum(
            max(0.0, reading_s - planning_s - computing_s)
            for reading_s, planning_s, computing_s in self._passes(forward_s, step_s)
        )

    def hidden_from(self, positions: int, forward_s: float, step_s: float) -> int:
        """Return from how many positions a micro-batch never waits, if computing grows with them; arguments as above."""
        longest = max(
            (reading_s - planning_s) / computing_s
            for reading_s, planning_s, computing_s in self._passes(forward_s, step_s)
            if computing_s > 0
        )
        return max(1, math.ceil(positions * longest))

    def _planning(self) -> tuple[float, float]:
        blocks = len(self.blocks)
        return blocks * self.block_planned_s, (blocks - self.first_trained) * self.block_planned_s

    def _passes(self, forward_s: float, step_s: float) -> list[tuple[float, float, float]]:
        """Return the seconds of reading, planning and computing of both passes."""
        read = self.forward_bytes / self.bytes_per_s, self.backward_bytes / self.bytes_per_s
        return list(zip(read, self._planning(), (forward_s, step_s - forward_s), strict=True))


def hidden_from(
    reading: Reading, settings: TrainSettings, shape: ModelShape, machine: Machine, ceilings: Ceilings, width: int
) -> int:
    """Return from how many positions a micro-batch of a run never waits for the disk.

    Args:
        reading: of the base.
        settings: of the run.
        shape: of the adapted model.
        machine, ceilings: what it runs on.
        width: positions of the longest row.
    """
    rows, width = largest_batch(width, settings, DEFAULT_BATCH_TOKENS)
    run = run_of(settings, rows, width, "block")
    step_s, _ = step_seconds(shape, run, machine, ceilings)
    return reading.hidden_from(run.positions, forward_seconds(shape, run, machine, ceilings), step_s)
