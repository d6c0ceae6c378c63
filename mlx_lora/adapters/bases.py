"""What an adapter needs to know of the layer it wraps: its kind, its widths, its weight as floats."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
QUANTISED = (nn.QuantizedLinear, nn.QuantizedEmbedding)


def base_dims(base: nn.Module) -> tuple[int, int]:
    """Return (input width, output width) of a linear or embedding base, quantised or not.

    A packed row holds in * bits / 32 words. The product is taken before the division: mlx-lm's DoRA
    divides first (`32 // bits`), which is wrong at 3, 5 and 6 bits.
    """
    rows, columns = base.weight.shape
    width = columns * 32 // base.bits if isinstance(base, QUANTISED) else columns
    return (rows, width) if isinstance(base, EMBEDDING) else (width, rows)


def dense_weight(base: nn.Module) -> mx.array:
    """Return the base's weight as floats, shape (out, in), for an embedding (vocabulary, width)."""
    if not isinstance(base, QUANTISED):
        return base.weight
    layout = {"group_size": base.group_size, "bits": base.bits, "mode": base.mode}
    return mx.dequantize(base.weight, base.scales, base.get("biases"), **layout)


def with_weight(base: nn.Module, weight: mx.array) -> nn.Module:
    """Return a dense layer of the base's kind with this weight, and the base's bias and float dtype.

    Args:
        base: linear or embedding, quantised or not.
        weight: as dense_weight gives it, any float dtype.
    """
    dtype = dense_weight(base).dtype
    if isinstance(base, EMBEDDING):
        dense = nn.Embedding(*weight.shape)
    else:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in base)
        if "bias" in base:
            dense.bias = base.bias
    dense.weight = weight.astype(dtype)
    return dense
