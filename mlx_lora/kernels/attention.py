"""Compute attention for training with memory that is linear in the sequence, and no work above the diagonal.

mlx's own backward pass computes the scores of every query with every key in every head, masks them and keeps them (B H T
S numbers per block, half of them above the diagonal); on Metal, mlx 0.32.4 has a blocked one. Which of the two is better
is measured (kernels/choose.py). The one here takes a tile of queries at a time, with only the keys that they may
see: those before them, and with a sliding window only those in it, so that time is linear in the row. For long rows it keeps
no scores, and the backward pass computes each tile's probabilities again:

    P = softmax(scale Q K^T),  O = P V
    dP = dO V^T,  dS = P (dP - rowsum(dO O)),  dQ = scale dS K,  dK = scale dS^T Q,  dV = P^T dO

Shapes: B batch, H query heads, N key heads, G = H / N, T queries, S keys, t queries of a tile, d head width.
Source: FlashAttention, arXiv 2205.14135, appendix B.2 (the backward pass; tiles of queries only).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import mlx.core as mx

from mlx_lora.kernels import activations as exponentials
from mlx_lora.planner.memory import MAX_KEPT_KEYS, TILE_QUERIES
from mlx_lora.utils import device


class Span(NamedTuple):
    """One tile.

    Attributes:
        start, stop: its first query, and the one after its last.
        begin, end: the first key that it reads, and the one after its last.
    """

    start: int
    stop: int
    begin: int
    end: int

    def of_queries(self, x: mx.array) -> mx.array:
        """Return the tile's part of (B, H, T, ...)."""
        return x[:, :, self.start : self.stop]

    def of_keys(self, x: mx.array) -> mx.array:
        """Return the tile's part of (B, N, S, ...)."""
        return x[:, :, self.begin : self.end]


@dataclass(frozen=True)
class Tiles:
    """How one attention is computed: all its arguments that are not differentiated.

    Attributes:
        scale: factor on the scores.
        mask: `causal`, None, or a bool array that broadcasts to (B, H, T, S), False where a key is hidden.
        backward: whether no query sees a later key; a `causal` mask implies this, but an array does not show it.
        window: the number of keys that a query sees at most, the last of which is its own; the mask says the same, and tiles do
            not read it. None: the mask decides.
        queries: about how many queries a tile has.
        kernel: `tiled`; `polynomial` for tiles with the exponentials of kernels/activations.py; or `mlx` for
            mx.fast.scaled_dot_product_attention with its own gradient and no tiles.
    """

    scale: float
    mask: mx.array | str | None
    queries: int = TILE_QUERIES
    kernel: str = "tiled"
    backward: bool = False
    window: int | None = None

    def spans(self, q: mx.array, k: mx.array) -> list[Span]:
        """Return the tiles, which are about equally large."""
        queries, keys = q.shape[2], k.shape[2]
        count = max(1, round(queries / self.queries))
        edges = [queries * i // count for i in range(count + 1)]
        causal = isinstance(self.mask, str) or self.backward or self.window is not None
        return [
            Span(
                a,
                b,
                0 if self.window is None else max(0, keys - queries + a - self.window + 1),
                keys - queries + b if causal else keys,
            )
            for a, b in pairwise(edges)
        ]

    def tile_mask(self, span: Span, own: mx.array, k: mx.array) -> mx.array | None:
        """Return the mask of a tile, broadcasting to (B, N, G, t, keys of the tile).

        Args:
            span: the tile.
            own: its queries.
            k: all keys.
        """
        if self.window is not None or isinstance(self.mask, str):
            keys, last = mx.arange(span.begin, span.end), mx.arange(span.end - (span.stop - span.start), span.end)
            if k.shape[2] > MAX_KEPT_KEYS:
                # Compiling would merge the masks of all layers, and of forward and backward pass, and keep them.
                [places] = mx.depends([mx.arange(k.shape[2])], [own])
                keys, last = places[span.begin : span.end], places[span.end - (span.stop - span.start) : span.end]
            last = last[:, None]  # that each query sees
            return keys <= last if self.window is None else (keys <= last) & (last < keys + self.window)
        if self.mask is None:
            return None
        mask = self.mask.reshape((1,) * (4 - self.mask.ndim) + self.mask.shape)
        mask = mask[:, :, span.start : span.stop, : span.end] if mask.shape[2] > 1 else mask
        batch, heads, *rest = mask.shape
        return mask.reshape(batch, *((1, 1) if heads == 1 else (k.shape[1], heads // k.shape[1])), *rest)


def attend(q: mx.array, k: mx.array, v: mx.array, tiles: Tiles, sinks: mx.array | None = None) -> mx.array:
    """Return attention, computed by the kernel that `tiles` names; shapes as in `tiled_attention`."""
    if tiles.kernel != "mlx":
        return tiled_attention(q, k, v, tiles, sinks)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=tiles.scale, mask=tiles.mask, sinks=sinks)


def attend_gradient(tiles: Tiles, primals: Sequence[mx.array], d_out: mx.array, out: mx.array) -> Sequence[mx.array]:
    """Return the cotangents of q, k, v (and sinks), computed by the kernel that `tiles` names.

    Our kernel starts from the output; mlx's computes the output again, since nothing else was kept.
    """
    if tiles.kernel != "mlx":
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
    """Return the output of `tiled_attention`, computed tile by tile, and each tile's P (B, N, G t, keys)."""
    parts: list[mx.array] = []
    probabilities: list[mx.array] = []
    # Not in a backward pass, where mlx cannot compile.
    polynomial = tiles.kernel == "polynomial" and not sinks and exponentials.usable(q, k)
    for span in tiles.spans(q, k):
        # Force the order: otherwise all tiles may be in memory at once.
        own = mx.depends(span.of_queries(q), parts[-1:]) if parts else span.of_queries(q)
        mask = tiles.tile_mask(span, own, k)
        weights, _ = _probabilities(own * tiles.scale, span.of_keys(k), mask, sinks, polynomial)
        probabilities.append(weights)
        parts.append(_fold_back(weights @ span.of_keys(v), q.shape[1]))
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
    for index, span in reversed(list(enumerate(tiles.spans(q, k)))):
        # The first tile also waits: otherwise compiling may merge it with the forward pass's tile, and keep that.
        done = [d_q[-1], *d_k.latest(), *d_v.latest()] if d_q else [d_row]
        own = mx.depends(span.of_queries(q) * tiles.scale, done)
        keys, mask = span.of_keys(k), tiles.tile_mask(span, own, k)
        weights, sunk = (probabilities[index], None) if probabilities else _probabilities(own, keys, mask, sinks)
        d_own, row = _fold(span.of_queries(d_out), key_heads), _fold(span.of_queries(d_row), key_heads)
        d_weights = d_own @ span.of_keys(v).swapaxes(-1, -2)  # (B, N, G t, keys)
        d_scores = (weights * (d_weights - row)).astype(q.dtype)
        d_q.append(_fold_back(d_scores @ keys, heads) * tiles.scale)
        d_k.add(span, d_scores.swapaxes(-1, -2) @ _fold(own, key_heads))
        d_v.add(span, weights.swapaxes(-1, -2) @ d_own)
        if sunk is not None:
            d_sinks = d_sinks - _fold_back(sunk * row, heads).sum(axis=(0, 2, 3))  # (H,)
    # StableLM and Phixtral pass queries and keys in float32, and values in the model's dtype.
    wholes = mx.concatenate(d_q[::-1], axis=2), d_k.whole(), d_v.whole()
    gradients = tuple(whole.astype(primal.dtype) for whole, primal in zip(wholes, (q, k, v), strict=True))
    return (*gradients, d_sinks.astype(sinks[0].dtype)) if sinks else gradients


AttentionCall = Callable[[mx.array, mx.array, mx.array, Tiles, mx.array | None], mx.array]


class _KeyGradient:
    """A sum of gradients of spans of the keys, added from the last to the first, without padding."""

    def __init__(self) -> None:
        self.head: Any = None  # an array from the first addition on: the sum for the keys from `_begin` on
        self._begin = 0
        self._tails: list[mx.array] = []  # sums that are complete, of the keys behind it

    def add(self, span: Span, part: mx.array) -> None:
        """Add (B, N, keys, d) to the keys of a tile, which begin and end no later than those of the tile before."""
        begin, self._begin = self._begin, span.begin
        if self.head is None:
            self.head = part
            return
        both = max(0, span.end - begin)  # keys of the head that this tile reads, too
        if both < self.head.shape[2]:
            self._tails.append(self.head[:, :, both:] * 1)  # a copy: a view would keep the whole buffer alive
        if begin == span.begin:
            self.head = self.head[:, :, :both] + part
        elif both:
            new = part.shape[2] - both
            self.head = mx.concatenate([part[:, :, :new], part[:, :, new:] + self.head[:, :, :both]], axis=2)
        else:
            self.head = part

    def latest(self) -> list[mx.array]:
        """Return the arrays that the last addition made."""
        return [self.head, *self._tails[-1:]]

    def whole(self) -> mx.array:
        """Return the sum, (B, N, S, d); no tile reads the keys before the first tile's."""
        batch, heads, _, width = self.head.shape
        before = [mx.zeros((batch, heads, self._begin, width), self.head.dtype)] if self._begin else []
        every = [*before, self.head, *self._tails[::-1]]
        return mx.concatenate(every, axis=2) if len(every) > 1 else self.head


def _fold(x: mx.array, key_heads: int) -> mx.array:
    """Reshape (B, H, t, d) to (B, N, G t, d), for one product of all heads that share a key head."""
    return x.reshape(x.shape[0], key_heads, -1, x.shape[3])


def _fold_back(x: mx.array, heads: int) -> mx.array:
    """Reshape (B, N, G t, d) to (B, H, t, d)."""
    return x.reshape(x.shape[0], heads, -1, x.shape[3])


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


# Sliding windows


class Windows:
    """Remembers which masks are sliding windows; masks are told apart by identity.

    mlx-lm gives a layer with a sliding window a bool array with a number for every query and key, (T, S), which does not say
    that most of it is False. All architectures get it from one function, `create_attention_mask`. While a step is traced, that
    function is replaced by one that also notes the window of the array that it returns (kernels/choose.py). An array that a model
    makes or changes by itself is not noted, and is then read as it is.
    """

    def __init__(self) -> None:
        # The masks themselves, too: while they are here, no other array gets one of their ids.
        self._noted: dict[int, tuple[mx.array, int]] = {}

    def note(self, mask: mx.array, window: int) -> None:
        """Remember that a query sees only itself and the `window` - 1 keys before it."""
        self._noted[id(mask)] = (mask, window)

    def of(self, mask: mx.array | str | None) -> int | None:
        """Return a mask's window, None if it has none that is known."""
        return self._noted.get(id(mask), (None, None))[1]

    def replaced(self, mask: mx.array, by: mx.array) -> None:
        """Remember of an array what is known of the mask that it stands for."""
        window = self.of(mask)
        if window is not None:
            self.note(by, window)

    def noting(self, make: Callable[..., Any]) -> Callable[..., Any]:
        """Return mlx-lm's `create_attention_mask` with a note of the windows of what it returns."""

        def made(h: mx.array, cache: Any = None, window_size: int | None = None, return_array: bool = False) -> Any:
            mask = make(h, cache, window_size, return_array)
            # The window of a shared prefix is one of positions, and not of columns.
            if window_size and cache is None and isinstance(mask, mx.array):
                self.note(mask, window_size)
            return mask

        return made
