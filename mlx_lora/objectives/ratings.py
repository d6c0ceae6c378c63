"""Rated answers (KTO) and reward models, which are preferences too: their loss is of whole answers (objectives/dpo.py).

A reward model's "log-probability" of an answer is the score of its last token.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.losses.cross_entropy import Arrays, Loss
from mlx_lora.losses.preference import RATED_LOSSES, RatedOptions, Ratings, bradley_terry, preferred
from mlx_lora.models.head import body_of, scores_at, with_last_block
from mlx_lora.objectives.dpo import REWARD_REPORTS, Preference, loss_names
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.objectives.base import BoundObjective, RunContext
    from mlx_lora.objectives.reference import AnswerSums

RATED_REPORTS = ("rewards_good", "rewards_bad", "good", "divergence")


def kto(settings: ObjectiveSettings) -> Preference:
    name, *others = loss_names("kto" if settings.loss_type == "sigmoid" else settings.loss_type, RATED_LOSSES)
    if others:
        raise InputError(
            f"--loss-type {settings.loss_type}: --objective kto has one loss; give {' or '.join(RATED_LOSSES)}"
        )
    options = RatedOptions(settings.beta, settings.desirable_weight, settings.undesirable_weight)
    function = RATED_LOSSES[name]

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        ratings = Ratings(sums.logps - sums.reference, sums.labels, sums.divergence)
        rewards = options.beta * ratings.ratio
        divergence = mx.broadcast_to(sums.divergence, rewards.shape)
        reports = (rewards * sums.labels, rewards * (1 - sums.labels), sums.labels, divergence)
        return function(ratings, options), dict(zip(RATED_REPORTS, reports, strict=True))

    words = f"kto: {name}, beta {settings.beta:g}"
    return Preference(settings, words, loss, RATED_REPORTS, _rated_means, divergence=name == "kto")


def _rated_means(means: dict[str, float]) -> dict[str, float]:
    """Convert means over all answers to the mean reward of the good answers and of the bad ones; NaN without any."""
    good = means["good"]
    chosen = means["rewards_good"] / good if good else math.nan
    rejected = means["rewards_bad"] / (1 - good) if good < 1 else math.nan
    return {
        "margin": chosen - rejected,
        "chosen_rewards": chosen,
        "rejected_rewards": rejected,
        "divergence": means["divergence"],
    }


def score_loss(model: nn.Module, part_of_last: bool = False) -> Loss:
    """Return a loss that is the negative score at each position, so that an answer's "log-probability" is its score.

    Args:
        model: with a score head.
        part_of_last: compute the last block at these positions only, as the loss of tokens that was tried on this model.
    """
    body = body_of(model)
    body = with_last_block(body, model)[0] if part_of_last else body
    block = "last block where scored" if body.last is not None else "whole last block"

    def tokens(model: nn.Module, arrays: Arrays) -> mx.array:
        return -scores_at(model, body, arrays).squeeze(-1) * arrays["weights"]

    def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array]:
        return tokens(model, arrays).sum(), arrays["weights"].sum()

    return Loss(summed, summed, f"scores of last tokens; {block}", tokens, part_of_last=body.last is not None)


class RewardModel(Preference):
    """A reward model, whose score head is trained on pairs."""

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        return super().bind(ctx, score_loss(ctx.base.model, loss.part_of_last), rows)


def reward(settings: ObjectiveSettings) -> RewardModel:
    center = settings.center_rewards

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        chosen, rejected = sums.side(0), sums.side(1)
        good, bad = chosen.logps, rejected.logps
        reports = (preferred(good, bad, mx.abs(good) + mx.abs(bad)), good - bad, good, bad)
        named = dict(zip(REWARD_REPORTS, reports, strict=True))
        return bradley_terry(good, bad, chosen.labels, center), named

    words = "reward: Bradley-Terry" + (f", centered with weight {center:g}" if center else "")
    return RewardModel(settings, words, loss, REWARD_REPORTS)
