"""Read units of a base from its files on a thread, the next one while the one before is computed.

Sequence of calls: blocks are used in the same order in every step (forward 0, 1, ..., n-1, backward n-1, ..., 1, 0), so what
followed a unit the last time is read ahead. What was read last is kept for a second use in a row: the last block ends the
forward pass and begins the backward pass, and the first block ends a step and begins the next.

The system's cache of files is bypassed (F_NOCACHE) or told to drop what was read (posix_fadvise): a base that is larger than
memory would push everything else out of it.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_lora.models.folder import StoredTensor
from mlx_lora.utils import device
from mlx_lora.utils.errors import RunError

PIECE_BYTES = 1 << 24  # of one call to the system


@dataclass
class ReadStatistics:
    """What was read, and what it cost.

    Attributes:
        bytes, read_s: read by the thread, and the seconds that it took.
        waited_s: seconds in which nothing was computed because weights were not there yet.
    """

    bytes: int = 0
    read_s: float = 0.0
    waited_s: float = 0.0

    @property
    def bytes_per_s(self) -> float:
        """The rate of the disk so far; 0 before anything was read."""
        return self.bytes / self.read_s if self.read_s else 0.0


class BaseReader:
    """Reads the tensors of units, one unit ahead.

    Attributes:
        statistics: of what was read.
        expected: the unit that is likely to be used next; None: not known yet.
    """

    def __init__(self, flag: str, read: Callable[[int, memoryview, int], int] | None = None):
        """Set up; nothing is read yet.

        Args:
            flag: that asks for it, for messages.
            read: (file descriptor, buffer, offset) -> bytes read, for tests and benchmarks of slow disks; None: the system's.
        """
        self._flag, self._read = flag, read or system_read
        self.statistics = ReadStatistics()
        self.expected: int | None = None
        self._files: dict[Path, int] = {}
        self._close = weakref.finalize(self, _close_all, self._files)
        self._units: list[Sequence[StoredTensor]] = []
        self._buffer = np.empty(0, np.uint8)
        self._thread = ThreadPoolExecutor(1, "base-reader")
        self._ahead: tuple[int, Future[None]] | None = None
        self._followed: dict[tuple[int, int], int] = {}
        self._last = (-1, -1)

    def add(self, tensors: Sequence[StoredTensor]) -> int:
        """Return the number of a new unit of tensors, by which it is read."""
        self._units.append(tensors)
        size = sum(tensor.bytes for tensor in tensors)
        if size > self._buffer.size:
            self._settle()
            self._buffer = np.empty(size, np.uint8)
        return len(self._units) - 1

    def fetch(self, unit: int, take: Callable[[list[np.ndarray]], None]) -> None:
        """Wait for a unit's bytes, let `take` copy them, and begin to read the unit that is likely to be next.

        Args:
            unit: its number.
            take: gets the (bytes,) uint8 of each tensor, which are overwritten afterwards.

        Raises:
            RunError: a file cannot be read, or is shorter than it was.
        """
        start = time.perf_counter()
        if self._ahead is None or self._ahead[0] != unit:
            self._settle()
            self._ahead = unit, self._thread.submit(self._fill, unit)
        future = self._ahead[1]
        self._ahead = None
        future.result()
        self.statistics.waited_s += time.perf_counter() - start
        arrays, begin = [], 0
        for tensor in self._units[unit]:
            arrays.append(self._buffer[begin : begin + tensor.bytes])
            begin += tensor.bytes
        take(arrays)
        self.used(unit)

    def used(self, unit: int) -> None:
        """Note that a unit is used now, whether or not it had to be read, and read ahead what followed it the last time."""
        self._followed[self._last] = unit
        self._last = self._last[1], unit
        self.expected = self._followed.get(self._last)
        following = (unit + 1) % len(self._units) if self.expected is None else self.expected
        if following != unit and (self._ahead is None or self._ahead[0] != following):
            self._settle()
            self._ahead = following, self._thread.submit(self._fill, following)

    def close(self) -> None:
        """Stop reading, and close the files."""
        self._settle()
        self._thread.shutdown()
        self._close()

    def _settle(self) -> None:
        """Wait for what is being read, which nobody needs."""
        if self._ahead is not None:
            self._ahead[1].exception()
            self._ahead = None

    def _fill(self, unit: int) -> None:
        start, begin = time.perf_counter(), 0
        for tensor in self._units[unit]:
            self._read_tensor(tensor, self._buffer.data[begin : begin + tensor.bytes])
            begin += tensor.bytes
        self.statistics.bytes += begin
        self.statistics.read_s += time.perf_counter() - start

    def _read_tensor(self, tensor: StoredTensor, into: memoryview) -> None:
        try:
            descriptor = self._files.get(tensor.file)
            if descriptor is None:
                descriptor = self._files[tensor.file] = device.open_uncached(tensor.file)
            done = 0
            while done < len(into):
                found = self._read(descriptor, into[done : done + PIECE_BYTES], tensor.begin + done)
                if not found:
                    raise OSError("the file ends early")
                done += found
            device.drop_cached(descriptor, tensor.begin, len(into))
        except OSError as error:
            raise RunError(
                f"{tensor.file}: cannot be read ({error.strerror or error}) while the run reads its base from it "
                f"({self._flag}); check the disk, and continue with --resume auto"
            ) from error


def _close_all(files: dict[Path, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def system_read(descriptor: int, into: memoryview, offset: int) -> int:
    """Read from a file at an offset, and return how many bytes were read."""
    return os.preadv(descriptor, [into], offset)


def read_rate(tensors: Sequence[StoredTensor], most_bytes: int = 1 << 28, most_s: float = 2.0) -> float:
    """Return the bytes per second at which tensors are read from their files, past the system's cache.

    Args:
        tensors: of a base.
        most_bytes, most_s: after which the measurement ends.

    Raises:
        RunError: a file cannot be read.
    """
    reader, start = BaseReader("--offload-base"), time.perf_counter()
    for number in [reader.add([tensor]) for tensor in sorted(tensors, key=lambda one: -one.bytes)[:64]]:
        reader._fill(number)
        if reader.statistics.bytes >= most_bytes or time.perf_counter() - start > most_s:
            break
    reader.close()
    return reader.statistics.bytes_per_s
