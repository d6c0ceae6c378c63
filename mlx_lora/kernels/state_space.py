"""Compute state-space layers for training: Mamba-2's (one decay per head) by products, Mamba's (one per state) by a scan.

Both are the recurrence  h_t = decay_t h_(t-1) + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t.  mlx-lm computes the first in
pieces of 256 tokens whose T x T matrices are kept for the backward pass, and the second token by token, keeping
every state, often a hundred times the size of the layer's output. Here only the inputs, and at most one state per span of
tokens, are kept between the passes:

    forward    for each span:  y, state = span(inputs of the span, state)
    backward   for each span, from the last:  the span again, and its gradient

Shapes: B batch, T tokens of the sequence, t tokens of a span, H heads of width P, G groups of heads, N numbers of a state (per
channel), W channels, K chunks of L tokens in a span.
Source: arXiv 2405.21060, section 6 and listing 1 (Mamba-2); arXiv 2312.00752, section 3 (Mamba); arXiv 1604.06174
(recomputation per segment).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import mlx.core as mx

from mlx_lora.utils.device import exponential

CHUNK = 64  # tokens of a chunk, within which the recurrence is computed by matrix products
# A span's number of chunks, and the numbers in its largest array, of which about 40 are in memory in the backward pass.
# More would make fewer, larger products; these keep a span's work near 80 MB, and none were faster on a CPU.
MAX_CHUNKS = 16
DUAL_NUMBERS = 1 << 19
SCAN_NUMBERS = 1 << 20
SCAN_TOKENS = (16, 256)  # fewest and most tokens of a span of the selective scan; fewer would keep too many states
STEP_NUMBERS = 1 << 15  # numbers in one step of a scan that keep a device busy
Span = Callable[[list[mx.array], list[mx.array], mx.array], tuple[mx.array, mx.array]]
"""(inputs of a span, each (B, t, ...); weights; state before it) -> (output (B, t, ...), state after it)."""


# Mamba-2 and Mamba


def state_space_dual(
    x: mx.array,
    dt: mx.array,
    log_decay: mx.array,
    b: mx.array,
    c: mx.array,
    skip: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return Mamba-2's y and last state: h_t = exp(log_decay_t) h_(t-1) + dt_t x_t b_t^T, y_t = h_t c_t + skip x_t.

    Args:
        x: (B, T, H, P) float.
        dt: (B, T, H) float32, the weight of each token's input.
        log_decay: (B, T, H) float32, at most 0.
        b, c: (B, T, G, N) float, G dividing H.
        skip: (H,) float.
        state: (B, H, P, N) float32, h_0; None for zeros.

    Returns:
        (B, T, H, P) of x's dtype and (B, H, P, N) float32, differentiable in all arguments.
    """
    batch, _, heads, width = x.shape
    if state is None:
        state = mx.zeros((batch, heads, width, b.shape[-1]), mx.float32)
    chunks = min(max(DUAL_NUMBERS // (batch * heads * CHUNK * CHUNK), 1), MAX_CHUNKS)
    return run_in_spans(_dual_span, [x, dt, log_decay, b, c], [skip], state, chunks * CHUNK, keep_states=False)


def _dual_span(inputs: list[mx.array], weights: list[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
    """Return a span of `state_space_dual`, computed by products within chunks, and by states between them."""
    given, dt, log_decay, b, c = inputs
    batch, length, heads, width = given.shape
    groups, numbers = b.shape[2:]
    per_group, size = heads // groups, min(length, CHUNK)
    chunks = -(-length // size)

    def in_chunks(array: mx.array, *rest: int) -> mx.array:
        """Return (B, t, ...) as (B, K, G, L, *rest) in float32; padding at the end does not change the state."""
        pad = [(0, 0), (0, chunks * size - length), *((0, 0) for _ in array.shape[2:])]
        array = mx.pad(array, pad) if chunks * size > length else array
        return (
            array.astype(mx.float32)
            .reshape(batch, chunks, size, groups, -1)
            .swapaxes(2, 3)
            .reshape(batch, chunks, groups, size, *rest)
        )

    b, c = in_chunks(b, numbers), in_chunks(c, numbers)
    x = in_chunks(given.astype(mx.float32) * dt[..., None], per_group, width)  # (B, K, G, L, H/G, P)
    log_decay = in_chunks(log_decay, per_group).swapaxes(-1, -2)  # (B, K, G, H/G, L)
    # What each chunk has added to the state at its end.
    to_end = exponential(mx.cumsum(log_decay, axis=-1, reverse=True, inclusive=False)).swapaxes(-1, -2)
    faded = (x * to_end[..., None]).flatten(-2)  # (B, K, G, L, H/G P)
    added = (faded.swapaxes(-1, -2) @ b).reshape(batch, chunks, heads, width * numbers)
    # The states before each chunk and after the last: chunks in a span are treated like tokens in a chunk.
    added = mx.concatenate([state.reshape(batch, 1, heads, -1), added], axis=1).swapaxes(1, 2)  # (B, H, 1 + K, P N)
    whole = log_decay.sum(axis=-1).reshape(batch, chunks, heads).swapaxes(1, 2)
    states = _decay_between(mx.pad(whole, [(0, 0), (0, 0), (1, 0)])) @ added
    after = states[:, :, -1].reshape(state.shape)
    before = states[:, :, :-1].swapaxes(1, 2).reshape(batch, chunks, groups, per_group * width, numbers)

    within = (c @ b.swapaxes(-1, -2))[:, :, :, None] * _decay_between(log_decay)  # (B, K, G, H/G, L, L)
    y = (within @ x.swapaxes(-2, -3)).swapaxes(-2, -3)  # (B, K, G, L, H/G, P)
    from_start = exponential(mx.cumsum(log_decay, axis=-1)).swapaxes(-1, -2)[..., None]
    y = y + (c @ before.swapaxes(-1, -2)).reshape(y.shape) * from_start
    y = y.swapaxes(2, 3).reshape(batch, chunks * size, heads, width)[:, :length]
    return (y + given * weights[0][:, None]).astype(given.dtype), after


def _decay_between(log_decay: mx.array) -> mx.array:
    """Return exp(sum of log_decay over j+1 .. i) for all i >= j, 0 above the diagonal: (..., L) to (..., L, L).

    Each j has its own sum: differences of one running sum would lose a weak decay that follows a strong one.
    """
    size = log_decay.shape[-1]
    below = mx.tril(mx.ones((size, size), mx.float32), -1)  # (i, j), 1 where i > j
    return mx.tril(exponential(mx.cumsum(log_decay[..., None] * below, axis=-2)))


def selective_scan(
    x: mx.array,
    dt: mx.array,
    a: mx.array,
    b: mx.array,
    c: mx.array,
    skip: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return Mamba's y and last state: h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t^T, y_t = h_t c_t + skip x_t.

    Args:
        x: (B, T, W) float.
        dt: (B, T, W) float, positive.
        a: (W, N) float, negative.
        b, c: (B, T, N) float.
        skip: (W,) float.
        state: (B, W, N) float, h_0; None for zeros.

    Returns:
        (B, T, W) of x's dtype and (B, W, N) float32, differentiable in all arguments.
    """
    state = mx.zeros((x.shape[0], *a.shape), mx.float32) if state is None else state.astype(mx.float32)
    return run_in_spans(_selective_span, [x, dt, b, c], [a, skip], state, scan_tokens(state.size), keep_states=True)


def _selective_span(inputs: list[mx.array], weights: list[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
    """Return a span of `selective_scan`, whose states (B, t, W, N) are only in memory during its work."""
    lanes = lanes_for(inputs[0].shape[1], state.size)
    # Padding tokens at the end have dt = 0, and do not change the state.
    x, dt, b, c = (in_lanes(array.astype(mx.float32), lanes) for array in inputs)  # (steps, lanes, B, W or N)
    a, skip = (array.astype(mx.float32) for array in weights)
    decay = exponential(dt[..., None] * a)  # (steps, lanes, B, W, N)
    h = linear_scan(decay, (dt * x)[..., None] * b[..., None, :], state)
    y = (h @ c[..., None]).squeeze(-1) + skip * x
    return out_of_lanes(y, inputs[0].shape[1]).astype(inputs[0].dtype), h[-1, -1]


# Spans of a sequence


def run_in_spans(
    span: Span,
    inputs: Sequence[mx.array],
    weights: Sequence[mx.array],
    state: mx.array,
    tokens: int,
    keep_states: bool,
) -> tuple[mx.array, mx.array]:
    """Return what `span` would return for all tokens at once, with the work of one span in memory at a time.

    Args:
        span: computes some tokens from the state before them; differentiable.
        inputs: (B, T, ...) each, split along T.
        weights: the arrays that all tokens share.
        state: the state before the first token.
        tokens: the number of tokens of a span; the last one may be shorter.
        keep_states: keep the state before each span for the backward pass. Otherwise, the backward pass computes the
            states again, which costs little if `span` can compute them without its output.

    Returns:
        The output (B, T, ...) and the state after the last token, differentiable in inputs, weights and state.
    """
    length, count = inputs[0].shape[1], len(inputs)
    edges = [*range(0, length, tokens), length]

    @mx.custom_function
    def forward(*primals: mx.array) -> list[mx.array]:
        given, (*shared, state) = list(primals[:count]), primals[count:]
        parts: list[mx.array] = []
        states: list[mx.array] = []
        for start, stop in pairwise(edges):
            # Force the order: otherwise the work of all spans may be in memory at once.
            part, state = span(_cut(given, start, stop, parts[-1:]), shared, state)
            parts.append(part)
            state = state * 1  # a copy: a view would keep the work of the whole span alive
            states.append(state)
        return [_joined(parts), state, *(states[:-1] if keep_states else [])]

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        # Depend on the cotangents: otherwise compiling may merge this with the forward pass, and keep its work.
        primals = mx.depends(list(primals), list(cotangents[:2]))
        given, (*shared, state) = primals[:count], primals[count:]
        states = [state, *outputs[2:]] if keep_states else [state]
        for start, stop in [] if keep_states else list(pairwise(edges))[:-1]:
            cut = _cut(given, start, stop, states[1:][-1:])
            states.append(span(cut, shared, states[-1])[1] * 1)  # a copy, as above
        d_out, d_state = cotangents[:2]
        d_parts: list[list[mx.array]] = []
        d_weights = [mx.zeros_like(weight) for weight in shared]
        done: list[mx.array] = []

        def again(*given: mx.array) -> list[mx.array]:
            return list(span(list(given[:count]), list(given[count:-1]), given[-1]))

        for (start, stop), before in reversed(list(zip(pairwise(edges), states, strict=True))):
            # Finish everything that this span adds to before the next one starts.
            own = [*_cut(given, start, stop, done), *shared, before]
            *d_own, d_state = mx.vjp(again, own, [*_cut([d_out], start, stop, done), d_state])[1]
            d_parts.append(d_own[:count])
            d_weights = [total + part for total, part in zip(d_weights, d_own[count:], strict=True)]
            done = [*d_own[:count], *d_weights, d_state]
        return [*(_joined(list(parts)[::-1]) for parts in zip(*d_parts, strict=True)), *d_weights, d_state]

    out, last, *_ = forward(*inputs, *weights, state)
    return out, last


def _cut(arrays: Sequence[mx.array], start: int, stop: int, after: Sequence[mx.array]) -> list[mx.array]:
    """Return the arrays' tokens from start to stop, to be computed only after `after`."""
    parts = [array[:, start:stop] for array in arrays]
    return mx.depends(parts, list(after)) if after else parts


def _joined(parts: list[mx.array]) -> mx.array:
    return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def scan_tokens(numbers: int) -> int:
    """Return the tokens of a span of a scan whose state has this many numbers over all rows."""
    fewest, most = SCAN_TOKENS
    return min(max(SCAN_NUMBERS // numbers, fewest), most)


# A scan in lanes


def linear_scan(decay: mx.array, added: mx.array, state: mx.array) -> mx.array:
    """Return all h of h_t = decay_t h_(t-1) + added_t, elementwise, with the tokens divided into lanes (`in_lanes`).

    All lanes step together, first from zero; then again, each from the state in which the lane before it ended. So T
    tokens take 2 T / lanes + lanes sequential operations.

    Args:
        decay, added: (steps, lanes, B, ...) float, of one shape; decay within 0 to 1.
        state: (B, ...), h_0.

    Returns:
        (steps, lanes, B, ...), differentiable in all three. Its backward pass is a scan in the other direction:
        g_t = d_t + decay_(t+1) g_(t+1), the gradient for `added`; g_t h_(t-1), that for `decay`.
    """

    @mx.custom_function
    def forward(decay: mx.array, added: mx.array, state: mx.array) -> mx.array:
        return mx.stack(_scan([*decay], [*added], state))

    @forward.vjp
    def forward_vjp(primals, d, h):
        decay, _, state = primals
        # The factor from each token's state to the next; a lane's last token is followed by the next lane's first.
        onward = mx.concatenate([decay[0, 1:], mx.ones_like(decay[0, :1])])
        factors, terms = ([x[::-1] for x in steps[::-1]] for steps in ([*decay[1:], onward], [*d]))
        g = [x[::-1] for x in _scan(factors, terms, mx.zeros_like(state))[::-1]]
        before = [mx.concatenate([state[None], h[-1, :-1]]), *h[:-1]]
        return mx.stack([one * other for one, other in zip(g, before, strict=True)]), mx.stack(g), g[0][0] * decay[0, 0]

    return forward(decay, added, state)


def _scan(decay: list[mx.array], added: list[mx.array], state: mx.array) -> list[mx.array]:
    """Return the h of `linear_scan`, given the arrays (lanes, B, ...) of each step."""
    lanes = decay[0].shape[0]
    h = state[None]
    if lanes > 1:
        end, whole = added[0], decay[0]
        for factor, term in zip(decay[1:], added[1:], strict=True):
            end, whole = factor * end + term, factor * whole
        entering = [state]
        for lane in range(lanes - 1):
            entering.append(whole[lane] * entering[-1] + end[lane])
        h = mx.stack(entering)
    states: list[mx.array] = []
    for factor, term in zip(decay, added, strict=True):
        h = factor * h + term
        states.append(h)
    return states


def in_lanes(x: mx.array, lanes: int) -> mx.array:
    """Divide tokens into lanes: (B, T, ...) to (steps, lanes, B, ...), padded with zeros at the end."""
    batch, length, *rest = x.shape
    steps = -(-length // lanes)
    if steps * lanes > length:
        x = mx.pad(x, [(0, 0), (0, steps * lanes - length), *((0, 0) for _ in rest)])
    return x.reshape(batch, lanes, steps, *rest).swapaxes(0, 2)


def out_of_lanes(x: mx.array, length: int) -> mx.array:
    """Join lanes again: (steps, lanes, B, ...) to (B, T, ...)."""
    return x.swapaxes(0, 2).flatten(1, 2)[:, :length]


def lanes_for(length: int, numbers: int) -> int:
    """Return how many lanes suit a scan over `length` tokens whose state has this many numbers."""
    return max(1, min(-(-STEP_NUMBERS // numbers), math.isqrt(length)))
