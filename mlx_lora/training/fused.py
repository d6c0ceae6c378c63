"""Linear cross-entropy without an array of all logits: loss and gradient of the hidden states in one forward pass.

The input has only the supervised positions. Their logits are computed a tile at a time: some rows by a slice of the
vocabulary. Each tile is exponentiated once, relative to the largest logit so far, added to both the loss and
the gradient, and freed before the next tile starts. The target's own logit x is not in these sums:

    m' = max(m, max l),  a = exp(m - m'),  e = exp(l - m'), 0 for the target
    s' = a s + sum e,    g' = a g + e W
    at the end           loss = log(1 + exp(log s + m - x)),  dh = (g - s W[target]) / (s + exp(x - m))

x is computed separately, in float32, from the target's row. The tiles' logits are rounded if h has 16 bits: with
the target among them, the loss of a token that the model is sure of would be mostly rounding error, often below zero.
This way no loss is negative, and loss and gradient of a sure token have a small relative error.

Neither probabilities nor a one-hot array are computed, a quantized head is dequantized a slice at a time, and the
backward pass only scales dh.

Shapes: P supervised positions, R rows and S columns of a tile, D width, V vocabulary.
Source: online softmax, arXiv 1805.02867, algorithm 3; the loss in chunks, arXiv 2410.10989 (Liger Kernel).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_lora.models.head import Head
from mlx_lora.planner.memory import tile_shape


def fused_token_losses(
    head: Head, hidden: mx.array, targets: mx.array, weights: mx.array, tile_bytes: int, gradient: bool = True
) -> mx.array:
    """Return weights[p] * cross_entropy(hidden[p], targets[p]) for every p, without holding P x V logits.

    Args:
        head: W and what is applied to its logits.
        hidden: (P, D).
        targets: (P,) int.
        weights: (P,) float32; 0 for padding.
        tile_bytes: bound on one tile's float32 logits.
        gradient: also compute the gradient, for a call that is differentiated; without it the vjp is zero.

    Returns:
        (P,) float32, differentiable only in `hidden`: the head is frozen.
    """
    rows, columns = tile_shape(len(targets), head.vocabulary, tile_bytes)

    @mx.custom_function
    def forward(hidden: mx.array, targets: mx.array, weights: mx.array, *arrays: mx.array):
        losses, parts, done = [], [], None
        for start in range(0, len(targets), rows):
            stop = min(start + rows, len(targets))
            h, t, w = hidden[start:stop], targets[start:stop], weights[start:stop]
            if done is not None:
                # Wait for the loss too, because its tiles are kept until it is computed.
                h = mx.depends(h, done)
            loss, dh = _rows_loss(head, list(arrays), h, t, w, columns, gradient)
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
) -> tuple[mx.array, mx.array]:
    """Return these rows' weighted losses (R,), and their gradient (R, D) in h's dtype (empty without `gradient`)."""
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
        logits = head.finish((h @ dense.T).astype(mx.float32), kept)  # (R, S)
        before, largest = largest, logits.max(axis=-1, keepdims=True)
        if before is not None:
            largest = mx.maximum(before, largest)
            shrink = mx.exp(before - largest)  # (R, 1)
        powers = _other_powers(logits, largest, targets[:, None] - start)
        mass = powers.sum(axis=-1, keepdims=True)
        total = mass if before is None else total * shrink + mass
        if gradient:
            slopes = powers if head.soft_cap is None else powers * head.slope(logits)
            pull = (slopes.astype(h.dtype) @ dense).astype(mx.float32)  # (R, D)
            pulled = pull if before is None else pulled * shrink + pull
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


@mx.compile
def _other_powers(logits: mx.array, largest: mx.array, own: mx.array) -> mx.array:
    """Return exp(logits - largest) with 0 at each row's target, in one kernel.

    Args:
        logits: (R, S).
        largest: (R, 1).
        own: (R, 1) int, the target's column; outside of 0..S-1 if it is in another tile.
    """
    return mx.where(mx.arange(logits.shape[1]) == own, 0.0, mx.exp(logits - largest))
