"""Rows of token ids -> a batch plan: which rows go together, at which width, in which order.

The plan is a pure function of (data, seed, epoch), so a run is repeatable and a position in it is two integers
(epoch, batch). Every row comes exactly once per epoch. Several ranks have the same plan and share each batch's rows
(training/sharing.py), so a run may go on with another number of them.

Rows of similar length share a batch, so little of it is padding; batches are shuffled, so no order of
lengths shows in the loss. Padding stands on the right: under a causal mask it cannot reach a real token,
so no attention mask is needed.

Shapes: B rows, T columns, P places for trained targets. A class is what has one shape; its rows are fixed,
and each epoch deals them to its batches anew, so that each batch has about the same number of targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.widths import ShapePrice, choose_widths, rows_per_batch

EMPTY = -1  # stands for a row that is all padding
PLACES_STEP = 8  # P is a multiple of this
DEALS = 4  # tries at a deal whose targets fit into P


@dataclass(frozen=True)
class Batch:
    """One micro-batch, ready for the loss.

    Attributes:
        inputs: (B, T) int32 token ids.
        targets: (B, T) int32, the token after each input.
        mask: (B, T) bool, True where that target is trained.
        real_tokens: targets that are not padding, trained or not.
        positions: (P,) int32, row * T + column of each trained target, then zeros.
        weights: (P,) float32, 1 for each trained target, then zeros.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    real_tokens: int
    positions: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(
        cls, inputs: np.ndarray, targets: np.ndarray, mask: np.ndarray, real_tokens: int, places: int | None = None
    ) -> Batch:
        """Make a batch; its positions and weights follow from the mask.

        Args:
            inputs, targets, mask, real_tokens: as the attributes.
            places: P, at least the trained targets, which it is by default.
        """
        trained_at = np.flatnonzero(mask)
        padding = (0, (len(trained_at) if places is None else places) - len(trained_at))
        positions = np.pad(trained_at.astype(np.int32), padding)
        weights = np.pad(np.ones(len(trained_at), np.float32), padding)
        return cls(inputs, targets, mask, real_tokens, positions, weights)


@dataclass(frozen=True)
class WidthClass:
    """The rows that share one shape.

    Attributes:
        width: columns, T.
        count: rows per batch, B.
        places: room for trained targets, P.
        dealt: (batches, B) row numbers of the deal that fits into P, EMPTY among them.
    """

    width: int
    count: int
    places: int
    dealt: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, T, P)."""
        return self.count, self.width, self.places


class BatchPlan:
    """Batches of one encoded set under a row or token budget."""

    def __init__(
        self,
        rows: EncodedSet,
        *,
        batch_tokens: int,
        batch_size: int | None,
        seed: int,
        price: ShapePrice = ShapePrice(),  # noqa: B008 (frozen)
    ):
        """Plan batches.

        Args:
            rows: the encoded set; rows shorter than two tokens hold no target and must not be in it.
            batch_tokens: width x rows stays within this, one row at the least.
            batch_size: rows per batch instead, as in mlx-lm.
            seed: of the shuffles.
            price: what a shape costs against padding; it decides how many widths there are.
        """
        self.rows = rows
        self.seed = seed
        # A row of n tokens has n - 1 (input, target) pairs.
        self._lengths = rows.lengths - 1
        self._counts = np.append(rows.supervised_counts, 0)  # so that EMPTY, the last, counts 0
        widths = choose_widths(self._lengths, batch_tokens, batch_size, price) if len(rows) else np.zeros(0, int)
        self.classes = self._make_classes(widths, batch_tokens, batch_size)
        self._epoch_cache: tuple[int, list[tuple[WidthClass, np.ndarray]]] | None = None

    def __len__(self) -> int:
        """Batches per epoch: the same in every epoch."""
        return sum(len(part.dealt) for part in self.classes)

    @property
    def shapes(self) -> set[tuple[int, int, int]]:
        """All (B, T, P) that ever occur."""
        return {part.shape for part in self.classes}

    @property
    def padding_fraction(self) -> float:
        """Share of an epoch's positions that hold no token; 0 without rows."""
        positions = sum(part.dealt.size * part.width for part in self.classes)
        return 1 - int(self._lengths.sum()) / positions if positions else 0.0

    def batch(self, epoch: int, index: int) -> Batch:
        """Return batch `index` of `epoch`."""
        part, numbers = self._epoch(epoch)[index]
        return collate(self.rows, numbers, part.width, part.places)

    def batches(self, limit: int = -1) -> Iterator[Batch]:
        """Yield the first `limit` batches of epoch 0 (-1: all): the fixed sample a validation uses."""
        count = len(self) if limit < 0 else min(limit, len(self))
        return (self.batch(0, i) for i in range(count))

    def _make_classes(self, widths: np.ndarray, batch_tokens: int, batch_size: int | None) -> list[WidthClass]:
        """Give each width its rows, from the widest down.

        A class takes whole batches: the last one is filled up with the longest rows of the next class,
        which wastes less than empty rows. Only the narrowest class may need those.
        """
        order = np.argsort(-self._lengths, kind="stable")
        ordered = self._lengths[order]
        classes = []
        start = 0
        for narrower in [*widths[-2::-1], 0]:
            end = int(np.searchsorted(-ordered, -narrower, side="left"))  # the first row that fits a narrower class
            if end <= start:
                continue
            width = int(ordered[start])
            count = min(rows_per_batch(width, batch_tokens, batch_size), len(order) - start)
            room = -(-(end - start) // count) * count
            taken = order[start : start + room]
            taken = np.append(taken, np.full(room - len(taken), EMPTY))
            places, dealt = self._fix_places(taken, count, width)
            classes.append(WidthClass(width, count, places, dealt))
            start += room
        return classes

    def _fix_places(self, taken: np.ndarray, count: int, width: int) -> tuple[int, np.ndarray]:
        """Return P of a class, and the deal that is known to fit it."""
        random = np.random.default_rng([self.seed, width])
        deals = [deal(self._counts, taken, count, random) for _ in range(DEALS)]
        most = [int(self._counts[dealt].sum(axis=1).max()) for dealt in deals]
        # The middle one: the least would be so tight that most epochs had to fall back on that one deal.
        middle = int(np.argsort(most, kind="stable")[DEALS // 2])
        places = -(-max(1, most[middle]) // PLACES_STEP) * PLACES_STEP
        return min(places, count * width), deals[middle]

    def _epoch(self, epoch: int) -> list[tuple[WidthClass, np.ndarray]]:
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            self._epoch_cache = (epoch, self._make_epoch(epoch))
        return self._epoch_cache[1]

    def _make_epoch(self, epoch: int) -> list[tuple[WidthClass, np.ndarray]]:
        """Return class and row numbers of each batch of one epoch, shuffled."""
        random = np.random.default_rng([self.seed, epoch])
        batches = [
            (part, numbers) for part in self.classes for numbers in random.permutation(self._deal_again(part, random))
        ]
        return [batches[i] for i in random.permutation(len(self))]

    def _deal_again(self, part: WidthClass, random: np.random.Generator) -> np.ndarray:
        """Deal a class's rows anew so that the targets fit into P; the known deal where chance does not."""
        for _ in range(DEALS):
            dealt = deal(self._counts, part.dealt.ravel(), part.count, random)
            if self._counts[dealt].sum(axis=1).max() <= part.places:
                return dealt
        return part.dealt


def deal(counts: np.ndarray, taken: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Deal rows to batches so that all batches have about the same number of trained targets.

    Rows are sorted by their targets, roughly, and cut into `count` strata; each batch gets one row of each,
    the batch with the fewest targets so far the row with the most.

    Args:
        counts: trained targets by row number; the last entry, EMPTY's, is 0.
        taken: (batches * count,) row numbers.
        count: rows per batch.
        random: breaks ties and blurs the strata.

    Returns:
        (batches, count) row numbers.
    """
    batches = len(taken) // count
    targets = counts[taken]
    # Blurred by a stratum's span: who meets whom changes from deal to deal.
    blur = max(1.0, np.ptp(targets) / count)
    strata = taken[np.argsort(targets + blur * random.random(len(taken)))[::-1]].reshape(count, batches)
    sums = np.zeros(batches, np.int64)
    dealt = np.empty((count, batches), np.int64)
    for i, stratum in enumerate(strata):
        most_first = stratum[np.lexsort((random.random(batches), -counts[stratum]))]
        fewest_first = np.lexsort((random.random(batches), sums))
        dealt[i, fewest_first] = most_first
        sums[fewest_first] += counts[most_first]
    return dealt.T


def collate(rows: EncodedSet, numbers: np.ndarray, width: int, places: int) -> Batch:
    """Lay rows out as one right-padded batch of `width` columns; padding is never a target.

    Args:
        rows: the encoded set.
        numbers: (B,) row numbers; EMPTY gives a row of padding.
        width: columns, T.
        places: P, room for the trained targets of all these rows.
    """
    inputs = np.zeros((len(numbers), width), np.int32)
    targets = np.zeros((len(numbers), width), np.int32)
    mask = np.zeros((len(numbers), width), bool)
    real_tokens = 0
    for i, number in enumerate(numbers):
        if number == EMPTY:
            continue
        tokens, trained = rows.row(int(number))
        n = len(tokens) - 1
        inputs[i, :n] = tokens[:-1]
        targets[i, :n] = tokens[1:]
        mask[i, :n] = trained[1:]
        real_tokens += n
    return Batch.of(inputs, targets, mask, real_tokens, places)
