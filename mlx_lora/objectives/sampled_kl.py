"""On-policy distillation as a policy gradient: the reverse KL of the tokens that the student sampled.

The student as it was, p_old, samples a token x; the teacher q says how likely it finds it. The token's advantage is that
of itself alone (a discount of 0), and there is no baseline:

    A = log q(x) - log p_old(x)        loss = -(p(x) / p_old(x)) A

While p is p_old, the loss is an estimate of KL(p || q) at its position, and its gradient one of the gradient of KL(p || q):
both are right on average over x. A single token is a noisy estimate of a sum over the vocabulary, but needs one number of
the teacher only.

Shapes: P positions, one for each sampled token, then padding.
Source: K. Lu, On-Policy Distillation, Thinking Machines Lab, 2025 (https://thinkingmachines.ai/blog/on-policy-distillation);
    the ratio is that of their loss `importance_sampling`, which does not clip it.
"""

from __future__ import annotations

import mlx.core as mx


def sampled_kl(logps: mx.array, old: mx.array, teacher: mx.array) -> mx.array:
    """Return the loss of each sampled token, (P,) float32.

    Args:
        logps: (P,) float32, log-probabilities under the student that is trained.
        old: (P,) float32, under the student that sampled them.
        teacher: (P,) float32, under the teacher.
    """
    advantages = mx.stop_gradient(teacher - old)
    return -mx.exp(logps - mx.stop_gradient(old)) * advantages
