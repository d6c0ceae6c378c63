"""Helpers of all adapter layers: the kinds of base, their widths, their weights as floats, and dropout."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_lora.models.matmul import MEASURED
from mlx_lora.models.quantize import dequantized_weight

LINEAR = (nn.Linear, nn.QuantizedLinear)
EMBEDDING = (nn.Embedding, nn.QuantizedEmbedding)
SWITCH = (SwitchLinear, QuantizedSwitchLinear)
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear)


_PLAIN = {measured: plain for plain, measured in MEASURED.items()}


def is_exactly(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Return whether a module's type is exactly one of `kinds`, or our measured variant of one.

    Other subclasses may do anything: mlx-lm's AFM has a linear layer that returns a list.
    """
    return _PLAIN.get(type(module), type(module)) in kinds


def base_dims(base: nn.Module) -> tuple[int, int]:
    """Return (input width, output width) of a linear, expert or embedding base, quantized or not.

    A packed row has in * bits / 32 words. Multiply before dividing: mlx-lm's DoRA divides first (`32 // bits`), which is
    wrong for 3, 5 and 6 bits.
    """
    rows, columns = base.weight.shape[-2:]
    width = columns * 32 // base.bits if isinstance(base, QUANTIZED) else columns
    return (rows, width) if isinstance(base, EMBEDDING) else (width, rows)


def dense_weight(base: nn.Module) -> mx.array:
    """Return the base's weight as floats: (out, in), for experts (E, out, in), for an embedding (vocabulary, width)."""
    return dequantized_weight(base) if isinstance(base, QUANTIZED) else base.weight


def with_weight(base: nn.Module, weight: mx.array) -> nn.Module:
    """Return a dense layer of the base's kind with this weight and the base's bias and float dtype.

    Args:
        base: linear, experts or embedding, quantized or not.
        weight: in the shape that dense_weight returns, with any float dtype.
    """
    if isinstance(base, EMBEDDING):
        dense = nn.Embedding(*weight.shape)
    elif isinstance(base, SWITCH):
        dense = SwitchLinear(weight.shape[2], weight.shape[1], weight.shape[0], bias="bias" in base)
    else:
        dense = nn.Linear(weight.shape[1], weight.shape[0], bias="bias" in base)
    if "bias" in base:
        dense.bias = base.bias
    dense.weight = weight.astype(dense_weight(base).dtype)
    return dense


class Dropout(nn.Module):
    """Dropout with a separate random draw, so that the same draw can be used twice.

    A checkpointed block runs again in the backward pass and must drop the same features; mlx's own layer would draw
    again, so that the loss and its gradient would belong to different functions.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    @property
    def active(self) -> bool:
        """Whether features are dropped now."""
        return self.training and self.probability > 0

    def draw(self) -> mx.array:
        """Return a random key, (2,) uint32."""
        return mx.random.randint(0, 2**31 - 1, (2,)).astype(mx.uint32)

    def __call__(self, x: mx.array, key: mx.array | None = None) -> mx.array:
        """Drop features of `x` by `key`, or by a key drawn here."""
        if not self.active:
            return x
        kept = 1 - self.probability
        return mx.random.bernoulli(kept, x.shape, key=self.draw() if key is None else key) * x * (1 / kept)


def is_parameter(module: nn.Module | None, name: str) -> bool:
    """Return whether a module itself has an array of this name; the name may come from a file."""
    return module is not None and isinstance(module.get(name), mx.array)
