"""The loss of an objective over whole answers, from the losses of single tokens.

The fused head gives the loss of each trained position and its gradient in one forward pass; here positions are summed to
answers, and the answer's weight arrives at each position with the cotangent. So no objective needs logits, and a step's
memory is that of imitation.

Shapes: B rows, K rows per example, E examples, T columns, P positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batches import EMPTY, Batch, BatchPlan
from mlx_lora.data.encode import EncodedSet
from mlx_lora.objectives.objective import AnswerSums, Objective
from mlx_lora.system.distributed import ALONE, Ranks
from mlx_lora.training.losses import Arrays, Loss, LossFunction, TokenLosses

FIRST, SECOND = 0, 1  # rows of an example


class AnswerArrays(NamedTuple):
    """What an objective needs of a batch beside `Arrays`, on the device.

    Attributes:
        answers: (P,) float32, 1 where a position belongs to an answer.
        labels, reference, real: (B,) float32, see `AnswerSums`.
        shares: (2,) float32, the factor on the likelihood and the divergence.
    """

    answers: mx.array
    labels: mx.array
    reference: mx.array
    real: mx.array
    shares: mx.array

    @classmethod
    def of(cls, batch: Batch) -> AnswerArrays:
        """Copy a batch's to the device."""
        rows = len(batch.inputs)
        answers = batch.weights
        if batch.answers is not None:
            answers = batch.answers.ravel()[batch.positions] * batch.weights
        zeros = np.zeros(rows, np.float32)
        return cls(
            mx.array(answers.astype(np.float32)),
            mx.array(zeros if batch.labels is None else batch.labels),
            mx.array(zeros if batch.reference is None else batch.reference),
            mx.array((batch_numbers(batch) != EMPTY).astype(np.float32)),
            mx.array(np.array(batch.shares or (0.0, 0.0), np.float32)),
        )


def batch_numbers(batch: Batch) -> np.ndarray:
    """Return the rows' numbers in the encoded set, (B,); of a batch that is from none, all rows count."""
    return np.arange(len(batch.inputs)) if batch.numbers is None else batch.numbers


def example_count(batch: Batch) -> int:
    """Return the number of examples in a batch: rows, pairs or rated answers, without padding."""
    return int((batch_numbers(batch) != EMPTY).sum()) // batch.group


def arrays_of(batch: Batch) -> tuple[mx.array, ...]:
    """Return all arrays of a batch of answers."""
    return (*Arrays.of(batch), *AnswerArrays.of(batch))


def answer_sums(losses: mx.array, width: int, arrays: Arrays, answers: AnswerArrays) -> AnswerSums:
    """Sum the losses of positions, (P,), to rows, (B,)."""
    rows = arrays.positions // width  # (P,)
    own = rows[None, :] == mx.arange(len(answers.real))[:, None]  # (B, P)

    def by_row(values: mx.array) -> mx.array:
        return mx.where(own, values[None, :], 0.0).sum(axis=1)

    logps, tokens = by_row(-losses * answers.answers), by_row(answers.answers)
    likelihood = by_row(losses * arrays.weights) * answers.shares[0]
    return AnswerSums(
        logps, tokens, likelihood, answers.reference, answers.labels, answers.real, mx.stop_gradient(answers.shares[1])
    )


@dataclass(frozen=True)
class Task:
    """What a step and a validation take of a run's objective.

    Attributes:
        loss: sum and count over what the objective's loss is a mean over.
        arrays_of: the loss's arguments for a batch.
        prepare: brings all batches of a step into the form that the loss takes.
        reports: names of the sums that the loss returns beside its own.
        finish: see `Objective`.
    """

    loss: Loss
    arrays_of: Callable[[Batch], tuple[mx.array, ...]] = Arrays.of
    prepare: Callable[[list[Batch], Ranks], list[Batch]] = lambda batches, ranks: batches
    reports: tuple[str, ...] = ()
    finish: Callable[[dict[str, float]], dict[str, float]] = dict


def task_of(objective: Objective, loss: Loss, model: nn.Module) -> Task:
    """Return the task of an objective on a model.

    Args:
        objective: its loss is of answers, or None for imitation.
        loss: of tokens; its kernels stay.
        model: trained or measured.
    """
    of_answers = objective.loss
    if of_answers is None:
        return Task(loss)
    group = 1 if objective.records == "rated" else 2
    measure_tokens = loss.measure_tokens or loss.tokens

    def of(tokens: TokenLosses) -> LossFunction:
        def summed(model: nn.Module, *batch: mx.array) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            arrays, answers = Arrays(*batch[:5]), AnswerArrays(*batch[5:])
            sums = answer_sums(tokens(model, *arrays), arrays.inputs.shape[1], arrays, answers)
            losses, reports = of_answers(sums)  # (E,)
            real = sums.real[::group]
            return (losses * real).sum(), real.sum(), {name: (r * real).sum() for name, r in reports.items()}

        return summed

    def prepare(batches: list[Batch], ranks: Ranks) -> list[Batch]:
        return _prepared(objective, measure_tokens, model, batches, ranks)

    words = f"{objective.description}; {loss.description}"
    whole = replace(loss, train=of(loss.tokens), measure=of(measure_tokens), description=words)
    return Task(whole, arrays_of, prepare, objective.reports, objective.finish)


def _prepared(
    objective: Objective, measure_tokens: TokenLosses, model: nn.Module, batches: list[Batch], ranks: Ranks
) -> list[Batch]:
    """Set what depends on the whole step, so that parts of it and ranks give the sums of the whole.

    That is the factor that makes the likelihood a mean over the step's tokens, and the divergence, for which rated
    answers have a second row. All ranks get the same numbers.
    """
    share = divergence = 0.0
    if objective.likelihood != "none":
        examples = sum(example_count(b) for b in batches)
        tokens = sum(int(b.mask[FIRST :: b.group].sum()) for b in batches)
        share = examples / max(1, tokens)
    if objective.divergence:
        others = (_only(batch, SECOND) for batch in batches)
        divergence = mean_log_ratio(model, measure_tokens, others, ranks)
    if objective.records == "rated":
        batches = [_only(batch, FIRST) for batch in batches]
    return [replace(batch, shares=(share, divergence)) for batch in batches]


def _only(batch: Batch, row: int) -> Batch:
    """Return a batch of each example's row `row` alone."""
    rows = np.arange(row, len(batch.inputs), batch.group)
    # The whole batch's slots: how many this row's targets need differs from deal to deal.
    slots = min(len(batch.positions), batch.mask[rows].size)
    return batch.take(rows, slots, batch.real_tokens if row == FIRST else 0, group=1)


def mean_log_ratio(model: nn.Module, tokens: TokenLosses, batches: Iterable[Batch], ranks: Ranks = ALONE) -> float:
    """Return the mean log-ratio of policy to reference over rows, at least 0 (KTO's estimate of the divergence)."""
    total, count = mx.array(0.0), mx.array(0.0)
    training = model.training
    model.eval()
    for number, batch in enumerate(batches):
        if number % ranks.size != ranks.rank:
            continue
        sums = _sums(model, tokens, batch)
        total = total + ((sums.logps - sums.reference) * sums.real).sum()
        count = count + sums.real.sum()
        mx.eval(total, count)
    total, count = ranks.sum(mx.stack([total, count]))
    model.train(training)
    return max(0.0, total.item() / count.item()) if count.item() else 0.0


def row_log_probabilities(
    model: nn.Module,
    tokens: TokenLosses,
    rows: EncodedSet,
    batch_tokens: int,
    say: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """Return the log-probability of each row's answer, (R,) float32.

    Args:
        model: put in eval mode for it, and back afterwards.
        tokens: losses of tokens, without a gradient.
        rows: whose answers.
        batch_tokens: of a batch.
        say: takes the number of rows done after each batch.
    """
    found = np.zeros(len(rows), np.float32)
    training, done = model.training, 0
    model.eval()
    for batch in BatchPlan(rows.grouped(1), batch_tokens=batch_tokens, batch_size=None, seed=0).batches():
        logps = np.array(_sums(model, tokens, batch).logps)
        numbers = batch_numbers(batch)
        real = numbers != EMPTY
        found[numbers[real]] = logps[real]
        done += int(real.sum())
        say(done)
    model.train(training)
    if not np.isfinite(found).all():
        bad = int(np.flatnonzero(~np.isfinite(found))[0])
        raise ArithmeticError(f"row {bad}: its log-probability under the reference is {found[bad]}")
    return found


def _sums(model: nn.Module, tokens: TokenLosses, batch: Batch) -> AnswerSums:
    arrays, answers = Arrays.of(batch), AnswerArrays.of(batch)
    return answer_sums(tokens(model, *arrays), arrays.inputs.shape[1], arrays, answers)
