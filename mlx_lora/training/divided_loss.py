"""Divide the loss over the vocabulary among ranks that have parts of the layers.

Such ranks all have the hidden states of all positions, so each can compute the losses of some positions with the whole
head. The losses are added up in the forward pass, and the gradients of the hidden states in the backward pass:

    losses = sum of ranks (0 ... 0, own losses, 0 ... 0)          dh likewise

The second message is made to wait for the first, because every rank must send its messages in the same order.

Shapes: P supervised positions, N ranks, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import mlx.core as mx

from mlx_lora.adapters.cut_layers import Wire
from mlx_lora.models.head import Head

OfHidden = Callable[..., mx.array]
"""(head, hidden (P, D), targets (P,), weights (P,), gradient=) -> (P,) losses, differentiable in `hidden`."""


def divided(losses_of: OfHidden, wire: Wire) -> OfHidden:
    """Return a function with the same results, of which each rank computes a part.

    Args:
        losses_of: computes each position by itself.
        wire: connects the ranks.
    """

    def losses(head: Head, hidden: mx.array, targets: mx.array, weights: mx.array, gradient: bool = True) -> mx.array:
        count = len(targets)
        part = -(-count // wire.size)
        own = slice(min(wire.rank * part, count), min((wire.rank + 1) * part, count))
        around = (own.start, count - own.stop)
        of_own = partial(losses_of, head, targets=targets[own], weights=weights[own], gradient=gradient)

        @mx.custom_function
        def forward(hidden: mx.array) -> tuple[mx.array, mx.array]:
            h, made, slopes = hidden[own], mx.zeros((0,)), hidden[own]
            if len(h) and gradient:
                [made], [slopes] = mx.vjp(lambda h: [of_own(h)], [h], [mx.ones((len(h),))])
            elif len(h):
                made = of_own(h)
            return wire.sum(mx.pad(made, around)), slopes

        @forward.vjp
        def forward_vjp(hidden: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
            slopes = (cotangents[0][own][:, None] * outputs[1]).astype(hidden.dtype)
            [slopes] = mx.depends([slopes], [outputs[0]])
            return wire.sum(mx.pad(slopes, [around, (0, 0)]))

        return forward(hidden)[0]

    return losses
