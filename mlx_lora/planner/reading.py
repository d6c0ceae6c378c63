"""Predict how long a run waits for a base that it reads from its files (--offload-base).

A block is read while the block before it is computed, so a pass waits only for what reading takes longer than computing. The
blocks are read in the forward pass and, where something is trained, in the backward pass. The last block stays between the two
passes, and the first one between two batches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Of a Mac's SSD, reading large blocks; not measured. Published figures are from 1.5 (M2 with 256 GB) to 7 GB/s.
ASSUMED_BYTES_PER_S = 3e9


@dataclass(frozen=True)
class Reading:
    """The reading of one micro-batch.

    Attributes:
        blocks: bytes of each.
        first_trained: the first block that has a backward pass.
        bytes_per_s: of the disk.
        source: of that number: `measured here` or `assumed`.
    """

    blocks: Sequence[int]
    first_trained: int
    bytes_per_s: float
    source: str

    @property
    def forward_bytes(self) -> int:
        """Read in the forward pass."""
        return sum(self.blocks[1:])

    @property
    def backward_bytes(self) -> int:
        """Read in the backward pass."""
        return sum(self.blocks[self.first_trained : -1])

    def waiting_s(self, forward_s: float, step_s: float) -> float:
        """Return the seconds of a micro-batch in which nothing is computed.

        Args:
            forward_s, step_s: of computing the forward pass alone, and everything.
        """
        passes = ((self.forward_bytes, forward_s), (self.backward_bytes, step_s - forward_s))
        return sum(max(0.0, read / self.bytes_per_s - computing_s) for read, computing_s in passes)

    def hidden_from(self, positions: int, forward_s: float, step_s: float) -> int:
        """Return from how many positions a micro-batch never waits, if computing grows with them; arguments as above."""
        passes = ((self.forward_bytes, forward_s), (self.backward_bytes, step_s - forward_s))
        longest = max(read / self.bytes_per_s / computing_s for read, computing_s in passes if computing_s > 0)
        return math.ceil(positions * longest)
