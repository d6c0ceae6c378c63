"""Preference objectives: pairs of a chosen and a rejected answer (DPO, ORPO, SimPO, CPO), rated answers (KTO), reward models.

The loss is computed from the summed log-probability of each answer (losses/preference.py), which for a reward model is the
score of its last token. A pair's answers may share their prompt (objectives/prefix_sharing.py). What the model is compared with is
in objectives/reference.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.inject import remove_adapters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.cross_entropy import Arrays, Loss, LossFunction, TokenLosses, token_arrays
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
from mlx_lora.models.head import body_of, scores_at, with_last_block
from mlx_lora.models.prefix_attention import answers_at
from mlx_lora.objectives.base import BoundObjective, Objective, RunContext, WholeSet
from mlx_lora.objectives.prefix_sharing import Layout, lay_out
from mlx_lora.objectives.reference import put_reference, with_reference
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import unknown_name

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.planner.shapes import ModelShape


# Bring an objective onto a model: its loss over whole answers in a step, and its mean over a held-out set.
#
# The fused head computes the loss of each trained position and its gradient in one forward pass. Here, positions are summed
# to answers; in the backward pass, the cotangent brings the answer's weight to each position. So no objective needs logits,
# and a step takes as much memory as one of imitation.
#
# Some losses are not means over examples: a likelihood is a mean over tokens (ORPO, CPO, RPO), KTO compares each answer with
# the mean divergence of others, and AOT sorts all margins. A mean over batches of these depends on the batches. So for a
# held-out set a batch only gives the sums of its answers, a few numbers each, and the loss is computed once, at the end.
#
# Shapes: B rows of a batch, A answers (B, or B K where a row holds K), E examples, T columns, P positions; N answers of a set.


@dataclass(frozen=True)
class AnswerSums:
    """The inputs of an objective's loss; arrays are (B,) float32.

    Attributes:
        logps: summed log-probability of each row's answer under the policy; of a reward model, its score.
        tokens: number of the answer's tokens.
        likelihood: negative log-likelihood of each row's trained tokens, weighted so that its sum over a step's rows,
            divided by the step's examples, is the mean over tokens.
        reference: the answer's log-probability under the reference, 0 without one.
        labels: from the data: the margin that a pair should have, or 1 for a good answer and 0 for a bad one.
        real: 1 for a row, 0 for padding.
        divergence: scalar: the mean log-ratio of policy to reference, on other answers (KTO); no gradient goes through it.
    """

    logps: mx.array
    tokens: mx.array
    likelihood: mx.array
    reference: mx.array
    labels: mx.array
    real: mx.array
    divergence: mx.array

    def side(self, number: int, group: int = 2) -> AnswerSums:
        """Return the sums of each example's row `number`, (E,)."""
        names = ("logps", "tokens", "likelihood", "reference", "labels", "real")
        return replace(self, **{name: getattr(self, name)[number::group] for name in names})


LossOfAnswers = Callable[[AnswerSums], tuple[mx.array, dict[str, mx.array]]]
"""AnswerSums -> ((E,) losses, name -> (E,) numbers to report as means)."""


# Binding

FIRST, SECOND = 0, 1  # rows of an example
BatchSums = Callable[[nn.Module, "Batch"], AnswerSums]
"""Computes the sums of a batch's answers under a model, outside of a compiled step."""


def batch_sums(tokens: TokenLosses) -> BatchSums:
    """Return what computes the sums of a batch's answers, from the losses of tokens."""
    return lambda model, batch: _array_sums(model, tokens, arrays_of(batch))


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


def _prepared(
    objective: Preference, sums: BatchSums, model: nn.Module, batches: list[Batch], strategy: Strategy
) -> list[Batch]:
    """Compute what depends on the whole step, before the step is divided into parts and among ranks.

    These are the factor that makes the likelihood a mean over the step's tokens, and the divergence, for which rated
    answers have a second row. All ranks get the same numbers.
    """
    share = divergence = 0.0
    if objective.likelihood != "none":
        examples = sum(b.examples for b in batches)
        tokens = sum(b.first_targets for b in batches)
        share = examples / max(1, tokens)
    if objective.divergence:
        others = (_only(batch, SECOND) for batch in batches)
        divergence = mean_log_ratio(model, sums, others, strategy)
    if objective.rated:
        batches = [_only(batch, FIRST) for batch in batches]
    return [
        batch.with_columns(shares=np.full((len(batch.inputs), 2), (share, divergence), np.float32)) for batch in batches
    ]


def _only(batch: Batch, row: int) -> Batch:
    """Return a batch of each example's row `row` alone."""
    rows = np.arange(row, len(batch.inputs), batch.group)
    # Keep the whole batch's number of slots: the number that this row's targets need differs from epoch to epoch.
    slots = min(batch.slots, batch.mask[rows].size)
    return replace(batch.take(rows, slots), group=1)


def mean_log_ratio(
    model: nn.Module, sums_of: BatchSums, batches: Iterable[Batch], strategy: Strategy = SINGLE_DEVICE
) -> float:
    """Return the mean log-ratio of policy to reference over rows, at least 0 (KTO's estimate of the divergence)."""
    total, count = mx.array(0.0), mx.array(0.0)
    training = model.training
    model.eval()
    for batch in strategy.dealt(list(batches)):
        sums = sums_of(model, batch)
        total = total + ((sums.logps - sums.reference) * sums.real).sum()
        count = count + sums.real.sum()
        mx.eval(total, count)
    total, count = strategy.ranks.sum(mx.stack([total, count]))
    model.train(training)
    return max(0.0, total.item() / count.item()) if count.item() else 0.0


# Sums of answers


def arrays_of(batch: Batch) -> Arrays:
    """Copy a batch of answers to the device.

    Returns:
        In addition to `token_arrays`: `answers` (P,) float32, 1 where a position belongs to an answer; `labels`, `reference`,
        `real` (A,) float32, see `AnswerSums`; `shares` (2,) float32, the factor on the likelihood and the divergence.
    """
    answers, columns = batch.weights, batch.columns
    if "answers" in columns:
        answers = columns["answers"].ravel()[batch.positions] * batch.weights
    real = np.repeat(batch.real, batch.answers_per_row).astype(np.float32)
    none = np.zeros_like(real)
    own = {
        "answers": answers.astype(np.float32),
        "labels": columns.get("labels", none).ravel(),
        "reference": columns.get("reference", none).ravel(),
        "real": real,
        "shares": columns["shares"][0] if "shares" in columns else np.zeros(2, np.float32),
    }
    return token_arrays(batch) | {name: mx.array(values) for name, values in own.items()}


def answer_sums(losses: mx.array, arrays: Arrays) -> AnswerSums:
    """Sum the losses of positions, (P,), to answers, (A,)."""
    own = answers_at(arrays)[None, :] == mx.arange(len(arrays["real"]))[:, None]  # (A, P)

    def by_answer(values: mx.array) -> mx.array:
        return mx.where(own, values[None, :], 0.0).sum(axis=1)

    logps, tokens = by_answer(-losses * arrays["answers"]), by_answer(arrays["answers"])
    share, divergence = arrays["shares"]
    likelihood = by_answer(losses * arrays["weights"]) * share
    return AnswerSums(
        logps, tokens, likelihood, arrays["reference"], arrays["labels"], arrays["real"], mx.stop_gradient(divergence)
    )


def _array_sums(model: nn.Module, tokens: TokenLosses, arrays: Arrays) -> AnswerSums:
    """Return the sums of a batch that `arrays_of` put on the device."""
    return answer_sums(tokens(model, arrays), arrays)


# Whole sets

SUM_NAMES = ("logps", "tokens", "likelihood", "reference", "labels", "real")
UNWEIGHTED = (1.0, 0.0)  # the column `shares` of sums whose likelihood is not yet divided by tokens


def whole_set(objective: Preference, tokens: TokenLosses) -> WholeSet:
    """Return how an objective is measured on a whole set, whose answers give a few numbers each.

    Args:
        objective: of pairs or rated answers.
        tokens: the losses of tokens.
    """

    def compute(model: nn.Module, arrays: Arrays) -> mx.array:
        sums = _array_sums(model, tokens, arrays | {"shares": mx.array(UNWEIGHTED)})
        return mx.stack([getattr(sums, name) for name in SUM_NAMES])  # (6, A)

    def examples(found: np.ndarray, batch: Batch, arrays: Arrays) -> np.ndarray:
        rows = found[:, found[-1] > 0].T.reshape(-1, 2, len(SUM_NAMES))  # both answers of an example, without padding
        targets = np.zeros((*rows.shape[:2], 1), np.float32)
        targets[:1, 0] = batch.first_targets  # of the whole batch
        return np.concatenate([rows, targets], axis=2)

    def measured(rows: np.ndarray) -> tuple[float, dict[str, float]]:
        found = rows.reshape(-1, rows.shape[-1]).T
        named = dict(zip(SUM_NAMES, found, strict=False))
        divergence = 0.0
        if objective.divergence:
            ratios = (named["logps"] - named["reference"])[SECOND::2]
            divergence = max(0.0, float(ratios.mean(dtype=np.float64)))
        share = len(rows) / max(1, int(found[-1].sum(dtype=np.float64)))
        named["likelihood"] = named["likelihood"] * np.float32(share)
        sums = AnswerSums(**{name: mx.array(values) for name, values in named.items()}, divergence=mx.array(divergence))
        losses, reports = objective.loss(sums.side(FIRST) if objective.rated else sums)
        return _mean(losses), {name: _mean(values) for name, values in reports.items()}

    return WholeSet(compute, examples, measured)


def _mean(values: mx.array) -> float:
    return float(np.array(values).mean(dtype=np.float64))


# Preference objectives: pairs of a chosen and a rejected answer (DPO, ORPO, SimPO, CPO), rated answers (KTO), reward models

REWARD_REPORTS: tuple[str, ...] = ("accuracy", "margin", "chosen_rewards", "rejected_rewards")
PAIR_REPORTS = (*REWARD_REPORTS, "chosen_logps", "rejected_logps")
RATED_REPORTS = ("rewards_good", "rewards_bad", "good", "divergence")
SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")  # the losses of DPO's family that use --label-smoothing
SORTING = ("aot", "aot_unpaired")  # those of a pair whose loss depends on the other pairs of its batch


@dataclass(eq=False)
class Preference(Objective):
    """An objective whose loss is of whole answers that the data have.

    Attributes:
        words: for the run header.
        loss: of the answers.
        reports: names of the numbers that the loss reports.
        finish: turns the means of these into the numbers that users see.
        likelihood: the tokens whose likelihood is part of the loss: `none`, `answers`, or `rows` if the prompts of the
            chosen rows count too (ORPO).
        divergence: whether the loss needs the mean log-ratio of policy to reference on each example's second row. No
            gradient goes through it, so that row is not trained (KTO).
        sorts: see `BoundObjective`.
        layout: how the answers to a prompt lie in rows.
    """

    words: str
    loss: LossOfAnswers
    reports: tuple[str, ...] = PAIR_REPORTS
    finish: Callable[[dict[str, float]], dict[str, float]] = dict
    likelihood: str = "none"
    divergence: bool = False
    sorts: str = ""
    layout: Layout = field(default_factory=Layout)

    @property
    def rated(self) -> bool:
        """Whether an example is one rated answer, with a second row that only tells the divergence."""
        return self.options.row.records == "rated"

    @property
    def _trains_prompts(self) -> bool:
        return self.likelihood == "rows"

    def _with_targets(self, rows: EncodedSet) -> EncodedSet:
        if not self._trains_prompts:
            return super()._with_targets(rows)
        whole = rows.with_whole_rows()
        return whole if self.pictures is None else self.pictures.untrained(whole)

    def compare(self, ctx: RunContext, sets: dict[str, EncodedSet]) -> dict[str, EncodedSet]:
        """Return the sets with the answers' log-probabilities under a reference that is not the run's model as it begins."""
        if not self.options.row.reference or (ctx.trains and not self.options.reference_adapter):
            return sets  # the untrained model is the reference, which a run computes in batches that fit
        put_reference(ctx)
        with nullcontext() if self.pictures is None else self.pictures.of_plain_base(ctx):
            found = with_reference(self, ctx.settings, ctx.plain_base, sets, ctx.strategy)
        remove_adapters(ctx.plain_base.model)
        return found

    def settle(self, ctx: RunContext, data: DataSplits) -> DataSplits:
        """Let the two answers to a prompt share its row where that saves work."""
        self.layout = lay_out(ctx, data.train)
        ctx.settings = self.layout.settled(ctx.settings)
        ctx.record.identity |= self.layout.identity
        ctx.record.about.append(self.layout.words)
        return self.layout.of(super().settle(ctx, data))

    def finish_data(self, ctx: RunContext, data: DataSplits, shape: ModelShape) -> DataSplits:
        """Compute the answers' log-probabilities under the model as it begins, if it is the reference."""
        if self.options.row.reference and data.train.reference is None:
            of = ctx.chosen.loss, ctx.chosen.kernels  # in batches that fit, so that its peak is below a step's
            data = data.changed(lambda sets: with_reference(self, ctx.settings, ctx.base, sets, ctx.strategy, *of))
        return self.layout.of(data)

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        model, group = ctx.base.model, 1 if self.rated else 2
        loss = score_loss(model, loss.part_of_last) if self.options.row.scores else loss
        measure_tokens = loss.measure_tokens or loss.tokens
        sums_before = self.sums_of(measure_tokens)

        def of(tokens: TokenLosses) -> LossFunction:
            def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
                sums = _array_sums(model, tokens, arrays)
                losses, reports = self.loss(sums)  # (E,)
                real = sums.real[::group]
                return (losses * real).sum(), real.sum(), {name: (r * real).sum() for name, r in reports.items()}

            return summed

        whole = replace(
            loss, train=of(loss.tokens), measure=of(measure_tokens), description=f"{self.words}; {loss.description}"
        )
        bound = BoundObjective(
            whole, arrays_of, lambda batches, strategy: _prepared(self, sums_before, model, batches, strategy),
            self.reports, self.finish, whole_set=whole_set(self, measure_tokens), sorts=self.sorts,
        )  # fmt: skip
        return bound if self.pictures is None else self.pictures.shown_to(bound, model)

    def sums_of(self, tokens: TokenLosses) -> BatchSums:
        """Return what computes the sums of a batch's answers, from the losses of tokens, outside of a step."""
        plain, pictures = batch_sums(tokens), self.pictures
        if pictures is None:
            return plain

        def seeing(model: nn.Module, batch: Batch) -> AnswerSums:
            with pictures.shown(model, batch):
                return plain(model, batch)

        return seeing


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
    likelihood = "answers" if "sft" in names else "none"
    objective = _pairwise(settings, words, parts, likelihood)
    objective.sorts = " and ".join(name for name in names if name in SORTING)
    return objective


def orpo(settings: ObjectiveSettings) -> Preference:
    parts = [(1.0, pair_losses.odds_ratio), (1.0, pair_losses.sft)]
    return _pairwise(settings, "odds ratio and likelihood", parts, "rows", per_token=True)


def simpo(settings: ObjectiveSettings) -> Preference:
    return _pairwise(settings, f"margin {settings.simpo_gamma:g}", [(1.0, pair_losses.simpo)], per_token=True)


def cpo(settings: ObjectiveSettings) -> Preference:
    parts = [(1.0, pair_losses.cpo)] + ([(settings.cpo_alpha, pair_losses.sft)] if settings.cpo_alpha else [])
    words = f"likelihood weight {settings.cpo_alpha:g}"
    return _pairwise(settings, words, parts, "answers" if settings.cpo_alpha else "none")


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


def reward(settings: ObjectiveSettings) -> Preference:
    center = settings.center_rewards

    def loss(sums: AnswerSums) -> tuple[mx.array, dict[str, mx.array]]:
        chosen, rejected = sums.side(0), sums.side(1)
        good, bad = chosen.logps, rejected.logps
        reports = (preferred(good, bad, mx.abs(good) + mx.abs(bad)), good - bad, good, bad)
        named = dict(zip(REWARD_REPORTS, reports, strict=True))
        return bradley_terry(good, bad, chosen.labels, center), named

    words = "reward: Bradley-Terry" + (f", centered with weight {center:g}" if center else "")
    return Preference(settings, words, loss, REWARD_REPORTS)


def _pairwise(
    settings: ObjectiveSettings,
    words: str,
    parts: list[tuple[float, PairLoss]],
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

    words = f"{settings.objective}: {words}, beta {settings.beta:g}"
    return Preference(settings, words, loss, likelihood=likelihood)


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
