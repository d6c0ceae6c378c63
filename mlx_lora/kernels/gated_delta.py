"""Compute the gated delta rule for training, by products over chunks of tokens, and keep nothing per token.

Qwen3.5, Qwen3-Next, Kimi-Linear and OLMo hybrid carry one matrix S per head from token to token:

    S_t = S_{t-1} diag(g_t) + u_t k_t^T,   u_t = beta_t (v_t - S_{t-1} diag(g_t) k_t),   y_t = S_t q_t

mlx-lm trains this with a loop over tokens, and autodiff keeps about three matrices like S for each. Within a chunk of C
tokens the u solve one triangular system, so a chunk is a few products; only S passes from chunk to chunk:

    (I + A) U = diag(beta) (V - K_seen S^T),   A_ti = beta_t (k_t decayed . k_i) for i < t
    Y = Q_seen S^T + P U,                      P_ti = q_t decayed . k_i for i <= t
    S' = S diag(decay of the chunk) + U^T K_left

"seen" is decayed from the chunk's start, "left" up to its end. Only the inputs and one S per segment of a few chunks are
kept; the backward pass computes the rest again, one segment at a time.

A and P are products of tokens that decay over the tokens between them. For rows a_t and columns b_i of a chunk, and
logarithms l of a decay per token, one number or one per channel d:

    M_ti = sum_d a_td b_id exp(l_(i+1)d + ... + l_td)   for i <= t, else 0

With one number per token the exponential is a factor on a_t . b_i. With one per channel it is not, and
exp(sum up to t) exp(-sum up to i) would overflow if the decay is strong. So the chunk is halved: for t in its
second half and i in its first, the sum is split at the middle, and both factors are exponentials of negative sums.
Each half is then treated in the same way. Every decay is the exponential of a sum of logarithms over exactly the tokens that
it spans: never of a positive number, and never of a difference of long sums. So a strong decay before these tokens costs no
precision.

Shapes: B batch, T tokens, K key heads, G value heads per key head (mlx-lm: Hk = K, Hv = K G), n chunks, C tokens of
a chunk, a power of two, k and v head widths. A gate has width 1 (one per head) or k (one per channel): written g. In
`Decay`, d is the number of channels, and axes before those given are batch axes.
Source: arXiv 2412.06464 (gated delta rule, equation 10), 2406.06484 section 3 (the WY representation), 2510.26692 (a gate
per channel), 2405.21060 section 6 (sums over segments), 2312.06635 section 4.3 (secondary chunks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

CHUNK = 64
# Tokens, over all heads and rows, whose intermediates are in memory at once; more makes fewer, larger products.
SEGMENT_HEAD_TOKENS = 4096
# Head widths, of keys and of values, that MLX's fused kernels have (mlx 0.32.4).
FUSED_WIDTH = 128


def chunked_gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    *,
    use_kernel: bool = True,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> tuple[mx.array, mx.array]:
    """Return what mlx-lm's `gated_delta_update` returns; its gradient takes memory that is linear in the length.

    Args:
        q, k: (B, T, Hk, Dk) float, normalized by mlx-lm's `normalize_qk`, which folds the scale into q.
        v: (B, T, Hv, Dv) float, Hk dividing Hv.
        a: (B, T, Hv) or (B, T, Hv, Dk) float, from which the gates are computed.
        b: (B, T, Hv) float, from which beta is computed.
        A_log, dt_bias: broadcast to a.
        state: (B, Hv, Dv, Dk) float32, or None for zeros.
        mask: (B, T) bool, False where a token leaves the state alone; its output is 0.
        use_kernel: mlx-lm's flag for "not training"; it makes no difference here.
        lower_bound: of the gates' logarithms (Kimi K3), or None.
        allow_neg_eigval: whether beta may reach 2 instead of 1.

    Returns:
        (B, T, Hv, Dv) in q's dtype, and the state after the last token, (B, Hv, Dv, Dk) float32.
    """
    batch, _, _, width = k.shape
    if state is None:
        state = mx.zeros((batch, *v.shape[2:], width), mx.float32)

    def gates(*of: mx.array) -> list[mx.array]:
        return log_gates(*of, mask=mask, lower_bound=lower_bound, allow_neg_eigval=allow_neg_eigval)

    @mx.custom_function
    def forward(*primals: mx.array) -> list[mx.array]:
        q, k, v, state, *of_gates = primals
        log_g, beta = gates(*of_gates)
        return gated_delta(q, k, v, log_g, beta, state)

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        q, k, v, state, *of_gates = primals
        # Computed when the backward pass gets here, and not merged with the forward pass.
        of_gates = mx.depends(of_gates, [cotangents[0]])
        log_g, beta = gates(*of_gates)
        d_q, d_k, d_v, *d_gates, d_state = gated_delta_gradient(
            [q, k, v, log_g, beta], outputs[2:], cotangents[0], cotangents[1]
        )
        return d_q, d_k, d_v, d_state.astype(state.dtype), *mx.vjp(gates, of_gates, d_gates)[1]

    y, last, *_ = forward(q, k, v, state, a, b, A_log, dt_bias)
    return y if mask is None else mx.where(mask[..., None, None], y, 0), last


def fused_gated_delta_update(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    mask: mx.array | None = None,
    **options: Any,
) -> tuple[mx.array, mx.array]:
    """Return what `chunked_gated_delta_update` returns, computed by MLX's fused kernel if that supports the arguments.

    MLX's Metal kernels support heads of 128 channels, one gate per head, and no mask. For other shapes
    `mx.fast.gated_delta_update` is a loop over tokens, so the chunked function is used instead. The kernels read gates in
    q's dtype, and bfloat16 keeps three digits of a decay near 1, so all arguments are passed as float32.
    """
    options.pop("use_kernel", None)
    if mask is not None or a.ndim == 4 or (k.shape[-1], v.shape[-1]) != (FUSED_WIDTH, FUSED_WIDTH):
        return chunked_gated_delta_update(q, k, v, a, b, A_log, dt_bias, state, mask, **options)
    log_g, beta = log_gates(a, b, A_log, dt_bias, None, **options)
    wide_q, wide_k, wide_v = (x.astype(mx.float32) for x in (q, k, v))
    y, last = mx.fast.gated_delta_update(wide_q, wide_k, wide_v, mx.exp(log_g), beta, state)
    return y.astype(q.dtype), last


def log_gates(
    a: mx.array,
    b: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    mask: mx.array | None,
    lower_bound: float | None = None,
    allow_neg_eigval: bool = False,
) -> list[mx.array]:
    """Return the gates' logarithms, (B, T, Hv) or (B, T, Hv, Dk), and beta, (B, T, Hv), both float32."""
    rate = mx.exp(A_log.astype(mx.float32))
    raw = a.astype(mx.float32) + dt_bias.astype(mx.float32)
    log_g = -rate * nn.softplus(raw) if lower_bound is None else lower_bound * mx.sigmoid(rate * raw)
    beta = mx.sigmoid(b.astype(mx.float32)) * (2.0 if allow_neg_eigval else 1.0)
    if mask is None:
        return [log_g, beta]
    kept = mask[..., None]
    return [mx.where(kept if log_g.ndim == 3 else kept[..., None], log_g, 0.0), mx.where(kept, beta, 0.0)]


def gated_delta(
    q: mx.array, k: mx.array, v: mx.array, log_g: mx.array, beta: mx.array, state: mx.array
) -> list[mx.array]:
    """Compute the gated delta rule over the sequence.

    Args:
        q, k, v, state: as in `chunked_gated_delta_update`.
        log_g, beta: as from `log_gates`.

    Returns:
        y (B, T, Hv, Dv) in q's dtype, the last state, and the state at each segment's start.
    """
    cut = _Cut.of(q, v)
    now = cut.split_state(state)
    parts, starts = [], []
    for start, stop in cut.segments():
        starts.append(now)
        # Force the order: otherwise the intermediates of all segments may be in memory at once.
        own = mx.depends([x[:, start:stop] for x in (q, k, v, log_g, beta)], [now, *parts[-1:]])
        chunks = _Chunks.of(cut, *own)
        deltas, begun, now = chunks.run(now)
        y = chunks.q_seen @ begun.swapaxes(-1, -2) + chunks.reads @ deltas
        parts.append(cut.join(y, stop - start, q.dtype))
    return [_whole(parts), cut.join_state(now), *starts]


def gated_delta_gradient(
    given: Sequence[mx.array], starts: Sequence[mx.array], d_y: mx.array, d_last: mx.array
) -> list[mx.array]:
    """Return the cotangents of `gated_delta`'s arguments, each in its argument's shape and dtype.

    Args:
        given: q, k, v, log_g and beta, as given to it.
        starts: the state at each segment's start, as it returned them.
        d_y, d_last: cotangents of y and of the last state.
    """
    cut = _Cut.of(given[0], given[2])
    d_now = cut.split_state(d_last)
    parts: list[list[mx.array]] = []
    for (start, stop), begin in reversed(list(zip(cut.segments(), starts, strict=True))):
        done = [d_now, *(parts[-1] if parts else [d_y])]
        *own, d_own = mx.depends([x[:, start:stop] for x in (*given, d_y)], done)
        d_parts, d_now = _Chunks.of(cut, *own).gradient(begin, cut.split(d_own), d_now)
        parts.append([cut.join(d, stop - start, x.dtype) for d, x in zip(d_parts, given, strict=True)])
    whole = [_whole(list(pieces)) for pieces in zip(*parts[::-1], strict=True)]
    return [*(d.reshape(x.shape) for d, x in zip(whole, given, strict=True)), cut.join_state(d_now)]


@dataclass(frozen=True)
class _Cut:
    """How (B, T, heads, width) is split into (B, K, G, n, C, width), float32."""

    key_heads: int
    group: int
    tokens: int
    chunk: int
    segment: int

    @classmethod
    def of(cls, q: mx.array, v: mx.array) -> _Cut:
        batch, tokens, key_heads, _ = q.shape
        chunk = min(CHUNK, 1 << (tokens - 1).bit_length())  # halves are halved again, so a power of two
        chunks = max(1, SEGMENT_HEAD_TOKENS // (batch * v.shape[2] * chunk))
        return cls(key_heads, v.shape[2] // key_heads, tokens, chunk, chunks * chunk)

    def segments(self) -> Iterator[tuple[int, int]]:
        """Return (first token, token after the last) of each segment."""
        return pairwise([*range(0, self.tokens, self.segment), self.tokens])

    def split(self, x: mx.array) -> mx.array:
        """Split (B, t, heads[, width]) into (B, K, G or 1, n, C, width or 1); padding tokens do not change the state."""
        x = x.astype(mx.float32)
        x = x[..., None] if x.ndim == 3 else x
        batch, tokens, heads, width = x.shape
        if missing := -tokens % self.chunk:
            x = mx.pad(x, [(0, 0), (0, missing), (0, 0), (0, 0)])
        x = x.reshape(batch, -1, self.chunk, self.key_heads, heads // self.key_heads, width)
        return mx.contiguous(x.transpose(0, 3, 4, 1, 2, 5))

    def join(self, x: mx.array, tokens: int, dtype: mx.Dtype) -> mx.array:
        """Join (B, K, G or 1, n, C, width) to (B, tokens, heads, width)."""
        x = x.astype(dtype).transpose(0, 3, 4, 1, 2, 5)
        return x.reshape(x.shape[0], -1, x.shape[3] * x.shape[4], x.shape[5])[:, :tokens]

    def split_state(self, state: mx.array) -> mx.array:
        """Reshape (B, Hv, Dv, Dk) to (B, K, G, Dv, Dk), float32."""
        return state.astype(mx.float32).reshape(state.shape[0], self.key_heads, self.group, *state.shape[2:])

    def join_state(self, state: mx.array) -> mx.array:
        return state.reshape(state.shape[0], -1, *state.shape[3:])


@dataclass(frozen=True)
class _Chunks:
    """The arrays of all chunks of a segment that do not depend on the state.

    Attributes:
        q, k, v, beta: (B, K, G or 1, n, C, width).
        decay: the decay by the gates.
        q_seen, k_seen, k_left: (B, K, G, n, C, k), decayed from the chunk's start, or up to its end.
        reads: (B, K, G, n, C, C), P.
        own: (B, K, G, n, C, C), A without beta.
        inverse: (B, K, G, n, C, C), the inverse of I + A.
        fresh: (B, K, G, n, C, v), U for a state of zeros.
        erases: (B, K, G, n, C, k), whose product with the state is subtracted from `fresh` to get U.
    """

    q: mx.array
    k: mx.array
    v: mx.array
    beta: mx.array
    decay: Decay
    q_seen: mx.array
    k_seen: mx.array
    k_left: mx.array
    reads: mx.array
    own: mx.array
    inverse: mx.array
    fresh: mx.array
    erases: mx.array

    @classmethod
    def of(cls, cut: _Cut, *given: mx.array) -> _Chunks:
        """Return the chunks of a segment, from its part of q, k, v, log_g and beta."""
        q, k, v, log_g, beta = (cut.split(x) for x in given)
        decay = Decay.of(log_g)
        products = decay.products(mx.stack([q, k]), k)
        reads, own = lower_triangle(products[0]), lower_triangle(products[1], strict=True)
        inverse = unit_lower_inverse(beta * own)
        k_seen = k * decay.seen
        fresh, erases = inverse @ (beta * v), inverse @ (beta * k_seen)
        return cls(q, k, v, beta, decay, q * decay.seen, k_seen, k * decay.left, reads, own, inverse, fresh, erases)

    def run(self, state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Compute U and the states, chunk by chunk.

        Args:
            state: (B, K, G, v, k) at the start of the first chunk.

        Returns:
            U (B, K, G, n, C, v), the state at each chunk's start (B, K, G, n, v, k), and the state at the end.
        """
        deltas, begun = [], []
        for i in range(self.fresh.shape[3]):
            begun.append(state)
            deltas.append(self.fresh[:, :, :, i] - self.erases[:, :, :, i] @ state.swapaxes(-1, -2))
            state = state * self.decay.whole[:, :, :, i] + deltas[-1].swapaxes(-1, -2) @ self.k_left[:, :, :, i]
        return mx.stack(deltas, axis=3), mx.stack(begun, axis=3), state

    def gradient(self, state: mx.array, d_y: mx.array, d_state: mx.array) -> tuple[list[mx.array], mx.array]:
        """Compute the cotangents, from the last chunk to the first.

        Args:
            state: (B, K, G, v, k) at the start of the first chunk.
            d_y: (B, K, G, n, C, v).
            d_state: (B, K, G, v, k), cotangent of the state at the end of the last chunk.

        Returns:
            Cotangents of q, k, v, log_g and beta, split into chunks, and of `state`.
        """
        deltas, begun, _ = self.run(state)
        d_deltas, d_ends, d_state = self._run_back(d_y, d_state)
        solved = self.inverse.swapaxes(-1, -2) @ d_deltas  # (B, K, G, n, C, v), of beta (V - K_seen S^T)
        d_scaled = -(solved @ begun)  # (B, K, G, n, C, k), of beta K_seen
        d_own = -lower_triangle(solved @ deltas.swapaxes(-1, -2), strict=True)  # (B, K, G, n, C, C), of A
        d_reads = lower_triangle(d_y @ deltas.swapaxes(-1, -2))
        d_q_seen, d_k_seen, d_k_left = d_y @ begun, self.beta * d_scaled, deltas @ d_ends
        d_rows, d_columns, d_pairs = self.decay.gradient(
            mx.stack([self.q, self.k]), self.k, mx.stack([d_reads, self.beta * d_own])
        )
        d_q = d_q_seen * self.decay.seen + d_rows[0]
        d_k = d_k_seen * self.decay.seen + d_k_left * self.decay.left + d_rows[1] + d_columns.sum(axis=0)
        parts = (solved * self.v, d_scaled * self.k_seen, d_own * self.own)
        d_beta = [part.sum(axis=-1, keepdims=True) for part in parts]
        d_log = self.decay.log_gradient(
            d_q_seen * self.q_seen + d_k_seen * self.k_seen,
            d_k_left * self.k_left,
            (d_ends * begun).sum(axis=-2, keepdims=True) * self.decay.whole,
        )
        # Value heads that share a key head add to its gradient.
        return [
            d_q.sum(axis=2, keepdims=True),
            d_k.sum(axis=2, keepdims=True),
            self.beta * solved,
            d_log + d_pairs.sum(axis=0),
            d_beta[0] + d_beta[1] + d_beta[2],
        ], d_state

    def _run_back(self, d_y: mx.array, d_state: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return the cotangents of U, of the state at each chunk's end, and of the state at the first chunk's start."""
        by_reads = self.reads.swapaxes(-1, -2) @ d_y
        by_y = d_y.swapaxes(-1, -2) @ self.q_seen  # (B, K, G, n, v, k)
        d_deltas, d_ends = [], []
        for i in reversed(range(d_y.shape[3])):
            d_ends.append(d_state)
            d_deltas.append(by_reads[:, :, :, i] + self.k_left[:, :, :, i] @ d_state.swapaxes(-1, -2))
            d_state = d_state * self.decay.whole[:, :, :, i] + by_y[:, :, :, i]
            d_state = d_state - d_deltas[-1].swapaxes(-1, -2) @ self.erases[:, :, :, i]
        return mx.stack(d_deltas[::-1], axis=3), mx.stack(d_ends[::-1], axis=3), d_state


def _whole(parts: Sequence[mx.array]) -> mx.array:
    return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


# Products with decay, and the triangular inverse


@dataclass(frozen=True)
class Decay:
    """The decay of a chunk's tokens.

    Attributes:
        log: (..., C, g) float32, at most 0.
        seen: (..., C, g), the decay from the chunk's start to each token, both included.
        left: (..., C, g), the decay after each token to the chunk's end.
        whole: (..., 1, g), the decay of the whole chunk.
    """

    log: mx.array
    seen: mx.array
    left: mx.array
    whole: mx.array

    @classmethod
    def of(cls, log: mx.array) -> Decay:
        """Return the decay with the given logarithms, (..., C, g)."""
        seen = mx.exp(mx.cumsum(log, axis=-2))
        return cls(log, seen, mx.exp(sum_behind(log)), seen[..., -1:, :])

    def log_gradient(self, d_seen: mx.array, d_left: mx.array, d_whole: mx.array) -> mx.array:
        """Return the cotangent of `log`.

        Args:
            d_seen, d_left, d_whole: cotangents of seen, left and whole per channel, each times its own value.
        """
        if self.log.shape[-1] == 1:
            d_seen, d_left, d_whole = (x.sum(axis=-1, keepdims=True) for x in (d_seen, d_left, d_whole))
        return mx.cumsum(d_seen, axis=-2, reverse=True) + sum_before(d_left) + d_whole

    def products(self, a: mx.array, b: mx.array) -> mx.array:
        """Return M, (..., C, C), undefined above the diagonal.

        Args:
            a, b: (..., C, d); batch axes broadcast.
        """
        return (a @ b.swapaxes(-1, -2)) * _between(self.log) if self.log.shape[-1] == 1 else _halved(self.log, a, b)

    def gradient(self, a: mx.array, b: mx.array, d: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return the cotangents of a, b and `log`.

        Args:
            a, b: as in `products`.
            d: (..., C, C), the cotangent of M; 0 above the diagonal.
        """
        if self.log.shape[-1] > 1:
            return _halved_gradient(self.log, a, b, d)
        near = d * _between(self.log)
        # A token's decay is part of M_ti for all t at or after it, and all i before it.
        crossing = mx.cumsum(near * (a @ b.swapaxes(-1, -2)), axis=-2, reverse=True)
        return near @ b, near.swapaxes(-1, -2) @ a, lower_triangle(crossing, strict=True).sum(axis=-1, keepdims=True)


def sum_behind(x: mx.array) -> mx.array:
    """Return, for each token, the sum over those behind it, (..., C, d)."""
    return mx.cumsum(x, axis=-2, reverse=True, inclusive=False)


def sum_before(x: mx.array) -> mx.array:
    """Return, for each token, the sum over those before it, (..., C, d)."""
    return mx.cumsum(x, axis=-2, inclusive=False)


def lower_triangle(x: mx.array, strict: bool = False) -> mx.array:
    """Return (..., C, C) with zeros above the diagonal; if `strict`, on it too."""
    token = mx.arange(x.shape[-1])
    return mx.where(token[:, None] > token if strict else token[:, None] >= token, x, 0.0)


def unit_lower_inverse(lower: mx.array) -> mx.array:
    """Return the inverse of I + `lower`, (..., C, C), where only the part of `lower` below the diagonal is read.

    It is computed by halves, as in forward substitution, without divisions and without powers of `lower`. (The product
    (I - A)(I + A^2)(I + A^4)... has fewer steps, but if keys are similar its terms grow to 1e15 and cancel.)
    """
    size = lower.shape[-1]
    if size == 1:
        return mx.ones_like(lower)
    first, second = _diagonal_halves(unit_lower_inverse(_diagonal_blocks(lower)))
    below = lower[..., size // 2 :, : size // 2]
    return _assemble(first, -(second @ below @ first), second)


def _between(log: mx.array) -> mx.array:
    """Return (..., C, C): exp of the sum of log (..., C, 1) over the tokens after i up to t; 0 above the diagonal."""
    size = log.shape[-2]
    # Column i of the running sums only covers tokens after i.
    sums = mx.cumsum(lower_triangle(mx.broadcast_to(log, (*log.shape[:-1], size)), strict=True), axis=-2)
    return lower_triangle(mx.exp(sums))


def _halved(log: mx.array, a: mx.array, b: mx.array) -> mx.array:
    """Return M for a decay per channel."""
    size = log.shape[-2]
    if size == 1:
        own = (a * b).sum(axis=-1, keepdims=True)
        return mx.broadcast_to(own, mx.broadcast_shapes(own.shape, (*log.shape[:-1], 1)))
    first, second = _diagonal_halves(_halved(_row_halves(log), _row_halves(a), _row_halves(b)))
    rows, columns = _to_middle(log)
    below = (a[..., size // 2 :, :] * rows) @ (b[..., : size // 2, :] * columns).swapaxes(-1, -2)
    return _assemble(first, below, second)


def _halved_gradient(log: mx.array, a: mx.array, b: mx.array, d: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return the cotangents of a, b and log for a decay per channel."""
    size = log.shape[-2]
    if size == 1:
        return d * b, d * a, mx.zeros_like(d * a)
    parts = _halved_gradient(_row_halves(log), _row_halves(a), _row_halves(b), _diagonal_blocks(d))
    d_a, d_b, d_log = (x.reshape(*x.shape[:-3], size, x.shape[-1]) for x in parts)
    rows, columns = _to_middle(log)
    a_far, b_far = a[..., size // 2 :, :] * rows, b[..., : size // 2, :] * columns
    below = d[..., size // 2 :, : size // 2]
    d_a_far, d_b_far = below @ b_far, below.swapaxes(-1, -2) @ a_far
    d_first = sum_before(d_b_far * b_far)
    d_second = mx.cumsum(d_a_far * a_far, axis=-2, reverse=True)
    return (
        _plus_half(d_a, d_a_far * rows, second=True),
        _plus_half(d_b, d_b_far * columns, second=False),
        d_log + mx.concatenate([d_first, d_second], axis=-2),
    )


def _to_middle(log: mx.array) -> tuple[mx.array, mx.array]:
    """Return the decay from the middle to each token of the second half, and from each token of the first half on."""
    half = log.shape[-2] // 2
    return mx.exp(mx.cumsum(log[..., half:, :], axis=-2)), mx.exp(sum_behind(log[..., :half, :]))


def _plus_half(whole: mx.array, part: mx.array, second: bool) -> mx.array:
    """Return `whole` with `part` added to one half of its rows."""
    half = whole.shape[-2] // 2
    first, last = whole[..., :half, :], whole[..., half:, :]
    return mx.concatenate([first, last + part] if second else [first + part, last], axis=-2)


def _row_halves(x: mx.array) -> mx.array:
    """Reshape (..., C, d) to (..., 2, C/2, d)."""
    return x.reshape(*x.shape[:-2], 2, x.shape[-2] // 2, x.shape[-1])


def _diagonal_blocks(x: mx.array) -> mx.array:
    """Return the two blocks (..., 2, C/2, C/2) on the diagonal of (..., C, C)."""
    half = x.shape[-1] // 2
    return mx.stack([x[..., :half, :half], x[..., half:, half:]], axis=-3)


def _diagonal_halves(x: mx.array) -> tuple[mx.array, mx.array]:
    return x[..., 0, :, :], x[..., 1, :, :]


def _assemble(first: mx.array, below: mx.array, second: mx.array) -> mx.array:
    """Return [[first, 0], [below, second]]."""
    above = mx.concatenate([first, mx.zeros_like(first)], axis=-1)
    return mx.concatenate([above, mx.concatenate([below, second], axis=-1)], axis=-2)
