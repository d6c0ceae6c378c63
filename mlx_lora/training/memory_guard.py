"""The memory guard: when a run exceeds its memory limit, its batches run in parts, which does not change any update.

A loss is a sum over trained tokens and is divided once, after all parts, so two halves give the gradient of the whole.
The guard cannot catch an allocation that fails: MLX then ends the process, on every backend. supervise.py restarts
it from the last checkpoint, in smaller parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_lora.data.batches import EMPTY, SLOTS_STEP, Batch
from mlx_lora.training.state import Position

# The number of slots for a part's targets has this many possible values, so that targets that are spread unevenly do
# not make a new shape, which must be compiled, again and again.
SIZES = 8


def split_rows(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch (B, T) into up to `parts` batches of ceil(B / parts) rows, all of one shape; the rows of an example stay together.

    Args:
        batch: to cut; with one row or one part it is returned as it is.
        parts: at least 1.

    Returns:
        Batches whose trained tokens together are the batch's; the last may end in rows of padding.
    """
    rows = len(batch.inputs)
    count = math.ceil(rows / batch.group / parts) * batch.group
    if count == rows:
        return [batch]
    starts = range(0, rows, count)
    numbers = np.pad(np.arange(rows), (0, count * len(starts) - rows), constant_values=EMPTY)
    needed = max(int(batch.mask[start : start + count].sum()) for start in starts)
    sizes = [math.ceil(len(batch.positions) * n / SIZES / SLOTS_STEP) * SLOTS_STEP for n in range(1, SIZES + 1)]
    slots = next(size for size in sizes if size >= needed)
    # The real tokens of each part are not known here; only their sum counts.
    return [batch.take(numbers[start : start + count], slots, 0 if start else batch.real_tokens) for start in starts]


class MemoryGuard:
    """Watches a run's memory, and says in how many parts its batches run."""

    def __init__(self, at: Position, limit_bytes: int | None = None, say: Callable[[str], None] = lambda line: None):
        """Begin to watch.

        Args:
            at: of the run; `at.parts` is kept here, so that a resumed run keeps it.
            limit_bytes: for MLX's buffers in use, None for no limit; buffers that it keeps for reuse have another limit.
            say: called with one line about each change.
        """
        self.at, self.limit_bytes, self.say = at, limit_bytes, say
        self._told, self._earlier_peak_bytes = False, 0

    @property
    def peak_bytes(self) -> int:
        """Peak of MLX's buffers in use since the process began."""
        return max(self._earlier_peak_bytes, mx.get_peak_memory())

    def divide(self, batches: list[Batch]) -> list[Batch]:
        """Return the batches of one optimizer step, in parts."""
        return [part for batch in batches for part in split_rows(batch, self.at.parts)]

    def watch(self, rows: int) -> None:
        """Double the parts when the peak since the last change is over the limit.

        Args:
            rows: of the largest batch in parts; a single row cannot be cut.
        """
        peak = mx.get_peak_memory()
        if self.limit_bytes is None or peak <= self.limit_bytes:
            return
        over = f"step {self.at.taken}: {peak / 1e9:.2f} GB were in use, the limit is {self.limit_bytes / 1e9:.2f} GB"
        if rows > 1:
            self.at.parts *= 2
            self.say(f"{over}; from now on, batches run in {self.at.parts} parts, with the same updates")
            self._earlier_peak_bytes = self.peak_bytes
            mx.reset_peak_memory()
        elif not self._told:
            self.say(f"{over}, with one row at a time; use --grad-checkpoint block or a smaller --max-seq-length")
            self._told = True
