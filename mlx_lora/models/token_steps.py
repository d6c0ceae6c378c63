"""Compute a model's steps of one token per row with fewer operations, on a CPU.

mlx has kernels for rotary positions and attention on a GPU only. On a CPU each is some ten or twenty small operations in
every block, which cost more than the numbers in them, so a step of one token uses these forms:

    positions    a rotation is linear, so x R, with R = rope(identity); R is made once per step, not twice per block
    attention    the queries that share a key head are the rows of one product, so keys and values are read once

Both agree with mlx's own to the rounding of float32. A prompt, a GPU and other dtypes use mlx's own.

Shapes: B rows, H query heads, N key heads, S keys, d head width.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import base
from mlx_lm.models.cache import BatchKVCache
from mlx_lm.models.rope_utils import Llama3RoPE, ProportionalRoPE, SuScaledRoPE

from mlx_lora.models.shared_prefix import Rotation
from mlx_lora.system import device

ATTENTION = "scaled_dot_product_attention"  # the name under which mlx-lm's architectures import it
TURNS = "turns"  # the attribute of a layer of positions that holds its `Turns`


class Turns:
    """The rotations of one step, shared by all layers of positions of a model.

    Attributes:
        active: whether a step of one token is computed now.
        offset: the positions of a batch's rows, (B,), the same object in all caches; None for a single row.
    """

    def __init__(self) -> None:
        self.active = False
        self.offset: mx.array | None = None
        self._known: dict[Any, mx.array] = {}

    def begin(self, caches: list[Any]) -> None:
        """Start a step; the caches of a batch are all at the same positions, so they get one array for these."""
        self.active = True
        rows = [cache for cache in caches if type(cache) is BatchKVCache]
        if rows and all(cache._idx == rows[0]._idx for cache in rows):
            self.offset = rows[0].offset
            for cache in rows[1:]:
                cache.offset = self.offset

    def end(self) -> None:
        """End a step."""
        self.active, self.offset = False, None
        self._known.clear()

    def rotation(self, layer: nn.Module, plain: Any, offset: int | mx.array, width: int) -> mx.array | None:
        """Return R (d, d), for a batch (B, d, d); None if the offset is not the one that all layers share."""
        if isinstance(offset, mx.array) and offset is not self.offset:
            return None
        batch = offset.size if isinstance(offset, mx.array) else 1
        key = layer.kind, width, offset if isinstance(offset, int) else None
        if key not in self._known:
            unit = mx.broadcast_to(mx.eye(width)[:, None], (batch, width, 1, width))  # one head for each direction
            self._known[key] = plain(layer, unit, offset=offset).squeeze(2 if batch > 1 else (0, 2))
        return self._known[key]


def _turning(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a subclass whose calls for one token per row use the step's rotation."""
    plain: Any = kind.__call__

    def turned(self: Any, x: mx.array, offset: int | mx.array = 0) -> mx.array:
        few = self.turns.active and x.ndim == 4 and x.shape[2] == 1 and x.dtype == mx.float32
        rotation = self.turns.rotation(self, plain, offset, x.shape[3]) if few else None
        if rotation is None:
            return plain(self, x, offset=offset)
        return x @ rotation if rotation.ndim == 2 else (x.squeeze(2) @ rotation)[:, :, None]

    return type(kind.__name__, (kind,), {"__call__": turned})


TURNING: dict[type[nn.Module], type[nn.Module]] = {
    kind: _turning(kind) for kind in (nn.RoPE, Llama3RoPE, ProportionalRoPE, SuScaledRoPE)
}


class TokenSteps:
    """A model that computes steps of one token per row in fewer operations; mlx-lm's generators take it as a model."""

    def __init__(self, model: nn.Module):
        """Prepare a model; its layers of positions get other classes, which compute the same outside such steps.

        Args:
            model: an mlx-lm model, with or without adapters.
        """
        self.model = model
        modules = list(model.modules())
        names = {type(module).__module__ for module in modules}
        self._homes = [home for home in (vars(sys.modules[name]) for name in names) if ATTENTION in home]
        self._turns = _prepared(modules)
        self._shortens = not device.on_gpu()

    def __getattr__(self, name: str) -> Any:
        """Return the model's own attribute, such as its layers."""
        return getattr(self.model, name)

    def __call__(self, tokens: mx.array, cache: Any = None, **given: Any) -> mx.array:
        """Return the model's logits (B, T, V) for tokens (B, T)."""
        if not self._shortens or tokens.shape[1] != 1 or cache is None:
            return self.model(tokens, cache=cache, **given)
        with self._step(cache):
            return self.model(tokens, cache=cache, **given)

    @contextmanager
    def _step(self, caches: list[Any]) -> Iterator[None]:
        exchanged = [home for home in self._homes if home[ATTENTION] is base.scaled_dot_product_attention]
        self._turns.begin(caches)
        for home in exchanged:
            home[ATTENTION] = attention_of_tokens
        try:
            yield
        finally:
            for home in exchanged:
                home[ATTENTION] = base.scaled_dot_product_attention
            self._turns.end()


def _prepared(modules: list[nn.Module]) -> Turns:
    """Give layers of positions their other class, and return the turns that they share."""
    layers = [module for module in modules if _plain_class(module) in (*TURNING, *TURNING.values())]
    turns: Any = next((layer.turns for layer in layers if hasattr(layer, TURNS)), None) or Turns()
    for layer in layers:
        own = _plain_class(layer)
        if own in TURNING:
            by_token = (Rotation,) if isinstance(layer, Rotation) else ()
            kept: Any = layer
            kept.__class__ = type(own.__name__, (*by_token, TURNING[own]), {}) if by_token else TURNING[own]
        layer.turns, layer.kind = turns, _kind(layer)
    return turns


def _plain_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class without the mix-in that lets it take a position for each token (shared_prefix.py)."""
    kind = type(module)
    return kind.__bases__[1] if issubclass(kind, Rotation) and kind is not Rotation else kind


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    """Return what makes two layers of positions the same function."""
    settings = {name: value for name, value in vars(layer).items() if isinstance(value, int | float | str | None)}
    arrays = {name: np.array(value).tobytes() for name, value in layer.items() if isinstance(value, mx.array)}
    return type(layer).__name__, *sorted(settings.items(), key=str), *sorted(arrays.items())


def attention_of_tokens(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return attention for one query per row, with mlx-lm's signature; calls of other kinds go to mlx-lm's function.

    Args:
        queries: (B, H, 1, d).
        keys, values: (B, N, S, d).
        cache: with `bits` if keys and values are quantized.
        scale: factor on the scores.
        mask: (B, 1, 1, S), true for keys that are seen; None: all are.
        sinks: logits without a value.

    Returns:
        (B, H, 1, d).
    """
    rows, heads, count, width = queries.shape
    plain = mask is None or (isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.shape[1:-1] == (1, 1))
    if count != 1 or not plain or sinks is not None or queries.dtype != mx.float32:
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
    if hasattr(cache, "bits"):
        return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask)
    few = keys.shape[1]
    grouped = (scale * queries).reshape(rows, few, heads // few, width)
    scores = grouped @ keys.swapaxes(-1, -2)  # (B, N, H / N, S)
    if mask is not None:
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
    return (mx.softmax(scores, axis=-1) @ values).reshape(rows, heads, 1, values.shape[-1])
