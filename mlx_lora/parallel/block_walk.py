"""Keep what blocks keep for the backward pass on the disk (--offload-activations), for rows whose block inputs do not fit in memory.

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

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.compat.instances import mix_in
from mlx_lora.models.folder import save_tensors
from mlx_lora.trainer.gradient_checkpointing import Checkpointed, Segment, float_arrays, is_stateless
from mlx_lora.utils.errors import RunError

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
