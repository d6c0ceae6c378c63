"""Fold an adapter into a quantized base so that its layers' outputs stay, on some tokens, and not each single weight.

    for each block:  inputs X of its adapted layers, over all tokens, with the adapter -> H = X X^T
                     W + s B A, H -> the layer's codes, scales and biases (models/gptq.py)

The tokens go through the blocks of the adapted model one block at a time, and one block's float weights are in memory at
a time. Layers that read the same input (query, key and value; gate and up) share H and are rounded together.
Experts and embeddings are left to be rounded plainly: few tokens reach each of them.

Shapes: B rows, T columns, I inputs of a layer, N tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.base import LINEAR, AdapterLayer, float_dtype
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.compat.functions import answering
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.exporters.rounding import target_quantization
from mlx_lora.models.block_walk import BlockWalk
from mlx_lora.models.gptq import Curvature, Grid, round_weight
from mlx_lora.models.quantize import Quantization, quantize_weight
from mlx_lora.utils.progress import tracked

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
            for quantization, paths in _by_quantization(inputs.paths, stored, bits).items():
                wholes = [layers[path].fuse() for path in paths]
                weight = mx.concatenate([layers[path].merged() for path in paths])
                grids = _grids(weight, quantization, [stored[path] for path in paths])
                rounded = round_weight(weight, curvature, grids)
                plain = quantize_weight(weight, quantization).dequantize()
                shares.append(rounded.error.sum().item() / max(curvature.error(weight - plain).sum().item(), 1e-30))
                ends = np.cumsum([len(whole.weight) for whole in wholes])[:-1].tolist()
                parts = zip(*(mx.split(array, ends) for array in rounded.packed.arrays), strict=True)
                for path, whole, arrays in zip(paths, wholes, parts, strict=True):
                    layer = whole.to_quantized(**quantization.layout)
                    for name, array in zip(("weight", "scales", "biases"), arrays, strict=False):
                        layer[name] = array
                    mx.eval(layer.parameters())
                    found[path] = layer
    return Compensated(found, float(np.mean(shares)) if shares else 1.0)


def _by_quantization(
    paths: list[str], stored: Mapping[str, Any], bits: Mapping[str, int]
) -> dict[Quantization, list[str]]:
    """Return the layers that are rounded together, by how they are packed."""
    groups: dict[Quantization, list[str]] = {}
    for path in paths:
        groups.setdefault(target_quantization(stored[path], bits.get(path)), []).append(path)
    return groups


def _grids(weight: mx.array, quantization: Quantization, bases: list[Any]) -> list[Grid]:
    """Return the grids to round on: a new one, and the one with the old weights in it if the new bits have it."""
    dtypes = {float_dtype(base) for base in bases}
    grids = [Grid.of_weight(weight, quantization, dtypes.pop() if len(dtypes) == 1 else mx.float32)]
    own = [Quantization(base.bits, base.group_size, base.mode) for base in bases]
    if all(one.group_size == quantization.group_size and one.mode == quantization.mode for one in own):
        refined = [Grid.of_layer(base.scales, base.get("biases"), one) for base, one in zip(bases, own, strict=True)]
        grids.append(Grid.joined([grid.refined(quantization.bits) for grid in refined]))
    return grids


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
        with _watched(own) as seen:
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

    def add(self, path: str, x: mx.array) -> None:
        """Add a layer's input, (B, T, I)."""
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


@contextmanager
def _watched(layers: dict[str, AdapterLayer]) -> Iterator[_Seen]:
    """Record what layers read inside the block."""
    seen = _Seen()

    def record(path: str, own: Callable[..., Any], x: mx.array, *args: Any, **kwargs: Any) -> Any:
        seen.add(path, x)
        return own(x, *args, **kwargs)

    with answering(*((layer, partial(record, path)) for path, layer in layers.items())):
        yield seen
