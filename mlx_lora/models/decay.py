"""Compute products of tokens that decay over the tokens between them, and a triangular inverse, by matrix products.

For rows a_t and columns b_i of a chunk, and logarithms l of a decay per token, one number or one per channel d:

    M_ti = sum_d a_td b_id exp(l_(i+1)d + ... + l_td)   for i <= t, else 0

With one number per token the exponential is a factor on a_t . b_i. With one per channel it is not, and
exp(sum up to t) exp(-sum up to i) would overflow if the decay is strong. So the chunk is halved: for t in its
second half and i in its first, the sum is split at the middle, and both factors are exponentials of negative sums.
Each half is then treated in the same way. A sum only covers tokens between i and t, so that a strong decay before them
costs no precision.

Shapes: C tokens of a chunk, a power of two; d channels; g is 1 or d. Axes before these are batch axes.
Source: arXiv 2405.21060 section 6 (sums over segments), 2312.06635 section 4.3 (secondary chunks).
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


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
