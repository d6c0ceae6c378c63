"""Compute the rows of several adapters with one product of their frozen base, while they are trained.

    before   self_attn.q_proj: Linear | QuantizedLinear        in each run's own model: LoRALinear around it
    after    self_attn.q_proj: StackedLinear(linear: the base's layer, adapters: {"run0": its layer, "run2": its layer})

    before   mlp.switch_mlp: SwitchGLU                          in each run's own model: the same, with adapted experts
    after    mlp.switch_mlp: Apart(plain: the base's module, own: {"run0": its module, ...})

A joint batch has all rows of one run after those of another, and `RowRouting` says how many each has. A stacked layer multiplies all
rows by the base at once, and adds to each row the update of its own run. The adapter layers are the very objects of the runs' own
models: who hands out new factors to a run's model changes them here, too. A mixture's experts get their rows sorted by expert, so a
module with adapted experts is called for each run's rows by itself.

Several LoRA layers (rsLoRA and LoRA+ are LoRA here), QA-LoRA or DoRA layers that drop nothing are one product: their factors are
stacked, lower ranks are filled up with zeros, and each row reads the pair of its own run. All other layers of one kind, and those
with dropout, whose mask depends on a batch's own shape, are called one by one. No row reads another run's factors, not even to multiply
them by zero, so an infinite factor of one run never reaches another run.

Shapes: U rows of a joint batch, T its columns, P its slots for trained targets; n runs of a product, r their highest rank; in, out of
the layer. Source: S-LoRA, arXiv 2311.03285, and Punica, arXiv 2310.18547 (serving); mLoRA, arXiv 2312.02515 (training).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import LINEAR, SWITCH, AdapterLayer
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.lora import (
    DoRALinear,
    DoRASwitchLinear,
    LoRALinear,
    LoRASwitchLinear,
    QALoRALinear,
    QALoRASwitchLinear,
)
from mlx_lora.adapters.qat import FakeQuantized
from mlx_lora.utils import device

STACKABLE = (LoRALinear, DoRALinear, QALoRALinear)
EXPERTS = (LoRASwitchLinear, DoRASwitchLinear, QALoRASwitchLinear)
# Arrays that only some methods have, and that the joint product does not know.
OWN_ARRAYS = ("lora_e", "start_a", "fixed_a")

# Rows


@dataclass(frozen=True)
class Share:
    """The part of a joint batch that belongs to one run.

    Attributes:
        run: its number.
        rows, width, slots: the shape (B, T, P) of its own batch.
    """

    run: int
    rows: int
    width: int
    slots: int


@dataclass
class RowRouting:
    """Tells all stacked layers of a model whose rows the next call has.

    Attributes:
        shares: in the order of the rows; empty: the rows belong to no run, and only the base computes.
        keys: run -> the state of its random stream, from which a layer with dropout draws.
    """

    shares: Sequence[Share] = ()
    keys: dict[int, mx.array] = field(default_factory=dict)

    @contextmanager
    def to(self, shares: Sequence[Share], keys: dict[int, mx.array]) -> Iterator[None]:
        """Give the rows of the calls inside the context to these runs, and draw from their keys, which change."""
        self.shares, self.keys = shares, keys
        try:
            yield
        finally:
            self.shares, self.keys = (), {}

    def draw(self, run: int) -> mx.array:
        """Return a random key for a dropout layer, as `Dropout.draw` does if the process has the run's random state."""
        self.keys[run], own = mx.random.split(self.keys[run])
        return mx.random.randint(0, 2**31 - 1, (2,), key=own).astype(mx.uint32)

    def lengths(self, shape: tuple[int, ...]) -> tuple[int, list[int]]:
        """Return the axis along which the runs' parts follow each other, and how long each part is.

        Args:
            shape: of an activation: (U, T, ...), or (U T, ...); or if only the trained positions are computed (1, P, ...) or
                (P, ...).

        Raises:
            ValueError: it has none of these forms.
        """
        rows, width = sum(s.rows for s in self.shares), max(s.width for s in self.shares)
        slots = sum(s.slots for s in self.shares)
        if shape[0] == rows:
            return 0, [s.rows for s in self.shares]
        if shape[:2] == (1, slots):
            return 1, [s.slots for s in self.shares]
        if shape[0] == rows * width:
            return 0, [s.rows * width for s in self.shares]
        if shape[0] == slots:
            return 0, [s.slots for s in self.shares]
        raise ValueError(f"an activation {shape} of a joint batch with {rows} rows of {width} and {slots} slots")


def parts_of(x: mx.array, lengths: Sequence[int], axis: int = 0) -> list[mx.array]:
    """Cut an array into parts. Unlike that of `mx.split`, the gradient is put together once, and not once for each part."""
    if len(lengths) == 1:
        return [x]
    ends = list(accumulate(lengths))[:-1]

    @mx.custom_function
    def cut(x: mx.array) -> Any:
        return mx.split(x, ends, axis)

    @cut.vjp
    def cut_vjp(primals: Any, cotangents: Any, outputs: Any) -> mx.array:
        return mx.concatenate(list(cotangents), axis)

    parts: Any = cut(x)
    return list(parts)


# Layers


def _key(run: int) -> str:
    """Return a run's name in a tree of modules, where a number would be a place in a list."""
    return f"run{run}"


class StackedLinear(nn.Module):
    """A frozen linear layer plus, for each row, the update of its own run's adapter layer."""

    def __init__(self, linear: nn.Module, adapters: Mapping[int, AdapterLayer], routing: RowRouting):
        super().__init__()
        self.linear = linear
        self.adapters = {_key(run): layer for run, layer in adapters.items()}
        self._routing = routing

    def layer_of(self, run: int) -> AdapterLayer | None:
        """Return a run's layer, None if it does not adapt this one."""
        return self.adapters.get(_key(run))

    def dropping(self) -> list[int]:
        """Return the runs of the next call whose layer drops features, in the order of their rows."""
        layers = [(share.run, self.layer_of(share.run)) for share in self._routing.shares]
        return [run for run, layer in layers if layer is not None and layer.dropout.active]

    def __call__(self, x: mx.array, keys: Sequence[mx.array] | None = None) -> mx.array:
        """Apply the layer.

        Args:
            x: (U, T, in), or another form that `RowRouting.lengths` knows.
            keys: random keys for the runs that `dropping` returns; None: new ones are drawn.
        """
        y = self.linear(x)
        shares = self._routing.shares
        if not any(self.layer_of(share.run) for share in shares):
            return y
        dropping = self.dropping()
        drawn = dict(zip(dropping, map(self._routing.draw, dropping) if keys is None else keys, strict=True))
        axis, lengths = self._routing.lengths(x.shape)
        parts = list(zip(shares, lengths, strict=True))
        spans = [list(span) for _, span in groupby(parts, lambda part: self._kind(part[0].run, x, axis))]
        sizes = [sum(length for _, length in span) for span in spans]
        pieces = zip(spans, parts_of(y, sizes, axis), parts_of(x, sizes, axis), strict=True)
        updated = [self._span(span, own_y, own_x, drawn, axis) for span, own_y, own_x in pieces]
        return updated[0] if len(updated) == 1 else mx.concatenate(updated, axis)

    def _kind(self, run: int, x: mx.array, axis: int) -> Any:
        """Return what the rows of neighboring runs must have in common to be one product."""
        layer = self.layer_of(run)
        if layer is None:
            return None
        gathers = x.dtype == mx.float32 or device.multiplies_16_bit_experts()
        own = layer.dropout.active or any(name in layer for name in OWN_ARRAYS)
        if own or axis or x.ndim < 3 or not gathers:
            return run  # a product of its own
        return next(kind for kind in STACKABLE if isinstance(layer, kind)).__name__

    def _span(
        self, span: list[tuple[Share, int]], y: mx.array, x: mx.array, keys: dict[int, mx.array], axis: int
    ) -> mx.array:
        """Return the output of the rows of some runs, which one product computes."""
        layers = [layer for share, _ in span if (layer := self.layer_of(share.run)) is not None]
        if not layers:
            return y
        if len(layers) == 1:
            return _alone(layers[0], y, x, span[0][0], keys.get(span[0][0].run), axis)
        numbers = mx.array(np.repeat(np.arange(len(span), dtype=np.uint32), [length for _, length in span]))  # (U,)
        if isinstance(layers[0], DoRALinear):
            return self._turned(layers, numbers, y, x)
        if isinstance(layers[0], QALoRALinear):
            x = layers[0].pooled(x)
        return _updated(layers, numbers, y, x)

    def _turned(self, layers: list[Any], numbers: mx.array, y: mx.array, x: mx.array) -> mx.array:
        """Return the output of DoRA layers: see DoRALinear, of which this is the computation for several."""
        bias = self.linear.bias if "bias" in self.linear else None
        turned = _updated(layers, numbers, y if bias is None else y - bias, x)
        a, b = (mx.stop_gradient(factor) for factor in _factors(layers))  # (n, in, r), (n, r, out) with the scale
        across = self.linear(a.swapaxes(1, 2).astype(x.dtype))  # (n, r, out)
        across = (across if bias is None else across - bias).astype(mx.float32)
        squares = layers[0]._squares + (b * (2 * across + (a.swapaxes(1, 2) @ a) @ b)).sum(axis=1)  # (n, out)
        gains = mx.stack([layer.m for layer in layers]) / mx.sqrt(mx.maximum(squares, 1e-30))
        turned = turned * gains.astype(x.dtype)[numbers].reshape(len(numbers), *[1] * (x.ndim - 2), -1)
        return turned if bias is None else turned + bias


class Apart(nn.Module):
    """Calls for each run's rows its own module, which is this one with adapted experts."""

    def __init__(self, plain: nn.Module, own: Mapping[int, nn.Module], routing: RowRouting):
        super().__init__()
        self.plain = plain
        self.own = {_key(run): module for run, module in own.items()}
        self._routing = routing

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Apply the modules to rows x and the experts of each."""
        shares = self._routing.shares
        if not shares:
            return self.plain(x, indices)
        axis, lengths = self._routing.lengths(x.shape)
        pieces = zip(
            shares, parts_of(x, lengths, axis), mx.split(indices, list(accumulate(lengths))[:-1], axis), strict=True
        )
        return mx.concatenate([self.own.get(_key(s.run), self.plain)(one, which) for s, one, which in pieces], axis)


def _alone(layer: Any, y: mx.array, x: mx.array, share: Share, key: mx.array | None, axis: int) -> mx.array:
    """Return the output of one run's layer; one that drops features gets the columns of the run's own batch."""
    columns = x.shape[1] if x.ndim > 2 and not axis else 0
    if key is None or columns <= share.width:
        return layer.onto(y, x, key)
    own = layer.onto(y[:, : share.width], x[:, : share.width], key)
    return mx.concatenate([own, y[:, share.width :]], axis=1)


def _factors(layers: Sequence[AdapterLayer]) -> tuple[mx.array, mx.array]:
    """Return the layers' factors, (n, in, r) and (n, r, out), the second times the scale; ranks that are missing are zero."""
    most = max(layer.rank for layer in layers)

    def filled(factor: mx.array, axis: int) -> mx.array:
        missing = most - factor.shape[axis]
        return mx.pad(factor, [(0, missing * (axis == 0)), (0, missing * (axis == 1))]) if missing else factor

    a = mx.stack([filled(layer.lora_a, 1) for layer in layers])
    return a, mx.stack([filled(layer.scale * layer.lora_b, 0) for layer in layers])


def _updated(layers: Sequence[AdapterLayer], numbers: mx.array, y: mx.array, x: mx.array) -> mx.array:
    """Return y plus the low-rank product of each row with the layer of its number."""
    a, b = (factor.astype(x.dtype) for factor in _factors(layers))
    z = mx.gather_mm(x, a, rhs_indices=numbers)  # (U, T, r)
    return y + mx.gather_mm(z, b, rhs_indices=numbers)


# Models


def unstackable(model: nn.Module) -> str | None:
    """Return why the rows of an adapted model cannot share a product with others', in a few words; None: they can."""
    layers = adapter_layers(model)
    trained = {f"{path}.{name}" for path, layer in layers.items() for name in layer.trained}
    whole = [name for name, _ in tree_flatten(model.trainable_parameters()) if name not in trained]
    if whole:
        return f"it trains {whole[0]}, a part of the base"
    for path, layer in layers.items():
        if isinstance(layer, FakeQuantized):
            return "it trains with the rounding of its fused weights (--qat)"
        if not isinstance(layer, STACKABLE + EXPERTS):
            return f"it adapts {path}, {'an embedding' if layer.OVER not in (LINEAR, SWITCH) else 'in another way'}"
        if isinstance(layer, EXPERTS) and layer.dropout.probability:
            return "it drops inputs of experts"
    return None


def stack_adapters(model: nn.Module, runs: Mapping[int, nn.Module]) -> RowRouting:
    """Put the adapters of several runs on one model.

    Args:
        model: without an adapter; changed in place. Its trainable parameters are then those of all runs.
        runs: number -> the adapted model of a run, whose rows can be stacked (`unstackable`).
    """
    model.freeze()
    routing, modules = RowRouting(), dict(model.named_modules())
    linear: dict[str, dict[int, AdapterLayer]] = {}
    experts: dict[str, dict[int, nn.Module]] = {}
    for run, own in runs.items():
        own_modules = dict(own.named_modules())
        for path, layer in adapter_layers(own).items():
            if layer.OVER is SWITCH:
                parent = path.rpartition(".")[0]
                experts.setdefault(parent, {})[run] = own_modules[parent]
            else:
                linear.setdefault(path, {})[run] = layer
    stacked: list[tuple[str, nn.Module]] = [
        (path, StackedLinear(modules[path], layers, routing)) for path, layers in linear.items()
    ]
    stacked += [(path, Apart(modules[path], own, routing)) for path, own in experts.items()]
    model.update_modules(tree_unflatten(stacked))
    return routing


def holders_of(model: nn.Module) -> list[tuple[str, AdapterLayer, str]]:
    """Return name, layer and attribute of each trained array of an adapted model, in the order of its parameters."""
    layers = adapter_layers(model)
    names = [name for name, _ in tree_flatten(model.trainable_parameters())]
    return [(name, layers[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in names]
