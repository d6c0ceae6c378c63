"""The loss of a reward model on preference pairs, as in TRL's RewardTrainer.

Shapes: E pairs.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn


def bradley_terry(chosen: mx.array, rejected: mx.array, margin: mx.array, center: float = 0.0) -> mx.array:
    """Return each pair's loss, (E,) float32: -log sigmoid(chosen - rejected - margin).

    Args:
        chosen, rejected: (E,) scores of the answers.
        margin: (E,) the least amount by which the scores should differ (Llama 2, arXiv 2307.09288, section 3.2.2).
        center: weight of (chosen + rejected)^2, which keeps scores near zero (arXiv 2312.09244).
    """
    return -nn.log_sigmoid(chosen - rejected - margin) + center * mx.square(chosen + rejected)
