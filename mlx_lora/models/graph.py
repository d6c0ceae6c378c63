"""List the graph of a function and its gradient, with the shape of every array, without computing anything.

MLX builds graphs lazily and can list one (`mx.export_function`), but not the functions that have their own backward pass
(`mx.custom_function`). Each call of such a function is therefore cut out: its outputs become inputs of the rest, and what
its backward pass returns becomes a cotangent of the rest.

    inputs -> rest -> p_1 | f_1 | o_1 -> rest -> p_2 | f_2 | o_2 -> rest -> outputs

The gradient of the rest, with the o and the cotangents of the p as inputs, is listed together with every f and its
backward pass; then the cuts are joined by name.
"""

from __future__ import annotations

import gc
import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_lora.compat.functions import Place, exchanged, original
from mlx_lora.kernels import activations as exponentials
from mlx_lora.utils import device

Arrays = list[mx.array]
Shape = tuple[int, ...]


class Node(NamedTuple):
    """One operation.

    Attributes:
        name: MLX's, such as `Matmul`.
        arguments: its parameters, such as axes.
        inputs, outputs: names of arrays.
    """

    name: str
    arguments: list[Any]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class ArrayInfo(NamedTuple):
    """The shape of an array and the bytes per number."""

    shape: Shape
    number_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its numbers."""
        return math.prod(self.shape) * self.number_bytes


@dataclass(frozen=True)
class Graph:
    """A function and its gradient.

    Attributes:
        nodes: in an order in which they can be computed.
        arrays: name -> shape and size, of inputs, constants and the outputs of nodes.
        inputs: names of the function's arguments.
        returned: names of the function's outputs.
        gradients: names of the gradients.
    """

    nodes: list[Node]
    arrays: dict[str, ArrayInfo]
    inputs: tuple[str, ...]
    returned: tuple[str, ...]
    gradients: tuple[str, ...]


def gradient_graph(function: Callable[[Arrays, Arrays], Arrays], varied: Arrays, fixed: Arrays) -> Graph:
    """Return the graph of `function(varied, fixed)` and of its gradient with respect to `varied`.

    Args:
        function: returns float arrays; it is called several times with arrays that have no values.
        varied: the arrays to differentiate for; only shapes and dtypes are read.
        fixed: the other arrays that the function reads. If it reads an array that is not given here, the graph includes
            the operations that make that array.

    Raises:
        ValueError, RuntimeError: the function reads values, or uses an operation that MLX cannot list.
    """
    with _cutting() as cuts:
        cuts.begin(None)
        returned = function(varied, fixed)
        made = [[_like(array) for array in call.outputs] for call in cuts.calls]
        pulled = [[_like(array) for array in call.primals] for call in cuts.calls]
        groups = [varied, fixed, [_like(array) for array in returned], _flat(made), _flat(pulled)]

        def whole(*arrays: mx.array) -> Arrays:
            varied, fixed, cotangents, made_, pulled_ = _parts(arrays, groups)
            return _differentiated(
                function, varied, fixed, cotangents, _parts(made_, made), _parts(pulled_, pulled), cuts
            )

        listing = _Listing()
        mx.export_function(listing.add, whole, *_flat(groups))
    cut = len(groups[0]) + len(groups[1]) + len(groups[2])
    return _joined(listing, cut, len(returned), len(varied))


def plain_graph(function: Callable[..., Arrays], arrays: Arrays) -> Graph:
    """Return the graph of a function that is not differentiated; arguments and errors as of `gradient_graph`."""
    with _cutting() as cuts:
        cuts.inside = True
        listing = _Listing()
        mx.export_function(listing.add, function, *arrays)
    return _joined(listing, len(arrays), len(listing.outputs), 0)


@contextmanager
def uncollected() -> Iterator[None]:
    """Put off Python's garbage collection inside the block.

    A graph is tens of thousands of small objects which all stay; looking for garbage among them, and among all that the imported
    libraries hold, takes longer than making them.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass
class _Call:
    """One call of a custom function: the function with its backward pass, its inputs and outputs."""

    function: _CustomFunction
    primals: Arrays
    outputs: Arrays
    is_list: bool


@dataclass
class _Cuts:
    """Records the calls of custom functions, in order, while a graph is listed."""

    calls: list[_Call] = field(default_factory=list)
    stand_ins: list[Arrays] | None = None
    returns_list: list[bool] = field(default_factory=list)
    inside: bool = False

    def begin(self, stand_ins: list[Arrays] | None) -> None:
        """Start a pass over the function.

        Args:
            stand_ins: what each call returns in this pass; None: each custom function is called.
        """
        if self.stand_ins is None:
            self.returns_list = [call.is_list for call in self.calls]
        self.calls, self.stand_ins = [], stand_ins

    def enter(self, function: _CustomFunction, primals: Sequence[Any]) -> Any:
        """Record a call of a custom function; a call inside another one counts as plain operations."""
        if self.inside:
            return function.forward(*primals)
        if self.stand_ins is None:
            made = self.uncut(function.forward, *primals)
            is_list = isinstance(made, (list, tuple))
            outputs = list(made) if is_list else [made]
        else:
            outputs, is_list = self.stand_ins[len(self.calls)], self.returns_list[len(self.calls)]
        self.calls.append(_Call(function, list(primals), outputs, is_list))
        return _one_or_all(list(outputs), is_list)

    def uncut(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function without cutting out the custom functions inside it."""
        self.inside = True
        try:
            return function(*arguments)
        finally:
            self.inside = False


class _CustomFunction:
    """A replacement for `mx.custom_function` while a graph is listed."""

    cuts: _Cuts

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward, self.backward = forward, forward

    def vjp(self, backward: Callable[..., Any]) -> _CustomFunction:
        """Set the backward pass, as mlx's decorator does."""
        self.backward = backward
        return self

    def __call__(self, *primals: Any) -> Any:
        return self.cuts.enter(self, primals)


@contextmanager
def _cutting() -> Iterator[_Cuts]:
    """Replace `mx.custom_function` inside the block; functions that use it look it up when they are called."""
    cuts = _Cuts()
    cut_function = type("_CutFunction", (_CustomFunction,), {"cuts": cuts})
    functions: dict[Place, Callable[..., Any]] = {
        (mx, "custom_function"): cut_function,
        (mx, "gather_mm"): partial(_gather_mm, original(mx, "gather_mm"), cut_function),
        # MLX can list neither a product of segments nor a copy.
        (mx, "segmented_mm"): lambda a, b, segments: one_kernel(
            ((len(segments), a.shape[0], b.shape[1]), a.dtype), a, b, segments
        ),
        (mx, "contiguous"): lambda array, *_, **__: array * 1,
    }
    if (
        device.compiles_kernels()
    ):  # those of kernels/activations.py: one node each, as they run, instead of what replaces them
        functions |= {
            (exponentials, "usable"): lambda *arrays: all(array.dtype == mx.float32 for array in arrays),
            (exponentials, "exp_minus"): lambda x: one_kernel(x, x),
            (exponentials, "gated_silu"): _gated_silu,
        }
    with exchanged(functions), device.uncompiled():  # MLX cannot list separately compiled functions either
        yield cuts


def _gather_mm(
    theirs: Callable[..., mx.array],
    cut_function: type[_CustomFunction],
    a: mx.array,
    b: mx.array,
    *indices: Any,
    **named: Any,
) -> mx.array:
    """Multiply as `mx.gather_mm` does, with a gradient for the matrices that MLX can list.

    That gradient is an array of the right shape which reads the same inputs; this is enough to count memory. Inside of
    another custom function, MLX differentiates the product itself: zeros are the gradient then, and what adds them up counts.
    """
    if cut_function.cuts.inside:
        return mx.depends([theirs(a, mx.stop_gradient(b), *indices, **named)], [b])[0]
    product = cut_function(lambda a, b: theirs(a, b, *indices, **named))

    def backward(primals: Arrays, cotangent: mx.array, _: mx.array) -> Arrays:
        a, b = primals
        d_a = theirs(cotangent, b.swapaxes(-1, -2), *indices, **named)
        return [d_a.reshape(a.shape) if d_a.size == a.size else one_kernel(a, d_a), one_kernel(b, a, cotangent)]

    return product.vjp(backward)(a, b)


def as_on_gpu() -> AbstractContextManager:
    """List graphs on a CPU as they are on a GPU inside the block, where single kernels replace several operations."""
    return exchanged(
        {
            (device, "keep_exponentials"): lambda: False,
            (mx, "dequantize"): _dequantized,
            (mx.fast, "rms_norm"): _normed,
            (mx.fast, "rope"): _rotated,
        }
    )


def _gated_silu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    slope, silu = one_kernel(gate, up, gate), one_kernel(gate, gate)  # two nodes: what reads the same is merged
    # One kernel makes both, so the forward pass has the slope too.
    return mx.depends(silu * up, slope), slope, silu


def one_kernel(like: mx.array | tuple[Shape, mx.Dtype], *reads: mx.array) -> mx.array:
    """Return an array that stands for one kernel's result: it has the shape of `like`, and depends on `reads`."""
    shape, dtype = like if isinstance(like, tuple) else (like.shape, like.dtype)
    first, *others = reads
    made = mx.full(shape, first[(0,) * first.ndim].astype(dtype))
    return mx.depends(made, others) if others else made


def _dequantized(
    weight: mx.array, scales: mx.array, *arrays: Any, bits: int | None = None, dtype: mx.Dtype | None = None, **_: Any
) -> mx.array:
    shape = (*weight.shape[:-1], weight.shape[-1] * 32 // (bits or 4))
    made = dtype or (scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else mx.bfloat16)
    return one_kernel((shape, made), weight, scales)


def _normed(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    x = x if weight is None else x.astype(mx.result_type(x, weight))
    norm = mx.custom_function(lambda x, *weights: one_kernel(x, x, *weights))

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Arrays:
        x, *weights = primals if isinstance(primals, (list, tuple)) else [primals]
        return [one_kernel(x, cotangent, x), *map(_like, weights)]

    norm.vjp(backward)
    return norm(x) if weight is None else norm(x, weight)


def _rotated(x: mx.array, *_: Any, **__: Any) -> mx.array:
    rotation = mx.custom_function(lambda x: one_kernel(x, x))
    rotation.vjp(lambda primal, cotangent, _: one_kernel(primal, cotangent))
    return rotation(x)


def _differentiated(
    function: Callable[[Arrays, Arrays], Arrays],
    varied: Arrays,
    fixed: Arrays,
    cotangents: Arrays,
    made: list[Arrays],
    pulled: list[Arrays],
    cuts: _Cuts,
) -> Arrays:
    """Return outputs, gradients, and, for each cut, what its function and its backward pass return."""

    def rest(*arrays: mx.array) -> Arrays:
        own, stand_ins = _parts(arrays, [varied, _flat(made)])
        cuts.begin(_parts(stand_ins, made))
        returned = function(own, fixed)
        return [*returned, *_flat([call.primals for call in cuts.calls])]

    outputs, gradients = mx.vjp(rest, [*varied, *_flat(made)], [*cotangents, *_flat(pulled)])
    returned, primals = _parts(outputs, [cotangents, _flat(pulled)])
    own, asked = _parts(gradients, [varied, _flat(made)])
    forward: Arrays = []
    backward: Arrays = []
    calls = zip(cuts.calls, _parts(primals, pulled), _parts(asked, made), made, strict=True)
    for call, inputs, d_outputs, outputs_ in calls:
        again = cuts.uncut(call.function.forward, *inputs)
        forward += list(again) if call.is_list else [again]
        # mlx passes a single array as it is, several as a list.
        given = (_one_or_all(part, call.is_list) for part in (d_outputs, outputs_))
        pulled_back = cuts.uncut(call.function.backward, inputs[0] if len(inputs) == 1 else inputs, *given)
        backward += list(pulled_back) if isinstance(pulled_back, (list, tuple)) else [pulled_back]
    return [*returned, *own, *forward, *backward]


@dataclass
class _Listing:
    """Collects what `mx.export_function` reports."""

    arrays: dict[str, ArrayInfo] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    def add(self, part: dict[str, Any]) -> None:
        """Add one part of the listing."""
        kind = part["type"]
        if kind == "primitive":
            self.nodes.append(
                Node(part["name"], part["arguments"], self._named(part["inputs"]), self._named(part["outputs"]))
            )
        elif kind == "inputs":
            self.inputs = list(self._named(part["inputs"]))
        elif kind == "outputs":
            self.outputs = list(self._named(part["outputs"]))
        elif kind == "constants":
            for name, array in part["constants"]:
                self.arrays[name] = ArrayInfo(tuple(array.shape), array.dtype.size)

    def _named(self, entries: list[tuple[str, Shape, mx.Dtype]]) -> tuple[str, ...]:
        arrays = self.arrays
        for name, shape, dtype in entries:
            if name not in arrays:  # an array is listed again by every operation that reads it
                arrays[name] = ArrayInfo(tuple(shape), dtype.size)
        return tuple([entry[0] for entry in entries])


def _joined(listing: _Listing, first_cut: int, returned: int, varied: int) -> Graph:
    """Return the graph with cuts joined, unused nodes removed, and repeated computations merged, as compiling does."""
    real = returned + varied
    names = dict(zip(listing.inputs[first_cut:], listing.outputs[real:], strict=True))

    def name_of(array: str) -> str:
        while array in names:
            array = names[array]
        return array

    outputs = [name_of(array) for array in listing.outputs[:real]]
    maker = {array: node for node in listing.nodes for array in node.outputs}
    seen: dict[tuple, tuple[str, ...]] = {}
    nodes: list[Node] = []
    for node in _in_order(outputs, maker, names):
        inputs = tuple(map(name_of, node.inputs))
        shapes = tuple([listing.arrays[array] for array in node.outputs])
        key = (node.name, repr(node.arguments), inputs, shapes)
        if key in seen and node.name != "RandomBits":
            names.update((a, b) for a, b in zip(node.outputs, seen[key], strict=True) if a != b)
            continue
        seen[key] = node.outputs
        nodes.append(Node(node.name, node.arguments, inputs, node.outputs))
    outputs = [name_of(array) for array in outputs]
    return Graph(
        nodes, listing.arrays, tuple(listing.inputs[:first_cut]), tuple(outputs[:returned]), tuple(outputs[returned:])
    )


def _in_order(outputs: list[str], maker: dict[str, Node], names: dict[str, str]) -> Iterator[Node]:
    """Yield the nodes that `outputs` need, inputs first; `names` says what an array is called now, and grows meanwhile."""
    done: set[int] = set()
    for output in outputs:
        waiting = [maker[output]] if output in maker else []
        while waiting:
            node = waiting[-1]
            if id(node) in done:
                waiting.pop()
                continue
            before = []
            for name in reversed(node.inputs):
                while name in names:
                    name = names[name]
                made_by = maker.get(name)
                if made_by is not None and id(made_by) not in done:
                    before.append(made_by)
            if before:
                waiting += before
            else:
                done.add(id(waiting.pop()))
                yield node


def _like(array: mx.array) -> mx.array:
    """Return an array of the same shape and dtype, whose values are never read."""
    return mx.zeros(array.shape, array.dtype)


def _one_or_all(arrays: Arrays, is_list: bool) -> Any:
    return arrays if is_list else arrays[0]


def _flat(groups: Sequence[Arrays]) -> Arrays:
    return [array for group in groups for array in group]


def _parts(arrays: Sequence[mx.array], like: Sequence[Sequence[Any]]) -> list[Arrays]:
    """Split a list into parts that are as long as those of `like`."""
    rest = iter(arrays)
    return [[next(rest) for _ in group] for group in like]


# Count the memory of a graph: which arrays get a buffer, what the backward pass reads of the forward pass, the peak.
#
# It follows MLX's rules:
#
#     views        reshape, transpose, slice, split ... share their input's buffer if strides allow it
#     fusion       compiling joins a chain of elementwise operations, and only stores what other operations read
#     donation     an elementwise result takes over the buffer of an input that nothing else reads, also through a view of it
#     lag          MLX prepares operations ahead of those that run, and frees an input when the last operation that reads
#                  it has run, up to `lag` dispatches later. A CPU's stream gets a dispatch for an operation and one that lets go of its
#                  inputs; a view has the second alone
#
# Sizes are in bytes.

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
    buffers = Buffers(graph, fuses)
    forward = needed_for(graph, graph.returned)
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
    needed = needed_for(graph, graph.returned)
    nodes = [node for number, node in enumerate(graph.nodes) if number in needed]
    alone = replace(graph, nodes=nodes, gradients=())
    return max((live for _, live, _ in _live(alone, Buffers(alone, fuses), lag)), default=0)


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


def needed_for(graph: Graph, names: tuple[str, ...]) -> set[int]:
    """Return the numbers of all nodes that are needed to compute some arrays."""
    needed, found = set(names), set()
    for number in reversed(range(len(graph.nodes))):
        node = graph.nodes[number]
        if not needed.isdisjoint(node.outputs):
            found.add(number)
            needed.update(node.inputs)
    return found


class Buffers:
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
        self.strides = {name: row_strides(info.shape) for name, info in graph.arrays.items()}
        self.size: dict[str, int] = {}
        self.maker: dict[str, int] = {}
        self.copied: dict[int, int] = defaultdict(int)
        self.last_reader: dict[str, int] = {}
        inner = fused_chains(graph)[1] if fuses else set()
        for number, node in enumerate(graph.nodes):
            for index, name in enumerate(node.outputs):
                view = self._view(node, index)
                if view is None:
                    self.size[name], self.maker[name] = (0 if name in inner else self.arrays[name].nbytes), number
                else:
                    self.of[name], self.strides[name] = self.of[view[0]], view[1]
            if node.name in PRODUCTS:
                self.copied[number] = sum(self.arrays[a].nbytes for a in node.inputs[:2] if not self.multiplies(a))
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
        if node.name == "View":  # of the bytes, as another dtype
            return source, row_strides(shape)
        return None

    def multiplies(self, name: str) -> bool:
        """Return whether a product can read a matrix with its strides, without copying it."""
        shape, strides = self.arrays[name].shape, self.strides[name]
        return len(shape) < 2 or strides[-2:] in ((shape[-1], 1), (1, shape[-2]))


def fused_chains(graph: Graph) -> tuple[dict[int, int], set[str]]:
    """Return which elementwise operations compiling joins, and the arrays inside of such chains, which are never stored.

    Returns:
        (number of a node -> number of the last node of its chain, names of arrays).
    """
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
    return chain, inner


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
        if depth and not is_broadcast:
            differs = graph.arrays[name].shape != graph.arrays[graph.nodes[last].outputs[0]].shape
            if (name in ends and differs) or not passed.issuperset(readers[name]):
                continue
        passed.add(number)
        if not is_broadcast:
            found.add(number)
        waiting += [(maker[source], depth + 1) for source in node.inputs if source in maker]
    return found


def _live(graph: Graph, buffers: Buffers, lag: int) -> Iterator[tuple[int, int, int]]:
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


def _donor(node: Node, name: str, number: int, buffers: Buffers, readers_so_far: dict[str, int]) -> str | None:
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
def row_strides(shape: Shape) -> Shape:
    """Return the strides, in numbers, of a row-major array."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _reshaped(shape: Shape, strides: Shape, new: Shape) -> Shape | None:
    """Return the strides with which an array can be viewed in another shape, None if it must be copied."""
    old = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    found = [0] * len(new)
    axes = [axis for axis, size in enumerate(new) if size != 1]
    if math.prod(shape) == 0:
        return row_strides(new)
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
