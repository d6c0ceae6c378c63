"""Preference objectives: pairs of a chosen and a rejected answer (DPO, ORPO, SimPO, CPO), rated answers (KTO), reward models.

The loss is computed from the summed log-probability of each answer (losses/preference.py), which for a reward model is the
score of its last token. A pair's answers may share their prompt (objectives/row_layout.py). The reference is the model as it
was before training, or --reference-adapter, and is computed once before the first step (objectives/answer_logps.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.losses.preference import (
    PAIR_LOSSES,
    RATED_LOSSES,
    PairLoss,
    PairOptions,
    Pairs,
    RatedOptions,
    Ratings,
    bradley_terry,
    preferred,
)
from mlx_lora.objectives.answer_logps import with_reference
from mlx_lora.objectives.answers import bind_answers
from mlx_lora.objectives.base import AnswerSums, BoundObjective, Objective, RunContext
from mlx_lora.objectives.row_layout import Layout, lay_out
from mlx_lora.planner.shapes import ModelShape
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import unknown_name

REWARD_REPORTS: tuple[str, ...] = ("accuracy", "margin", "chosen_rewards", "rejected_rewards")
PAIR_REPORTS = (*REWARD_REPORTS, "chosen_logps", "rejected_logps")
RATED_REPORTS = ("rewards_good", "rewards_bad", "good", "divergence")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # the losses of DPO's family that use --label-smoothing


@dataclass(eq=False)
class Preference(Objective):
    """An objective whose loss is of whole answers that the data have."""

    layout: Layout = field(default_factory=Layout)

    def compare(self, ctx: RunContext, sets: dict[str, EncodedSet]) -> dict[str, EncodedSet]:
        if not self.reference or (ctx.trains and not ctx.settings.objective.reference_adapter):
            return sets  # the untrained model is the reference, which a run computes in batches that fit
        return with_reference(ctx.settings, ctx.plain_base, sets, ctx.strategy)

    def lay_out(self, ctx: RunContext, rows: EncodedSet) -> None:
        self.layout = lay_out(ctx, self, rows)

    def settled(self, settings: TrainSettings) -> TrainSettings:
        return self.layout.settled(settings)

    def arrange(self, data: DataSplits) -> DataSplits:
        return self.layout.of(data)

    def after_fit(self, ctx: RunContext, data: DataSplits, shape: ModelShape) -> DataSplits:
        ctx.record.identity |= self.layout.identity
        if not self.reference or data.train.reference is not None:
            return data
        of = ctx.chosen.loss, ctx.chosen.kernels  # in batches that fit, so that its peak is below a step's
        return data.changed(lambda sets: with_reference(ctx.settings, ctx.base, sets, ctx.strategy, *of))

    def header_words(self, plan: BatchPlan, ctx: RunContext) -> list[str]:
        return [self.layout.words]

    def bind(self, loss: Loss, model: nn.Module) -> BoundObjective:
        return bind_answers(self, loss, model)


def dpo(settings: ObjectiveSettings) -> Preference:
    names = _names(settings.loss_type, PAIR_LOSSES)
    weights = _weights(settings.loss_weights, names)
    smoothed = [name for name in names if name in SMOOTHED]
    if settings.label_smoothing and not smoothed:
        raise InputError(
            f"--label-smoothing with --loss-type {settings.loss_type}: only {', '.join(SMOOTHED)} use it; leave it out"
        )
    if settings.discopop_tau != ObjectiveSettings.discopop_tau and "discopop" not in names:
        raise InputError(f"--discopop-tau with --loss-type {settings.loss_type}: only discopop uses it; leave it out")
    if "exo_pair" in names and not settings.label_smoothing:
        raise InputError("--loss-type exo_pair requires --label-smoothing above 0 (the paper uses 0.001)")
    parts = [(weight, PAIR_LOSSES[name]) for name, weight in zip(names, weights, strict=True)]
    words = " + ".join(
        name if weight == 1 else f"{weight:g} {name}" for name, weight in zip(names, weights, strict=True)
    )
    return _pairwise("dpo", settings, words, parts, reference=True, likelihood="answers" if "sft" in names else "none")


def orpo(settings: ObjectiveSettings) -> Preference:
    parts = [(1.0, pair_losses.odds_ratio), (1.0, pair_losses.sft)]
    return _pairwise("orpo", settings, "odds ratio and likelihood", parts, likelihood="rows", per_token=True)


def simpo(settings: ObjectiveSettings) -> Preference:
    return _pairwise("simpo", settings, f"margin {settings.simpo_gamma:g}", [(1.0, pair_losses.simpo)], per_token=True)


def cpo(settings: ObjectiveSettings) -> Preference:
    parts = [(1.0, pair_losses.cpo)] + ([(settings.cpo_alpha, pair_losses.sft)] if settings.cpo_alpha else [])
    words = f"likelihood weight {settings.cpo_alpha:g}"
    return _pairwise("cpo", settings, words, parts, likelihood="answers" if settings.cpo_alpha else "none")


def kto(settings: ObjectiveSettings) -> Preference:
    name, *others = _names("kto" if settings.loss_type == "sigmoid" else settings.loss_type, RATED_LOSSES)
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
    return Preference(
        "kto", "rated", words, loss, True, divergence=name == "kto", reports=RATED_REPORTS, finish=_rated_means
    )


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


def reward(settings: ObjectiveSettings) -> Preference:
    center = settings.center_rewards

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        chosen, rejected = sums.side(0), sums.side(1)
        good, bad = chosen.logps, rejected.logps
        reports = (preferred(good, bad, mx.abs(good) + mx.abs(bad)), good - bad, good, bad)
        named = dict(zip(REWARD_REPORTS, reports, strict=True))
        return bradley_terry(good, bad, chosen.labels, center), named

    words = "reward: Bradley-Terry" + (f", centered with weight {center:g}" if center else "")
    return Preference("reward", "pairs", words, loss, scores=True, reports=REWARD_REPORTS)


def _pairwise(
    name: str,
    settings: ObjectiveSettings,
    words: str,
    parts: list[tuple[float, PairLoss]],
    reference: bool = False,
    likelihood: str = "none",
    per_token: bool = False,
) -> Preference:
    """Return an objective whose loss is a weighted sum of pairwise losses; with `per_token`, rewards are means per token."""
    options = PairOptions(settings.beta, settings.label_smoothing, settings.simpo_gamma, settings.discopop_tau)

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        chosen, rejected = sums.side(0), sums.side(1)
        pairs = Pairs(
            chosen.logps, rejected.logps, chosen.reference, rejected.reference, chosen.tokens, rejected.tokens,
            chosen.likelihood, chosen.real,
        )  # fmt: skip
        losses = [weight * function(pairs, options) for weight, function in parts]
        of_good, of_bad = (
            options.beta / (mx.maximum(tokens, 1) if per_token else 1)
            for tokens in (pairs.chosen_tokens, pairs.rejected_tokens)
        )
        good, bad = of_good * pairs.chosen_ratio, of_bad * pairs.rejected_ratio
        magnitude = of_good * (mx.abs(pairs.chosen) + mx.abs(pairs.reference_chosen))
        magnitude += of_bad * (mx.abs(pairs.rejected) + mx.abs(pairs.reference_rejected))
        reports = (preferred(good, bad, magnitude), good - bad, good, bad, pairs.chosen, pairs.rejected)
        named = {name: report.astype(mx.float32) for name, report in zip(PAIR_REPORTS, reports, strict=True)}
        return sum(losses[1:], losses[0]), named

    description = f"{name}: {words}, beta {settings.beta:g}"
    return Preference(name, "pairs", description, loss, reference, likelihood, reports=PAIR_REPORTS)


def _names(text: str, known: dict) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(f"--loss-type {name!r}: {unknown_name(name, known)}")
    if not names:
        raise InputError(f"--loss-type is empty; give one of {', '.join(known)}")
    return names


def _weights(text: str | None, names: list[str]) -> list[float]:
    if text is None:
        return [1.0] * len(names)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--loss-weights {text!r}: write numbers separated by commas, as in 0.8,0.2") from None
    if len(weights) != len(names) or not all(0 <= weight < 1e6 for weight in weights):
        raise InputError(f"--loss-weights {text!r}: give {len(names)} numbers of at least 0, one for each --loss-type")
    return weights
