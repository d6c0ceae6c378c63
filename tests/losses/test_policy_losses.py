"""Losses of sampled answers against TRL's own code, values and gradients, and advantages by hand."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_lora.losses.grpo import (
    RATIO_OF,
    PolicyOptions,
    SampledTokens,
    group_advantages,
    leave_one_out_advantages,
    policy_loss,
)

ANSWERS, WIDTH = 6, 9
# rloo takes the divergence from the reward.
CASES = [(name, beta) for name in RATIO_OF for beta in (0.0, 0.3) if name != "rloo" or not beta]


def random_sampled(seed: int = 0):
    """Return log-probabilities (A, T) under three policies, the mask, and advantages (A,)."""
    random = np.random.default_rng(seed)
    mask = np.arange(WIDTH) < random.integers(1, WIDTH + 1, ANSWERS)[:, None]
    old = -random.gamma(1.0, 1.0, mask.shape) * mask
    logps, reference = (old + random.normal(0, 0.3, mask.shape) * mask for _ in range(2))
    return logps, old, reference, mask, random.normal(0, 1, ANSWERS)


def our_loss(logps, old, reference, mask, advantages, options, padding: int = 0):
    """Return the mean loss over answers, its gradient in the log-probabilities, and the mean reports."""
    rows, columns = np.nonzero(mask)
    pad = (0, padding)
    answers = mx.array(np.pad(rows, pad))
    weights = mx.array(np.pad(np.ones(len(rows), np.float32), pad))
    share = mx.array(len(mask) / mask.sum())

    def flat(values):
        return mx.concatenate([values[rows_, columns_], mx.zeros((padding,))])

    rows_, columns_ = mx.array(rows), mx.array(columns)
    of_old, of_reference = (flat(mx.array(values.astype(np.float32))) for values in (old, reference))

    def loss(x):
        sampled = SampledTokens(
            flat(x), of_old, of_reference, weights, answers, mx.array(advantages.astype(np.float32)), share
        )
        losses, reports = policy_loss(sampled, options)
        return losses.mean(), reports

    (value, reports), gradient = mx.value_and_grad(loss)(mx.array(logps.astype(np.float32)))
    return value.item(), np.array(gradient), {name: np.array(report) for name, report in reports.items()}


def relative(found, wanted) -> float:
    return float(np.linalg.norm(np.subtract(found, wanted)) / np.linalg.norm(wanted))


@pytest.mark.parity
@pytest.mark.parametrize("padding", [0, 7])
@pytest.mark.parametrize(("name", "beta"), CASES)
def test_each_loss_is_trls(name, beta, padding):
    import torch
    from trl_policy_judge import policy_objective

    logps, old, reference, mask, advantages = random_sampled()
    per_token = torch.tensor(logps, requires_grad=True)
    others = [torch.tensor(values) for values in (old, reference, mask, advantages)]
    wanted, reports = policy_objective(per_token, *others, name, beta=beta, high=0.28, longest=WIDTH)
    wanted.backward()
    options = PolicyOptions(name, 0.2, 0.28, beta, beta > 0, WIDTH)
    found, gradient, ours = our_loss(logps, old, reference, mask, advantages, options, padding)
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    assert relative(gradient, per_token.grad.numpy()) < 1e-5
    tokens = mask.sum(axis=1)
    if name != "gspo" and name != "rloo":
        clipped = (ours["clipped"] * tokens).sum() / tokens.sum()
        assert clipped == pytest.approx(reports["clip_ratio/region_mean"], abs=1e-6)
        assert clipped > 0
    if beta:
        assert (ours["kl"] * tokens).sum() / tokens.sum() == pytest.approx(reports["kl"], rel=1e-5)
        assert abs(our_loss(logps, old, reference, mask, advantages, PolicyOptions(name))[0] - found) > 1e-4
    assert abs(our_loss(logps, old, reference, mask, -advantages, options)[0] - found) > 1e-3 * abs(found)


@pytest.mark.parametrize("name", list(RATIO_OF))
def test_a_ratio_of_one_gives_the_policy_gradient(name):
    """Where the policy has not moved, the gradient is minus advantage over the loss's number of tokens."""
    logps, _, _, mask, advantages = random_sampled(1)
    _, gradient, reports = our_loss(logps, logps, logps, mask, advantages, PolicyOptions(name, max_new_tokens=WIDTH))
    tokens = mask.sum(axis=1, keepdims=True)
    per = {"dapo": mask.sum() / ANSWERS, "bnpo": mask.sum() / ANSWERS, "dr_grpo": WIDTH, "rloo": 1.0}.get(name, tokens)
    assert relative(gradient, -advantages[:, None] * mask / per / ANSWERS) < 1e-5
    assert not reports["clipped"].any()


def test_an_answer_without_tokens_has_no_loss_and_no_nan():
    logps, old, reference, mask, advantages = random_sampled(2)
    mask = mask.copy()
    mask[0] = False
    for name in RATIO_OF:
        found, gradient, _ = our_loss(
            logps, old, reference, mask, advantages, PolicyOptions(name, beta=0.1, compares=True)
        )
        assert np.isfinite(found)
        assert np.isfinite(gradient).all()
        assert not gradient[0].any()


def test_advantages_compare_the_answers_to_one_prompt():
    rewards = np.array([1.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0, 3.0])
    found = group_advantages(rewards, 4)
    deviation = np.std([1, 0, 0, 1], ddof=1)
    np.testing.assert_allclose(found[:4], np.array([0.5, -0.5, -0.5, 0.5]) / (deviation + 1e-4), rtol=1e-6)
    assert not found[4:].any()
    np.testing.assert_allclose(group_advantages(rewards, 4, "none")[:4], [0.5, -0.5, -0.5, 0.5])
    np.testing.assert_allclose(
        group_advantages(rewards, 4, "batch")[:4], np.array([0.5, -0.5, -0.5, 0.5]) / (np.std(rewards, ddof=1) + 1e-4)
    )
    np.testing.assert_allclose(leave_one_out_advantages(rewards, 4)[:4], [2 / 3, -2 / 3, -2 / 3, 2 / 3], rtol=1e-6)


def test_an_answer_without_a_reward_takes_no_part_in_advantages():
    rewards = np.array([1.0, np.nan, 0.0, 1.0, np.nan, np.nan, 2.0, np.nan])
    for advantages in (group_advantages(rewards, 4, "none"), leave_one_out_advantages(rewards, 4)):
        assert advantages[1] == 0
        assert not advantages[4:].any()
    np.testing.assert_allclose(group_advantages(rewards, 4, "none")[:4], [1 / 3, 0, -2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(leave_one_out_advantages(rewards, 4)[:4], [0.5, 0, -1, 0.5])
