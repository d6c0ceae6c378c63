"""Bring an objective onto a model: its loss over whole answers in a step, and its mean over a held-out set.

The fused head computes the loss of each trained position and its gradient in one forward pass. Here, positions are summed
to answers; in the backward pass, the cotangent brings the answer's weight to each position. So no objective needs logits,
and a step takes as much memory as one of imitation.

Some losses are not means over examples: a likelihood is a mean over tokens (ORPO, CPO, RPO), KTO compares each answer with
the mean divergence of others, and AOT sorts all margins. A mean over batches of these depends on the batches. So for a
held-out set a batch only gives the sums of its answers, a few numbers each, and the loss is computed once, at the end.

Shapes: B rows of a batch, A answers (B, or B K where a row holds K), E examples, T columns, P positions; N answers of a set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.cross_entropy import Arrays, Loss, LossFunction, TokenLosses, token_arrays
from mlx_lora.models.head import body_of, scores_at, with_last_block
from mlx_lora.models.prefix_attention import answers_at
from mlx_lora.objectives.base import AnswerSums, BoundObjective, LossOfAnswers, Objective
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet

# Binding

FIRST, SECOND = 0, 1  # rows of an example
BatchSums = Callable[[nn.Module, "Batch"], AnswerSums]
"""Computes the sums of a batch's answers under a model, outside of a compiled step."""


def batch_sums(tokens: TokenLosses) -> BatchSums:
    """Return what computes the sums of a batch's answers, from the losses of tokens."""
    return lambda model, batch: _array_sums(model, tokens, arrays_of(batch))


def bind_answers(
    objective: Objective,
    loss: Loss,
    model: nn.Module,
    sums_of: Callable[[TokenLosses], BatchSums] = batch_sums,
) -> BoundObjective:
    """Return an objective whose loss is of whole answers, on a model.

    Args:
        objective: of pairs or rated answers.
        loss: of tokens, whose kernels are kept; a reward model has a loss of its own.
        model: that is trained or measured.
        sums_of: returns what computes the sums that a step needs beforehand.
    """
    of_answers = objective.loss
    if of_answers is None:
        raise ValueError(f"{objective.name} has no loss of answers")
    loss = score_loss(model, loss.part_of_last) if objective.scores else loss
    group = 1 if objective.records == "rated" else 2
    measure_tokens = loss.measure_tokens or loss.tokens

    def of(tokens: TokenLosses) -> LossFunction:
        def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            sums = _array_sums(model, tokens, arrays)
            losses, reports = of_answers(sums)  # (E,)
            real = sums.real[::group]
            return (losses * real).sum(), real.sum(), {name: (r * real).sum() for name, r in reports.items()}

        return summed

    def prepare(batches: list[Batch], strategy: Strategy) -> list[Batch]:
        return _prepared(objective, sums_of(measure_tokens), model, batches, strategy)

    words = f"{objective.description}; {loss.description}"
    whole = replace(loss, train=of(loss.tokens), measure=of(measure_tokens), description=words)
    measured = WholeSet(
        lambda model, arrays: _array_sums(model, measure_tokens, arrays),
        of_answers,
        objective.records == "rated",
        objective.divergence,
    )
    return BoundObjective(whole, arrays_of, prepare, objective.reports, objective.finish, whole_set=measured)


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
    objective: Objective, sums: BatchSums, model: nn.Module, batches: list[Batch], strategy: Strategy
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
    if objective.records == "rated":
        batches = [_only(batch, FIRST) for batch in batches]
    return [replace(batch, shares=(share, divergence)) for batch in batches]


def _only(batch: Batch, row: int) -> Batch:
    """Return a batch of each example's row `row` alone."""
    rows = np.arange(row, len(batch.inputs), batch.group)
    # Keep the whole batch's number of slots: the number that this row's targets need differs from epoch to epoch.
    slots = min(len(batch.positions), batch.mask[rows].size)
    return batch.take(rows, slots, batch.real_tokens if row == FIRST else 0, group=1)


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
    answers = batch.weights
    if batch.answers is not None:
        answers = batch.answers.ravel()[batch.positions] * batch.weights
    real = np.repeat(batch.real, batch.answers_per_row).astype(np.float32)
    none = np.zeros_like(real)
    own = {
        "answers": answers.astype(np.float32),
        "labels": none if batch.labels is None else batch.labels.ravel(),
        "reference": none if batch.reference is None else batch.reference.ravel(),
        "real": real,
        "shares": np.array(batch.shares or (0.0, 0.0), np.float32),
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


def row_log_probabilities(
    model: nn.Module,
    sums: BatchSums,
    rows: EncodedSet,
    batch_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
    finite: bool = True,
    strategy: Strategy = SINGLE_DEVICE,
) -> np.ndarray:
    """Return the log-probability of each answer, (A,) float32, in the order of the rows.

    Args:
        model: is put in eval mode meanwhile.
        sums: computes those of a batch's answers, without a gradient.
        rows: rows with one answer each, or joined rows with several.
        batch_tokens: the most positions of a batch.
        on_progress: called with the number of finished answers after each batch.
        finite: raise ArithmeticError if one is not finite.
        strategy: how the ranks that call this divide the batches; all get all answers.
    """
    apart = replace(rows, group=1)
    found = np.zeros((len(rows), 1 if rows.starts is None else rows.starts.shape[1]), np.float32)
    training, done = model.training, 0
    model.eval()
    plan = BatchPlan(apart, batch_tokens=batch_tokens, batch_size=None, seed=0)
    for batch in strategy.held_out(plan, -1):
        logps = np.array(sums(model, batch).logps).reshape(-1, found.shape[1])
        numbers: Any = batch.numbers  # there are some: the batch is of a set
        found[numbers[batch.real]] = logps[batch.real]
        done += logps[batch.real].size
        on_progress(min(strategy.ranks.size * done, found.size))
    found = np.array(strategy.ranks.sum(mx.array(found.ravel())))  # a rank has zeros for the others' answers
    model.train(training)
    if finite and not np.isfinite(found).all():
        bad = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ArithmeticError(f"answer {bad}: its log-probability under the reference is {found[bad]}")
    return found


# Whole sets

SUM_NAMES = ("logps", "tokens", "likelihood", "reference", "labels", "real")
UNWEIGHTED = (1.0, 0.0)  # `Batch.shares` for sums whose likelihood is not yet divided by tokens


@dataclass(frozen=True)
class WholeSet:
    """How an objective is measured on a whole set.

    Attributes:
        sums: (model, arrays of a batch) -> the sums of its answers.
        loss: of the objective.
        rated: whether an example is one rated answer, with a second row that only tells the divergence.
        divergence: whether the loss needs that.
    """

    sums: Callable[..., AnswerSums]
    loss: LossOfAnswers
    rated: bool
    divergence: bool

    def above(self, given: Callable[[Callable[..., Any]], Callable[..., Any]]) -> WholeSet:
        """Return it with `given` around what computes the sums of a batch's answers."""
        return replace(self, sums=given(self.sums))

    def __call__(
        self,
        model: nn.Module,
        arrays_of: Callable[[Batch], Arrays],
        batches: Iterable[Batch],
        strategy: Strategy,
    ) -> tuple[float, int, dict[str, float]]:
        """Return the mean loss over all examples of all ranks' batches, their number, and the means that are reported.

        Args:
            model: in eval mode.
            arrays_of: returns the arguments of `sums` for a batch.
            batches: this rank's.
            strategy: how the ranks that call this divide the batches.
        """
        found, targets = [np.zeros((len(SUM_NAMES), 0), np.float32)], 0
        for batch in batches:
            sums = self.sums(model, arrays_of(replace(batch, shares=UNWEIGHTED)))
            rows = np.array(mx.stack([getattr(sums, name) for name in SUM_NAMES]))  # (6, B)
            found.append(rows[:, rows[-1] > 0])  # without padding
            targets += batch.first_targets
        told = strategy.everyone([targets, np.concatenate(found, axis=1).tolist()])
        rows = np.concatenate([np.array(one, np.float32).reshape(len(SUM_NAMES), -1) for _, one in told], axis=1)
        examples = rows.shape[1] // 2
        if not examples:
            return math.nan, 0, {}
        sums = _whole_set_sums(rows, examples / max(1, sum(number for number, _ in told)), self)
        losses, reports = self.loss(sums)
        return _mean(losses), examples, {name: _mean(values) for name, values in reports.items()}


def _whole_set_sums(rows: np.ndarray, share: float, whole: WholeSet) -> AnswerSums:
    """Return the sums of a set's answers, (6, N), as the loss takes them; `share` is the set's examples per target."""
    named = dict(zip(SUM_NAMES, rows, strict=True))
    divergence = 0.0
    if whole.divergence:
        ratios = (named["logps"] - named["reference"])[1::2]
        divergence = max(0.0, float(ratios.mean(dtype=np.float64)))
    named["likelihood"] = named["likelihood"] * np.float32(share)
    sums = AnswerSums(**{name: mx.array(values) for name, values in named.items()}, divergence=mx.array(divergence))
    return sums.side(0) if whole.rated else sums


def _mean(values: mx.array) -> float:
    return float(np.array(values).mean(dtype=np.float64))
