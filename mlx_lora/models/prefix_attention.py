"""Compute a prompt once for several answers: a row has the prompt, followed by the answers, one after another.

    row        p p p p  a a a  b b
    positions  0 1 2 3  4 5 6  4 5     for the rotation: each answer begins where the prompt ends
    seen by b  p p p p         b b     the mask: a token sees the prompt, and its own answer up to itself

Keys and values of the prompt are computed once, and the gradients of both answers add up in them. Models get this through the cache
argument that they have for generation: it knows the tokens' positions, makes the mask, and returns keys and values as
they are. Only the rotating layers have to be changed, since they take one position per row.

A model whose state passes from token to token (state-space, linear attention) cannot do this: the second answer would
begin with the state that the first one left.

Shapes: B rows, K answers per row, T columns, H heads, d head width.
Source: arXiv 2410.20305 (prefix sharing for DPO).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ChunkedKVCache, KVCache, RotatingKVCache, make_prompt_cache

from mlx_lora.compat.functions import mix_in

PLAIN_CACHES = (
    KVCache,
    RotatingKVCache,
)  # they hold keys and values of each token, and nothing that depends on their order


class SharedPrefix(NamedTuple):
    """The layout of a batch, in the role of every layer's cache.

    It holds only arrays and never changes, so a checkpointed block may take it as an argument.

    Attributes:
        positions: (B, T) int32, each token's position in its own text.
        answers: (B, T) int32, 0 in the prompt and k in the k-th answer. Padding belongs to the last one.
    """

    positions: mx.array
    answers: mx.array

    @classmethod
    def of(cls, starts: mx.array, width: int) -> SharedPrefix:
        """Return the layout of rows.

        Args:
            starts: (B, K) int32, the column at which each answer starts; the first is the prompt's length.
            width: T.
        """
        columns = mx.arange(width)
        begun = columns >= starts[..., None]  # (B, K, T)
        answers = begun.astype(mx.int32).sum(axis=1)
        before = mx.concatenate([starts[:, :1], starts], axis=1)  # the prompt begins at 0, as the first answer would
        own = mx.take_along_axis(before, answers, axis=1)  # (B, T)
        return cls(columns - own + starts[:, :1], answers)

    @property
    def offset(self) -> mx.array:
        """The positions: what rotating layers take as the offset."""
        return self.positions

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return the keys and values to attend to: those of the row itself."""
        return keys, values

    def make_mask(self, tokens: int, window_size: int | None = None, return_array: bool = False) -> mx.array:
        """Return the mask, (B, 1, T, T) bool: where a query (second to last axis) sees a key.

        Args:
            tokens: T.
            window_size: of a sliding window: the number of positions seen, the token's own included.
            return_array: mlx-lm's; the mask always is an array.
        """
        query, key = self.answers[:, None, :, None], self.answers[:, None, None, :]
        seen = (mx.arange(tokens)[:, None] >= mx.arange(tokens)) & ((key == 0) | (key == query))
        if window_size is not None:
            seen = seen & (self.positions[:, None, :, None] < self.positions[:, None, None, :] + window_size)
        return seen


def shared_caches(model: nn.Module, arrays: Mapping[str, Any]) -> dict[str, list[SharedPrefix]]:
    """Return the keyword arguments with which a model takes a batch: none unless its rows hold several answers.

    Args:
        model: whose call it is.
        arrays: of the batch, with `starts` if its rows hold several answers (losses/cross_entropy.py).
    """
    if "starts" not in arrays:
        return {}
    layout = SharedPrefix.of(arrays["starts"], arrays["inputs"].shape[1])
    return {"cache": [layout] * len(make_prompt_cache(model))}


def answers_at(arrays: Mapping[str, Any]) -> mx.array:
    """Return which answer each position belongs to, (P,): its row, or row * K + place in the row where rows hold K answers.

    A position in the prompt counts for the first answer, as in a row that holds only that one.

    Args:
        arrays: of a batch (losses/cross_entropy.py).
    """
    positions, width = arrays["positions"], arrays["inputs"].shape[1]
    rows = positions // width
    if "starts" not in arrays:
        return rows
    starts = arrays["starts"]
    later = (positions % width)[:, None] >= starts[rows][:, 1:]
    return rows * starts.shape[1] + later.sum(axis=1)


class Rotation(nn.Module):
    """A mix-in for the class of a rotating layer, which then also takes a position for each token."""

    def __call__(self, x: mx.array, offset: Any = 0, **kwargs: Any) -> mx.array:
        if not isinstance(offset, mx.array) or offset.ndim < 2:
            return super().__call__(x, offset=offset, **kwargs)
        batch, heads, tokens, width = x.shape
        # Each token as a row of its own: mx.fast.rope takes an offset per row.
        single = x.swapaxes(1, 2).reshape(batch * tokens, heads, 1, width)
        turned = super().__call__(single, offset=offset.reshape(-1), **kwargs)
        return turned.reshape(batch, tokens, heads, -1).swapaxes(1, 2)


def rotate_by_token(model: nn.Module) -> None:
    """Let the rotating layers of this model take a position for each token; a second call changes nothing."""
    for module in model.modules():
        if list(inspect.signature(type(module).__call__).parameters)[1:3] == ["x", "offset"]:
            mix_in(Rotation, module)


def unshareable(model: nn.Module) -> str | None:
    """Return in a few words why a model cannot share a prompt, None if its structure allows it."""
    for cache in make_prompt_cache(model):
        if not isinstance(cache, PLAIN_CACHES) or isinstance(cache, ChunkedKVCache):
            return f"a layer of this model keeps {type(cache).__name__}, in which answers cannot be told apart"
    return None
