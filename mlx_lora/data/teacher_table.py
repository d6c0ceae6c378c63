"""Keep a teacher's probabilities on disk, a record of 16-bit numbers for each trained token.

    top k       [k ids: uint16, uint32 beyond 65,536 tokens] [k + 1 log-probabilities: float16]
    everything  [V log-probabilities: float16]

The log-probabilities are relative to that of the likeliest token, where float16 is finest; the last one of a top k is that
of all other tokens together. What rounding leaves of their sum is divided out when they are used, so each record is a
distribution again.

Shapes: R rows, P positions, n trained tokens of a row, k likeliest tokens, N = k + 1 bins (N = V for everything).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mlx_lora.data.row_store import RowStore
from mlx_lora.utils.errors import RunError

LOWEST = -6e4  # of float16, whose exponential is 0 in any case
SMALL_VOCABULARY = 1 << 16


@dataclass(frozen=True)
class TableFormat:
    """What a record holds.

    Attributes:
        vocabulary: the number of tokens, V.
        top_k: k; 0: every token has its own probability.
    """

    vocabulary: int
    top_k: int

    @classmethod
    def of(cls, vocabulary: int, asked: int) -> TableFormat:
        """Return the format for --teacher-top-k: everything, where that is no more than k and a rest."""
        return cls(vocabulary, asked if 0 < asked < vocabulary - 1 else 0)

    @property
    def id_type(self) -> np.dtype:
        """The type of an id, which is the smallest that holds all of them."""
        return np.dtype("<u2" if self.vocabulary <= SMALL_VOCABULARY else "<u4")

    @property
    def bins(self) -> int:
        """The number of log-probabilities of a record, N."""
        return self.top_k + 1 if self.top_k else self.vocabulary

    @property
    def record_bytes(self) -> int:
        """The bytes of a record."""
        return self.top_k * self.id_type.itemsize + 2 * self.bins

    def pack(self, logps: np.ndarray, ids: np.ndarray | None) -> np.ndarray:
        """Return records, (n, W) uint8.

        Args:
            logps: (n, N) float.
            ids: (n, k) int; None: every token.
        """
        relative = np.maximum(logps - logps[:, : self.top_k or None].max(axis=1, keepdims=True), LOWEST)
        parts = [np.ascontiguousarray(relative, "<f2").view(np.uint8)]
        if ids is not None:
            parts.insert(0, np.ascontiguousarray(ids, self.id_type).view(np.uint8))
        return np.concatenate(parts, axis=1)

    def unpack(self, records: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the relative log-probabilities (n, N) float16 and the ids (n, k) int32 of records (n, W) uint8."""
        at = self.top_k * self.id_type.itemsize
        relative = np.ascontiguousarray(records[:, at:]).view("<f2")
        if not self.top_k:
            return relative, None
        return relative, np.ascontiguousarray(records[:, :at]).view(self.id_type).astype(np.int32)


@dataclass(frozen=True)
class TeacherTable:
    """The records of a set's rows, one for each trained token in order.

    Attributes:
        store: on disk.
        form: of the records.
        numbers: (R,) int64, the number in the store of each row.
    """

    store: RowStore
    form: TableFormat
    numbers: np.ndarray

    def select(self, rows: np.ndarray) -> TeacherTable:
        """Return the table of these rows, in this order."""
        return replace(self, numbers=self.numbers[rows])

    def read(self, rows: np.ndarray, positions: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the relative log-probabilities (P, N) float16 and ids (P, k) int32 of rows, one after another.

        Args:
            rows: numbers of rows.
            positions: P, at least their trained tokens; what is left of it gets zeros.

        Raises:
            RunError: a record is gone or damaged.
        """
        found = np.zeros((positions, self.form.record_bytes), np.uint8)
        start = 0
        for row in rows:
            values = self.store.read(int(self.numbers[row]))
            if values is None:
                raise RunError(
                    "the teacher's probabilities in the cache were removed or damaged while the run read them; start it "
                    "again with --resume, and they are computed again"
                )
            found[start : start + len(values)] = values
            start += len(values)
        return self.form.unpack(found)
