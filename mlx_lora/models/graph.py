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
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
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
        (mx, "segmented_mm"): _segmented_mm,
        (mx, "contiguous"): lambda array, *_, **__: array * 1,
    }
    if (
        device.compiles_kernels()
    ):  # those of kernels/activations.py: one node each, as they run, instead of what replaces them
        functions |= {
            (exponentials, "usable"): lambda *arrays: all(array.dtype == mx.float32 for array in arrays),
            (exponentials, "exp_minus"): lambda x: _kernel(x, x),
            (exponentials, "gated_silu"): _gated_silu,
        }
    with exchanged(functions), device.uncompiled():  # MLX cannot list separately compiled functions either
        yield cuts


def _segmented_mm(a: mx.array, b: mx.array, segments: mx.array) -> mx.array:
    return _kernel(((len(segments), a.shape[0], b.shape[1]), a.dtype), a, b, segments)


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
        return [d_a.reshape(a.shape) if d_a.size == a.size else _kernel(a, d_a), _kernel(b, a, cotangent)]

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
    slope, silu = _kernel(gate, up, gate), _kernel(gate, gate)  # two nodes: what reads the same is merged
    # One kernel makes both, so the forward pass has the slope too.
    return mx.depends(silu * up, slope), slope, silu


def _kernel(like: mx.array | tuple[Shape, mx.Dtype], *reads: mx.array) -> mx.array:
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
    return _kernel((shape, made), weight, scales)


def _normed(x: mx.array, weight: mx.array | None, eps: float) -> mx.array:
    norm = mx.custom_function(lambda x, *weights: _kernel(x, x, *weights))

    def backward(primals: Any, cotangent: mx.array, _: mx.array) -> Arrays:
        x, *weights = primals if isinstance(primals, (list, tuple)) else [primals]
        return [_kernel(x, cotangent, x), *map(_like, weights)]

    norm.vjp(backward)
    return norm(x) if weight is None else norm(x, weight)


def _rotated(x: mx.array, *_: Any, **__: Any) -> mx.array:
    rotation = mx.custom_function(lambda x: _kernel(x, x))
    rotation.vjp(lambda primal, cotangent, _: _kernel(primal, cotangent))
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
