"""Preference objectives on pairs of a chosen and a rejected answer: DPO and its losses, ORPO, SimPO, CPO.

One step, in order:

    rows of the pairs' answers       each has its prompt, or both share one (objectives/prefix_sharing.py)
    log-probabilities of answers     summed over their tokens, under the model (objectives/reference.py)
                                     and, for DPO, under the reference, which is computed before the run (objectives/reference.py)
    loss of each pair                from these sums (losses/preference.py); the step's loss is their mean

Shapes: E pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.inject import remove_adapters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.losses import preference as pair_losses
from mlx_lora.losses.cross_entropy import Arrays, Loss, LossFunction, TokenLosses
from mlx_lora.losses.preference import PAIR_LOSSES, PairLoss, PairOptions, Pairs, preferred
from mlx_lora.objectives.base import BoundObjective, Objective, RunContext
from mlx_lora.objectives.prefix_sharing import Layout, lay_out
from mlx_lora.objectives.reference import (
    AnswerSums,
    BatchSums,
    LossOfAnswers,
    array_sums,
    arrays_of,
    batch_sums,
    prepared,
    put_reference,
    whole_set,
    with_reference,
)
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import unknown_name

if TYPE_CHECKING:
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.planner.memory import ModelShape

REWARD_REPORTS: tuple[str, ...] = ("accuracy", "margin", "chosen_rewards", "rejected_rewards")
PAIR_REPORTS = (*REWARD_REPORTS, "chosen_logps", "rejected_logps")
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
        measure_tokens = loss.measure_tokens or loss.tokens
        sums_before = self.sums_of(measure_tokens)

        def of(tokens: TokenLosses) -> LossFunction:
            def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
                sums = array_sums(model, tokens, arrays)
                losses, reports = self.loss(sums)  # (E,)
                real = sums.real[::group]
                return (losses * real).sum(), real.sum(), {name: (r * real).sum() for name, r in reports.items()}

            return summed

        whole = replace(
            loss, train=of(loss.tokens), measure=of(measure_tokens), description=f"{self.words}; {loss.description}"
        )
        bound = BoundObjective(
            whole, arrays_of, lambda batches, strategy: prepared(self, sums_before, model, batches, strategy),
            self.reports, self.finish, whole_set=whole_set(self, measure_tokens), sorts=self.sorts,
        )  # fmt: skip
        return bound if self.pictures is None else self.pictures.shown_to(bound, model)

    def sums_of(self, tokens: TokenLosses) -> BatchSums:
        """Return what computes the sums of a batch's answers, from the losses of tokens, outside of a step."""
        return batch_sums(tokens, self.pictures)


def dpo(settings: ObjectiveSettings) -> Preference:
    names = loss_names(settings.loss_type, PAIR_LOSSES)
    weights = _weights(settings.loss_weights, names)
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


def loss_names(text: str, known: dict) -> list[str]:
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
