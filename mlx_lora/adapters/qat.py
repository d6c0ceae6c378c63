"""Quantization-aware training: compute with the weights that fusing will write.

An adapter layer adds scale * A B to a quantized weight. Fused, the sum is quantized again, and a small update gets lost in the
steps of the grid. Here the forward pass already computes with the fused weight, in the base's own format (bits, group,
mode), where an affine base keeps its grid (models/quantize.py):

    y = x Q(W + D)^T,   D = the layer's update

so the loss is that of the fused model. The gradient by x is that of Q(W + D). Rounding has no useful gradient. A
straight-through estimator gives the factors the one that they would have without Q:

    y = x stop(Q(W + D))^T + (u - stop(u)),   u = what the layer computes from stop(x)

Affine linear layers and experts have a better gradient. A small update changes no code, and what is left of it is what scales
and biases can follow: in each group, its projection P on the codes and on ones (models/quantize.py). That part has its true
gradient, and the rest, which only counts when a code changes, a share of the straight-through one (docs/development/decisions.md):

    dL/dD = P G + STRAIGHT (1 - P) G,   G = dL/dQ

A layer's dense weight is computed when it is needed, and again in the backward pass. While texts are generated, each
layer holds its fused weight, packed (`hold`).

Source: Bengio et al., arXiv 1308.3432, section 4 (straight-through); LLM-QAT, arXiv 2305.17888; a gradient for the scale,
too: LSQ, arXiv 1902.08153, section 2.1.
Shapes: T positions, E experts, G groups of a row, g numbers of a group; in and out are the base's widths.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import EMBEDDING, QUANTIZED, SWITCH, AdapterLayer, with_weight
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.compat.functions import become, mix_in
from mlx_lora.kernels.quantized_matmul import MEASURED
from mlx_lora.models.quantize import AFFINE, QuantFormat, quantized_like, round_on_grid
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import counted

# A flag in the layer's arrays. A compiled step reads them, so it is traced again when the flags appear.
FLAG = "_fake_quantized"

STRAIGHT = 0.3  # of the gradient that scales and biases cannot follow

RIGHT_FUSED = "was trained with --qat, and is right in its fused form only"
FUSED_ONLY = f"{RIGHT_FUSED}; use fuse, or --to gguf or hf"


@dataclass(frozen=True)
class Product:
    """The product of a kind of layer, and its gradients.

    They are written out: a nested `mx.vjp` would walk the whole step's graph behind the weight, or behind the indices of
    experts, in each layer, only to find that neither gets a gradient there.

    Attributes:
        forward: x, weight -> output.
        by_x, by_weight: x, the output's cotangent, weight -> the gradient.
    """

    forward: Callable[[mx.array, mx.array], mx.array]
    by_x: Callable[[mx.array, mx.array, mx.array], mx.array]
    by_weight: Callable[[mx.array, mx.array, mx.array], mx.array]


PLAIN = Product(
    lambda x, weight: x @ weight.T,
    lambda x, d, weight: d @ weight,
    lambda x, d, weight: d.reshape(-1, d.shape[-1]).T @ x.reshape(-1, x.shape[-1]),
)
"""x (..., in) with (out, in)."""


def _experts_product(indices: mx.array, sorted_indices: bool) -> Product:
    """Return the product of x, (..., 1, in), or (..., 1, 1, in) that the experts of a token share, with (E, out, in).

    Args:
        indices: of the expert of each row, of the output's shape without its last two axes.
        sorted_indices: whether they are in order.
    """
    through = partial(mx.gather_mm, rhs_indices=indices, sorted_indices=sorted_indices)

    def by_x(x: mx.array, d: mx.array, weight: mx.array) -> mx.array:
        rows = through(d, weight)  # (..., 1, in)
        shared = [axis for axis, (of_x, of_rows) in enumerate(zip(x.shape, rows.shape, strict=True)) if of_x < of_rows]
        return rows.sum(axis=shared, keepdims=True) if shared else rows

    def by_weight(x: mx.array, d: mx.array, weight: mx.array) -> mx.array:
        width, of = x.shape[-1], indices.reshape(-1)
        rows = mx.broadcast_to(x.squeeze(-2), (*indices.shape, width)).reshape(-1, width)
        slopes = d.reshape(-1, d.shape[-1])
        if not sorted_indices:
            order = mx.argsort(of)
            rows, slopes, of = rows[order], slopes[order], of[order]
        counts = mx.zeros((len(weight),), mx.uint32).at[of].add(mx.array(1, mx.uint32))
        ends = mx.cumsum(counts)
        segments = mx.stack([ends - counts, ends], axis=1)
        return mx.segmented_mm(slopes.T.astype(mx.float32), rows.astype(mx.float32), segments)

    return Product(lambda x, weight: through(x, weight.swapaxes(-1, -2)), by_x, by_weight)


class SharedInput:
    """The order of layers that read one input (query, key, value; gate, up): each waits for the one before.

    MLX would compute their dense weights side by side, which takes the memory of all of them.

    Attributes:
        slopes: the gradient by the input of the layer that had its backward pass last; empty before the first.
    """

    _latest: tuple[mx.array, mx.array, SharedInput] | None = None

    def __init__(self) -> None:
        self.slopes: list[mx.array] = []

    @classmethod
    def of(cls, x: mx.array) -> tuple[SharedInput, mx.array]:
        """Return the layers that read `x`, and the output to wait for; `x` itself for the first layer."""
        latest = cls._latest
        return (latest[2], latest[1]) if latest is not None and latest[0] is x else (cls(), x)

    def done(self, x: mx.array, y: mx.array) -> None:
        """Note the output of a layer that reads `x`, until another layer or the backward pass begins."""
        SharedInput._latest = (x, y, self)

    def follow(self, by_x: mx.array) -> None:
        """Note a gradient by the input, for which the next layer's backward pass waits."""
        self.slopes, SharedInput._latest = [by_x], None


class FakeQuantized(AdapterLayer):
    """A mixin that comes before an adapter layer's own class: its output is that of the fused and quantized layer.

    What rounding takes away from the factors has never been trained: such an adapter without its rounding is another, and
    mostly broken, model. So all that this layer is asked for is that of its fused form.
    """

    CAST_ONCE = False  # rounds the float32 sum of base and factors
    NOT_IN_PEFT = NOT_IN_GGUF = RIGHT_FUSED
    NOT_FOR_A_ROW = "was trained with --qat"

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if FLAG not in self:
            return super().__call__(x, *args, **kwargs)
        if held := self._held:
            return held[0](x, *args, **kwargs)
        if self.OVER is EMBEDDING:
            # Rows of the fused weight, in which nothing gets a gradient.
            arrays = {name: mx.stop_gradient(mx.depends(array, x)) for name, array in tree_flatten(self.parameters())}
            return _straight_through(_fused_weight(self, arrays)[0][x], super().__call__(x, *args, **kwargs))
        kwargs.pop("key", None)  # there is no dropout
        affine, fixed = self.base.mode == AFFINE, mx.stop_gradient(x)
        if self.OVER is SWITCH:
            y = self._experts(x, *args, **kwargs)
            return y if affine else _straight_through(y, super().__call__(fixed, *args, **kwargs))
        y = self._with_dense(PLAIN, x)
        y = y + self.base.bias if "bias" in self.base else y
        if affine:
            return y
        if self.LAYER_TYPE != "lora":
            return _straight_through(y, super().__call__(fixed))
        # The factors have the same gradient without the product with the base, which has none here.
        a, b = self.effective_factors()
        return _straight_through(y, (fixed @ a.astype(x.dtype)) @ (self.scale * b).astype(x.dtype))

    def _experts(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """Return the output of the fused experts; arguments as of LoRASwitchLinear."""
        y = self._with_dense(_experts_product(indices, sorted_indices), x)
        return y + mx.expand_dims(self.base.bias[indices], -2) if "bias" in self.base else y

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits of a tied head."""
        if FLAG not in self:
            return super().as_linear(x)  # pyright: ignore[reportAttributeAccessIssue] # an embedding's
        if held := self._held:
            return held[0].as_linear(x)
        y = self._with_dense(PLAIN, x, fitted=False)
        return _straight_through(y, super().as_linear(mx.stop_gradient(x)))  # pyright: ignore[reportAttributeAccessIssue] # an embedding's

    def _with_dense(self, product: Product, x: mx.array, *, fitted: bool = True) -> mx.array:
        """Return the product with the fused weight, which the backward pass computes again.

        Args:
            product: of the layer's kind.
            x: floats.
            fitted: give the trained arrays of an affine layer the gradient of the fit (module docstring); else they get none here.
        """
        names, arrays = zip(*tree_flatten(self.parameters()), strict=True)
        siblings, before = SharedInput.of(x)

        def fused(arrays: Sequence[mx.array], after: Sequence[mx.array]) -> tuple[mx.array, mx.array | None]:
            own = dict(zip(names, (mx.depends(array, list(after)) for array in arrays), strict=True))
            weight, codes = _fused_weight(self, own)
            return weight.astype(x.dtype), codes

        @mx.custom_function
        def output(x: mx.array, before: mx.array, *arrays: mx.array) -> mx.array:
            # Depend on x: a checkpointed block's second pass has another x, and is not merged with the first.
            return product.forward(x, fused(arrays, (x, before))[0])

        @output.vjp
        def output_vjp(primals, cotangent, _):
            # Depend on the cotangent: else the weights of all layers would be computed as soon as there is time.
            x, before, *arrays = primals
            weight, codes = fused(arrays, (cotangent, *siblings.slopes))
            by_x, no_slope = product.by_x(x, cotangent, weight), mx.zeros_like(before)
            by_name = {name: mx.zeros_like(array) for name, array in zip(names, arrays, strict=True)}
            if not fitted or codes is None:
                siblings.follow(by_x)
                return (by_x, no_slope, *by_name.values())
            by_update = _through_fit(product.by_weight(x, cotangent, weight).astype(mx.float32), codes)
            trained = {name: array for name, array in zip(names, arrays, strict=True) if name in self.trained}

            def merged(*own: mx.array) -> list[mx.array]:
                given = {**dict(zip(names, arrays, strict=True)), **dict(zip(trained, own, strict=True))}
                return [_without_rounding(self, given).merged()]

            _, found = mx.vjp(merged, list(trained.values()), [by_update])
            by_name |= dict(zip(trained, found, strict=True))
            # The layer before waits for them: they need arrays of the weight's size, which would else pile up.
            [by_x] = mx.depends([by_x], found)
            siblings.follow(by_x)
            return (by_x, no_slope, *by_name.values())

        y = output(x, mx.stop_gradient(before).reshape(-1)[:1], *arrays)
        siblings.done(x, y)
        return y

    def merged(self) -> mx.array:
        if FLAG not in self:
            return super().merged()
        return _fused_weight(self, dict(tree_flatten(self.parameters())))[0].astype(mx.float32)

    def delta(self) -> mx.array:
        return self.merged() - self.weight if FLAG in self else super().delta()

    def finish(self) -> None:
        self.hold()

    def hold(self) -> None:
        """Compute the fused layer once, for generation, until `release`."""
        self._held = (fused_layer(self),)
        mx.eval(self._held[0].parameters())

    def release(self) -> None:
        """Drop what `hold` computed."""
        self._held = ()


def _straight_through(value: mx.array, update: mx.array) -> mx.array:
    """Return `value` with the gradient of `update` in addition to its own.

    `value + update - stop(update)` is the same, and keeps one array more for the backward pass.
    """

    @mx.custom_function
    def through(value: mx.array, update: mx.array) -> mx.array:
        return value

    through.vjp(lambda primals, cotangent, _: (cotangent, cotangent.astype(primals[1].dtype)))
    return through(value, update)


def _through_fit(gradient: mx.array, codes: mx.array) -> mx.array:
    """Return the gradient by the update, (out, in), of the one by the fused weight (module docstring).

    Args:
        gradient: (out, in), or of experts, float32.
        codes: (out, G, g) of the fused weight.
    """
    by_code = gradient.reshape(codes.shape)
    spread = codes - codes.mean(axis=-1, keepdims=True)
    squares = mx.square(spread).sum(axis=-1, keepdims=True)
    slope = (spread * by_code).sum(axis=-1, keepdims=True) / mx.where(squares == 0, 1.0, squares)
    followed = by_code.mean(axis=-1, keepdims=True) + spread * slope
    return (STRAIGHT * by_code + (1 - STRAIGHT) * followed).reshape(gradient.shape)


def _without_rounding(layer: AdapterLayer, arrays: Mapping[str, mx.array] | None = None) -> AdapterLayer:
    """Return a copy that computes with the base and its update.

    Args:
        layer: to copy.
        arrays: its parameters by name; None: the same as now.
    """
    twin = copy.copy(layer)
    twin.pop(FLAG, None)
    if arrays is not None:
        tree, base = tree_unflatten(list(arrays.items())), copy.copy(layer.base)
        for name, array in tree.pop(layer.holds).items():
            base[name] = array
        twin.update(tree)
        twin[layer.holds] = base
    return twin


def _fused_weight(layer: AdapterLayer, arrays: Mapping[str, mx.array]) -> tuple[mx.array, mx.array | None]:
    """Return the weight of the fused layer as it will be read back, in the base's float dtype, and its codes if it is affine.

    Args:
        layer: whose arrays are replaced.
        arrays: its parameters by name.
    """
    merged, base = _without_rounding(layer, arrays).merged(), layer.base
    if base.mode != AFFINE:  # rounded as fusing does
        return QuantFormat.of(base).quantize(merged.astype(mx.bfloat16)).dequantize(), None
    scales, biases = (arrays[f"{layer.holds}.{name}"] for name in ("scales", "biases"))
    codes, *fitted = round_on_grid(merged, scales, biases, base.group_size, base.bits)
    s, b = (array.astype(base.scales.dtype).astype(mx.float32)[..., None] for array in fitted)  # as they are written
    return (codes * s + b).reshape(merged.shape).astype(base.scales.dtype), codes


def fused_layer(layer: AdapterLayer) -> nn.Module:
    """Return the quantized layer that fusing will write."""
    base, dtype = layer.base, mx.float32 if layer.base.mode == AFFINE else None
    made = quantized_like(base, with_weight(base, _without_rounding(layer).merged(), dtype))
    if type(base) in MEASURED.values():  # with its choice of products
        become(made, type(base))
        made.dense_from_rows = base.dense_from_rows
    return made


def begin_qat(model: nn.Module) -> None:
    """Let the adapter layers of a model compute with their fused weights from now on, but for those of float layers.

    Raises:
        InputError: no layer's base is quantized, so all fuse without rounding, or one cannot be computed.
    """
    layers = adapter_layers(model)
    rounded = {path: layer for path, layer in layers.items() if isinstance(layer.base, QUANTIZED)}
    if layers and not rounded:
        raise InputError(
            f"--qat: {next(iter(layers))} is not quantized, and neither is another layer of the adapter, so it fuses "
            "without rounding; quantize the model (--bits 4), or leave --qat out"
        )
    for path, layer in rounded.items():
        if "global_scale" in layer.base:
            raise InputError(f"--qat: {path} has a scale for each expert, which is not supported; leave --qat out")
        mix_in(FakeQuantized, layer)
        layer[FLAG], layer._held = mx.array(True), ()


def end_qat(model: nn.Module) -> None:
    """Let every adapter layer of a model compute with its base and its update again, as before `begin_qat`."""
    for layer in adapter_layers(model).values():
        layer.pop(FLAG, None)


def is_rounded(model: nn.Module) -> bool:
    """Return whether some adapter layers of a model compute with their fused weights now."""
    return any(FLAG in layer for layer in adapter_layers(model).values())


def rounded_to(model: nn.Module) -> str:
    """Return in words how the adapted layers of a model are quantized; empty: none is.

    An adapter that was trained with the rounding of one format is another model in another format.
    """
    layers = [layer.base for layer in adapter_layers(model).values() if isinstance(layer.base, QUANTIZED)]
    counts = Counter(str(QuantFormat.of(base)) for base in layers)
    return "; ".join(f"{form}: {counted(count, 'layer')}" for form, count in sorted(counts.items()))


def hold_fused(model: nn.Module) -> None:
    """Compute the fused layers once, for generation."""
    for layer in adapter_layers(model).values():
        if isinstance(layer, FakeQuantized) and FLAG in layer:
            layer.hold()


def release_fused(model: nn.Module) -> None:
    """Drop what `hold_fused` computed."""
    for layer in adapter_layers(model).values():
        if isinstance(layer, FakeQuantized):
            layer.release()
