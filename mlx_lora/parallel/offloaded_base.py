"""Read units of a base from its files on a thread, the next one while the one before is computed.

Sequence of calls: blocks are used in the same order in every step (forward 0, 1, ..., n-1, backward n-1, ..., 1, 0), so what
followed a unit the last time is read ahead. What was read last is kept for a second use in a row: the last block ends the
forward pass and begins the backward pass, and the first block ends a step and begins the next.

The system's cache of files is bypassed (F_NOCACHE) or told to drop what was read (posix_fadvise): a base that is larger than
memory would push everything else out of it.

Embedding and head of a base that is larger than memory: their rows stay in the model's files, like the weights of its blocks.

    lookup     the rows of a batch's own tokens are read
    product    slices of the vocabulary are read one after another, each while the one before is computed with

A plan of a product would hold all of its slices. So it is computed at once, a slice at a time, and the block-by-block walk keeps its
result for the further plans of a step (`Walk.outside`, parallel/block_walk.py).

Train a base that is larger than memory: each block's frozen weights are read from the model's files just before their use.

    read       a block's arrays, as the files have them, in the forward pass and again in the backward pass, while the block
               before is computed
    compute    forward, or in the backward pass again and then backward: the block is checkpointed
    drop       the weights are freed when the block is computed

The host walks the blocks (parallel/block_walk.py): it waits for each one to be computed before it plans the next one, so that
two blocks are in memory, whatever the device plans ahead. Nothing is written: the safetensors files of the base are the store. Embedding and head stay in
the files, too. Arrays that mlx-lm changes while it loads them stay in memory.

Source: FlexGen, arXiv 2303.06865, and ZeRO-Infinity, arXiv 2104.07857, without what training a base takes.
"""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.kernels.quantized_matmul import packed_arrays
from mlx_lora.models.folder import StoredTensor, read_rows
from mlx_lora.models.head import EMBEDDING_HEADS, FLOAT_HEADS, QUANTIZED_HEADS, AtHand
from mlx_lora.parallel.block_walk import ActivationFiles, Mode, Walk, apart, value_and_grad, walk_over
from mlx_lora.parallel.sharded_base import (
    Named,
    Sharded,
    SharedEmbedding,
    SharedLinear,
    SharedTable,
    share_modules,
    shared_mixin,
    stand_ins,
    units_of,
)
from mlx_lora.parallel.strategy import DISK_WAIT, Strategy, offloaded
from mlx_lora.planner.fit import hidden_from
from mlx_lora.planner.machine import ceilings_here, this_machine
from mlx_lora.planner.speed import Reading
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.models.load import Base
    from mlx_lora.planner.memory import ModelShape

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
            into = self._buffer.data[begin : begin + tensor.bytes]
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
            begin += tensor.bytes
        self.statistics.bytes += begin
        self.statistics.read_s += time.perf_counter() - start


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


# Embedding and head of a base that is larger than memory

OURS = f"{__name__.partition('.')[0]}."  # classes that compute the same in another way
PULLED_ROWS = 4096  # of a head that are unpacked at a time for the gradient of whole logits


class StoredTable(SharedTable):
    """A mixin that comes before the class of an embedding or a linear layer whose rows are in files."""

    _walk: Walk
    _rows: StoredRows

    def parts(self) -> list[tuple[slice, AtHand]]:
        return [(one.rows, partial(self._read, one)) for one in self._slices.every]

    def at_once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self._walk.outside, function)

    def pulled(self, call: Callable[[mx.array], mx.array], x: mx.array, cotangent: mx.array) -> mx.array:
        """Return the same, unpacking few rows at a time: within a gradient that is being planned, MLX keeps all that was computed."""
        own = next(
            kind
            for kind in type(self).__mro__
            if not kind.__module__.startswith(OURS) and not issubclass(kind, SharedTable)
        )
        if self._walk.mode is Mode.PLANNED or own not in FLOAT_HEADS + QUANTIZED_HEADS:
            return super().pulled(call, x, cotangent)
        table: Any = self
        packed = own in QUANTIZED_HEADS
        arrays, total = packed_arrays(table) if packed else [table.weight], mx.zeros(x.shape)
        layout = {"group_size": table.group_size, "bits": table.bits, "mode": table.mode} if packed else {}
        slopes = apart(cotangent)
        for start in range(0, slopes.shape[-1], PULLED_ROWS):
            rows = [array[start : start + PULLED_ROWS] for array in arrays]
            dense = mx.dequantize(*rows, **layout) if layout else rows[0]
            part = slopes[..., start : start + PULLED_ROWS] @ dense.astype(slopes.dtype)
            total = apart(total + part.astype(mx.float32))
        return total.astype(x.dtype)

    @contextmanager
    def _read(self, one: Sharded, before: Sequence[mx.array]) -> Iterator[None]:
        """Give the module a slice's rows inside this context, once what is before was computed; in a plan, stand-ins of them."""
        if self._walk.mode is Mode.PLANNED:
            arrays = [(name, array[one.rows]) for name, array in tree_flatten(one.stand_ins)]
            self.update(tree_unflatten(stand_ins(arrays)))
            yield
            self.update(one.stand_ins)
            return
        mx.eval(before)
        with one.at_hand(self, before):
            yield


class StoredEmbedding(StoredTable, SharedEmbedding):
    """The mixin for an embedding, with or without a head that is tied to it."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return the embeddings of token ids, (...) -> (..., D)."""
        look_up = super(SharedEmbedding, self).__call__
        if self._walk.mode is Mode.PLANNED:
            return look_up(x)
        ids, local = np.unique(np.array(x), return_inverse=True)
        self.update(tree_unflatten(self._rows.of(ids)))
        try:
            return look_up(mx.array(local.reshape(x.shape).astype(np.uint32)))
        finally:
            self.update(self._slices.every[0].stand_ins)


class StoredLinear(StoredTable, SharedLinear):
    """The mixin for a linear layer outside of the blocks, such as a head."""


class StoredRows:
    """Single rows of a table, read from its files."""

    def __init__(self, tensors: Sequence[tuple[str, StoredTensor, mx.Dtype]], flag: str):
        """Open nothing yet.

        Args:
            tensors: name, place and the model's dtype of each array of the table.
            flag: that asks for it, for messages.
        """
        self._tensors, self._flag = tensors, flag
        self._ids, self._kept = np.zeros(0, np.int64), []

    def of(self, ids: np.ndarray) -> list[tuple[str, mx.array]]:
        """Return the arrays of some rows; those of the last call are kept for another one with the same rows.

        Args:
            ids: sorted, each once.

        Raises:
            RunError: a file cannot be read.
        """
        if not np.array_equal(ids, self._ids) or not self._kept:
            self._kept = [(name, self._read(at, ids).astype(dtype)) for name, at, dtype in self._tensors]
            self._ids = ids
        return self._kept

    def _read(self, at: StoredTensor, ids: np.ndarray) -> mx.array:
        row = math.prod(at.shape[1:]) * at.dtype.size
        content = np.empty((len(ids), row), np.uint8)
        try:
            with at.file.open("rb", buffering=0) as file:
                # Through the system's cache, unlike blocks: rows are small, and a text repeats its tokens.
                for number, token in enumerate(ids.tolist()):
                    if os.preadv(file.fileno(), [content[number]], at.begin + token * row) != row:
                        raise OSError("the file ends early")
        except OSError as error:
            raise RunError(
                f"{at.file}: cannot be read ({error.strerror or error}) while the run reads its base from it ({self._flag}); "
                "check the disk, and continue with --resume auto"
            ) from error
        return mx.array(content).view(at.dtype).reshape(len(ids), *at.shape[1:])


def stored_mixin(table: Any, units: Sequence[Any]) -> type[SharedTable]:
    """Return the mixin of a table: one that reads it, or one that has it in memory if it is not stored as the model has it."""
    if not all(unit.bytes for unit in units):
        return shared_mixin(table, units)
    return StoredEmbedding if isinstance(table, EMBEDDING_HEADS) else StoredLinear


# Train a base that is larger than memory

COPIED_BYTES, COPIED_ARRAYS = 1 << 26, 16  # to measure the rate of copying


class OffloadedUnit:
    """The frozen arrays of a block, most of which are in files.

    Attributes:
        bytes: of those, as the model has them.
        kept_bytes: of the others.
    """

    def __init__(self, offloaded: Sequence[tuple[str, StoredTensor, mx.Dtype]], kept: Named, reader: BaseReader):
        """Remember where arrays are stored.

        Args:
            offloaded: name, place and the model's dtype of each.
            kept: arrays that stay in memory.
            reader: reads the others.
        """
        self._offloaded, self._kept, self._reader = list(offloaded), list(kept), reader
        self._again: list[tuple[str, mx.array]] = []
        mx.eval([array for _, array in kept])
        self.bytes = sum(at.count * dtype.size for _, at, dtype in offloaded)
        self.kept_bytes = sum(array.nbytes for _, array in kept)
        self._number = reader.add([at for _, at, _ in offloaded]) if offloaded else None

    def gathered(self, before: Sequence[mx.array]) -> list[tuple[str, mx.array]]:
        """Return the arrays, after what is asked for before was computed."""
        if self._number is None:  # packed slices of a table are unpacked to be computed with: one at a time
            names, arrays = zip(*self._kept, strict=True)
            return list(zip(names, mx.depends(list(arrays), list(before)) if before else arrays, strict=True))
        made, self._again = self._again, []
        if made:
            self._reader.used(self._number)
        else:
            self._reader.fetch(
                self._number,
                lambda contents: made.extend(
                    [
                        (name, mx.array(content).view(at.dtype).reshape(at.shape).astype(dtype))
                        for (name, at, dtype), content in zip(self._offloaded, contents, strict=True)
                    ]
                ),
            )
        # The last block ends the forward pass and begins the backward pass; the first one, a step and the next.
        if self._reader.expected == self._number:
            self._again = made
        return [*made, *self._kept]


class BaseFiles:
    """The files of a base, from which blocks are read again and again.

    Attributes:
        flag: that asks for it, for messages.
        reader: reads them.
        tables: path -> rows of an embedding or a head that is read.
    """

    flag: ClassVar[str] = "--offload-base"

    def __init__(self, model: nn.Module, stored: Mapping[str, StoredTensor], reader: BaseReader | None = None):
        """Remember where the arrays of a model are stored.

        Args:
            model: adapted; its arrays are lazy.
            stored: by path, without what adapter layers add to it.
            reader: reads them; None: a new one.
        """
        self._stored: dict[int, StoredTensor] = {}
        for path, array in tree_flatten(model.parameters()):
            at = stored.get(path) or stored.get(path.replace(".linear.", ".").replace(".embedding.", "."))
            if at is not None and at.shape == array.shape:
                self._stored[id(array)] = at
        self._versions = {at.file: _version(at.file) for at in self._stored.values()}
        self.reader = reader or BaseReader(self.flag)
        self.tables: dict[str, StoredRows] = {}

    def unit(self, arrays: Named) -> OffloadedUnit:
        """Return a unit of arrays that are read when they are used, if they are stored as the model has them."""
        offloaded, kept = [], []
        for name, array in arrays:
            at = self._stored.pop(id(array), None)  # another array may get this id when this one is freed
            if at is None:
                kept.append((name, array))
            else:
                offloaded.append((name, at, array.dtype))
        return OffloadedUnit(offloaded, kept, self.reader)

    def table_unit(self, arrays: Named) -> OffloadedUnit:
        """Return a unit of arrays that stay in memory."""
        return OffloadedUnit([], arrays, self.reader)

    def rows_unit(self, path: str, arrays: Named, rows: slice, stored: Mapping[str, StoredTensor]) -> OffloadedUnit:
        """Return a unit of rows of a table, which are read when they are used, if all of its arrays are stored as the model has them."""
        places = [self._stored.get(id(array)) for _, array in arrays]
        if None in places:
            return self.table_unit([(name, read_rows(f"{path}.{name}", array, rows, stored)) for name, array in arrays])
        found = [(name, at, array.dtype) for (name, array), at in zip(arrays, places, strict=True) if at is not None]
        self.tables.setdefault(path, StoredRows(found, self.flag))
        return OffloadedUnit([(name, at.part(rows), dtype) for name, at, dtype in found], [], self.reader)

    def check(self) -> None:
        """Refuse files that were changed since the run began.

        Raises:
            RunError: naming one.
        """
        for file, version in self._versions.items():
            if _version(file) != version:
                raise RunError(
                    f"{file}: was changed or removed while the run reads its base from it (--offload-base on); put it "
                    "back, and continue with --resume auto"
                )


def _version(file: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def copy_rate(size: int, rounds: int = 4) -> float:
    """Return the bytes per second at which a block's weights are copied from the buffer that they are read into, at best.

    Args:
        size: bytes of the block, of which up to COPIED_BYTES are copied.
        rounds: how often. In the first one the system has no memory at hand, which later blocks get from those before.
    """
    content, spent_s = np.ones((COPIED_ARRAYS, -(-min(size, COPIED_BYTES) // COPIED_ARRAYS)), np.uint8), math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        copied = [mx.array(row) for row in content]
        spent_s = min(spent_s, time.perf_counter() - start)
        del copied
    return content.size / spent_s


class OffloadedBase(Strategy):
    """One process, which reads each block's frozen weights from the base's files just before it computes the block."""

    divides_base = "--offload-base"
    whole_blocks = "it is read in whole"

    def __init__(self, seed: int = 0, reader: BaseReader | None = None, activations: Path | None = None):
        """Set up.

        Args:
            seed: of the run.
            activations: folder for files of what blocks keep for the backward pass; None: it stays in memory.
            reader: of the files, for benchmarks of other disks; None: a new one.
        """
        super().__init__(seed=seed)
        self._reader, self._activations = reader, activations
        self._files: BaseFiles | None = None
        self._walk: Walk | None = None
        self._blocks: Sequence[OffloadedUnit] = ()
        self._units: Sequence[OffloadedUnit] = ()
        self._head_bytes = 0
        self._tensors: Sequence[StoredTensor] = ()
        self._waited_s = 0.0

    def divide(self, base: Base, settings: TrainSettings) -> TrainSettings:
        if not base.stored:
            raise InputError(
                "--offload-base on: the base is in memory already, or its files cannot be read array by array; leave it out, or "
                "give the model's name instead of a loaded one"
            )
        parts = units_of(base.model)
        self._head_bytes = parts.head_bytes
        self._files = BaseFiles(base.model, base.stored, self._reader)
        units = share_modules(base.model, self._files, base.stored, stored_mixin)
        self._walk = walk_over(base.model.layers)
        for path, module in base.model.named_modules():
            if isinstance(module, StoredTable):
                module._walk, module._rows = self._walk, self._files.tables[path]
        if self._activations is not None:
            self._walk.files = ActivationFiles(self._activations)
        device.wait_beyond(mx.get_active_memory() + parts.largest)  # until the run has a plan
        read, held = sum(unit.bytes for unit in units), sum(unit.kept_bytes for unit in units)
        self._units, self._blocks, self._tensors = units, units[: len(base.model.layers)], list(base.stored.values())
        if not read:
            raise InputError(
                "--offload-base on: mlx-lm changes every array of this model while it loads it, so that none can be read alone; "
                "write the model as mlx-lm has it (mlx-lora convert), and give that folder"
            )
        self.words = f"base read from its files ({read / 1e6:,.0f} MB; {held / 1e6:,.0f} MB stay in memory)"
        if self._activations is not None:
            self.words += f"; what blocks keep for the backward pass is in {self._activations}"
        return offloaded(settings)

    def hidden_from(self, settings: TrainSettings, shape: ModelShape, width: int) -> int:
        blocks, dtype = [unit.bytes for unit in self._blocks], settings.model.dtype
        reading = Reading(
            blocks,
            shape.first_trained,
            read_rate(self._tensors),
            copy_rate(max(blocks)),
            "measured here",
            head=self._head_bytes,
        )
        return hidden_from(reading, settings, shape, this_machine(dtype), ceilings_here(dtype), width)

    def part_of(self, shape: ModelShape, model: nn.Module) -> ModelShape:
        return replace(
            shape, base_bytes=shape.base_bytes + sum(unit.kept_bytes for unit in self._units)
        )  # an outline does not know of these

    def value_and_grad(self, model: nn.Module, loss: Callable[..., Any]) -> Callable[..., tuple[Any, dict]]:
        if self._walk is None or self._files is None:
            return super().value_and_grad(model, loss)
        walked, reading = value_and_grad(self._walk, model, loss), self._files.reader.statistics

        def function(*args: Any) -> tuple[Any, dict]:
            before = reading.waited_s
            made = walked(*args)
            self._waited_s += reading.waited_s - before
            return made

        return function

    def measured_shares(self, spent_s: float) -> dict[str, float]:
        waited_s, self._waited_s = self._waited_s, 0.0
        return {DISK_WAIT: waited_s / spent_s}

    def only_planned(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext() if self._walk is None else self._walk.set_to(Mode.PLANNED)

    def reseed(self, step: int) -> None:
        """Refuse files that were changed; a single process goes on with its random numbers."""
        if self._files is not None:
            self._files.check()
