"""Round fused layers: each for itself, or for its outputs on some tokens, and with how many bits.

A weight that is rounded for itself has a grid:

    own grid   the base's, or with more bits one that has all of its values: what was there is kept exactly, and an update
               below half a step is lost as far as new scales and biases cannot express it
    new grid   the one that `mx.quantize` chooses for the sum: the whole weight is rounded once more, which adds an error many
               times the update's size, but one that points everywhere, and the update is in it

Their squared errors do not tell which one a model bears better (docs/development/decisions.md, `--bits-budget`).

With --compensate, the layers' outputs stay, on some tokens, and not each single weight:

    for each block:  inputs X of its adapted layers, over all tokens, with the adapter -> H = X X^T
                     W + s B A, H -> the layer's codes, scales and biases (models/gptq.py)

The tokens go through the blocks of the adapted model one block at a time, and one block's float weights are in memory at
a time. Layers that read the same input (query, key and value; gate and up) share H and are rounded together.
Experts and embeddings are left to be rounded plainly: few tokens reach each of them.

Shapes: B rows, T columns, I inputs of a layer, N tokens.

With --bits-budget, layers get 5, 6 or 8 bits, so that the outputs lose least within a size that the user names:

    loss of a layer at b bits = tr (W - V_b) H (W - V_b)^T / tr W H W^T       V_b: W rounded for itself, H = X X^T

which is the relative squared error of its outputs on some tokens. It needs no gradient. The step from one number of bits to
the next that takes most of this loss away per byte is taken first, until no step fits.
"""

from __future__ import annotations

import copy
import heapq
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.base import LINEAR, exact_weight, float_dtype, with_weight
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.compat.functions import answering
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.models.blocks import BlockWalk
from mlx_lora.models.gptq import Curvature, Grid, round_weight
from mlx_lora.models.quantize import AFFINE, QuantFormat, quantized_like
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.text import parse_size

LEAST_GROUP = 32  # weights of an affine group; nvfp4 has groups of 16


def target_quantization(base: Any, bits: int | None) -> QuantFormat:
    """Return a base layer's quantization, or if it has fewer bits than asked for, affine with so many."""
    if bits is None or base.bits >= bits:
        return QuantFormat.of(base)
    return QuantFormat(bits, max(base.group_size, LEAST_GROUP))


def rounded_layer(base: Any, weight: mx.array, bits: int | None, *, new_grid: bool) -> Any:
    """Return a weight quantized like a base layer, or if that has fewer bits than asked for, with so many.

    Args:
        base: quantized.
        weight: float32, of the base's shape.
        bits: asked for; None: the base's.
        new_grid: choose a new affine grid, instead of the base's.
    """
    quantization = target_quantization(base, bits)
    if quantization.mode != AFFINE:
        return quantized_like(base, with_weight(base, weight))
    whole = with_weight(base, weight, mx.float32)
    has_grid = base.mode == AFFINE and quantization.group_size == base.group_size
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


BATCH_POSITIONS = 1024


@dataclass(frozen=True)
class CalibrationTokens:
    """Token ids that a model computes to find the inputs of its layers.

    Attributes:
        ids: (B, T) int32 of each batch, padded on the right.
        real: (B, T) float32 of each batch, 0 for padding.
        tokens: how many are real.
        of: where they come from, in words.
    """

    ids: list[mx.array]
    real: list[mx.array]
    tokens: int
    of: str

    @classmethod
    def from_rows(cls, rows: EncodedSet, most_tokens: int, of: str) -> CalibrationTokens:
        """Take rows of all lengths, up to a number of tokens.

        Args:
            rows: to choose from.
            most_tokens: of all together.
            of: where they come from.
        """
        count = int(most_tokens / max(1.0, float(rows.lengths.mean())) / rows.group)
        picked = rows.select(spaced_by_length(rows, max(1, min(rows.examples, count))))
        chosen = [picked.row(number)[0][:most_tokens] for number in range(len(picked))]
        chosen.sort(key=len)
        batches: list[list[np.ndarray]] = [[]]
        for row in chosen:
            if batches[-1] and (len(batches[-1]) + 1) * len(row) > BATCH_POSITIONS:
                batches.append([])
            batches[-1].append(row)
        ids, real = [], []
        for batch in batches:
            width = max(map(len, batch))
            ids.append(mx.array(np.stack([np.pad(row, (0, width - len(row))) for row in batch]).astype(np.int32)))
            real.append(mx.array(np.stack([np.arange(width) < len(row) for row in batch]).astype(np.float32)))
        return cls(ids, real, sum(map(len, chosen)), of)


@dataclass
class LayerInputs:
    """The inputs of some layers that read the same array.

    Attributes:
        paths: of the layers.
        hessian: (I, I) float32, X X^T over the tokens so far.
    """

    paths: list[str]
    hessian: mx.array = field(default_factory=lambda: mx.array(0.0))


@dataclass(frozen=True)
class Compensated:
    """Layers of a quantized base with the adapter folded in.

    Attributes:
        layers: path -> quantized layer.
        kept_error: the mean over layers of what is left of the error that plain rounding makes in the outputs.
    """

    layers: dict[str, nn.Module]
    kept_error: float


def compensated_layers(
    model: nn.Module, tokens: CalibrationTokens, stored: Mapping[str, Any], bits: Mapping[str, int]
) -> Compensated:
    """Fold adapters into their quantized linear layers, rounded for the inputs that the tokens give them.

    Args:
        model: adapted, in eval mode; not changed.
        tokens: to compute.
        stored: path -> the base's quantized layer as its files have it.
        bits: of layers that get more than their base has.
    """
    layers, found, shares = adapter_layers(model), {}, []
    blocks = layer_inputs(model, tokens, stored)
    for block in tracked(blocks, "Compensating", len(model.layers), "blocks"):
        for inputs in block:
            curvature = Curvature.of(inputs.hessian)
            together: dict[QuantFormat, list[str]] = {}
            for path in inputs.paths:
                together.setdefault(target_quantization(stored[path], bits.get(path)), []).append(path)
            for quantization, paths in together.items():
                wholes = [layers[path].fuse() for path in paths]
                weight = mx.concatenate([layers[path].merged() for path in paths])
                # A new grid, and the one with the old weights in it if the new bits have it.
                bases = [stored[path] for path in paths]
                dtypes, own = {float_dtype(base) for base in bases}, [QuantFormat.of(base) for base in bases]
                grids = [Grid.of_weight(weight, quantization, dtypes.pop() if len(dtypes) == 1 else mx.float32)]
                if all((one.group_size, one.mode) == (quantization.group_size, quantization.mode) for one in own):
                    old = [Grid.of_layer(base.scales, base.get("biases"), QuantFormat.of(base)) for base in bases]
                    grids.append(Grid.joined([grid.refined(quantization.bits) for grid in old]))
                packed, error = round_weight(weight, curvature, grids)
                plain = quantization.quantize(weight).dequantize()
                shares.append(error.sum().item() / max(curvature.error(weight - plain).sum().item(), 1e-30))
                ends = np.cumsum([len(whole.weight) for whole in wholes])[:-1].tolist()
                parts = zip(*(mx.split(array, ends) for array in packed.arrays), strict=True)
                for path, whole, arrays in zip(paths, wholes, parts, strict=True):
                    layer = whole.to_quantized(**quantization.layout)
                    for name, array in zip(("weight", "scales", "biases"), arrays, strict=False):
                        layer[name] = array
                    mx.eval(layer.parameters())
                    found[path] = layer
    return Compensated(found, float(np.mean(shares)) if shares else 1.0)


def layer_inputs(model: nn.Module, tokens: CalibrationTokens, paths: Iterable[str]) -> Iterator[list[LayerInputs]]:
    """Yield, for one block after the other, the inputs of some of its adapted linear layers.

    Args:
        model: adapted, in eval mode; the adapters are on.
        tokens: to compute.
        paths: of the layers; those of another kind are left out.
    """
    adapted = adapter_layers(model)
    layers = {path: adapted[path] for path in paths if adapted[path].OVER is LINEAR}
    walk = BlockWalk(model, tokens.ids)
    for number in range(len(model.layers) + 1):
        inside = {id(m) for m in model.layers[number].modules()} if number < len(model.layers) else None
        own = {p: m for p, m in layers.items() if inside is None or id(m) in inside}
        layers = {p: m for p, m in layers.items() if p not in own}
        if not own and not layers:
            return
        seen = _Seen()
        with answering(*((layer, partial(seen.called, path)) for path, layer in own.items())):
            for batch in walk.step():
                seen.begin(tokens.real[batch])
        yield seen.found


class _Seen:
    """Collects the inputs of watched layers.

    Attributes:
        found: by array that was read; layers that read the same one share an entry.
    """

    def __init__(self) -> None:
        self.found: list[LayerInputs] = []
        self._entry: dict[str, LayerInputs] = {}
        self._read: list[tuple[mx.array, LayerInputs]] = []  # of this batch
        self._real = mx.array(1.0)

    def begin(self, real: mx.array) -> None:
        """Begin a batch, whose (B, T) real tokens are 1; compute what the batch before added."""
        mx.eval([entry.hessian for entry in self.found])
        self._read, self._real = [], real

    def called(self, path: str, own: Callable[..., Any], x: mx.array, *args: Any, **kwargs: Any) -> Any:
        """Add a layer's input, (B, T, I), and compute the layer."""
        self._add(path, x)
        return own(x, *args, **kwargs)

    def _add(self, path: str, x: mx.array) -> None:
        for array, entry in self._read:
            if array is x and entry is self._entry.get(path, entry):
                if path not in entry.paths:
                    entry.paths.append(path)
                self._entry[path] = entry
                return
        if path not in self._entry:
            self._entry[path] = LayerInputs([path])
            self.found.append(self._entry[path])
        entry = self._entry[path]
        self._read.append((x, entry))
        flat = x.reshape(-1, x.shape[-1]).astype(mx.float32)  # (N, I)
        if x.shape[:2] == self._real.shape and x.ndim == 3:
            flat = flat * self._real.reshape(-1, 1)
        entry.hessian = entry.hessian + flat.T @ flat


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
            rounded = quantization.quantize(weight).dequantize()
        else:
            rounded = exact_weight(rounded_layer(base, weight, bits, new_grid=False))
        difference = weight - rounded.astype(mx.float32)
        losses[bits] = ((difference @ hessian) * difference).sum().item() / max(whole, 1e-30)
        sizes[bits] = quantization.stored_bytes(weight.size, float_dtype(base))
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
