"""Sum the losses of tokens to answers, for losses of whole answers (objectives/dpo.py, objectives/ratings.py).

The fused head computes the loss of each trained position and its gradient in one forward pass. Here, positions are summed
to answers; in the backward pass, the cotangent brings the answer's weight to each position. So no objective needs logits,
and a step takes as much memory as one of imitation.

Some losses are not means over examples: a likelihood is a mean over tokens (ORPO, CPO, RPO), KTO compares each answer with
the mean divergence of others, and AOT sorts all margins. A mean over batches of these depends on the batches. So for a
held-out set a batch only gives the sums of its answers, a few numbers each, and the loss is computed once, at the end.

Shapes: B rows of a batch, A answers (B, or B K where a row holds K), E examples, T columns, P positions; N answers of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.losses.cross_entropy import Arrays, TokenLosses, token_arrays
from mlx_lora.models.prefix_attention import answers_at
from mlx_lora.objectives.base import WholeSet
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.objectives.pictures import Pictures


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


class LossIsOfAnswers(Protocol):
    """What is needed of an objective here; see `Preference` of objectives/dpo.py."""

    loss: LossOfAnswers
    likelihood: str
    divergence: bool

    @property
    def rated(self) -> bool:
        """Whether an example is one rated answer, with a second row that only tells the divergence."""
        ...


# Binding

FIRST, SECOND = 0, 1  # rows of an example
BatchSums = Callable[[nn.Module, "Batch"], AnswerSums]
"""Computes the sums of a batch's answers under a model, outside of a compiled step."""


def batch_sums(tokens: TokenLosses, pictures: Pictures | None = None) -> BatchSums:
    """Return what computes the sums of a batch's answers, from the losses of tokens, outside of a step."""

    def sums(model: nn.Module, batch: Batch) -> AnswerSums:
        with nullcontext() if pictures is None else pictures.shown(model, batch):
            return array_sums(model, tokens, arrays_of(batch))

    return sums


def prepared(
    objective: LossIsOfAnswers, sums: BatchSums, model: nn.Module, batches: list[Batch], strategy: Strategy
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


def array_sums(model: nn.Module, tokens: TokenLosses, arrays: Arrays) -> AnswerSums:
    """Return the sums of a batch that `arrays_of` put on the device."""
    return answer_sums(tokens(model, arrays), arrays)


# Whole sets

SUM_NAMES = ("logps", "tokens", "likelihood", "reference", "labels", "real")
UNWEIGHTED = (1.0, 0.0)  # the column `shares` of sums whose likelihood is not yet divided by tokens


def whole_set(objective: LossIsOfAnswers, tokens: TokenLosses) -> WholeSet:
    """Return how an objective is measured on a whole set, whose answers give a few numbers each.

    Args:
        objective: of pairs or rated answers.
        tokens: the losses of tokens.
    """

    def compute(model: nn.Module, arrays: Arrays) -> mx.array:
        sums = array_sums(model, tokens, arrays | {"shares": mx.array(UNWEIGHTED)})
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
