"""Count the memory of a graph: which arrays get a buffer, what the backward pass reads of the forward pass, the peak.

It follows MLX's rules:

    views        reshape, transpose, slice, split ... share their input's buffer if strides allow it
    fusion       compiling joins a chain of elementwise operations, and only stores what other operations read
    donation     an elementwise result takes over the buffer of an input that nothing else reads, also through a view of it
    lag          MLX prepares operations ahead of those that run, and frees an input when the last operation that reads
                 it has run, up to `lag` dispatches later. A CPU's stream gets a dispatch for an operation and one that lets go of its
                 inputs; a view has the second alone

Sizes are in bytes.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from mlx_lora.models.graph import Graph, Node, Shape

UNARY = [
    "Abs",
    "ArcCos",
    "ArcCosh",
    "ArcSin",
    "ArcSinh",
    "ArcTan",
    "ArcTanh",
    "AsType",
    "BitwiseInvert",
    "Ceil",
    "Conjugate",
    "Cos",
    "Cosh",
    "Erf",
    "ErfInv",
    "Exp",
    "Expm1",
    "Floor",
    "Log",
    "Log1p",
    "LogicalNot",
    "Negative",
    "Round",
    "Rsqrt",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Sqrt",
    "Square",
    "Tan",
    "Tanh",
]
SEVERAL = [
    "Add",
    "ArcTan2",
    "BitwiseBinary",
    "Divide",
    "Equal",
    "Greater",
    "GreaterEqual",
    "Less",
    "LessEqual",
    "LogAddExp",
    "LogicalAnd",
    "LogicalOr",
    "Maximum",
    "Minimum",
    "Multiply",
    "NotEqual",
    "Power",
    "Remainder",
    "Select",
    "Subtract",
]
ELEMENTWISE = frozenset(UNARY + SEVERAL)
RESHAPES = frozenset(["Copy", "ExpandDims", "Flatten", "Reshape", "Squeeze", "StopGradient", "Unflatten"])
DONATES = ELEMENTWISE | {"Softmax", "SliceUpdate", "Scatter", "ScatterAxis"}
PRODUCTS = frozenset(["AddMM", "GatherMM", "Matmul"])
# Dispatches that MLX prepares ahead: it waits while more than 10 tasks are not done, and 10 dispatches are a task (MAX_ACTIVE_TASKS
# in mlx/transforms.cpp, DISPATCHES_PER_TASK in mlx/backend/cpu/encoder.h); the task that is being filled counts by half.
AHEAD = 105
DEEPEST_FUSION = 11  # mlx's bound on a chain


@dataclass(frozen=True)
class KeptArrays:
    """The memory of one differentiated function.

    Attributes:
        kept_bytes: of arrays that the forward pass makes and the backward pass reads.
        window_bytes: what the backward pass adds to that at its peak.
        early_bytes: what the first operations of the backward pass add at their peak: those that are prepared while the last ones
            before it still hold their inputs.
        forward_bytes: the peak of the forward pass, with what it keeps.
    """

    kept_bytes: int
    window_bytes: int
    early_bytes: int
    forward_bytes: int


def count_memory(graph: Graph, lag: int, fuses: bool = True) -> KeptArrays:
    """Return a graph's memory.

    Args:
        graph: a function with its gradient.
        lag: see the module's docstring.
        fuses: whether it is compiled.
    """
    buffers = _Buffers(graph, fuses)
    forward = _before(graph, graph.returned)
    kept = {
        buffers.of[name]
        for number, node in enumerate(graph.nodes)
        if number not in forward
        for name in node.inputs
        if buffers.maker.get(buffers.of[name], -1) in forward or buffers.of[name] in graph.inputs
    }
    kept_bytes = sum(buffers.size.get(name, 0) for name in kept)
    start = max(forward, default=-1)
    live = list(_live(graph, buffers, lag))
    done = max((dispatches for number, _, dispatches in live if number <= start), default=0)
    peak = max((bytes_ for number, bytes_, _ in live if number > start), default=kept_bytes)
    first = (bytes_ for number, bytes_, dispatches in live if number > start and dispatches <= done + lag)
    early = max(first, default=kept_bytes)
    before = max((bytes_ for number, bytes_, _ in live if number <= start), default=0)
    return KeptArrays(kept_bytes, max(0, peak - kept_bytes), max(0, early - kept_bytes), before)


def forward_peak(graph: Graph, lag: int, fuses: bool = True) -> int:
    """Return the most bytes that are allocated while the function is computed without its gradient; arguments as above."""
    needed = _before(graph, graph.returned)
    nodes = [node for number, node in enumerate(graph.nodes) if number in needed]
    alone = replace(graph, nodes=nodes, gradients=())
    return max((live for _, live, _ in _live(alone, _Buffers(alone, fuses), lag)), default=0)


WIDTH = 20  # arrays that MLX's search has open at a time


def as_evaluated(graph: Graph) -> Graph:
    """Return the graph with its nodes in the order in which MLX computes them, which matters where parts do not need one another.

    MLX searches from what is asked for to what that needs, breadth first as long as the search is narrow, and computes what it
    found from the end. So the forward passes of several pictures are computed side by side (mlx/transforms.cpp, `eval_impl`).
    """
    maker = {name: number for number, node in enumerate(graph.nodes) for name in node.outputs}
    asked, needed_by = (*graph.returned, *graph.gradients), defaultdict(int)
    for names in (asked, *(node.inputs for node in graph.nodes)):
        for name in names:
            if name in maker:
                needed_by[maker[name]] += 1
    found: list[int | None] = [None]  # which stands for what is asked for
    later: list[tuple[int | None, int]] = []
    at = 0
    while at < len(found) or later:
        if at < len(found):
            number, first = found[at], 0
            at += 1
        else:
            number, first = later.pop()
        names = asked if number is None else graph.nodes[number].inputs
        for place, name in enumerate(names[first:], first):
            if len(found) - at >= WIDTH:
                later.append((number, place))
                break
            if name in maker:
                needed_by[maker[name]] -= 1
                if not needed_by[maker[name]]:
                    found.append(maker[name])
    return replace(graph, nodes=[graph.nodes[number] for number in reversed(found) if number is not None])


def _before(graph: Graph, names: tuple[str, ...]) -> set[int]:
    """Return the numbers of all nodes that are needed to compute some arrays."""
    needed, found = set(names), set()
    for number in reversed(range(len(graph.nodes))):
        node = graph.nodes[number]
        if not needed.isdisjoint(node.outputs):
            found.add(number)
            needed.update(node.inputs)
    return found


class _Buffers:
    """The buffer of each array.

    Attributes:
        of: array -> the array whose buffer it shares (usually itself).
        size: buffer -> bytes; inputs and constants are not counted, since they are in memory anyway.
        maker: buffer -> number of the node that makes it.
        copied: node -> bytes of inputs that it must copy first.
        last_reader: buffer -> number of the last node that reads it.
    """

    def __init__(self, graph: Graph, fuses: bool) -> None:
        self.arrays = graph.arrays
        self.of = {name: name for name in graph.arrays}
        self.strides = {name: _row_strides(info.shape) for name, info in graph.arrays.items()}
        self.size: dict[str, int] = {}
        self.maker: dict[str, int] = {}
        self.copied: dict[int, int] = defaultdict(int)
        self.last_reader: dict[str, int] = {}
        inner = _fused_away(graph) if fuses else set()
        for number, node in enumerate(graph.nodes):
            for index, name in enumerate(node.outputs):
                view = self._view(node, index)
                if view is None:
                    self.size[name], self.maker[name] = (0 if name in inner else self.arrays[name].nbytes), number
                else:
                    self.of[name], self.strides[name] = self.of[view[0]], view[1]
            if node.name in PRODUCTS:
                self.copied[number] = sum(self.arrays[a].nbytes for a in node.inputs[:2] if not self._multiplies(a))
            for name in (*node.inputs, *node.outputs):
                self.last_reader[self.of[name]] = number
        for name in (*graph.returned, *graph.gradients):
            self.last_reader[self.of[name]] = len(graph.nodes)

    def _view(self, node: Node, index: int) -> tuple[str, Shape] | None:
        """Return the array whose buffer an output shares, and its strides; None if it has its own buffer."""
        if not node.inputs:
            return None
        source, shape = node.inputs[0], self.arrays[node.outputs[index]].shape
        if node.name == "Depends":
            source = node.inputs[index]
            return source, self.strides[source]
        strides = self.strides[source]
        if node.name in RESHAPES:
            strides = _reshaped(self.arrays[source].shape, strides, shape)
            return None if strides is None else (source, strides)
        if node.name == "Transpose":
            return source, tuple(strides[axis] for axis in node.arguments[0])
        if node.name in ("Broadcast", "BroadcastAxes"):
            missing = len(shape) - len(strides)
            before = (1,) * missing + self.arrays[source].shape
            padded = (0,) * missing + strides
            return source, tuple(s if a == b else 0 for a, b, s in zip(before, shape, padded, strict=True))
        if node.name == "Slice":
            return source, tuple(a * b for a, b in zip(strides, node.arguments[2], strict=True))
        if node.name == "Split":
            return source, strides
        return None

    def _multiplies(self, name: str) -> bool:
        """Return whether a product can read a matrix with its strides, without copying it."""
        shape, strides = self.arrays[name].shape, self.strides[name]
        return len(shape) < 2 or strides[-2:] in ((shape[-1], 1), (1, shape[-2]))


def _fused_away(graph: Graph) -> set[str]:
    """Return the arrays inside chains of elementwise operations, which are never stored."""
    maker = {name: number for number, node in enumerate(graph.nodes) for name in node.outputs}
    readers: dict[str, list[int]] = defaultdict(list)
    for number, node in enumerate(graph.nodes):
        for name in node.inputs:
            readers[name].append(number)
    ends = {*graph.returned, *graph.gradients}
    chain: dict[int, int] = {}
    for last in reversed(range(len(graph.nodes))):
        if last not in chain and graph.nodes[last].name in ELEMENTWISE:
            for number in _chain(graph, last, maker, readers, ends, chain):
                chain[number] = last
    # An array that is broadcast belongs to the chain that reads the broadcast.
    inner = set()
    for number, own in chain.items():
        name = graph.nodes[number].outputs[0]
        into = [r for reader in readers[name] for r in _behind_broadcast(graph, reader, readers)]
        if name not in ends and into and all(chain.get(reader) == own for reader in into):
            inner.add(name)
    return inner


def _behind_broadcast(graph: Graph, reader: int, readers: dict[str, list[int]]) -> list[int]:
    node = graph.nodes[reader]
    return readers[node.outputs[0]] if node.name == "Broadcast" else [reader]


def _chain(
    graph: Graph,
    last: int,
    maker: dict[str, int],
    readers: dict[str, list[int]],
    ends: set[str],
    taken: dict[int, int],
) -> set[int]:
    """Return the elementwise nodes that compiling joins with node `last`."""
    found: set[int] = set()
    passed: set[int] = set()
    waiting = [(last, 0)]
    while waiting:
        number, depth = waiting.pop()
        node = graph.nodes[number]
        is_broadcast = node.name == "Broadcast"
        if (
            number in taken
            or number in passed
            or depth >= DEEPEST_FUSION
            or not (is_broadcast or node.name in ELEMENTWISE)
        ):
            continue
        name = node.outputs[0]
        if depth and not is_broadcast and (name in ends or not passed.issuperset(readers[name])):
            continue
        passed.add(number)
        if not is_broadcast:
            found.add(number)
        waiting += [(maker[source], depth + 1) for source in node.inputs if source in maker]
    return found


def _live(graph: Graph, buffers: _Buffers, lag: int) -> Iterator[tuple[int, int, int]]:
    """Yield each node's number, the bytes that are allocated when it has been prepared, and how many dispatches were before."""
    live, dispatches = 0, 0
    waiting: list[tuple[int, int]] = []  # (dispatch whose end frees it, bytes)
    readers_so_far: dict[str, int] = defaultdict(int)
    donated: set[str] = set()
    for number, node in enumerate(graph.nodes):
        while waiting and waiting[0][0] + lag <= dispatches:
            live -= heapq.heappop(waiting)[1]
        made = [name for name in node.outputs if buffers.of[name] == name and buffers.size.get(name)]
        for name in made:
            given = _donor(node, name, number, buffers, readers_so_far)
            if given is not None:
                donated.add(given)
                live -= buffers.size[given]
            live += buffers.size[name]
        if buffers.copied[number]:
            live += buffers.copied[number]
            heapq.heappush(waiting, (dispatches, buffers.copied[number]))
        yield number, live, dispatches
        is_view = all(buffers.of[name] != name for name in node.outputs)  # which holds no buffer while it waits
        for buffer in {buffers.of[name] for name in (*node.inputs, *made)}:
            readers_so_far[buffer] += buffer not in made and not is_view
            ends_here = buffers.last_reader[buffer] == number
            if ends_here and buffer not in donated and buffers.size.get(buffer):
                heapq.heappush(waiting, (dispatches, buffers.size[buffer]))
        dispatches += 2 if made else int(is_view)


def _donor(node: Node, name: str, number: int, buffers: _Buffers, readers_so_far: dict[str, int]) -> str | None:
    """Return the buffer that a result can take over from an input, if there is one."""
    if node.name not in DONATES:
        return None
    for source in node.inputs:
        buffer = buffers.of[source]
        alone = buffers.last_reader[buffer] == number and not readers_so_far[buffer]
        if alone and buffers.size.get(buffer) == buffers.size[name]:
            return buffer
    return None


@lru_cache(maxsize=4096)
def _row_strides(shape: Shape) -> Shape:
    """Return the strides, in numbers, of a row-major array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _reshaped(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Return the strides with which an array can be viewed in another shape, None if it must be copied."""
    old = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    found = [0] * len(new)
    axes = [axis for axis, size in enumerate(new) if size != 1]
    if math.prod(shape) == 0:
        return _row_strides(new)
    while axes:
        if not old:
            return None
        group, size = [old.pop(0)], new[axes[0]]
        together = [axes.pop(0)]
        total = group[0][0]
        while total != size:
            if total < size:
                if not old or group[-1][1] != old[0][0] * old[0][1]:
                    return None
                group.append(old.pop(0))
                total *= group[-1][0]
            else:
                together.append(axes.pop(0))
                size *= new[together[-1]]
        stride = group[-1][1]
        for axis in reversed(together):
            found[axis] = stride
            stride *= new[axis]
    return tuple(found)
