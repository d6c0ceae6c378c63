"""The reverse KL of sampled tokens: against torch from its definition, and on average against the sum over a vocabulary."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.losses.divergence import sampled_kl


def three_policies(seed: int = 0, count: int = 37):
    """Return log-probabilities (P,) of sampled tokens under the student now, the student then, and the teacher."""
    random = np.random.default_rng(seed)
    old = -random.gamma(1.0, 1.0, count)
    return old + random.normal(0, 0.3, count), old, -random.gamma(1.0, 2.0, count)


def ours(logps, old, teacher):
    """Return the losses (P,) and the gradient of their sum in each argument."""
    arrays = [mx.array(values.astype(np.float32)) for values in (logps, old, teacher)]
    losses = sampled_kl(*arrays)
    gradients = mx.grad(lambda *a: sampled_kl(*a).sum(), argnums=(0, 1, 2))(*arrays)
    return np.array(losses), [np.array(gradient) for gradient in gradients]


@pytest.mark.parity
def test_loss_and_gradient_are_those_of_the_definition():
    """A policy gradient by importance sampling, whose advantage is minus the reverse KL of the sampled token."""
    import torch

    logps, old, teacher = (torch.tensor(values) for values in three_policies())
    logps.requires_grad_(True)
    reverse_kl = old - teacher
    ratio = torch.exp(logps - old)
    wanted = -(ratio * -reverse_kl)
    wanted.sum().backward()
    losses, gradients = ours(*three_policies())
    np.testing.assert_allclose(losses, wanted.detach().numpy(), rtol=1e-5)
    np.testing.assert_allclose(gradients[0], logps.grad.numpy(), rtol=1e-5)
    assert not gradients[1].any()  # of neither the policy that sampled nor the teacher
    assert not gradients[2].any()
    changed, _ = ours(logps.detach().numpy(), old.numpy(), teacher.numpy() + 0.1)
    assert np.abs(changed - losses).max() > 1e-3


def test_on_average_it_is_the_reverse_kl_and_its_gradient():
    """The mean over all tokens, weighted by the student's probabilities, is a sum over the vocabulary."""
    random = np.random.default_rng(3)
    student, teacher = (mx.array(random.normal(0, 1.5, 23).astype(np.float32)) for _ in range(2))
    others = teacher - mx.logsumexp(teacher)
    weights = mx.softmax(student)

    def exact(logits):
        logps = logits - mx.logsumexp(logits)
        return (mx.exp(logps) * (logps - others)).sum()

    def average(logits):
        logps = logits - mx.logsumexp(logits)
        return (weights * sampled_kl(logps, mx.stop_gradient(logps), others)).sum()

    (wanted, wanted_gradient), (found, gradient) = (mx.value_and_grad(f)(student) for f in (exact, average))
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(wanted_gradient), atol=1e-6)
    assert np.abs(np.array(gradient)).max() > 1e-2


def test_a_token_that_the_teacher_likes_more_gets_likelier():
    logps = mx.array([-1.0, -1.0])
    gradient = mx.grad(lambda x: sampled_kl(x, logps, mx.array([-0.5, -2.0])).sum())(logps)
    assert gradient[0].item() < 0 < gradient[1].item()
