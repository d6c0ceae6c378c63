"""A batch of encoded rows, ready for the loss: put together, cut into parts, and dealt out to ranks.

Shapes: E examples, K rows of each, B = E K rows, T columns, P slots for trained targets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.teacher_table import TeacherTable

EMPTY = -1  # the number of an example that is all padding
SLOTS_STEP = 8  # P is a multiple of this
# The number of slots for a part's targets has this many possible values, so that targets that are spread unevenly do
# not make a new shape, which must be compiled, again and again.
SIZES = 8
# The slots for a share's targets increase in steps of this fraction of an even share, which makes few shapes and wastes
# little of the head's work.
ROOM_STEP = 1 / 16


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
        shares: the factor on the likelihood, and the divergence, that the loss uses for this batch (objectives/preference.py).
        sampled: name -> (B,) or (B, T) float32 of rows whose answers were sampled (rollouts/rollout.py); None: others.
        table: what a teacher says about the trained targets of the encoded set's rows; None: nothing.
        pictures: (B,) int32, as in `EncodedSet`; None: there are none.
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
    pictures: np.ndarray | None = None

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
        names = ("labels", "reference", "answers", "starts", "pictures")
        parts: dict[str, Any] = {name: taken(getattr(self, name), rows) for name in names}
        if self.sampled is not None:
            parts["sampled"] = {name: taken(array, rows) for name, array in self.sampled.items()}
        return Batch.of(
            taken(self.inputs, rows), taken(self.targets, rows), taken(self.mask, rows), real_tokens, slots,
            group=group or self.group, shares=self.shares, trained_rows=None if group else self.trained_rows,
            table=self.table, numbers=taken(self.numbers, rows, EMPTY), **parts,
        )  # fmt: skip


def taken(array: Any, rows: np.ndarray, empty: int = 0) -> Any:
    """Return some rows of an array, None of None; EMPTY gives a row of `empty`."""
    if array is None:
        return None
    found = array[rows]
    found[rows == EMPTY] = empty
    return found


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

    more = {name: taken(getattr(rows, name), numbers) for name in ("labels", "reference", "starts", "pictures")}
    return Batch.of(
        inputs, targets, mask, real_tokens, slots, group=rows.group, numbers=numbers, answers=answers,
        trained_rows=rows.trained_rows, table=rows.table, **more,
    )  # fmt: skip


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


def share_of(batch: Batch, rows: np.ndarray) -> Batch:
    """Return some rows of a micro-batch as a micro-batch.

    Args:
        batch: (B, T) with P slots.
        rows: which of the B.
    """
    mask = batch.mask[rows]
    most, count = mask.size, int(mask.sum())
    even = len(batch.positions) * len(rows) / len(batch.mask)
    steps = max(0, int(np.ceil((count / even - 1) / ROOM_STEP))) if even else 0
    room = int(np.ceil(even * (1 + steps * ROOM_STEP) / SLOTS_STEP)) * SLOTS_STEP
    real_tokens = batch.real_tokens * len(rows) // len(batch.mask)  # not used for a share; the whole batch counts
    return batch.take(rows, min(max(room, count), most), real_tokens)


def nothing_of(batch: Batch) -> Batch:
    """Return a batch of one example of padding, for a rank that has no rows and must compute as often as the others."""
    return batch.take(np.full(batch.group, EMPTY), SLOTS_STEP, 0)
