"""Quantization-aware training: compute with the weights that fusing will write, and train the factors straight through.

An adapter layer adds scale * A B to a quantized weight. Fused, the sum is quantized again, and a small update gets lost in the
steps of the grid. Here the forward pass already computes with the fused weight, in the base's own format (bits, group,
mode), where an affine base keeps its grid (models/quantize.py):

    y = x Q(W + D)^T,   D = the layer's update

so the loss is that of the fused model. Rounding has no useful gradient. The gradient by x is that of Q(W + D), and the
gradient by the factors is the one that they would have without Q (straight-through estimator):

    y = x stop(Q(W + D))^T + (u - stop(u)),   u = what the layer computes from stop(x)

One layer's dense weight is at hand at a time: it is computed again in the backward pass. While texts are generated, each
layer holds its fused weight, packed (`hold`).

Source: Bengio et al., arXiv 1308.3432, section 4 (straight-through); LLM-QAT, arXiv 2305.17888.
Shapes: T positions, E experts; in and out are the base's widths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.base import EMBEDDING, QUANTIZED, SWITCH, AdapterLayer, mix_in, with_weight
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.kernels.quantized_matmul import MEASURED
from mlx_lora.models.quantize import quantized_like, round_on_grid
from mlx_lora.utils.errors import InputError

# A flag in the layer's arrays. A compiled step reads them, so it is traced again when the flags appear.
FLAG = "_fake_quantized"

FUSED_ONLY = "was trained with --qat, and is right in its fused form only; use fuse, or --to gguf or hf"


class FakeQuantized(AdapterLayer):
    """A mixin that comes before an adapter layer's own class: its output is that of the fused and quantized layer.

    What rounding takes away from the factors has never been trained: such an adapter without its rounding is another, and
    mostly broken, model. So all that this layer is asked for is that of its fused form.
    """

    NOT_IN_PEFT = NOT_IN_GGUF = NOT_FOR_A_ROW = FUSED_ONLY

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        if FLAG not in self:
            return super().__call__(x, *args, **kwargs)
        if held := self._held:
            return held[0](x, *args, **kwargs)
        if self.OVER is EMBEDDING:
            y = self._with_dense(lambda tokens, weight: weight[tokens], x)
            return _straight_through(y, super().__call__(x, *args, **kwargs))
        kwargs.pop("key", None)  # there is no dropout
        if self.OVER is SWITCH:
            indices, in_order = args[0], kwargs.get("sorted_indices", args[1] if len(args) > 1 else False)
            y = self._with_dense(
                lambda x, weight: mx.gather_mm(
                    x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=in_order
                ),
                x,
            )
            y = y + mx.expand_dims(self.base.bias[indices], -2) if "bias" in self.base else y
            return _straight_through(y, super().__call__(mx.stop_gradient(x), *args, **kwargs))
        y = self._with_dense(lambda x, weight: x @ weight.T, x)
        y = y + self.base.bias if "bias" in self.base else y
        return _straight_through(y, self._update(mx.stop_gradient(x)))

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits of a tied head."""
        if FLAG not in self:
            return super().as_linear(x)  # pyright: ignore[reportAttributeAccessIssue] # an embedding's
        if held := self._held:
            return held[0].as_linear(x)
        y = self._with_dense(lambda x, weight: x @ weight.T, x)
        return _straight_through(y, super().as_linear(mx.stop_gradient(x)))  # pyright: ignore[reportAttributeAccessIssue] # an embedding's

    def _update(self, x: mx.array) -> mx.array:
        """Return something of which the factors have the same gradient as of the layer's output."""
        if self.LAYER_TYPE != "lora":
            return super().__call__(x)
        a, b = self.effective_factors()  # without the product with the base, which has no gradient here
        return (x @ a.astype(x.dtype)) @ (self.scale * b).astype(x.dtype)

    def _with_dense(self, function: Callable[[mx.array, mx.array], mx.array], x: mx.array) -> mx.array:
        """Return function(x, fused weight), for which the backward pass computes the weight again."""
        names, arrays = zip(*tree_flatten(self.parameters()), strict=True)
        tokens = not mx.issubdtype(x.dtype, mx.floating)  # they have no gradient

        def dense(arrays: Sequence[mx.array], after: mx.array) -> mx.array:
            own = dict(zip(names, (mx.depends(array, after) for array in arrays), strict=True))
            weight = _fused_weight(self, own)
            return weight if tokens else weight.astype(x.dtype)

        @mx.custom_function
        def product(x: mx.array, *arrays: mx.array) -> mx.array:
            # Depend on x: a checkpointed block's second pass has another x, and is not merged with the first.
            return function(x, dense(arrays, x))

        @product.vjp
        def product_vjp(primals, cotangent, _):
            # Depend on the cotangent: else the weights of all layers would be computed as soon as there is time.
            x, *arrays = primals
            frozen = [mx.zeros_like(array) for array in arrays]
            if tokens:
                return (mx.zeros_like(x), *frozen)
            weight = dense(arrays, cotangent)
            _, [by_x] = mx.vjp(lambda x: function(x, weight), [x], [cotangent])
            return (by_x, *frozen)

        return product(x, *arrays)

    def merged(self) -> mx.array:
        if FLAG not in self:
            return super().merged()
        return _fused_weight(self, dict(tree_flatten(self.parameters()))).astype(mx.float32)

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


def _without_rounding(layer: AdapterLayer) -> AdapterLayer:
    """Return a copy with the same arrays that computes with the base and its update."""
    twin = copy.copy(layer)
    twin.pop(FLAG, None)
    return twin


def _fused_weight(layer: AdapterLayer, arrays: Mapping[str, mx.array]) -> mx.array:
    """Return the weight of the fused layer as it will be read back, in the base's float dtype.

    Args:
        layer: whose arrays are replaced.
        arrays: its parameters by name.
    """
    base, twin = copy.copy(layer.base), _without_rounding(layer)
    tree = tree_unflatten(list(arrays.items()))
    for name, array in tree.pop(layer.holds).items():
        base[name] = array
    twin.update(tree)
    twin[layer.holds] = base
    merged = twin.merged()
    if base.mode == "affine":
        codes, scales, biases = round_on_grid(merged, base.scales, base.biases, base.group_size, base.bits)
        return (codes * scales[..., None] + biases[..., None]).reshape(merged.shape).astype(base.scales.dtype)
    layout = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    return mx.dequantize(*mx.quantize(merged.astype(mx.bfloat16), **layout), **layout)  # as fusing quantizes it


def fused_layer(layer: AdapterLayer) -> nn.Module:
    """Return the quantized layer that fusing will write."""
    base, dtype = layer.base, mx.float32 if layer.base.mode == "affine" else None
    made = quantized_like(base, with_weight(base, _without_rounding(layer).merged(), dtype))
    if type(base) in MEASURED.values():  # with its choice of products
        made.__class__, made.dense_from_rows = type(base), base.dense_from_rows
    return made


def begin_qat(model: nn.Module) -> None:
    """Let every adapter layer of a model compute with its fused weight from now on.

    Raises:
        InputError: a layer's base is not quantized, or fuses without rounding.
    """
    for path, layer in adapter_layers(model).items():
        if not isinstance(layer, FakeQuantized):
            refuse_qat(path, layer)
            mix_in(FakeQuantized, layer)
        layer[FLAG], layer._held = mx.array(True), ()


def end_qat(model: nn.Module) -> None:
    """Let every adapter layer of a model compute with its base and its update again, as before `begin_qat`."""
    for layer in adapter_layers(model).values():
        layer.pop(FLAG, None)


def refuse_qat(path: str, layer: AdapterLayer) -> None:
    """Refuse a layer whose fused form is not rounded, or cannot be computed.

    Raises:
        InputError: naming it.
    """
    base = layer.base
    if not isinstance(base, QUANTIZED):
        raise InputError(
            f"--qat: {path} is not quantized, and fuses without rounding; quantize the model (--bits 4), or leave --qat out"
        )
    if "global_scale" in base:
        raise InputError(f"--qat: {path} has a scale for each expert, which is not supported; leave --qat out")


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
