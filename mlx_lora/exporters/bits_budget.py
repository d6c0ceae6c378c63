"""Choose which fused layers get 5, 6 or 8 bits, so that the outputs lose least within a size that the user names.

    loss of a layer at b bits = tr (W - V_b) H (W - V_b)^T / tr W H W^T       V_b: W rounded for itself, H = X X^T

which is the relative squared error of its outputs on some tokens. It needs no gradient. The step from one number of bits to
the next that takes most of this loss away per byte is taken first, until no step fits.
"""

from __future__ import annotations

import heapq
import logging
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import exact_weight, float_dtype
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.exporters.compensate import CalibrationTokens, layer_inputs
from mlx_lora.exporters.rounding import rounded_layer, target_quantization
from mlx_lora.models.quantize import quantize_weight
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.text import parse_size

log = logging.getLogger(__name__)

MORE_BITS = (5, 6, 8)


@dataclass(frozen=True)
class Budget:
    """The size that a fused model may have.

    Attributes:
        text: as the user gave it.
        size_bytes: of all weights; None: `share` decides.
        share: more bytes than with the base's own bits, as a fraction of these.
    """

    text: str
    size_bytes: int | None
    share: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a size such as 120MB, or +10% for a tenth more than the base's own bits take.

        Raises:
            InputError: it is neither.
        """
        if more := re.fullmatch(r"\+(\d+(?:\.\d+)?) ?%", text.strip()):
            return cls(text, None, float(more[1]) / 100)
        try:
            return cls(text, parse_size(text))
        except InputError:
            raise InputError(f"--bits-budget {text}: not a size; give one such as 120MB, or +10%") from None

    def room(self, size_bytes: int) -> int:
        """Return the bytes that layers may grow by.

        Args:
            size_bytes: of the model with the base's own bits.

        Raises:
            InputError: it is larger already.
        """
        room = int(size_bytes * self.share) if self.size_bytes is None else self.size_bytes - size_bytes
        if room < 0:
            raise InputError(
                f"--bits-budget {self.text}: with the base's own bits, the model takes {size_bytes / 1e6:.1f} MB already; "
                "give more, or +10%"
            )
        return room


@dataclass(frozen=True)
class LayerCost:
    """What a layer loses and takes at each number of bits, the base's own first.

    Attributes:
        losses: bits -> relative squared error of its outputs.
        sizes: bits -> bytes.
    """

    losses: dict[int, float]
    sizes: dict[int, int]


def choose_bits(
    model: nn.Module,
    tokens: CalibrationTokens,
    stored: Mapping[str, Any],
    budget: Budget,
    size_bytes: int,
    *,
    new_grid: bool,
) -> dict[str, int]:
    """Return path -> bits of the layers that get more than their base has.

    Args:
        model: adapted, in eval mode.
        tokens: to compute.
        stored: path -> the base's quantized layer as its files have it.
        budget: of the whole model.
        size_bytes: of the model with the base's own bits.
        new_grid: measure layers on new grids, instead of their base's (rounding.py).

    Raises:
        InputError: the model is larger than the budget already.
    """
    room = budget.room(size_bytes)
    costs: dict[str, LayerCost] = {}
    layers = adapter_layers(model)
    for block in tracked(layer_inputs(model, tokens, stored), "Measuring layers", len(model.layers), "blocks"):
        for inputs in block:
            for path in inputs.paths:
                costs[path] = _cost(layers[path].merged(), inputs.hessian, stored[path], new_grid)
    chosen = allocate(costs, room)
    taken = sum(costs[path].sizes[bits] - next(iter(costs[path].sizes.values())) for path, bits in chosen.items())
    counts = Counter(chosen.values())
    words = ", ".join(f"{count} layers get {bits} bits" for bits, count in sorted(counts.items())) or "no layer fits"
    log.info(f"--bits-budget {budget.text}: {words}; {(size_bytes + taken) / 1e6:.1f} MB")
    return chosen


def _cost(weight: mx.array, hessian: mx.array, base: Any, new_grid: bool) -> LayerCost:
    whole = ((weight @ hessian) * weight).sum().item()
    losses, sizes = {}, {}
    for bits in (base.bits, *(more for more in MORE_BITS if more > base.bits)):
        quantization = target_quantization(base, bits)
        if new_grid:
            rounded = quantize_weight(weight, quantization).dequantize()
        else:
            rounded = exact_weight(rounded_layer(base, weight, bits, new_grid=False))
        difference = weight - rounded.astype(mx.float32)
        losses[bits] = ((difference @ hessian) * difference).sum().item() / max(whole, 1e-30)
        scale_bytes = 2 * float_dtype(base).size if quantization.mode == "affine" else 1  # of a group, with its bias
        sizes[bits] = weight.size * bits // 8 + weight.size // quantization.group_size * scale_bytes
    return LayerCost(losses, sizes)


def allocate(costs: Mapping[str, LayerCost], room_bytes: int) -> dict[str, int]:
    """Return path -> bits of the layers that get more, taking the steps that help most per byte first.

    Args:
        costs: path -> loss and size by bits, ascending.
        room_bytes: that all layers together may grow by.
    """
    chosen: dict[str, int] = {}
    steps: list[tuple[float, str, int, int]] = []

    def offer(path: str, now: int) -> None:
        cost, more = costs[path], [bits for bits in costs[path].sizes if bits > now]
        for bits in more:
            grows = cost.sizes[bits] - cost.sizes[now]
            less = cost.losses[now] - cost.losses[bits]
            if grows > 0 and less > 0:
                heapq.heappush(steps, (-less / grows, path, now, bits))

    for path, cost in costs.items():
        offer(path, next(iter(cost.sizes)))
    while steps:
        _, path, now, bits = heapq.heappop(steps)
        current = chosen.get(path, next(iter(costs[path].sizes)))
        grows = costs[path].sizes[bits] - costs[path].sizes[current]
        if now != current or grows > room_bytes:
            continue
        chosen[path], room_bytes = bits, room_bytes - grows
        offer(path, bits)
    return chosen
