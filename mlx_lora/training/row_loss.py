"""Linear cross-entropy with `mx.fast.cross_entropy`: whole rows of logits, some rows at a time.

mlx's kernel, fused on Metal and CUDA, takes finished logits. So a chunk has logits of whole rows of the vocabulary,
computed once; the kernel returns the losses and their gradient, which is multiplied by the head immediately. Like in
fused.py, only the gradient of the hidden states is kept. Measurements decide between the two (training/loss_choice.py).

Shapes: P supervised positions, R rows of a chunk, D width, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lora.models.head import Head
from mlx_lora.planner.memory import MAX_SLICE, chunk_rows


def row_token_losses(
    head: Head, hidden: mx.array, targets: mx.array, weights: mx.array, tile_bytes: int, gradient: bool = True
) -> mx.array:
    """Return weights[p] * cross_entropy(hidden[p], targets[p]) for every p, holding the logits of R positions at a time.

    Args:
        head: W and what is applied to its logits.
        hidden: (P, D).
        targets: (P,) int.
        weights: (P,) float32; 0 for padding.
        tile_bytes: bound on a chunk's float32 logits; a single row may exceed it.
        gradient: also compute the gradient, for a call that is differentiated; without it the vjp is zero.

    Returns:
        (P,) float32, differentiable only in `hidden`: the head is frozen.
    """
    rows = chunk_rows(len(targets), head.vocabulary, tile_bytes)

    @mx.custom_function
    def forward(hidden: mx.array, targets: mx.array, weights: mx.array, *arrays: mx.array):
        losses, parts = [], []
        for start in range(0, len(targets), rows):
            stop = start + rows
            h, t, w = hidden[start:stop], targets[start:stop], weights[start:stop]
            if losses:  # one chunk at a time
                h = mx.depends(h, [losses[-1], *parts[-1:]])
            loss, dh = _chunk_loss(head, list(arrays), h, t, w, gradient)
            losses.append(loss)
            parts += [dh] if gradient else []
        if not losses:
            return mx.zeros((0,)), mx.zeros_like(hidden)
        return mx.concatenate(losses), mx.concatenate(parts) if gradient else mx.zeros_like(hidden)

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        hidden, *rest = primals
        dh = (cotangents[0][:, None] * outputs[1]).astype(hidden.dtype)
        return (dh, *(mx.zeros_like(array) for array in rest))

    return forward(hidden, targets, weights, *head.arrays)[0]


def _chunk_loss(
    head: Head, arrays: list[mx.array], h: mx.array, targets: mx.array, weights: mx.array, gradient: bool
) -> tuple[mx.array, mx.array]:
    """Return these rows' weighted losses (R,), and their gradient (R, D) in h's dtype (empty without `gradient`)."""
    logits = chunk_logits(head, arrays, h)  # (R, V)
    if not gradient:
        return mx.fast.cross_entropy(logits, targets) * weights, mx.zeros((0,))
    [losses], [d_logits] = mx.vjp(lambda x: [mx.fast.cross_entropy(x, targets)], [logits], [weights])
    return losses * weights, chunk_gradient(head, arrays, h, logits, d_logits)


def _slices(head: Head) -> list[slice]:
    """Return slices of the vocabulary.

    In them, a quantized head is dequantized a slice at a time, and no matrix has a side of 262k (Gemma's vocabulary).
    """
    return [slice(start, start + MAX_SLICE) for start in range(0, head.vocabulary, MAX_SLICE)]


def chunk_logits(head: Head, arrays: list[mx.array], h: mx.array) -> mx.array:
    """Return the logits of some positions, (R, V) float32.

    Args:
        head: what is applied to its logits.
        arrays: its weight.
        h: (R, D) hidden states.
    """
    after = [mx.depends(array, h) for array in arrays]
    parts = [
        head.finish((h @ head.dense([array[kept] for array in after], h.dtype).T).astype(mx.float32), kept)
        for kept in _slices(head)
    ]
    return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def chunk_gradient(head: Head, arrays: list[mx.array], h: mx.array, logits: mx.array, d_logits: mx.array) -> mx.array:
    """Return the gradient of the hidden states, (R, D) in h's dtype, from that of the logits, (R, V); see `chunk_logits`."""
    if head.soft_cap is not None:
        d_logits = d_logits * head.slope(logits)
    # After the logits, so that a quantized slice is dequantized again and not kept.
    after = [mx.depends(array, d_logits) for array in arrays]
    pulls = [
        (d_logits[:, kept].astype(h.dtype) @ head.dense([array[kept] for array in after], h.dtype)).astype(mx.float32)
        for kept in _slices(head)
    ]
    return (sum(pulls[1:], pulls[0]) * head.scale).astype(h.dtype)
