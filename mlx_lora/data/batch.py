"""A batch of encoded rows, ready for the loss: put together, cut into parts, and dealt out to ranks.

Shapes: E examples, K rows of each, B = E K rows, T columns, P slots for trained targets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from mlx_lora.data.dataset import EncodedSet, TeacherTable

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
        slots: P, at least the number of trained targets.
        group: rows per example, K.
        numbers: (B,) row numbers in the encoded set, EMPTY for padding; None: not from a set.
        columns: what else is known of each row, by name: (B, ...) arrays. Beside what an objective adds, these are

            lengths              (B,) targets that are not padding, trained or not
            measured             (B,) bool, whether a row is only measured, and not trained
            labels, reference    (B,) float32, as in `EncodedSet`; (B, K) with `starts`
            answers              (B, T) bool, the trained targets that belong to an answer, if not all do
            starts               (B, K) int32, as in `EncodedSet`, where a row holds several answers
            pictures             (B,) int32, as in `EncodedSet`
        table: what a teacher says about the trained targets of the encoded set's rows; None: nothing.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    slots: int
    group: int = 1
    numbers: np.ndarray | None = None
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)
    table: TeacherTable | None = None

    @classmethod
    def of(
        cls,
        inputs: np.ndarray,
        targets: np.ndarray,
        mask: np.ndarray,
        slots: int | None = None,
        group: int = 1,
        numbers: np.ndarray | None = None,
        **columns: np.ndarray,
    ) -> Batch:
        """Return a batch.

        Args:
            inputs, targets, mask, group, numbers, columns: as the attributes; without `lengths`, nothing is padding.
            slots: P; None: the number of trained targets.
        """
        columns = {"lengths": np.full(len(inputs), inputs.shape[1])} | columns
        return cls(inputs, targets, mask, int(mask.sum()) if slots is None else slots, group, numbers, columns)

    @cached_property
    def positions(self) -> np.ndarray:
        """(P,) int32, row * T + column of each trained target, then zeros."""
        trained_at = np.flatnonzero(self.mask)
        return np.pad(trained_at.astype(np.int32), (0, self.slots - len(trained_at)))

    @cached_property
    def weights(self) -> np.ndarray:
        """(P,) float32, 1 for each trained target, then zeros."""
        return (np.arange(self.slots) < self.mask.sum()).astype(np.float32)

    @property
    def starts(self) -> np.ndarray | None:
        """(B, K) int32, where each answer of a row starts; None: a row holds one text."""
        return self.columns.get("starts")

    @property
    def real_tokens(self) -> int:
        """The number of targets that are not padding, trained or not."""
        return int(self.columns["lengths"].sum())

    @property
    def supervised_tokens(self) -> int:
        """The number of trained targets, without those of rows that are only measured."""
        measured = self.columns.get("measured")
        return int((self.mask if measured is None else self.mask[~measured]).sum())

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

    def with_columns(self, **more: np.ndarray) -> Batch:
        """Return the same batch with more known of its rows."""
        return replace(self, columns={**self.columns, **more})

    def take(self, rows: np.ndarray, slots: int) -> Batch:
        """Return some rows as a batch of their own.

        Args:
            rows: (rows,) row numbers in this batch; EMPTY gives a row of padding.
            slots: P of the new batch.
        """
        columns = {name: taken(array, rows) for name, array in self.columns.items()}
        inputs, targets, mask = (taken(one, rows) for one in (self.inputs, self.targets, self.mask))
        return Batch(inputs, targets, mask, slots, self.group, taken(self.numbers, rows, EMPTY), columns, self.table)


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
    columns: dict[str, np.ndarray] = {"lengths": np.zeros(len(numbers), np.int64)}
    if rows.answers is not None:
        columns["answers"] = np.zeros_like(mask)
    for i, number in enumerate(numbers):
        if number == EMPTY:
            continue
        tokens, trained = rows.row(int(number))
        n = len(tokens) - 1
        inputs[i, :n] = tokens[:-1]
        targets[i, :n] = tokens[1:]
        mask[i, :n] = trained[1:]
        if rows.answers is not None:
            columns["answers"][i, :n] = rows.answers[rows.offsets[number] + 1 : rows.offsets[number + 1]]
        columns["lengths"][i] = n
    for name in ("labels", "reference", "starts", "pictures"):
        if (values := getattr(rows, name)) is not None:
            columns[name] = taken(values, numbers)
    if rows.trained_rows is not None:
        columns["measured"] = np.arange(len(numbers)) % rows.group >= rows.trained_rows
    return Batch(inputs, targets, mask, slots, rows.group, numbers, columns, rows.table)


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
    sizes = [math.ceil(batch.slots * n / SIZES / SLOTS_STEP) * SLOTS_STEP for n in range(1, SIZES + 1)]
    slots = next(size for size in sizes if size >= needed)
    return [batch.take(numbers[start : start + count], slots) for start in starts]


def share_of(batch: Batch, rows: np.ndarray) -> Batch:
    """Return some rows of a micro-batch as a micro-batch.

    Args:
        batch: (B, T) with P slots.
        rows: which of the B.
    """
    mask = batch.mask[rows]
    most, count = mask.size, int(mask.sum())
    even = batch.slots * len(rows) / len(batch.mask)
    steps = max(0, int(np.ceil((count / even - 1) / ROOM_STEP))) if even else 0
    room = int(np.ceil(even * (1 + steps * ROOM_STEP) / SLOTS_STEP)) * SLOTS_STEP
    return batch.take(rows, min(max(room, count), most))


def nothing_of(batch: Batch) -> Batch:
    """Return a batch of one example of padding, for a rank that has no rows and must compute as often as the others."""
    return batch.take(np.full(batch.group, EMPTY), SLOTS_STEP)
