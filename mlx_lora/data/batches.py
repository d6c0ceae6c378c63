"""Plan batches: which rows of token ids share a batch, at which width, and in which order.

The plan is a pure function of (data, seed, epoch), so a run is repeatable and a position in it is two integers
(epoch, batch). Every row occurs exactly once per epoch. Several ranks have the same plan and share each batch's rows
(training/sharing.py), so a run may be resumed with another number of ranks.

Rows of similar length share a batch, so there is little padding; batches are shuffled, so that lengths do not follow an
order that would show in the loss. Padding is on the right: under a causal mask it cannot affect a real token, so no
attention mask is needed.

An example may have several rows (a pair's two answers): they go into the same batch, next to each other.

Shapes: E examples, K rows of each, B = E K rows, T columns, P slots for trained targets. A class has all rows with one
shape. The rows of a class stay the same, and each epoch distributes them anew over the class's batches, with about the
same number of targets in each batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.teacher_table import TeacherTable
from mlx_lora.data.widths import ShapePrice, choose_widths, rows_per_batch

EMPTY = -1  # the number of an example that is all padding
SLOTS_STEP = 8  # P is a multiple of this
DEALS = 4  # tries at a distribution whose targets fit into P


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
        group: rows per example, K.
        trained_rows: as in `EncodedSet`.
        labels, reference: (B,) float32, as in `EncodedSet`; None: it has none. (B, K) with `starts`.
        starts: (B, K) int32, as in `EncodedSet`; None: a row holds one text.
        numbers: (B,) row numbers in the encoded set, EMPTY for padding; None: not from a set.
        answers: (B, T) bool, the trained targets that belong to an answer; None: all of them.
        shares: the factor on the likelihood, and the divergence, that the loss uses for this batch (objective_loss.py).
        sampled: name -> (B,) or (B, T) float32 of rows whose answers were sampled (training/rollouts.py); None: others.
        table: what a teacher says about the trained targets of the encoded set's rows; None: nothing.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    real_tokens: int
    positions: np.ndarray
    weights: np.ndarray
    group: int = 1
    labels: np.ndarray | None = None
    reference: np.ndarray | None = None
    numbers: np.ndarray | None = None
    answers: np.ndarray | None = None
    starts: np.ndarray | None = None
    shares: tuple[float, ...] = ()
    trained_rows: int | None = None
    sampled: dict[str, np.ndarray] | None = None
    table: TeacherTable | None = None

    @property
    def supervised_tokens(self) -> int:
        """The number of trained targets, without those of rows that are only measured."""
        return int(self.mask.reshape(-1, self.group, self.mask.shape[1])[:, : self.trained_rows].sum())

    @property
    def real(self) -> np.ndarray:
        """(B,) bool, False for rows of padding; all True if the batch is not from an encoded set."""
        return np.ones(len(self.inputs), bool) if self.numbers is None else self.numbers != EMPTY

    @property
    def examples(self) -> int:
        """The number of examples: rows, pairs or rated answers, without padding."""
        return int(self.real.sum()) // self.group

    @property
    def answers_per_row(self) -> int:
        """The number of answers in a row: 1, or K with `starts`."""
        return 1 if self.starts is None else self.starts.shape[1]

    @property
    def first_targets(self) -> int:
        """The number of trained targets in the first answers of all examples, and in trained prompts."""
        if self.starts is None:
            return int(self.mask[:: self.group].sum())
        return int((self.mask & (np.arange(self.mask.shape[1]) < self.starts[:, 1:2])).sum())

    @classmethod
    def of(
        cls,
        inputs: np.ndarray,
        targets: np.ndarray,
        mask: np.ndarray,
        real_tokens: int,
        slots: int | None = None,
        **more: Any,
    ) -> Batch:
        """Return a batch, with positions and weights computed from the mask.

        Args:
            inputs, targets, mask, real_tokens, more: as the attributes.
            slots: P, at least the number of trained targets, which is the default.
        """
        trained_at = np.flatnonzero(mask)
        padding = (0, (len(trained_at) if slots is None else slots) - len(trained_at))
        positions = np.pad(trained_at.astype(np.int32), padding)
        weights = np.pad(np.ones(len(trained_at), np.float32), padding)
        return cls(inputs, targets, mask, real_tokens, positions, weights, **more)

    def take(self, rows: np.ndarray, slots: int, real_tokens: int, group: int | None = None) -> Batch:
        """Return some rows as a batch of their own.

        Args:
            rows: (rows,) row numbers in this batch; EMPTY gives a row of padding.
            slots: P of the new batch.
            real_tokens: the number to count for it.
            group: rows per example of the new batch, all of them trained; None: as in this one.
        """

        def of(array: np.ndarray) -> np.ndarray:
            taken = array[rows]
            taken[rows == EMPTY] = EMPTY if array is self.numbers else 0
            return taken

        more = {name: getattr(self, name) for name in ("labels", "reference", "numbers", "answers", "starts")}
        parts: dict[str, Any] = {name: of(array) for name, array in more.items() if array is not None}
        if self.sampled is not None:
            parts["sampled"] = {name: of(array) for name, array in self.sampled.items()}
        return Batch.of(
            of(self.inputs), of(self.targets), of(self.mask), real_tokens, slots,
            group=group or self.group, shares=self.shares, trained_rows=None if group else self.trained_rows,
            table=self.table, **parts,
        )  # fmt: skip


@dataclass(frozen=True)
class WidthClass:
    """The rows that share one shape.

    Attributes:
        width: columns, T.
        count: examples per batch, E.
        slots: the number of slots for trained targets, P.
        dealt: (batches, E) example numbers, or EMPTY, of a distribution whose targets fit into P.
        group: rows per example, K.
    """

    width: int
    count: int
    slots: int
    dealt: np.ndarray
    group: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (B, T, P)."""
        return self.count * self.group, self.width, self.slots


class BatchPlan:
    """Batches of one encoded set under a row or token budget."""

    updates = 1  # steps that must be taken together, see RolloutPlan

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
            batch_tokens: the limit for width x rows of a batch, which has at least one row.
            batch_size: examples per batch instead, as in mlx-lm and TRL.
            seed: of the shuffles.
            price: what a shape costs compared to padding, which decides the number of widths.
        """
        self.rows = rows
        self.seed = seed
        group = rows.group
        # A row of n tokens has n - 1 (input, target) pairs; an example is as long as its longest row.
        self._lengths = (rows.lengths - 1).reshape(-1, group).max(axis=1)
        counts = rows.supervised_counts.reshape(-1, group).sum(axis=1)
        self._counts = np.append(counts, 0)  # EMPTY, which is -1, gets the last entry, 0
        budget = max(1, batch_tokens // group)
        widths = choose_widths(self._lengths, budget, batch_size, price) if len(rows) else np.zeros(0, int)
        self.classes = self._make_classes(widths, budget, batch_size)
        self._epoch_cache: tuple[int, list[tuple[WidthClass, np.ndarray]]] | None = None

    def __len__(self) -> int:
        """Return the number of batches per epoch, which is the same in every epoch."""
        return sum(len(part.dealt) for part in self.classes)

    @property
    def shapes(self) -> set[tuple[int, int, int]]:
        """All (B, T, P) that occur."""
        return {part.shape for part in self.classes}

    @property
    def padding_fraction(self) -> float:
        """The fraction of an epoch's positions that hold no token; 0 without rows."""
        positions = sum(part.dealt.size * part.group * part.width for part in self.classes)
        return 1 - int((self.rows.lengths - 1).sum()) / positions if positions else 0.0

    def batch(self, epoch: int, index: int) -> Batch:
        """Return batch `index` of `epoch`."""
        part, numbers = self._epoch(epoch)[index]
        return collate(self.rows, numbers, part.width, part.slots)

    def examples_of(self, limit: int = -1) -> np.ndarray:
        """Return the numbers of the examples in the first `limit` batches of epoch 0 (-1: all)."""
        found = [numbers for _, numbers in self._epoch(0)[: len(self) if limit < 0 else limit]]
        numbers = np.concatenate(found) if found else np.zeros(0, np.int64)
        return numbers[numbers != EMPTY]

    def layout(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Return the width and the row numbers, (B,), of each batch of an epoch."""
        return [(part.width, rows_of(numbers, part.group)) for part, numbers in self._epoch(epoch)]

    def batches(self, limit: int = -1, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """Yield the first `limit` batches of epoch 0 (-1: all), the fixed sample that validation uses.

        Args:
            limit: of the whole sample.
            first, every: yield only every so many of them, from number `first` on; so ranks divide them.
        """
        count = len(self) if limit < 0 else min(limit, len(self))
        return (self.batch(0, i) for i in range(first, count, every))

    def _make_classes(self, widths: np.ndarray, batch_tokens: int, batch_size: int | None) -> list[WidthClass]:
        """Return the class of each width, from the widest to the narrowest.

        A class has whole batches: its last batch is filled with the longest rows of the next class, which wastes less
        than empty rows. Only the narrowest class may need empty rows.
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
            slots, dealt = self._fix_slots(taken, count, width)
            classes.append(WidthClass(width, count, slots, dealt, self.rows.group))
            start += room
        return classes

    def _fix_slots(self, taken: np.ndarray, count: int, width: int) -> tuple[int, np.ndarray]:
        """Return P of a class, and a distribution of its rows that fits into P."""
        random = np.random.default_rng([self.seed, width])
        deals = [deal(self._counts, taken, count, random) for _ in range(DEALS)]
        most = [int(self._counts[dealt].sum(axis=1).max()) for dealt in deals]
        # Take the median: with the smallest P, most epochs would have to fall back on that one distribution.
        middle = int(np.argsort(most, kind="stable")[DEALS // 2])
        slots = -(-max(1, most[middle]) // SLOTS_STEP) * SLOTS_STEP
        return min(slots, count * self.rows.group * width), deals[middle]

    def _epoch(self, epoch: int) -> list[tuple[WidthClass, np.ndarray]]:
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            self._epoch_cache = (epoch, self._make_epoch(epoch))
        return self._epoch_cache[1]

    def _make_epoch(self, epoch: int) -> list[tuple[WidthClass, np.ndarray]]:
        """Return the class and the row numbers of each batch of one epoch, shuffled."""
        random = np.random.default_rng([self.seed, epoch])
        batches = [
            (part, numbers) for part in self.classes for numbers in random.permutation(self._deal_again(part, random))
        ]
        return [batches[i] for i in random.permutation(len(self))]

    def _deal_again(self, part: WidthClass, random: np.random.Generator) -> np.ndarray:
        """Return a new distribution of a class's rows whose targets fit into P, or the known one if none is found."""
        for _ in range(DEALS):
            dealt = deal(self._counts, part.dealt.ravel(), part.count, random)
            if self._counts[dealt].sum(axis=1).max() <= part.slots:
                return dealt
        return part.dealt


def deal(counts: np.ndarray, taken: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Distribute rows over batches so that all batches have about the same number of trained targets.

    Rows are roughly sorted by their number of targets and divided into `count` strata. Each batch gets one row of each
    stratum; the batch with the fewest targets so far gets the row with the most.

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
    # Blur by the span of a stratum, so that each epoch combines other rows.
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


def rows_of(numbers: np.ndarray, group: int) -> np.ndarray:
    """Return the row numbers, (B,), of examples (E,) of `group` rows each; EMPTY stays EMPTY."""
    own_rows = numbers[:, None] * group + np.arange(group)  # (E, K)
    return np.where(numbers[:, None] == EMPTY, EMPTY, own_rows).ravel()


def collate(rows: EncodedSet, numbers: np.ndarray, width: int, slots: int) -> Batch:
    """Return examples as one right-padded batch of `width` columns; padding is never a target.

    Args:
        rows: the encoded set.
        numbers: (E,) example numbers; EMPTY gives rows of padding.
        width: columns, T.
        slots: P, at least the number of trained targets of these rows.
    """
    numbers = rows_of(numbers, rows.group)
    inputs = np.zeros((len(numbers), width), np.int32)
    targets = np.zeros((len(numbers), width), np.int32)
    mask = np.zeros((len(numbers), width), bool)
    answers = None if rows.answers is None else np.zeros_like(mask)
    real_tokens = 0
    for i, number in enumerate(numbers):
        if number == EMPTY:
            continue
        tokens, trained = rows.row(int(number))
        n = len(tokens) - 1
        inputs[i, :n] = tokens[:-1]
        targets[i, :n] = tokens[1:]
        mask[i, :n] = trained[1:]
        if answers is not None and rows.answers is not None:
            answers[i, :n] = rows.answers[rows.offsets[number] + 1 : rows.offsets[number + 1]]
        real_tokens += n

    def of_rows(values: np.ndarray | None) -> np.ndarray | None:
        if values is None:
            return None
        found = values[numbers]
        found[numbers == EMPTY] = 0
        return found

    more = {"labels": of_rows(rows.labels), "reference": of_rows(rows.reference), "starts": of_rows(rows.starts)}
    return Batch.of(
        inputs, targets, mask, real_tokens, slots, group=rows.group, numbers=numbers, answers=answers,
        trained_rows=rows.trained_rows, table=rows.table, **more,
    )  # fmt: skip
