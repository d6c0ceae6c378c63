"""Muon with decoupled weight decay, as its author's and torch's, and with an update of its own for each expert's matrix.

MLX adds the decay to the gradient, before this is made orthogonal: where the gradient is small or zero, as that of LoRA's A is at
the start, a whole step then goes against the weight (https://kellerjordan.github.io/posts/muon/; torch.optim.Muon).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as optim


class Muon(optim.Muon):
    """mlx.optimizers.Muon whose weight decay is w <- w - rate * decay * w, apart from the gradient."""

    def __init__(self, learning_rate: Any, weight_decay: float = 0.01, **options: Any):
        """Prepare it as mlx's, which gets no decay.

        Args:
            learning_rate: a float, or a callable from step to rate.
            weight_decay: decoupled.
            options: of mlx's class.
        """
        super().__init__(learning_rate, weight_decay=0.0, **options)
        self.decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, Any]) -> mx.array:
        """Return the updated parameter, of shape (rows, columns), (experts, rows, columns), or (n,)."""
        kept = parameter * (1 - self.learning_rate.astype(parameter.dtype) * self.decay)
        if gradient.ndim != 3:
            return super().apply_single(gradient, kept, state)
        single = super().apply_single

        def of_one(own: mx.array, weight: mx.array, momentum: mx.array) -> tuple[mx.array, mx.array]:
            stored = {"v": momentum}
            return single(own, weight, stored), stored["v"]

        updated, state["v"] = mx.vmap(of_one)(gradient, kept, state["v"])
        return updated
