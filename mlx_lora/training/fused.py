"""Linear cross-entropy without a logits array: loss and gradient of the hidden states in one forward pass.

Only the supervised positions come in. They are taken in chunks of rows; each chunk's logits live, are
exponentiated once, give both the loss and the gradient, and are gone before the next chunk starts:

    e = exp(l - max l),  s = sum e,  loss = log s + max l - l[target],  dh = (e W) / s - W[target]

so neither the probabilities nor a one-hot array is ever made, and the backward pass only scales dh.

Shapes: P supervised positions, C rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from mlx_lora.models.head import Head

# On Metal a product over a 256k inner dimension has aborted the process (mlx#1363, Gemma), so the gradient's
# product is cut along the vocabulary.
MAX_INNER = 32768


@dataclass(frozen=True)
class LossBudget:
    """What the loss may hold at once.

    Attributes:
        chunk_bytes: one chunk's float32 logits.
        dense_bytes: a quantised head's dense form, kept for all chunks of a step when it is no larger.
    """

    chunk_bytes: int
    dense_bytes: int


def fused_cross_entropy(
    head: Head, hidden: mx.array, targets: mx.array, weights: mx.array, budget: LossBudget, gradient: bool = True
) -> mx.array:
    """Return sum_p weights[p] * cross_entropy(hidden[p], targets[p]), never holding P x V logits.

    Args:
        head: W and what is done to its logits.
        hidden: (P, D).
        targets: (P,) int.
        weights: (P,) float32; 0 for padding.
        budget: bounds on what is held at once.
        gradient: also make the gradient, for a call that will be differentiated; without it the vjp is zero.

    Returns:
        A float32 scalar, differentiable in `hidden` alone: the head is frozen by construction.
    """
    rows = chunk_rows(len(targets), head.vocabulary, budget.chunk_bytes)
    once = head.vocabulary * hidden.shape[-1] * hidden.dtype.size <= budget.dense_bytes

    @mx.custom_function
    def forward(hidden: mx.array, targets: mx.array, weights: mx.array, *arrays: mx.array):
        total, parts, done = mx.array(0.0), [], None
        dense = head.dense(list(arrays), hidden.dtype) if once else None  # (V, D)
        for start in range(0, len(targets), rows):
            stop = min(start + rows, len(targets))
            h, t, w = hidden[start:stop], targets[start:stop], weights[start:stop]
            if done is not None:
                # Force the order, or every chunk's logits may be alive at once. The loss counts as well: left
                # for later it would keep its own chunk's logits.
                h = mx.depends(h, done)
            # A dense head beyond the budget is made again for every chunk, after the one before is gone.
            own = [mx.depends(array, h) for array in arrays] if dense is None else list(arrays)
            w_dense = head.dense(own, hidden.dtype) if dense is None else dense
            loss, dh = _chunk(head, w_dense, list(arrays), h, t, w, gradient)
            total = total + loss
            parts.append(dh)
            done = [loss, dh] if gradient else [loss]
        return total, mx.concatenate(parts) if gradient and parts else mx.zeros_like(hidden)

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        hidden, *rest = primals
        dh = (cotangents[0] * outputs[1]).astype(hidden.dtype)
        return (dh, *(mx.zeros_like(array) for array in rest))

    return forward(hidden, targets, weights, *head.arrays)[0]


def chunk_rows(positions: int, vocabulary: int, chunk_bytes: int) -> int:
    """Return rows per chunk: within the byte budget, and all chunks about equal."""
    most = max(1, chunk_bytes // (4 * vocabulary))
    chunks = -(-positions // most)
    return max(1, -(-positions // max(chunks, 1)))


def _chunk(
    head: Head,
    dense: mx.array,
    arrays: list[mx.array],
    h: mx.array,
    targets: mx.array,
    weights: mx.array,
    gradient: bool,
) -> tuple[mx.array, mx.array]:
    """Return one chunk's weighted loss, a scalar, and its gradient (C, D) in h's dtype (empty without)."""
    logits = (h @ dense.T).astype(mx.float32)  # (C, V)
    if head.bias is not None:
        logits = logits + head.bias
    if head.scale != 1.0:
        logits = logits * head.scale
    if head.soft_cap is not None:
        logits = head.soft_cap * mx.tanh(logits / head.soft_cap)
    largest = logits.max(axis=-1, keepdims=True)
    powers = mx.exp(logits - largest)
    total = powers.sum(axis=-1, keepdims=True)  # (C, 1)
    own = mx.take_along_axis(logits, targets[:, None], axis=-1)  # (C, 1)
    loss = ((mx.log(total) + largest - own) * weights[:, None]).sum()
    if not gradient:
        return loss, mx.zeros((0,))
    own_slope = 1.0
    if head.soft_cap is not None:  # d tanh
        powers = powers * (1 - mx.square(logits / head.soft_cap))
        own_slope = 1 - mx.square(own / head.soft_cap)
    powers = powers.astype(h.dtype)
    pulled = sum(
        powers[:, a : a + MAX_INNER] @ dense[a : a + MAX_INNER] for a in range(0, head.vocabulary, MAX_INNER)
    )  # (C, D)
    target_rows = head.dense([array[targets] for array in arrays], h.dtype)
    dh = pulled.astype(mx.float32) / total - own_slope * target_rows.astype(mx.float32)
    return loss, (dh * (head.scale * weights[:, None])).astype(h.dtype)
