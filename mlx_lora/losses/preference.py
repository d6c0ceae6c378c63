"""Compute losses of preferences, as functions of the log-probabilities or the scores of whole answers.

    pairs           of a chosen and a rejected answer: DPO's family, SimPO, CPO, ORPO
    rated answers   good or bad, without a second answer to compare with: KTO, APO-zero
    scores          of a reward model on pairs: Bradley-Terry

Each loss of pairs takes `Pairs` and `PairOptions` and returns one loss per pair, (E,) float32. A new one is one function here
and one row in `PAIR_LOSSES`.

With r the log-ratio of policy to reference, log pi(y|x) - log pi_ref(y|x), and d = r(chosen) - r(rejected), DPO's loss is
-log sigmoid(beta d) (arXiv 2305.18290, eq. 7). Names and definitions are those of TRL's DPOTrainer, CPOTrainer, KTOTrainer and
RewardTrainer.

Shapes: E pairs, or E rated answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

# Pairs

# The share of a sum of log-probabilities that rounding may change: the same answer in another batch, or by another kernel.
ROUNDING = 1e-5


@dataclass(frozen=True)
class PairOptions:
    """The numbers that pairwise losses take.

    Attributes:
        beta: how strongly the policy is held to the reference; for `ipo` the paper's tau.
        label_smoothing: share of pairs whose labels are assumed to be swapped.
        simpo_gamma: the margin that SimPO asks for.
        discopop_tau: temperature of DiscoPOP's mixture.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch; all arrays are (E,) float32.

    Attributes:
        chosen, rejected: summed log-probabilities of the answers under the policy.
        reference_chosen, reference_rejected: the same under the reference; zeros for losses without a reference.
        chosen_tokens, rejected_tokens: number of answer tokens.
        likelihood: negative log-likelihood of the chosen row, each token weighted so that the mean over pairs is the
            mean over tokens.
        real: 1 for a pair, 0 for padding.
    """

    chosen: mx.array
    rejected: mx.array
    reference_chosen: mx.array
    reference_rejected: mx.array
    chosen_tokens: mx.array
    rejected_tokens: mx.array
    likelihood: mx.array
    real: mx.array

    @property
    def chosen_ratio(self) -> mx.array:
        """Log-ratio of policy to reference of the chosen answers."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> mx.array:
        """Log-ratio of policy to reference of the rejected answers."""
        return self.rejected - self.reference_rejected

    @property
    def delta(self) -> mx.array:
        """How much more the policy prefers the chosen answer than the reference does."""
        return self.chosen_ratio - self.rejected_ratio

    @property
    def delta_per_token(self) -> mx.array:
        """`delta` with each answer's log-ratio divided by its number of tokens."""
        return self.chosen_ratio / _at_least_one(self.chosen_tokens) - self.rejected_ratio / _at_least_one(
            self.rejected_tokens
        )

    @property
    def mean_delta(self) -> mx.array:
        """Difference of the answers' mean log-probabilities per token, without a reference."""
        return self.chosen / _at_least_one(self.chosen_tokens) - self.rejected / _at_least_one(self.rejected_tokens)


PairLoss = Callable[[Pairs, PairOptions], mx.array]


def sigmoid(pairs: Pairs, options: PairOptions) -> mx.array:
    """DPO (arXiv 2305.18290, eq. 7)."""
    return -nn.log_sigmoid(options.beta * pairs.delta)


def sigmoid_norm(pairs: Pairs, options: PairOptions) -> mx.array:
    """DPO on log-ratios per token."""
    return -nn.log_sigmoid(options.beta * pairs.delta_per_token)


def hinge(pairs: Pairs, options: PairOptions) -> mx.array:
    """Hinge loss on the margin (SLiC, arXiv 2305.10425)."""
    return nn.relu(1 - options.beta * pairs.delta)


def ipo(pairs: Pairs, options: PairOptions) -> mx.array:
    """Squared distance of the margin per token from 1 / (2 beta) (IPO, arXiv 2310.12036, eq. 17)."""
    return mx.square(pairs.delta_per_token - 1 / (2 * options.beta))


def exo_pair(pairs: Pairs, options: PairOptions) -> mx.array:
    """Reverse Kullback-Leibler divergence from the smoothed labels (EXO, arXiv 2402.00856, eq. 16)."""
    margin, smoothing = options.beta * pairs.delta, options.label_smoothing
    return mx.sigmoid(margin) * (nn.log_sigmoid(margin) - math.log1p(-smoothing)) + mx.sigmoid(-margin) * (
        nn.log_sigmoid(-margin) - math.log(smoothing)
    )


def nca_pair(pairs: Pairs, options: PairOptions) -> mx.array:
    """Noise contrastive alignment of both answers (NCA, arXiv 2402.05369)."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -nn.log_sigmoid(chosen) - 0.5 * nn.log_sigmoid(-chosen) - 0.5 * nn.log_sigmoid(-rejected)


def robust(pairs: Pairs, options: PairOptions) -> mx.array:
    """An unbiased loss where a share of the labels is flipped (arXiv 2403.00409, eq. 7)."""
    margin, smoothing = options.beta * pairs.delta, options.label_smoothing
    clean, flipped = (1 - smoothing) * nn.log_sigmoid(margin), smoothing * nn.log_sigmoid(-margin)
    return (flipped - clean) / (1 - 2 * smoothing)


def bco_pair(pairs: Pairs, options: PairOptions) -> mx.array:
    """Each answer by itself, as a binary classifier (BCO, arXiv 2404.04656)."""
    chosen, rejected = options.beta * pairs.chosen_ratio, options.beta * pairs.rejected_ratio
    return -nn.log_sigmoid(chosen) - nn.log_sigmoid(-rejected)


def sppo_hard(pairs: Pairs, options: PairOptions) -> mx.array:
    """Squared distances from +-1 / (2 beta), with the winner's probability set to 1 (SPPO, arXiv 2405.00675, eq. 4.7)."""
    half = 0.5 / options.beta
    return mx.square(pairs.chosen_ratio - half) + mx.square(pairs.rejected_ratio + half)


def aot(pairs: Pairs, options: PairOptions) -> mx.array:
    """Margins of policy and reference compared in sorted order (AOT, arXiv 2406.05882)."""
    policy = _sorted(pairs.chosen - pairs.rejected, pairs.real)
    reference = _sorted(pairs.reference_chosen - pairs.reference_rejected, pairs.real)
    return _smoothed(policy - reference, options)


def aot_unpaired(pairs: Pairs, options: PairOptions) -> mx.array:
    """Log-ratios of chosen and rejected answers compared in sorted order (AOT, arXiv 2406.05882)."""
    return _smoothed(_sorted(pairs.chosen_ratio, pairs.real) - _sorted(pairs.rejected_ratio, pairs.real), options)


def apo_zero(pairs: Pairs, options: PairOptions) -> mx.array:
    """Raise the chosen answer and lower the rejected one (APO-zero, arXiv 2408.06266, eq. 7)."""
    return mx.sigmoid(-options.beta * pairs.chosen_ratio) + mx.sigmoid(options.beta * pairs.rejected_ratio)


def apo_down(pairs: Pairs, options: PairOptions) -> mx.array:
    """Lower both answers, the rejected one more (APO-down, arXiv 2408.06266, eq. 8)."""
    return mx.sigmoid(options.beta * pairs.chosen_ratio) + mx.sigmoid(-options.beta * pairs.delta)


def discopop(pairs: Pairs, options: PairOptions) -> mx.array:
    """A mixture of logistic and exponential loss that a model discovered (DiscoPOP, arXiv 2406.08414, eq. 5)."""
    margin = options.beta * pairs.delta
    share = mx.sigmoid(margin / options.discopop_tau)
    return -nn.log_sigmoid(margin) * (1 - share) + mx.exp(-margin) * share


def sft(pairs: Pairs, options: PairOptions) -> mx.array:
    """Imitation of the chosen answers: the mean over their tokens."""
    return pairs.likelihood


def simpo(pairs: Pairs, options: PairOptions) -> mx.array:
    """Mean log-probabilities with a margin and without a reference (SimPO, arXiv 2405.14734, eq. 6)."""
    return _smoothed(pairs.mean_delta - options.simpo_gamma / options.beta, options)


def cpo(pairs: Pairs, options: PairOptions) -> mx.array:
    """DPO's loss under a uniform reference (CPO, arXiv 2401.08417, eq. 3)."""
    return _smoothed(pairs.chosen - pairs.rejected, options)


def odds_ratio(pairs: Pairs, options: PairOptions) -> mx.array:
    """Log-odds ratio of the answers' mean probabilities, times beta (ORPO, arXiv 2403.07691, eq. 4 and 7)."""
    # Padding has a probability of 1, whose odds are infinite, and 0 * inf is NaN.
    chosen = mx.where(pairs.real > 0, pairs.chosen / _at_least_one(pairs.chosen_tokens), -1.0)
    rejected = mx.where(pairs.real > 0, pairs.rejected / _at_least_one(pairs.rejected_tokens), -1.0)
    log_odds = chosen - rejected - (_log_one_minus_exp(chosen) - _log_one_minus_exp(rejected))
    return -options.beta * nn.log_sigmoid(log_odds)


# DPO's family by TRL's names.
PAIR_LOSSES: dict[str, PairLoss] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sft,
        sigmoid_norm,
    )
}


def preferred(good: mx.array, bad: mx.array, magnitude: mx.array) -> mx.array:
    """Return 1 for each pair whose chosen answer has the higher reward, and 0 for others and for ties, (E,) float32.

    A difference up to `ROUNDING` of what the rewards were computed from is a tie. TRL compares `good > bad`, which before the
    first step, when the policy is still its own reference, counts the signs of rounding errors.

    Args:
        good, bad: (E,) rewards of the chosen and the rejected answers.
        magnitude: (E,) sum of the absolute numbers whose sums and differences the rewards are, in the same unit.
    """
    return (good - bad > ROUNDING * magnitude).astype(mx.float32)


def _smoothed(margin: mx.array, options: PairOptions) -> mx.array:
    """Return the logistic loss of a margin where a share of the labels may be wrong."""
    beta, smoothing = options.beta, options.label_smoothing
    return -nn.log_sigmoid(beta * margin) * (1 - smoothing) - nn.log_sigmoid(-beta * margin) * smoothing


def _sorted(values: mx.array, real: mx.array) -> mx.array:
    """Return values of real pairs in ascending order at the positions of real pairs, padding unchanged."""
    # Padding is sorted to the end, then each real pair, in order, takes its rank's value.
    order = mx.argsort(mx.stop_gradient(mx.where(real > 0, values, mx.inf)))
    rank = mx.cumsum(real).astype(mx.int32) - 1
    return mx.where(real > 0, values[order][mx.maximum(rank, 0)], values)


def _log_one_minus_exp(x: mx.array) -> mx.array:
    """Return log(1 - exp(x)) for x <= 0, without cancellation near 0; at 0, that of the nearest float32 below."""
    x = mx.minimum(x, -1e-7)
    near = x > -math.log(2)
    # Each branch gets an argument that is safe for it: the gradient of the other branch would be 0 * inf.
    by_expm1 = mx.log(-mx.expm1(mx.where(near, x, -1.0)))
    by_log1p = mx.log1p(-mx.exp(mx.where(near, -1.0, x)))
    return mx.where(near, by_expm1, by_log1p)


def _at_least_one(count: mx.array) -> mx.array:
    return mx.maximum(count, 1.0)


# Rated answers


@dataclass(frozen=True)
class RatedOptions:
    """The numbers that losses of rated answers take.

    Attributes:
        beta: how strongly the policy is held to the reference.
        desirable_weight, undesirable_weight: factors on the losses of good and of bad answers.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0


@dataclass(frozen=True)
class Ratings:
    """The rated answers of a batch.

    Attributes:
        ratio: (E,) float32, log-ratio of policy to reference of each answer.
        good: (E,) float32, 1 for a good answer, 0 for a bad one.
        divergence: scalar float32, how far the policy is from the reference, estimated on answers to other prompts and
            not below 0; no gradient goes through it.
    """

    ratio: mx.array
    good: mx.array
    divergence: mx.array


RatedLoss = Callable[[Ratings, RatedOptions], mx.array]


def kto(ratings: Ratings, options: RatedOptions) -> mx.array:
    """Prospect-theoretic value of each answer relative to the divergence (KTO, arXiv 2402.01306, eq. 7)."""
    value = options.beta * (ratings.ratio - ratings.divergence)
    return _weighted(mx.sigmoid(-value), mx.sigmoid(value), ratings, options)


def apo_zero_unpaired(ratings: Ratings, options: RatedOptions) -> mx.array:
    """APO-zero for single answers (arXiv 2408.06266, eq. 7)."""
    value = options.beta * ratings.ratio
    return _weighted(mx.sigmoid(-value), mx.sigmoid(value), ratings, options)


# The names are TRL's.
RATED_LOSSES: dict[str, RatedLoss] = {loss.__name__: loss for loss in (kto, apo_zero_unpaired)}


def _weighted(good: mx.array, bad: mx.array, ratings: Ratings, options: RatedOptions) -> mx.array:
    desirable, undesirable = options.desirable_weight * good, options.undesirable_weight * bad
    return mx.where(ratings.good > 0, desirable, undesirable)


# Scores


def bradley_terry(chosen: mx.array, rejected: mx.array, margin: mx.array, center: float = 0.0) -> mx.array:
    """Return a reward model's loss on each pair, (E,) float32: -log sigmoid(chosen - rejected - margin).

    Args:
        chosen, rejected: (E,) scores of the answers.
        margin: (E,) the least amount by which the scores should differ (Llama 2, arXiv 2307.09288, section 3.2.2).
        center: weight of (chosen + rejected)^2, which keeps scores near zero (arXiv 2312.09244).
    """
    return -nn.log_sigmoid(chosen - rejected - margin) + center * mx.square(chosen + rejected)
