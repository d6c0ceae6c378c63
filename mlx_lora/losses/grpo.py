"""Policy-gradient losses of sampled answers: the GRPO family and RLOO.

Each takes the log-probability of every sampled token, under the policy, under the policy that sampled it and, with a
penalty, under the reference, and one advantage for each answer. They differ in two things: whether the ratio of the two
policies is taken per token or per answer, and how the losses of tokens are averaged.

    loss       ratio of              an answer's weight on the loss of each of its tokens
    grpo       each token            1 / its tokens                      arXiv 2402.03300, equation 3
    bnpo       each token            answers / tokens of the step        every token counts the same (TRL)
    dapo       each token            answers / tokens of the step        arXiv 2503.14476, equation 8
    dr_grpo    each token            1 / --max-new-tokens                arXiv 2503.20783, equation 3
    gspo       the answer, a mean    1 / its tokens                      arXiv 2507.18071, equation 5
    rloo       the answer, a sum     1 / its tokens (its loss is one)    arXiv 2402.14740, equation 8

Shapes: P positions (one for each sampled token, then padding), A answers, G answers to one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_lora.config.objectives import RATIOS, names_of

TOKEN, MEAN, SUM = "token", "mean", "sum"
RATIO_OF = RATIOS | dict.fromkeys(names_of("leaves_one_out"), SUM)
# Added to the standard deviation of rewards, as in TRL, so that equal rewards give advantages of 0.
TINY = 1e-4


@dataclass(frozen=True)
class PolicyOptions:
    """The numbers that policy losses take; names and defaults are TRL's.

    Attributes:
        loss: a name in `RATIO_OF`.
        epsilon, epsilon_high: how far below and above 1 the ratio counts.
        beta: weight of the divergence from the reference in the loss.
        compares: whether there is a reference, so that the divergence is reported.
        max_new_tokens: of an answer; dr_grpo divides by it.
    """

    loss: str = "dapo"
    epsilon: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    compares: bool = False
    max_new_tokens: int = 256


@dataclass(frozen=True)
class SampledTokens:
    """The sampled tokens of a batch.

    Attributes:
        logps: (P,) float32, log-probabilities under the policy that is trained.
        old: (P,) float32, under the policy that sampled them.
        reference: (P,) float32, under the reference; only read with `compares`.
        weights: (P,) float32, 1 for a sampled token, 0 for padding.
        answers: (P,) int, each position's answer.
        advantages: (A,) float32.
        share: scalar, answers / tokens of the whole step.
    """

    logps: mx.array
    old: mx.array
    reference: mx.array
    weights: mx.array
    answers: mx.array
    advantages: mx.array
    share: mx.array

    def by_answer(self, values: mx.array) -> mx.array:
        """Sum the values (P,) of each answer's tokens, (A,)."""
        own = self.answers[None, :] == mx.arange(len(self.advantages))[:, None]  # (A, P)
        return mx.where(own, (values * self.weights)[None, :], 0.0).sum(axis=1)


def policy_loss(sampled: SampledTokens, options: PolicyOptions) -> tuple[mx.array, dict[str, mx.array]]:
    """Return each answer's loss, (A,), whose mean over answers is the loss; and what to report of each, (A,).

    The reports are means over the answer's tokens: `kl`, an estimate of the divergence from the reference
    (http://joschu.net/blog/kl-approx.html, k3), and `clipped`, the share of ratios beyond the bounds.
    """
    tokens = mx.maximum(sampled.by_answer(sampled.weights), 1.0)  # (A,)
    log_ratio = sampled.logps - sampled.old  # (P,)
    if RATIO_OF[options.loss] != TOKEN:
        of_answer = sampled.by_answer(log_ratio)
        log_ratio = (of_answer / tokens if RATIO_OF[options.loss] == MEAN else of_answer)[sampled.answers]
    ratio, advantages = mx.exp(log_ratio), sampled.advantages[sampled.answers]
    low, high = 1 - options.epsilon, 1 + options.epsilon_high
    losses = -mx.minimum(ratio * advantages, mx.clip(ratio, low, high) * advantages)
    clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
    kl = mx.zeros_like(losses)
    if options.compares:
        away = sampled.reference - sampled.logps
        kl = mx.exp(away) - away - 1
        losses = losses + options.beta * kl
    weight = {"dapo": sampled.share, "bnpo": sampled.share, "dr_grpo": 1 / options.max_new_tokens}
    reports = {"kl": kl, "clipped": clipped.astype(mx.float32)}
    of_answers = sampled.by_answer(losses) * weight.get(options.loss, 1 / tokens)
    return of_answers, {name: sampled.by_answer(values) / tokens for name, values in reports.items()}


def group_advantages(
    rewards: np.ndarray, group: int, scale: str = "group", step: np.ndarray | None = None
) -> np.ndarray:
    """Return how much better each answer is than the mean of those to its prompt (arXiv 2402.03300, section 4.1.2).

    Args:
        rewards: (A,) float; NaN for an answer that could not be rewarded, which takes no part.
        group: G, answers to one prompt, which are neighbors.
        scale: what the difference is divided by: the standard deviation of the `group`, of the whole `batch`, or `none`.
        step: rewards of all answers of the optimizer step, which is the `batch`; None: those given.

    Returns:
        (A,) float32, 0 for an answer without a reward.
    """
    by_prompt = rewards.reshape(-1, group).astype(np.float64)
    difference = by_prompt - _mean(by_prompt)
    if scale == "group":
        difference = difference / (group_deviation(by_prompt) + TINY)
    elif scale == "batch":
        whole = (rewards if step is None else step).reshape(1, -1).astype(np.float64)
        difference = difference / (group_deviation(whole) + TINY)
    return np.nan_to_num(difference, nan=0.0).astype(np.float32).ravel()


def leave_one_out_advantages(rewards: np.ndarray, group: int) -> np.ndarray:
    """Return how much better each answer is than the mean of the others to its prompt (arXiv 2402.14740, equation 8).

    Args, Returns: as for `group_advantages`; an answer without another one to compare with gets 0.
    """
    by_prompt = rewards.reshape(-1, group).astype(np.float64)
    found = np.isfinite(by_prompt)
    others = found.sum(axis=1, keepdims=True) - 1
    total = np.where(found, by_prompt, 0.0).sum(axis=1, keepdims=True)
    advantages = by_prompt - (total - by_prompt) / np.maximum(others, 1)
    return np.where(found & (others > 0), advantages, 0.0).astype(np.float32).ravel()


def _mean(values: np.ndarray) -> np.ndarray:
    """Return the mean of each row, NaN left out, as a column."""
    found = np.isfinite(values)
    return np.where(found, values, 0.0).sum(axis=1, keepdims=True) / np.maximum(found.sum(axis=1, keepdims=True), 1)


def group_deviation(values: np.ndarray) -> np.ndarray:
    """Return the sample's standard deviation of each row, NaN left out, as a column; 0 for fewer than two."""
    found = np.isfinite(values)
    squares = np.where(found, (values - _mean(values)) ** 2, 0.0).sum(axis=1, keepdims=True)
    return np.sqrt(squares / np.maximum(found.sum(axis=1, keepdims=True) - 1, 1))
