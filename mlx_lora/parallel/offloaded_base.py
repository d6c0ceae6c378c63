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
result for the further plans of a step (`Walk.outside` below).

Train a base that is larger than memory: each block's frozen weights are read from the model's files just before their use.

    read       a block's arrays, as the files have them, in the forward pass and again in the backward pass, while the block
               before is computed
    compute    forward, or in the backward pass again and then backward: the block is checkpointed
    drop       the weights are freed when the block is computed

The host walks the blocks: it waits for each one to be computed before it plans the next one, so that
two blocks are in memory, whatever the device plans ahead. Nothing is written: the safetensors files of the base are the store. Embedding and head stay in
the files, too. Arrays that mlx-lm changes while it loads them stay in memory.

Source: FlexGen, arXiv 2303.06865, and ZeRO-Infinity, arXiv 2104.07857, without what training a base takes.

Keep what blocks keep for the backward pass on the disk (--offload-activations), for rows whose block inputs do not fit in memory.

A block's call keeps its inputs, its outputs and the results on its tape. Each array is written to a file when the block is computed,
and an array that is lazy takes its place: MLX reads the file when something needs the numbers. What one block returns and the next
one gets is one file. The files are removed after the step.

Source: ZeRO-Infinity, arXiv 2104.07857, section 5.1.2 (activations on NVMe).

Differentiate a model one block at a time, so that a block's weights are in memory only while it is computed.

`mx.value_and_grad` plans a whole step before anything is computed, and an array that is computed while it plans keeps what it
was computed from. So the walk does what it does in parts, each of which is computed before the next one is planned:

    forward     the model runs on numbers; each block is computed when it is called, and its inputs x and outputs z are noted
    backward    from the last block to the first: dz of the block, then its part of the gradient and dx, by `mx.vjp` of the
                block alone

What a model computes between its blocks, with embedding, head and loss, is the function (z of all blocks) -> (x of all blocks,
loss), in which blocks return their z without computing anything. dz is its product with the dx that are known by then. An x that
is the z of the block before, as in most models, is needed by no other dz, so its dx is let go after that. This function draws the
same random numbers whenever it is planned: those of the forward pass (dropout of an embedding's or a head's adapter).

Source: reverse mode over a program cut at checkpoints, Griewank and Walther, Evaluating Derivatives, chapter 12.
"""

from __future__ import annotations

import math
import os
import shutil
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.compat.functions import mix_in
from mlx_lora.kernels.quantized_matmul import packed_arrays
from mlx_lora.models.folder import StoredTensor, read_rows, save_tensors
from mlx_lora.models.head import EMBEDDING_HEADS, FLOAT_HEADS, QUANTIZED_HEADS, AtHand
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
from mlx_lora.trainer.gradient_checkpointing import Checkpointed, Segment, float_arrays, is_stateless
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.models.load import Base
    from mlx_lora.planner.memory import ModelShape


LEAST_BYTES = 1 << 12  # a smaller array stays in memory
FOLDER, NAME = "activations", "0"  # in a run folder, and of the array in its file


Place = Callable[[], mx.array]
"""Returns an array: one that stays in memory, or a lazy one, which is read from its file when it is computed with."""


def _read(path: Path) -> mx.array:
    """Return a new lazy array, so that what is read can be freed."""
    return mx.load(str(path))[NAME]  # pyright: ignore[reportCallIssue, reportArgumentType, reportIndexIssue] # a dict


class ActivationFiles:
    """The files of one step's activations.

    Attributes:
        bytes: written since the step began.
    """

    def __init__(self, folder: Path):
        """Remove what a run that was killed has left.

        Args:
            folder: of the run, in which a folder for the files is made for the duration of a step.
        """
        self._folder = folder / FOLDER
        shutil.rmtree(self._folder, ignore_errors=True)
        self._count = 0
        self.last: list[tuple[mx.array, Place]] = []
        self.bytes = 0

    def put(self, array: mx.array) -> Place:
        """Write a computed array, if it is large enough.

        Raises:
            RunError: the disk is full, or cannot be written.
        """
        if array.nbytes < LEAST_BYTES:
            return lambda: array
        path = self._folder / f"{self._count}.safetensors"
        self._count += 1
        try:
            self._folder.mkdir(exist_ok=True)
            save_tensors(path, {NAME: array})
        except (OSError, RunError) as error:
            raise RunError(
                f"--offload-activations: {error}; free space on that disk or give --adapter-path on another one, and continue "
                "with --resume auto"
            ) from error
        self.bytes += array.nbytes
        return partial(_read, path)

    def clear(self) -> None:
        """Remove the files."""
        self.last, self.bytes = [], 0
        self._count = 0
        shutil.rmtree(self._folder, ignore_errors=True)


# Differentiate a model one block at a time, so that a block's weights are in memory only while it is computed


class Mode(Enum):
    """What a block does when it is called."""

    AT_ONCE = auto()  # it is computed, and so are the caches that it changes
    PLANNED = auto()  # it is planned, for those who look at the plan; it has no weights
    FORWARD = auto()  # it is computed and noted
    BETWEEN = auto()  # it returns what it returned in the forward pass


@dataclass
class Call:
    """A block's call in a forward pass.

    Attributes:
        segment: the block as a function.
        outputs: z, the float arrays that it returned.
        kept: what its backward pass needs besides.
        places: of x, if it is in files.
        tape: places of what is kept, likewise.
    """

    segment: Segment
    outputs: list[mx.array]
    kept: list[mx.array]
    places: Sequence[Place] = ()
    tape: Sequence[Place] = ()

    def backward(self, cotangents: list[mx.array]) -> list[mx.array]:
        """Return the gradients of the block's parameters and of x, computed; what was kept is let go."""
        kept = [place() for place in self.tape] or self.kept
        pulled = self.segment.backward(cotangents, kept)
        mx.eval(pulled)
        self.kept = []
        if self.places:
            self.segment.give([place() for place in self.places])  # without what was read
        return pulled


@dataclass
class Walk:
    """Where a walk is; shared by the blocks of a model, and by tables outside of them that are read from files.

    Attributes:
        mode: what blocks do.
        calls: of the forward pass.
        given: x of each call between the blocks, as far as they were called.
        files: where x, z and what is kept wait for the backward pass; None: in memory.
        results: of what was computed at once between the blocks, in order.
        repeated: how many of them the plan of now has had.
        seeds: of the random state at the beginning of the forward pass, and after each of its calls.
    """

    mode: Mode = Mode.AT_ONCE
    calls: list[Call] = field(default_factory=list)
    given: list[list[mx.array]] = field(default_factory=list)
    files: ActivationFiles | None = None
    results: list[list[mx.array]] = field(default_factory=list)
    repeated: int = 0
    seeds: list[int] = field(default_factory=list)

    def outside(self, function: Callable[..., Sequence[mx.array]], *arrays: mx.array) -> Sequence[mx.array]:
        """Return `function(*arrays)`, computed at once, unless it is only planned.

        What is between the blocks is planned anew for each block, always in the same way. So it is computed in the forward pass, where
        nothing is kept for a gradient, or else the first time, and its results are kept until the step ends.
        """
        if self.mode is Mode.PLANNED:
            return function(*arrays)
        if self.mode is Mode.BETWEEN and self.repeated < len(self.results):
            self.repeated += 1
            return self.results[self.repeated - 1]
        made = list(function(*arrays))
        mx.eval(made)
        if self.mode is not Mode.AT_ONCE:
            self.results.append(made)
            self.repeated += 1
        return made

    @contextmanager
    def set_to(self, mode: Mode) -> Iterator[None]:
        """Let blocks do something else inside this context."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def computed(self, segment: Segment) -> Any:
        """Compute a block, note it, and return what it returns."""
        outputs, kept = segment.forward(segment.primals)
        mx.eval(outputs, kept)
        call = Call(segment, outputs, kept)
        if self.files is not None:
            files, places, shapes = (
                self.files,
                {id(array): at for array, at in self.files.last},
                {z.shape for z in outputs},
            )
            # What the block before returned is in its files already; what has no output's shape (a mask) is shared by blocks.
            given = [
                places.get(id(x)) or (files.put(x) if x.shape in shapes else (lambda x=x: x)) for x in segment.given
            ]
            stored, tape = [files.put(array) for array in outputs], [files.put(array) for array in kept]
            files.last = list(zip(outputs, stored, strict=True))
            segment.give([place() for place in given])
            call = Call(segment, [place() for place in stored], [], given, tape)
        self.calls.append(call)
        self.seeds.append(_seed_of_state())
        return segment.result(outputs)

    def end(self) -> None:
        """Forget the step."""
        self.calls, self.given, self.results, self.seeds = [], [], [], []
        if self.files is not None:
            self.files.clear()

    def again(self, given: list[mx.array]) -> Any:
        """Note what a block is called with, and return what the walk says that it returns."""
        call = self.calls[len(self.given)]
        self.given.append(given)
        mx.random.seed(self.seeds[len(self.given)])  # what follows the block draws the same as then
        return call.segment.result(call.outputs)


class WalkedBlock(nn.Module):
    """A mixin that comes before a checkpointed block's own class; what it does when it is called depends on the walk."""

    _walk: Walk

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        mode, block = self._walk.mode, cast(Checkpointed, self)
        if mode is Mode.BETWEEN and all(map(is_stateless, (*args, *kwargs.values()))):
            return self._walk.again(float_arrays((args, kwargs)))
        if mode is Mode.FORWARD and (segment := block.segment(*args, **kwargs)) is not None:
            return self._walk.computed(segment)
        result = super().__call__(*args, **kwargs)
        if mode is Mode.AT_ONCE:
            mx.eval(result, [value.state for value in (*args, *kwargs.values()) if hasattr(value, "state")])
        return result

    def at_hand(self, before: Sequence[mx.array]) -> AbstractContextManager:
        planned = self._walk.mode is Mode.PLANNED
        return nullcontext() if planned else super().at_hand(before)  # pyright: ignore[reportAttributeAccessIssue] # likewise


def walk_over(blocks: Sequence[nn.Module]) -> Walk:
    """Let checkpointed blocks compute when they are called, and return the walk that says how."""
    walk = Walk()
    for one in blocks:
        block: Any = one
        block._walk = walk
        mix_in(WalkedBlock, block)
    return walk


def value_and_grad(walk: Walk, model: nn.Module, loss: Callable[..., Any]) -> Callable[..., tuple[Any, dict]]:
    """Return what `nn.value_and_grad(model, loss)` returns, computed block by block.

    Args:
        walk: of the model's blocks.
        model: with trainable parameters.
        loss: returns a scalar, or a tuple or list whose first element is one.
    """

    def function(*args: Any) -> tuple[Any, dict]:
        walk.end()
        try:
            walk.seeds = [_seed_of_state()]
            with walk.set_to(Mode.FORWARD):  # blocks are computed and noted
                loss(*args)  # of which only the blocks are computed, and what is computed at once
            paths = {id(module): path for path, module in model.named_modules()}
            own = {paths[id(call.segment.module)]: call.segment for call in walk.calls}
            inside = {f"{path}.{name}" for path, segment in own.items() for name in segment.names}
            outer = [(name, array) for name, array in tree_flatten(model.trainable_parameters()) if name not in inside]
            between = _Between(walk, model, (lambda: loss(*args)), outer)
            gradients: dict[str, mx.array] = {}
            first = next((n for n, call in enumerate(walk.calls) if outer or call.segment.names), len(walk.calls))
            for number in reversed(range(first, len(walk.calls))):
                segment = walk.calls[number].segment
                pulled = walk.calls[number].backward(between.pull(number))
                count = len(segment.names)
                for name, gradient in zip(segment.names, pulled[:count], strict=True):
                    name = f"{paths[id(segment.module)]}.{name}"
                    gradients[name] = gradients[name] + gradient if name in gradients else gradient
                between.known[number] = list(pulled[count:])
            value = between.value()
            gradients |= zip((name for name, _ in outer), between.outer(), strict=True)
            order = [name for name, _ in tree_flatten(model.trainable_parameters())]
            zeros = dict(tree_flatten(model.trainable_parameters()))  # of a block that was not called
            return value, tree_unflatten([(name, gradients.get(name, mx.zeros_like(zeros[name]))) for name in order])
        finally:
            walk.end()

    return function


class _Between:
    """The function from z of all blocks to x of all blocks and the loss.

    Attributes:
        known: dx of each call, as far as they are known; None: nothing needs it any more.
    """

    def __init__(self, walk: Walk, model: nn.Module, loss: Callable[[], Any], outer: list[tuple[str, mx.array]]):
        """Remember the function.

        Args:
            walk: after its forward pass.
            model: whose trainable parameters outside of its blocks are arguments, too.
            loss: of the model.
            outer: those parameters, by path.
        """
        self._walk, self._model, self._loss = walk, model, loss
        self._names, self._outer = [name for name, _ in outer], [array for _, array in outer]
        self._outputs = [call.outputs for call in walk.calls]
        self.known: dict[int, list[mx.array | None]] = {}
        self._value = self._called(self._primals())  # planned, for its shape
        before: list[list[mx.array]] = [[], *self._outputs]
        self._is_z = [
            [any(x is z for z in z_before) for x in given]
            for given, z_before in zip(self._walk.given, before, strict=False)
        ]
        self._leaves = _arrays(self._value)
        self._is_known = False

    def pull(self, number: int) -> list[mx.array]:
        """Return dz of a call, computed."""
        begin = sum(len(outputs) for outputs in self._outputs[:number])
        pulled = self._pulled()[begin : begin + len(self._outputs[number])]
        mx.eval(pulled, self._leaves)
        if number + 1 in self.known:
            self.known[number + 1] = [
                None if is_z else array
                for is_z, array in zip(self._is_z[number + 1], self.known[number + 1], strict=True)
            ]
        return pulled

    def outer(self) -> list[mx.array]:
        """Return the gradients of the parameters outside of blocks, computed."""
        pulled = self._pulled()[-len(self._outer) :] if self._outer else []
        mx.eval(pulled)
        return pulled

    def value(self) -> Any:
        """Return what the loss returns."""
        rest = iter(self._leaves)
        return tree_map(lambda leaf: next(rest) if isinstance(leaf, mx.array) else leaf, self._value)

    def _primals(self) -> list[mx.array]:
        return [array for outputs in self._outputs for array in outputs] + self._outer

    def _called(self, primals: Sequence[mx.array]) -> Any:
        """Return the loss of z and of the parameters outside of blocks; the walk notes x."""
        rest = iter(primals)
        for call, outputs in zip(self._walk.calls, self._outputs, strict=True):
            call.outputs = [next(rest) for _ in outputs]
        self._model.update(tree_unflatten(list(zip(self._names, rest, strict=True))))
        try:
            # As if the forward pass were made again: blocks return what they returned in it.
            self._walk.given, self._walk.repeated = [], 0
            mx.random.seed(self._walk.seeds[0])
            with self._walk.set_to(Mode.BETWEEN):
                return self._loss()
        finally:
            self._model.update(tree_unflatten(list(zip(self._names, self._outer, strict=True))))
            for call, outputs in zip(self._walk.calls, self._outputs, strict=True):
                call.outputs = outputs

    def _pulled(self) -> list[mx.array]:
        """Return the gradients of all z and of the parameters outside of blocks, planned."""

        def function(*primals: mx.array) -> list[mx.array]:
            # mx.vjp skips outputs of stop_gradient, with which it would take the cotangents of others for theirs.
            leaves = [leaf * 1 for leaf in _arrays(self._called(primals))]
            return [*leaves, *(array for given in self._walk.given for array in given)]

        given = [call.segment.given for call in self._walk.calls]
        known = [
            mx.zeros_like(x) if dx is None else dx
            for n, one in enumerate(given)
            for x, dx in zip(one, self.known.get(n, [None] * len(one)), strict=True)
        ]
        cotangents = [mx.ones_like(self._leaves[0]), *map(mx.zeros_like, self._leaves[1:]), *known]
        with self._walk.set_to(Mode.BETWEEN):  # a table has gradients of its own
            made, pulled = mx.vjp(function, self._primals(), cotangents)
        if not self._is_known:
            self._leaves, self._is_known = made[: len(self._leaves)], True
        return pulled


def apart(array: mx.array) -> mx.array:
    """Return a copy that does not keep what it was computed from, as an array does that is computed while a gradient is planned."""
    mx.eval(array)
    if array.size == 0:
        return mx.zeros(array.shape, array.dtype)
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[array.dtype.size]
    return mx.array(np.array(mx.stop_gradient(array).view(bits), copy=False)).view(array.dtype)


def _seed_of_state() -> int:
    """Return the seed that leads to the random state of now; it cannot be assigned a key, but a seed is a key's two halves."""
    high, low = mx.random.state[0].tolist()
    return high << 32 | low


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


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
