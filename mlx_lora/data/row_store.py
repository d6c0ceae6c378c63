"""Keep a record for each position of an encoded set's rows on disk, for values that are expensive to compute.

    <cache>/trunk/<key>/values.bin      the records of all rows, one row after another; rows not written yet take no space
                        marks.bin       for each row, 0 or 1 << 32 | the CRC-32 of its records

Whoever writes a row computes the same bytes for it, so several runs may share a folder. A row that was only partly
written (a crash, a power failure) or damaged fails its check sum and counts as absent.

Shapes: R rows, W bytes of a record.
"""

from __future__ import annotations

import errno
import os
import shutil
import weakref
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

VALUES_FILE, MARKS_FILE = "values.bin", "marks.bin"
MOST_KEPT_BYTES = 4 * 10**9  # of all folders together, once no run uses them, as for encoded data
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


def used_bytes(folder: Path) -> int:
    """Return the bytes that a folder's files take on disk, without holes; 0 if it does not exist."""
    return sum(512 * file.stat().st_blocks for file in folder.iterdir()) if folder.is_dir() else 0


def evict(room: Path, most_bytes: int = MOST_KEPT_BYTES, spared: Collection[Path] = ()) -> None:
    """Remove the folders that were used longest ago, until the others take at most `most_bytes`.

    A run that still uses one keeps its open files; only a later run has to compute the rows again.

    Args:
        room: has one folder for each key.
        most_bytes: of all folders that are not spared.
        spared: folders that stay.
    """
    if not room.is_dir():
        return
    kept_bytes = 0
    folders = [folder for folder in room.iterdir() if folder not in spared]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        kept_bytes += used_bytes(folder)
        if kept_bytes > most_bytes:
            shutil.rmtree(folder, ignore_errors=True)
