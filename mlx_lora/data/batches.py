"""Rows of token ids -> a batch plan: which rows go together, at which width, in which order.

The plan is a pure function of (row lengths, seed, epoch), so a run is repeatable and a position in it is
two integers (epoch, batch). Every row comes exactly once per epoch.

Rows of similar length share a batch, so little of it is padding; batches are shuffled, so no order of
lengths shows in the loss. Padding stands on the right: under a causal mask it cannot reach a real token,
so no attention mask is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_lora.data.encode import EncodedSet

# (up to this width, widths are multiples of this): every distinct shape is compiled once, so wider rows,
# where a step costs less padding relative to the row, take coarser ones.
WIDTH_STEPS_TOKENS = ((256, 16), (1024, 32), (1 << 31, 128))


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the loss.

    Attributes:
        inputs: (B, T) int32 token ids.
        targets: (B, T) int32, the token after each input.
        mask: (B, T) bool, True where that target is trained.
        real_tokens: targets that are not padding, trained or not.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    real_tokens: int


class BatchPlan:
    """Batches of one encoded set under a row or token budget."""

    def __init__(self, rows: EncodedSet, *, batch_tokens: int, batch_size: int | None, seed: int):
        """Plan batches.

        Args:
            rows: the encoded set; rows shorter than two tokens hold no target and must not be in it.
            batch_tokens: width x rows stays within this, one row at the least.
            batch_size: rows per batch instead, as in mlx-lm.
            seed: of the shuffles.
        """
        self.rows = rows
        self.seed = seed
        # A row of n tokens has n - 1 (input, target) pairs.
        self._widths = _rounded(rows.lengths - 1)
        self._batch_tokens = batch_tokens
        self._batch_size = batch_size
        self._epoch_cache: tuple[int, list[np.ndarray]] | None = None

    def __len__(self) -> int:
        """Batches per epoch: the same in every epoch, since only the order within one length changes."""
        return len(self._epoch(0))

    def _epoch(self, epoch: int) -> list[np.ndarray]:
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            self._epoch_cache = (epoch, self._make_epoch(epoch))
        return self._epoch_cache[1]

    def _make_epoch(self, epoch: int) -> list[np.ndarray]:
        """Return the row numbers of each batch of one epoch, shuffled."""
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self._widths))
        order = order[np.argsort(-self._widths[order], kind="stable")]  # widest first, ties in random order
        batches = []
        start = 0
        while start < len(order):
            width = self._widths[order[start]]
            count = self._batch_size or max(1, self._batch_tokens // int(width))
            batches.append(order[start : start + count])
            start += count
        return [batches[i] for i in random.permutation(len(batches))]

    def batch(self, epoch: int, index: int) -> Batch:
        """Return batch `index` of `epoch`."""
        return collate(self.rows, self._epoch(epoch)[index], int(self._widths[self._epoch(epoch)[index]].max()))

    def batches(self, limit: int = -1) -> Iterator[Batch]:
        """Yield the first `limit` batches of epoch 0 (-1: all): the fixed sample a validation uses."""
        count = len(self) if limit < 0 else min(limit, len(self))
        return (self.batch(0, i) for i in range(count))


def _rounded(lengths: np.ndarray) -> np.ndarray:
    """Round up to the width step, but never past the longest row."""
    step = np.select([lengths <= limit for limit, _ in WIDTH_STEPS_TOKENS], [step for _, step in WIDTH_STEPS_TOKENS])
    return np.minimum(-(-lengths // step) * step, lengths.max(initial=1))


def collate(rows: EncodedSet, numbers: np.ndarray, width: int) -> Batch:
    """Lay rows out as one right-padded batch of `width` columns; padding is never a target."""
    inputs = np.zeros((len(numbers), width), np.int32)
    targets = np.zeros((len(numbers), width), np.int32)
    mask = np.zeros((len(numbers), width), bool)
    real_tokens = 0
    for i, number in enumerate(numbers):
        tokens, trained = rows.row(int(number))
        n = len(tokens) - 1
        inputs[i, :n] = tokens[:-1]
        targets[i, :n] = tokens[1:]
        mask[i, :n] = trained[1:]
        real_tokens += n
    return Batch(inputs, targets, mask, real_tokens)
