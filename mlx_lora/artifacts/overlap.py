"""Detect whether an adapter is already in its base's weights, fused by any program and possibly quantized since.

A base's fingerprint depends on norms and biases (models/fingerprint.py), and fusing changes neither; a folder that
another program fused has no mark. But the update D is known. The adapter stores its base's share along D:

    share(W) = <W, D> / <D, D>          share(W + D) = share(W) + 1

Rounding and quantizing W add noise that is independent of D: its standard deviation is s / |D| for a noise of s per
number, a few thousandths over the rows sampled here. An update too small to tell from that noise is not judged.

Shapes: n rows of a layer, r rank.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.adapter_layer import AdapterLayer
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.parts import LINEAR, QUANTIZED
from mlx_lora.training.shared_use import with_weights

LAYERS, ROWS = 8, 1024  # the most that are sampled, so that it takes little time
PRESENT = 0.5  # the least share of a fused update; quantized bases lose some of it
# The noise of a quantized weight, relative to its size, by bits; a float one may have been quantized to four before.
NOISE = {2: 0.45, 3: 0.2}
LEAST_NOISE = 0.1
MOST_DEVIATION = 0.1  # the largest standard deviation of the share, from noise; PRESENT is five times this


def measure_overlap(model: nn.Module) -> dict[str, float]:
    """Return the inner products of an adapted model's weights with its update.

    Ranks that share the base must all call this.

    Returns:
        `inner` <W, D>, `size` <D, D> and `noise`, the mean square of the noise that quantizing may have added to W, all
        over the sampled rows, to six digits; empty without linear layers whose update is not zero, and where this process
        has only a part of them (--parallel tensor): such an adapter is not judged.
    """
    layers = [layer for layer in adapter_layers(model).values() if layer.OVER is LINEAR]
    if any(layer.cut is not None for layer in layers):
        return {}
    chosen = [layers[len(layers) * i // LAYERS] for i in range(LAYERS)] if len(layers) > LAYERS else layers
    if not chosen:
        return {}
    blocks = {id(module): block for block in model.layers for module in block.modules()}
    sums = mx.zeros((4,))
    for layer in chosen:
        with with_weights(blocks.get(id(layer))):
            sums = sums + _sums(layer)
        mx.eval(sums)  # one block of a shared base at a time
    inner, size, noise, numbers = sums.tolist()
    if not size > 0:  # NaN too
        return {}
    return {"inner": _digits(inner), "size": _digits(size), "noise": _digits(noise / numbers)}


def _sums(layer: AdapterLayer) -> mx.array:
    """Return <W, D>, <D, D>, the noise's square and the count of numbers, over one layer's first rows."""
    base = layer.base
    names = [name for name in ("weight", "scales", "biases") if name in base]
    rows = [base[name][:ROWS] for name in names]
    if isinstance(base, QUANTIZED):
        weight = mx.dequantize(*rows, group_size=base.group_size, bits=base.bits, mode=base.mode)
    else:
        weight = rows[0]
    weight = weight.astype(mx.float32)  # (n, in)
    a, b = layer.plain_factors()  # (in, r), (r, out)
    update = layer.scale * (b.T[: len(weight)] @ a.T)  # (n, in)
    noise = NOISE.get(base.bits, LEAST_NOISE) if isinstance(base, QUANTIZED) else LEAST_NOISE
    squares = noise**2 * mx.square(weight).sum()
    return mx.stack([(weight * update).sum(), mx.square(update).sum(), squares, mx.array(float(weight.size))])


def _digits(value: float) -> float:
    return float(f"{value:.6g}")


def share_present(model: nn.Module, stored: dict[str, Any]) -> float | None:
    """Return the share of its adapter's update in a model's weights: about 0, or about 1 if it was fused.

    Args:
        model: adapted.
        stored: what `measure_overlap` returned when the adapter was written.

    Returns:
        The share; None if it is not known, because the factors are not those measured or the update is too small.
    """
    found = measure_overlap(model)
    if not found or not stored or abs(found["size"] - stored["size"]) > 1e-3 * stored["size"]:
        return None
    deviation = (max(found["noise"], stored["noise"]) / found["size"]) ** 0.5
    if deviation > MOST_DEVIATION:
        return None
    return (found["inner"] - stored["inner"]) / found["size"]
