"""Losses of single answers that are rated good or bad, without a second answer to compare with.

Shapes: E rated answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx


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
RATED_LOSSES: dict[str, RatedLoss] = {"kto": kto, "apo_zero_unpaired": apo_zero_unpaired}


def _weighted(good: mx.array, bad: mx.array, ratings: Ratings, options: RatedOptions) -> mx.array:
    desirable, undesirable = options.desirable_weight * good, options.undesirable_weight * bad
    return mx.where(ratings.good > 0, desirable, undesirable)
