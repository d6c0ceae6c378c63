"""Keep values that are expensive to compute on disk, a record for each position, such as a teacher's probabilities.

    <cache>/trunk/<key>/values.bin      the records of all rows, one row after another; rows not written yet take no space
                        marks.bin       for each row, 0 or 1 << 32 | the CRC-32 of its records

Whoever writes a row computes the same bytes for it, so several runs may share a folder. A row that was only partly
written (a crash, a power failure) or damaged fails its check sum and counts as absent.

A teacher has a record of 16-bit numbers for each trained token:

    top k       [k ids: uint16, uint32 beyond 65,536 tokens] [k + 1 log-probabilities: float16]
    everything  [V log-probabilities: float16]

The log-probabilities are relative to that of the likeliest token, where float16 is finest; the last one of a top k is that
of all other tokens together. What rounding leaves of their sum is divided out when they are used, so each record is a
distribution again.

Shapes: R rows, P positions, W bytes of a record, n trained tokens of a row, k likeliest tokens, N = k + 1 bins (N = V for
everything).
"""

from __future__ import annotations

import errno
import os
import weakref
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mlx_lora.utils.errors import RunError

VALUES_FILE, MARKS_FILE = "values.bin", "marks.bin"
PRESENT = 1 << 32


class RowStore:
    """The records of an encoded set's rows."""

    def __init__(self, folder: Path, positions: np.ndarray, record_bytes: int):
        """Open a folder, or create it.

        Args:
            folder: of these rows and records alone; its name is a key of everything that decides the bytes.
            positions: (R,) the number of records of each row.
            record_bytes: W.

        Raises:
            OSError: there is no space or no permission.
        """
        self._starts = record_bytes * np.concatenate([[0], np.cumsum(positions, dtype=np.int64)])
        self._record_bytes = record_bytes
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)  # the folders that were used longest ago are removed first
        # Read and written by position, not mapped into memory: mapped pages would count as the process's memory, and on a
        # full disk a write to them ends the process instead of raising an error.
        self._files = [os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644) for name in (VALUES_FILE, MARKS_FILE)]
        for file in self._files:
            weakref.finalize(self, os.close, file)
        stored = np.frombuffer(os.pread(self._files[1], 8 * len(positions), 0), np.uint8)
        self._marks = np.zeros(len(positions), np.uint64)
        self._marks.view(np.uint8)[: len(stored)] = stored
        self._checked = np.zeros(len(positions), bool)

    def read(self, row: int) -> np.ndarray | None:
        """Return a row's records, (positions, W) uint8; None: they are absent or damaged."""
        mark, start = int(self._marks[row]), int(self._starts[row])
        if not mark & PRESENT:
            return None
        size = int(self._starts[row + 1]) - start
        content = os.pread(self._files[0], size, start)
        if len(content) < size or not (self._checked[row] or mark == PRESENT | zlib.crc32(content)):
            return None
        self._checked[row] = True
        return np.frombuffer(content, np.uint8).reshape(-1, self._record_bytes)

    def write(self, row: int, values: np.ndarray) -> None:
        """Write a row's records.

        Args:
            row: its number.
            values: (positions, W) uint8.

        Raises:
            OSError: there is no space.
        """
        content = values.tobytes()
        if os.pwrite(self._files[0], content, int(self._starts[row])) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._marks[row] = PRESENT | zlib.crc32(content)
        os.pwrite(self._files[1], self._marks[row].tobytes(), 8 * row)
        self._checked[row] = True


# Rows on disk
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
