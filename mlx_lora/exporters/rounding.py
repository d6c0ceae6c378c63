"""Round one fused layer's weight for itself: with how many bits, and on which grid.

    own grid   the base's, or with more bits one that has all of its values: what was there is kept exactly, and an update
               below half a step is lost as far as new scales and biases cannot express it
    new grid   the one that `mx.quantize` chooses for the sum: the whole weight is rounded once more, which adds an error many
               times the update's size, but one that points everywhere, and the update is in it

Their squared errors do not tell which one a model bears better (docs/decisions.md, `--bits-budget`).
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx

from mlx_lora.adapters.base import exact_weight, float_dtype, with_weight
from mlx_lora.models.quantize import Quantization, quantized_like

LEAST_GROUP = 32  # weights of an affine group; nvfp4 has groups of 16


def target_quantization(base: Any, bits: int | None) -> Quantization:
    """Return a base layer's quantization, or if it has fewer bits than asked for, affine with so many."""
    if bits is None or base.bits >= bits:
        return Quantization(base.bits, base.group_size, base.mode)
    return Quantization(bits, max(base.group_size, LEAST_GROUP), "affine")


def rounded_layer(base: Any, weight: mx.array, bits: int | None, *, new_grid: bool) -> Any:
    """Return a weight quantized like a base layer, or if that has fewer bits than asked for, with so many.

    Args:
        base: quantized.
        weight: float32, of the base's shape.
        bits: asked for; None: the base's.
        new_grid: choose a new affine grid, instead of the base's.
    """
    quantization = target_quantization(base, bits)
    if quantization.mode != "affine":
        return quantized_like(base, with_weight(base, weight))
    whole = with_weight(base, weight, mx.float32)
    has_grid = base.mode == "affine" and quantization.group_size == base.group_size
    keeps_grid, more = has_grid and not new_grid, quantization.bits - base.bits
    if keeps_grid and not more:
        return quantized_like(base, whole)
    new = whole.to_quantized(**quantization.layout)
    new.scales, new.biases = (array.astype(float_dtype(base)) for array in (new.scales, new.biases))
    if not keeps_grid:
        return quantized_like(new, whole)  # the codes for the scales as they are written
    finer = copy.copy(new)  # it has all values of the base's grid: its steps are halved for each bit
    finer.scales, finer.biases = base.scales / 2**more, base.biases
    rounded = [quantized_like(grid, whole) for grid in (new, finer)]
    return min(rounded, key=lambda layer: mx.square(exact_weight(layer) - weight).sum().item())
