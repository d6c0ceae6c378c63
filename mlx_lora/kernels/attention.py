"""Compute attention for training with memory that is linear in the sequence, and no work above the diagonal.

mlx's own backward pass computes the scores of every query with every key in every head, masks them and keeps them (B H T
S numbers per block, half of them above the diagonal); on Metal, mlx 0.32.4 has a blocked one. Which of the two is better
is measured (kernels/table.py). The one here takes a tile of queries at a time, with only the keys that they may
see. For long rows it keeps no scores, and the backward pass computes each tile's probabilities again:

    P = softmax(scale Q K^T),  O = P V
    dP = dO V^T,  dS = P (dP - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

Shapes: B batch, H query heads, N key heads, G = H / N, T queries, S keys, t queries of a tile, d head width.
Source: FlashAttention, arXiv 2205.14135, appendix B.2 (the backward pass; tiles of queries only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx

from mlx_lora.kernels import activations as exponentials
from mlx_lora.planner.memory import MAX_KEPT_KEYS, TILE_QUERIES
from mlx_lora.utils import device


@dataclass(frozen=True)
class Tiles:
    """How one attention is computed: all its arguments that are not differentiated.

    Attributes:
        scale: factor on the scores.
        mask: `causal`, None, or a bool array that broadcasts to (B, H, T, S), False where a key is hidden.
        backward: whether no query sees a later key; a `causal` mask implies this, but an array does not show it.
        queries: about how many queries a tile has.
        kernel: `tiled`; `polynomial` for tiles with the exponentials of kernels/activations.py; or `mlx` for
            mx.fast.scaled_dot_product_attention with its own gradient and no tiles.
    """

    scale: float
    mask: mx.array | str | None
    queries: int = TILE_QUERIES
    kernel: str = "tiled"
    backward: bool = False

    @property
    def ours(self) -> bool:
        """Whether this file computes the attention."""
        return self.kernel != "mlx"

    def spans(self, q: mx.array, k: mx.array) -> list[tuple[int, int, int]]:
        """Return (first query, query after the last, keys seen) of each tile; tiles are about equally large."""
        queries, keys = q.shape[2], k.shape[2]
        count = max(1, round(queries / self.queries))
        edges = [queries * i // count for i in range(count + 1)]
        causal = isinstance(self.mask, str) or self.backward
        return [(a, b, keys - queries + b if causal else keys) for a, b in pairwise(edges)]

    def tile_mask(self, start: int, stop: int, seen: int, key_heads: int) -> mx.array | None:
        """Return the mask of a tile, broadcasting to (B, N, G, t, seen)."""
        if self.mask is None:
            return None
        if isinstance(self.mask, str):  # the tile's last query sees all keys of the tile
            return mx.arange(seen) <= mx.arange(seen - (stop - start), seen)[:, None]
        mask = self.mask.reshape((1,) * (4 - self.mask.ndim) + self.mask.shape)
        mask = mask[:, :, start:stop, :seen] if mask.shape[2] > 1 else mask
        batch, heads, *rest = mask.shape
        return mask.reshape(batch, *((1, 1) if heads == 1 else (key_heads, heads // key_heads)), *rest)


def attend(q: mx.array, k: mx.array, v: mx.array, tiles: Tiles, sinks: mx.array | None = None) -> mx.array:
    """Return attention, computed by the kernel that `tiles` names; shapes as in `tiled_attention`."""
    if tiles.ours:
        return tiled_attention(q, k, v, tiles, sinks)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=tiles.scale, mask=tiles.mask, sinks=sinks)


def attend_gradient(tiles: Tiles, primals: Sequence[mx.array], d_out: mx.array, out: mx.array) -> Sequence[mx.array]:
    """Return the cotangents of q, k, v (and sinks), computed by the kernel that `tiles` names.

    Our kernel starts from the output; mlx's computes the output again, since nothing else was kept.
    """
    if tiles.ours:
        return attention_gradient(tiles, primals, d_out, out)

    def again(q: mx.array, k: mx.array, v: mx.array, *sinks: mx.array) -> list[mx.array]:
        return [attend(q, k, v, tiles, *sinks)]

    # Depend on the cotangent: otherwise compiling would merge this with the forward pass, and keep what is in between.
    return mx.vjp(again, mx.depends(list(primals), d_out), [d_out])[1]


def tiled_attention(q: mx.array, k: mx.array, v: mx.array, tiles: Tiles, sinks: mx.array | None = None) -> mx.array:
    """Return softmax(scale Q K^T + mask) V, and keep no scores of long rows for the backward pass.

    Args:
        q: (B, H, T, d) float.
        k, v: (B, N, S, d) float, N dividing H; v's width may differ from k's.
        tiles: scale, mask, and the size of a tile.
        sinks: (H,) logits that take part in the softmax without a value (GPT-OSS), or None.

    Returns:
        (B, H, T, v's width), differentiable in q, k, v and sinks.
    """
    given = (q, k, v) if sinks is None else (q, k, v, sinks)
    keep = device.keep_exponentials() and sinks is None and k.shape[2] <= MAX_KEPT_KEYS

    @mx.custom_function
    def forward(*primals: mx.array) -> list[mx.array]:
        out, probabilities = attention(tiles, *primals)
        return [out, *probabilities] if keep else [out]

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        return attention_gradient(tiles, primals, cotangents[0], outputs[0], outputs[1:])

    return forward(*given)[0]


def attention(tiles: Tiles, q: mx.array, k: mx.array, v: mx.array, *sinks: mx.array) -> tuple[mx.array, list[mx.array]]:
    """Return the output of `tiled_attention`, computed tile by tile, and each tile's P (B, N, G t, seen)."""
    parts: list[mx.array] = []
    probabilities: list[mx.array] = []
    polynomial = _by_polynomials(tiles, q, k, sinks)
    for start, stop, seen in tiles.spans(q, k):
        # Force the order: otherwise all tiles may be in memory at once.
        own = mx.depends(q[:, :, start:stop], parts[-1:]) if parts else q[:, :, start:stop]
        mask = tiles.tile_mask(start, stop, seen, k.shape[1])
        weights, _ = _probabilities(own * tiles.scale, k[:, :, :seen], mask, sinks, polynomial)
        probabilities.append(weights)
        parts.append(_fold_back(weights @ v[:, :, :seen], q.shape[1]))
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0], probabilities


def attention_gradient(
    tiles: Tiles,
    primals: Sequence[mx.array],
    d_out: mx.array,
    out: mx.array,
    probabilities: Sequence[mx.array] = (),
) -> tuple[mx.array, ...]:
    """Return the cotangents of q, k, v (and sinks).

    Args:
        tiles: as in the forward pass.
        primals: q, k, v (and sinks).
        d_out, out: (B, H, T, width), the output's cotangent and the output.
        probabilities: each tile's P if the forward pass kept them; otherwise they are computed again.
    """
    q, k, v, *sinks = primals
    heads, key_heads = q.shape[1], k.shape[1]
    d_row = (d_out * out).astype(mx.float32).sum(axis=-1, keepdims=True)  # (B, H, T, 1)
    d_q: list[mx.array] = []
    d_k, d_v, d_sinks = _KeyGradient(), _KeyGradient(), mx.array(0.0)
    for index, (start, stop, seen) in reversed(list(enumerate(tiles.spans(q, k)))):
        # The first tile also waits: otherwise compiling may merge it with the forward pass's tile, and keep that.
        done = [d_q[-1], *d_k.latest(), *d_v.latest()] if d_q else [d_row]
        own = mx.depends(q[:, :, start:stop] * tiles.scale, done)
        keys, mask = k[:, :, :seen], tiles.tile_mask(start, stop, seen, key_heads)
        weights, sunk = (probabilities[index], None) if probabilities else _probabilities(own, keys, mask, sinks)
        d_own, row = _fold(d_out[:, :, start:stop], key_heads), _fold(d_row[:, :, start:stop], key_heads)
        d_weights = d_own @ v[:, :, :seen].swapaxes(-1, -2)  # (B, N, G t, seen)
        d_scores = (weights * (d_weights - row)).astype(q.dtype)
        d_q.append(_fold_back(d_scores @ keys, heads) * tiles.scale)
        d_k.add(d_scores.swapaxes(-1, -2) @ _fold(own, key_heads))
        d_v.add(weights.swapaxes(-1, -2) @ d_own)
        if sunk is not None:
            d_sinks = d_sinks - _fold_back(sunk * row, heads).sum(axis=(0, 2, 3))  # (H,)
    # StableLM and Phixtral pass queries and keys in float32, and values in the model's dtype.
    wholes = mx.concatenate(d_q[::-1], axis=2), d_k.whole(), d_v.whole()
    gradients = tuple(whole.astype(primal.dtype) for whole, primal in zip(wholes, (q, k, v), strict=True))
    return (*gradients, d_sinks.astype(sinks[0].dtype)) if sinks else gradients


AttentionCall = Callable[[mx.array, mx.array, mx.array, Tiles, mx.array | None], mx.array]


class _KeyGradient:
    """A sum of gradients of prefixes of the keys, added from the longest to the shortest, without padding."""

    def __init__(self) -> None:
        self.head: Any = None  # an array from the first addition on
        self._tails: list[mx.array] = []

    def add(self, part: mx.array) -> None:
        """Add (B, N, seen, d) to the first `seen` keys."""
        if self.head is None:
            self.head = part
            return
        seen = part.shape[2]
        if seen < self.head.shape[2]:
            self._tails.append(self.head[:, :, seen:] * 1)  # a copy: a view would keep the whole buffer alive
        self.head = self.head[:, :, :seen] + part

    def latest(self) -> list[mx.array]:
        """Return the arrays that the last addition made."""
        return [self.head, *self._tails[-1:]]

    def whole(self) -> mx.array:
        """Return the sum, (B, N, S, d)."""
        return mx.concatenate([self.head, *self._tails[::-1]], axis=2) if self._tails else self.head


def _fold(x: mx.array, key_heads: int) -> mx.array:
    """Reshape (B, H, t, d) to (B, N, G t, d), for one product of all heads that share a key head."""
    return x.reshape(x.shape[0], key_heads, -1, x.shape[3])


def _fold_back(x: mx.array, heads: int) -> mx.array:
    """Reshape (B, N, G t, d) to (B, H, t, d)."""
    return x.reshape(x.shape[0], heads, -1, x.shape[3])


def _by_polynomials(tiles: Tiles, q: mx.array, k: mx.array, sinks: Sequence[mx.array]) -> bool:
    """Return whether the probabilities are computed by polynomials: not in a backward pass, where mlx cannot compile."""
    return tiles.kernel == "polynomial" and not sinks and exponentials.usable(q, k)


def _probabilities(
    q: mx.array, k: mx.array, mask: mx.array | None, sinks: Sequence[mx.array], polynomial: bool = False
) -> tuple[mx.array, mx.array | None]:
    """Return P (B, N, G t, S) for scaled queries (B, H, t, d), and the sinks' share (B, N, G t, 1)."""
    key_heads = k.shape[1]
    q = q * exponentials.SCALE if polynomial else q
    scores = _fold(q, key_heads) @ k.swapaxes(-1, -2)
    shape = scores.shape
    if mask is not None:
        scores = scores.reshape(shape[0], key_heads, q.shape[1] // key_heads, q.shape[2], shape[3])
        scores = mx.where(mask, scores, mx.finfo(scores.dtype).min).reshape(shape)
    if polynomial:
        return exponentials.softmax(scores), None
    if not sinks:
        return mx.softmax(scores, axis=-1, precise=True), None
    sunk = mx.broadcast_to(sinks[0].astype(scores.dtype)[None, :, None, None], (shape[0], q.shape[1], q.shape[2], 1))
    both = mx.softmax(mx.concatenate([_fold(sunk, key_heads), scores], axis=-1), axis=-1, precise=True)
    return both[..., 1:], both[..., :1]
