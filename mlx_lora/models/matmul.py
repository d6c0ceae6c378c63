"""Two ways to multiply by a quantised weight, and the choice between them per call.

`mx.quantized_matmul` reads packed weights once per row block: best for few rows (generation).
Dequantise-then-GEMM pays one pass over the weight, then runs the dense kernel: best for many rows
(training), by 100x on an x86 CPU. Where the second starts to win is measured (device.py), never assumed.

Shapes: x (..., in), weight packed (out, in * bits / 32) uint32, scales and biases (out, in / group_size).
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_lora import device


def dequantised_matmul(x: mx.array, packed: list[mx.array], *, group_size: int, bits: int, mode: str) -> mx.array:
    """Return `x @ dequantise(packed).T`, keeping no dense weight between forward and backward.

    Args:
        x: (..., in), float.
        packed: `[weight, scales]` or `[weight, scales, biases]`, as mx.quantize returns them.
        group_size, bits, mode: as mx.quantize took them.

    Returns:
        (..., out), in x's dtype. Its vjp with respect to x dequantises again; the packed arrays are
        frozen by construction and get zero cotangents.
    """

    def dense(arrays: tuple[mx.array, ...]) -> mx.array:
        return mx.dequantize(*arrays, group_size=group_size, bits=bits, mode=mode).astype(x.dtype)  # (out, in)

    @mx.custom_function
    def product(x: mx.array, *arrays: mx.array) -> mx.array:
        return x @ dense(arrays).T

    @product.vjp
    def product_vjp(primals, cotangent, _):
        _, *arrays = primals
        return (cotangent @ dense(tuple(arrays)), *(mx.zeros_like(array) for array in arrays))

    return product(x, *packed)


def packed_arrays(layer: nn.Module) -> list[mx.array]:
    """Return a quantised layer's `[weight, scales]`, with `biases` in the affine mode."""
    arrays = [layer["weight"], layer["scales"]]
    return arrays if layer.get("biases") is None else [*arrays, layer["biases"]]


def _many_rows(layer: nn.Module, x: mx.array) -> bool:
    return math.prod(x.shape[:-1]) >= layer.dense_from_rows


class MeasuredQuantizedLinear(nn.QuantizedLinear):
    """A QuantizedLinear that takes the dense path from `dense_from_rows` rows on."""

    def __call__(self, x: mx.array) -> mx.array:
        if not _many_rows(self, x):
            return super().__call__(x)
        y = dequantised_matmul(x, packed_arrays(self), group_size=self.group_size, bits=self.bits, mode=self.mode)
        return y + self["bias"] if "bias" in self else y


class MeasuredQuantizedEmbedding(nn.QuantizedEmbedding):
    """A QuantizedEmbedding whose tied head takes the dense path from `dense_from_rows` rows on."""

    def as_linear(self, x: mx.array) -> mx.array:
        if not _many_rows(self, x):
            return super().as_linear(x)
        return dequantised_matmul(x, packed_arrays(self), group_size=self.group_size, bits=self.bits, mode=self.mode)


MEASURED = {nn.QuantizedLinear: MeasuredQuantizedLinear, nn.QuantizedEmbedding: MeasuredQuantizedEmbedding}


def use_measured_matmul(model: nn.Module) -> dict[str, int]:
    """Give every quantised layer of `model` the faster of the two paths for each row count.

    The layers keep their place, names and parameters: only the instance's class changes, so another
    model in this process is not touched.

    Returns:
        For each kind of quantised weight (`4-bit/64 affine`) the rows from which the dense path is used.
    """
    chosen: dict[str, int] = {}
    for _, layer in model.named_modules():
        if type(layer) in MEASURED:
            rows = device.dense_matmul_from_rows(layer.bits, layer.group_size, layer.mode, layer.scales.dtype)
            layer.dense_from_rows = rows
            layer.__class__ = MEASURED[type(layer)]
            chosen[f"{layer.bits}-bit/{layer.group_size} {layer.mode}"] = rows
    return chosen
