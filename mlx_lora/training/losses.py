"""The loss: a sum over trained tokens and their count, never a mean.

A mean cannot be added to another batch's mean; sums and counts can, so accumulation, validation and
several ranks all divide once, at the end.

Shapes: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def cross_entropy(model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
    """Return the summed next-token cross-entropy of the trained tokens and how many there are.

    Args:
        model: maps (B, T) ids to (B, T, V) logits.
        inputs: (B, T) int.
        targets: (B, T) int.
        mask: (B, T) bool; False positions, padding included, contribute exactly zero.

    Returns:
        (sum, count), float32 scalars. An empty mask gives (0, 0): no division happens here, so no NaN.
    """
    logits = model(inputs).astype(mx.float32)  # (B, T, V)
    losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    # where, not a product: a masked position may hold inf, and 0 * inf is NaN.
    return mx.where(mask, losses, 0.0).sum(), mask.astype(mx.float32).sum()
