"""Compute a recurrence over tokens for training, span by span, each computed again for its backward pass.

Differentiating a loop over tokens keeps every token's state, often a hundred times the size of the layer's output.
Here only the inputs, and at most one state per span of tokens, are kept between the passes:

    forward    for each span:  y, state = span(inputs of the span, state)
    backward   for each span, from the last:  the span again, and its gradient

Shapes: B batch, T tokens of the sequence, t tokens of a span.
Source: arXiv 1604.06174 (recomputation per segment).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import mlx.core as mx

Span = Callable[[list[mx.array], list[mx.array], mx.array], tuple[mx.array, mx.array]]
"""(inputs of a span, each (B, t, ...); weights; state before it) -> (output (B, t, ...), state after it)."""


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
        states = [state, *outputs[2:]] if keep_states else _states_before(span, edges, given, shared, state)
        return _gradient(span, edges, given, shared, states, cotangents[:2])

    out, last, *_ = forward(*inputs, *weights, state)
    return out, last


def _states_before(
    span: Span, edges: list[int], inputs: list[mx.array], weights: list[mx.array], state: mx.array
) -> list[mx.array]:
    """Return the state before each span."""
    states = [state]
    for start, stop in list(pairwise(edges))[:-1]:
        states.append(span(_cut(inputs, start, stop, states[1:][-1:]), weights, states[-1])[1] * 1)  # a copy, as above
    return states


def _gradient(
    span: Span,
    edges: list[int],
    inputs: list[mx.array],
    weights: list[mx.array],
    states: list[mx.array],
    cotangents: Sequence[mx.array],
) -> list[mx.array]:
    """Return the cotangents of inputs, weights and first state, given the state before each span."""
    count = len(inputs)
    d_out, d_state = cotangents
    d_parts: list[list[mx.array]] = []
    d_weights = [mx.zeros_like(weight) for weight in weights]
    done: list[mx.array] = []

    def again(*given: mx.array) -> list[mx.array]:
        return list(span(list(given[:count]), list(given[count:-1]), given[-1]))

    for (start, stop), before in reversed(list(zip(pairwise(edges), states, strict=True))):
        # Finish everything that this span adds to before the next one starts.
        given = [*_cut(inputs, start, stop, done), *weights, before]
        *d_given, d_state = mx.vjp(again, given, [*_cut([d_out], start, stop, done), d_state])[1]
        d_parts.append(d_given[:count])
        d_weights = [total + part for total, part in zip(d_weights, d_given[count:], strict=True)]
        done = [*d_given[:count], *d_weights, d_state]
    return [*(_joined(list(parts)[::-1]) for parts in zip(*d_parts, strict=True)), *d_weights, d_state]


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


def _cut(arrays: Sequence[mx.array], start: int, stop: int, after: Sequence[mx.array]) -> list[mx.array]:
    """Return the arrays' tokens from start to stop, to be computed only after `after`."""
    parts = [array[:, start:stop] for array in arrays]
    return mx.depends(parts, list(after)) if after else parts


def _joined(parts: list[mx.array]) -> mx.array:
    return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
