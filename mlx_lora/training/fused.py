"""Linear cross-entropy without an array of all logits: loss and gradient of the hidden states in one forward pass.

The input has only the supervised positions. Their logits are computed a tile at a time: some rows by a slice of the
vocabulary. Each tile is exponentiated once, relative to the largest logit so far, added to both the loss and
the gradient, and freed before the next tile starts. The target's own logit x is not in these sums:

    m' = max(m, max l),  a = exp(m - m'),  e = exp(l - m'), 0 for the target
    s' = a s + sum e,    g' = a g + e W
    at the end           loss = log(1 + exp(log s + m - x)),  dh = (g - s W[target]) / (s + exp(x - m))

With `polynomial`, the exponentials are those of system/exponentials.py, and a tile's logits are scaled for them.

x is computed separately, in float32, from the target's row. The tiles' logits are rounded if h has 16 bits: with
the target among them, the loss of a token that the model is sure of would be mostly rounding error, often below zero.
This way no loss is negative, and loss and gradient of a sure token have a small relative error.

Neither probabilities nor a one-hot array are computed, a quantized head is dequantized a slice at a time, and the
backward pass only scales dh.

Shapes: P supervised positions, R rows and S columns of a tile, D width, V vocabulary.
Source: online softmax, arXiv 1805.02867, algorithm 3; the loss in chunks, arXiv 2410.10989 (Liger Kernel).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_lora.models.head import Head
from mlx_lora.planner.memory import tile_shape
from mlx_lora.system import exponentials


def fused_token_losses(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    tile_bytes: int,
    gradient: bool = True,
    polynomial: bool = False,
) -> mx.array:
    """Return weights[p] * cross_entropy(hidden[p], targets[p]) for every p, without holding P x V logits.

    Args:
        head: W and what is applied to its logits.
        hidden: (P, D).
        targets: (P,) int.
        weights: (P,) float32; 0 for padding.
        tile_bytes: bound on one tile's float32 logits.
        gradient: also compute the gradient, for a call that is differentiated; without it the vjp is zero.
        polynomial: compute exponentials by polynomials where mlx compiles them.

    Returns:
        (P,) float32, differentiable only in `hidden`: the head is frozen.
    """
    rows, columns = tile_shape(len(targets), head.vocabulary, tile_bytes)

    @mx.custom_function
    def forward(hidden: mx.array, targets: mx.array, weights: mx.array, *arrays: mx.array):
        losses, parts, done = [], [], None
        powers_of, unit = _exact_powers, 1.0
        if polynomial and exponentials.usable(hidden):
            # Scaling the hidden states spares a pass over the logits, if those are nothing but products.
            unit = exponentials.SCALE if head.bias is None and head.soft_cap is None else 1.0
            powers_of = partial(_polynomial_powers, unit)
        for start in range(0, len(targets), rows):
            stop = min(start + rows, len(targets))
            h, t, w = hidden[start:stop], targets[start:stop], weights[start:stop]
            if done is not None:
                # Wait for the loss too, because its tiles are kept until it is computed.
                h = mx.depends(h, done)
            loss, dh = _rows_loss(head, list(arrays), h, t, w, columns, gradient, powers_of, unit)
            losses.append(loss)
            parts.append(dh)
            done = [loss, dh] if gradient else [loss]
        if not losses:
            return mx.zeros((0,)), mx.zeros_like(hidden)
        return mx.concatenate(losses), mx.concatenate(parts) if gradient else mx.zeros_like(hidden)

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        hidden, *rest = primals
        dh = (cotangents[0][:, None] * outputs[1]).astype(hidden.dtype)
        return (dh, *(mx.zeros_like(array) for array in rest))

    return forward(hidden, targets, weights, *head.arrays)[0]


def _rows_loss(
    head: Head,
    arrays: list[mx.array],
    h: mx.array,
    targets: mx.array,
    weights: mx.array,
    columns: int,
    gradient: bool,
    powers_of: Callable[..., tuple[mx.array, mx.array]],
    unit: float,
) -> tuple[mx.array, mx.array]:
    """Return these rows' weighted losses (R,), and their gradient (R, D) in h's dtype (empty without `gradient`).

    Args:
        head, arrays, h, targets, weights, columns, gradient: as above, of these rows.
        powers_of: returns a tile's exponentials, and the largest logit.
        unit: a power of two by which the tiles' logits are scaled; `powers_of` knows it.
    """
    largest: Any = None
    total: Any = None
    pulled: Any = None
    for start in range(0, head.vocabulary, columns):
        if largest is not None:
            # Force the order, or all tiles may be in memory at once.
            h = mx.depends(h, [total, pulled] if gradient else [total])
        kept = slice(start, start + columns)
        part = [mx.depends(array, h)[kept] for array in arrays]
        dense = head.dense(part, h.dtype)  # (S, D)
        logits = head.finish(((h * unit if unit != 1 else h) @ dense.T).astype(mx.float32), kept)  # (R, S)
        before = largest
        powers, largest = powers_of(logits, before, targets[:, None] - start)
        shrink = None if before is None else mx.exp((before - largest) / unit)  # (R, 1)
        mass = powers.sum(axis=-1, keepdims=True)
        total = mass if shrink is None else total * shrink + mass
        if gradient:
            slopes = powers if head.soft_cap is None else powers * head.slope(logits)
            pull = (slopes.astype(h.dtype) @ dense).astype(mx.float32)  # (R, D)
            pulled = pull if shrink is None else pulled * shrink + pull
    largest = largest / unit
    own_rows = head.dense([array[targets] for array in arrays], h.dtype).astype(mx.float32)  # (R, D)
    own = head.finish((h.astype(mx.float32) * own_rows).sum(axis=-1, keepdims=True), targets[:, None])  # (R, 1)
    losses = mx.logaddexp(mx.array(0.0), mx.log(total) + largest - own)
    loss = (losses * weights[:, None]).squeeze(-1)  # (R,)
    if not gradient:
        return loss, mx.zeros((0,))
    others = total if head.soft_cap is None else total * head.slope(own)
    # If all others underflow, rounding may also put x far below m; the smallest float prevents 0 / 0.
    dh = (pulled - others * own_rows) / (total + mx.exp(own - largest) + mx.finfo(mx.float32).smallest_normal)
    return loss, (dh * (head.scale * weights[:, None])).astype(h.dtype)


def _exact_powers(logits: mx.array, before: mx.array | None, own: mx.array) -> tuple[mx.array, mx.array]:
    """Return exp(logits - m), with 0 at each row's target, and m (R, 1), the largest logit so far.

    Args:
        logits: (R, S) of a tile.
        before: (R, 1), the m of the tiles before; None for the first.
        own: (R, 1) int, the target's column; outside of 0..S-1 if it is in another tile.
    """
    largest = logits.max(axis=-1, keepdims=True)
    if before is not None:
        largest = mx.maximum(before, largest)
    return _other_powers(logits, largest, own), largest


def _polynomial_powers(
    unit: float, logits: mx.array, before: mx.array | None, own: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the same for logits that were multiplied by `unit`; here, m is the largest logit of all but the target."""
    column = mx.clip(own, 0, logits.shape[1] - 1)
    inside = column == own
    there = mx.take_along_axis(logits, column, axis=1)
    others = mx.put_along_axis(logits, column, mx.where(inside, -mx.inf, there), axis=1)
    # The smallest float: a tile of nothing but the target has no largest other logit.
    largest = mx.maximum(others.max(axis=-1, keepdims=True), mx.finfo(mx.float32).min)
    if before is not None:
        largest = mx.maximum(before, largest)
    below = largest - others
    return exponentials.exp_minus(below if unit == exponentials.SCALE else below * (exponentials.SCALE / unit)), largest


@mx.compile
def _other_powers(logits: mx.array, largest: mx.array, own: mx.array) -> mx.array:
    """Return exp(logits - largest) with 0 at each row's target, in one kernel.

    Args:
        logits: (R, S).
        largest: (R, 1).
        own: (R, 1) int, the target's column; outside of 0..S-1 if it is in another tile.
    """
    return mx.where(mx.arange(logits.shape[1]) == own, 0.0, mx.exp(logits - largest))
