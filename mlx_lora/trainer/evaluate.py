"""Choose the held-out rows that a run validates on, and measure a loss without training: its mean, and whether a change could be chance.

A validation is a forward pass; a trained token costs two of them, because the backward pass through a frozen base takes
about as long again. So all validations of a run may take a fifth of its trained tokens, which is a tenth of its work, each
of them an equal part, and never more than about 25 batches. A run too short for that validates on a few rows all the same:
a loss over fewer says nothing. The rows are spaced evenly by length, and follow from settings and data alone. A checkpoint
has their number, so that a resumed run, with more steps too, measures the same rows again.

Rows differ far more from each other than a row differs before and after training, so two measurements are compared row by
row. The change of the mean loss per token is a ratio of sums over rows, because the tokens of one row are not independent.
utils/statistics.py has its interval, and docs/development/measured.md says how often it holds.

Shapes: R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, LoopSettings
from mlx_lora.data.dataset import EncodedSet, positions_by_example, spaced_by_length
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.trainer.guards import VALIDATED
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.statistics import ratio_error
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.objectives.base import BoundObjective, Objective, RunContext
    from mlx_lora.rollouts.rollout import HeldOutRollouts

    HeldOutBatches = BatchPlan | HeldOutRollouts

# Which rows

SHARE, SHARE_WORDS = 0.1, "a tenth"  # of the run's work, for all its validations together
PASSES_PER_STEP = 2  # forward passes that a trained token costs
FEWEST = 8  # examples of a validation
MOST_BATCHES = 25  # per validation


@dataclass(frozen=True)
class HeldOut:
    """What a run validates on.

    Attributes:
        plan: its batches; None: there is nothing to validate on.
        val_batches: how many of them, the first ones; None: all.
        examples, tokens: in one validation.
        times: validations in the run, the one before the first step included.
        words: for the run header; empty without validation.
        identity: what a checkpoint keeps.
    """

    plan: BatchPlan | None = None
    val_batches: int | None = None
    examples: int = 0
    tokens: int = 0
    times: int = 0
    words: str = ""
    identity: dict[str, Any] = field(default_factory=dict)


def choose_held_out(
    rows: EncodedSet | None,
    loop: LoopSettings,
    plan: BatchPlan,
    steps: int,
    identity: Mapping[str, Any] | None = None,
    updates: int = 1,
) -> HeldOut:
    """Choose the rows that the run validates on.

    Args:
        rows: held out; None or empty: nothing is.
        loop: of the run; --val-batches is obeyed if it is given.
        plan: of the rows to train on.
        steps: of the run.
        identity: of the checkpoint to go on from, whose rule is kept; None: the run begins.
        updates: steps on the same batches.
    """
    kept = None if identity is None else identity[VALIDATED]
    if rows is None or not rows.examples:
        return HeldOut(val_batches=loop.val_batches, identity={VALIDATED: kept or 0})
    every: Any = loop.steps_per_eval  # chosen by now (config/defaults.py)
    times, whole = validations(steps, every), held_out_plan(rows, loop)
    passes = steps * loop.grad_accumulation_steps / max(1, len(plan) * updates)
    trained_tokens = passes * int(positions_by_example(plan.rows).sum())
    count, why = _affordable(rows, whole, trained_tokens * SHARE * PASSES_PER_STEP / times)
    identity_now = {VALIDATED: count if identity is None else kept}
    batches = loop.val_batches
    if batches == 0:
        return HeldOut(val_batches=0, identity=identity_now)
    if batches is not None:
        why = f"--val-batches {batches}"
    elif kept and kept != count:
        count, why = min(kept, rows.examples), "as this run began"
    if batches is None and count < rows.examples:
        whole = held_out_plan(rows.select(spaced_by_length(rows, count)), loop)
    numbers = whole.examples_of(-1 if batches is None else batches)
    tokens = int(positions_by_example(whole.rows)[numbers].sum())
    unit = "row" if rows.group == 1 else "example"
    words = (
        f"Validation: {len(numbers):,} of {counted(rows.examples, f'held-out {unit}')} ({tokens:,} tokens), "
        f"{'before the first step and after the last' if times == 2 else f'{times:,} times'}: {why}"
    )
    return HeldOut(whole, batches, len(numbers), tokens, times, words, identity_now)


def held_out_plan(rows: EncodedSet, settings: LoopSettings) -> BatchPlan:
    """Plan the batches of a held-out set; the seed is fixed, so that every measurement uses the same batches."""
    from mlx_lora.data.sampler import BatchPlan  # the loop, which measures, plans nothing

    tokens = settings.batch_tokens or DEFAULT_BATCH_TOKENS
    return BatchPlan(rows, batch_tokens=tokens, batch_size=settings.batch_size, seed=0)


def measured_batches(objective: Objective, plan: BatchPlan) -> HeldOutBatches:
    """Return the batches of a plan, with sampled answers if the objective samples them."""
    return plan if objective.rollouts is None else objective.rollouts.held_out(plan)


def in_steps(loop: LoopSettings, steps: int, updates: int) -> LoopSettings:
    """Return the settings with intervals as whole steps; shares of the run are rounded up as in transformers, to whole rounds."""
    asked = {"steps_per_eval": loop.steps_per_eval, "save_every": loop.save_every}
    whole = {
        name: updates * math.ceil(value * steps / updates) if value < 1 else round(value)
        for name, value in asked.items()
        if value is not None
    }
    return replace(loop, **whole)


def validations(steps: int, every: int) -> int:
    """Return the number of validations of a run: before the first step, after every so many, and after the last."""
    return 2 + ((steps - 1) // every if every else 0)


def _affordable(rows: EncodedSet, whole: BatchPlan, budget: float) -> tuple[int, str]:
    """Return how many examples a budget of tokens allows, and what bounded them, in words."""
    costs, all_of_them = positions_by_example(rows), rows.examples
    most = all_of_them if len(whole) <= MOST_BATCHES else max(FEWEST, all_of_them * MOST_BATCHES // len(whole))
    least = min(FEWEST, all_of_them)
    by_mean = int(1.2 * budget / max(1.0, float(costs.mean()))) + 1  # a sample's rows may be shorter than the mean
    count = max(least, min(most, by_mean))
    while count > least and costs[spaced_by_length(rows, count)].sum() > budget:
        count -= 1
    if count == all_of_them:
        return count, "all of them"
    more = "; --val-batches -1 takes all"
    if count == most:
        return count, f"about {MOST_BATCHES} batches{more}"
    if costs[spaced_by_length(rows, count)].sum() > budget:
        return count, f"the fewest possible, though they take more than {SHARE_WORDS} of this short run's work{more}"
    return count, f"{SHARE_WORDS} of the run's work{more}"


def held_out_loss(ctx: RunContext, rows: EncodedSet) -> Measured:
    """Return the mean loss of the first --test-batches batches.

    Args:
        ctx: of the measurement; an adapter is on the base if one is measured.
        rows: to measure.
    """
    from mlx_lora.losses.agree import choose_loss  # a run has chosen its loss by then, and the loop needs none of it

    base, loop, objective, strategy = ctx.base, ctx.settings.loop, ctx.objective, ctx.strategy
    loss = choose_loss(base.model, base.config, loop.kernels, strategy=strategy)
    bound = objective.bind(ctx, loss, rows)
    plan = measured_batches(objective, held_out_plan(rows, loop))
    batches = strategy.held_out(plan, loop.test_batches)
    if strategy.ranks.size == 1:
        batches = tracked(batches, "Measuring", strategy.held_out_count(plan, loop.test_batches), "batches")
    return mean_loss(base.model, bound, batches, strategy)


# Mean loss


@dataclass(frozen=True)
class Measured:
    """A loss on data that are not trained on.

    Attributes:
        loss: mean over `count`; NaN without any.
        count: trained tokens, or examples if the objective's loss is a mean over examples.
        reports: the numbers that the objective reports, as means over `count`.
        rows: the loss of each row that the ranks measured, for a loss that is a mean over tokens; None: another loss.
        details: what was found besides numbers (`BoundObjective.details`).
    """

    loss: float
    count: int
    reports: dict[str, float] = field(default_factory=dict)
    rows: RowLosses | None = None
    details: dict[str, Any] = field(default_factory=dict)


def mean_loss(
    model: nn.Module, bound: BoundObjective, batches: Iterable[Batch], strategy: Strategy = SINGLE_DEVICE
) -> Measured:
    """Return the mean loss over the batches of all ranks, to each of which `batches` gives its own.

    Meanwhile, the model is in eval mode (no dropout), and long rows have attention in tiles.
    """
    training = model.training
    model.eval()
    try:
        with bound.loss.measuring(model):
            if bound.whole_set:
                loss, count, means = bound.whole_set(model, bound.arrays_of, batches, strategy)
                return Measured(loss, count, bound.finish(means) if count else {}, details=bound.details())
            sums, rows = mx.zeros((2 + len(bound.reports),)), []
            tokens = bound.loss.measure_tokens or bound.loss.tokens
            for part in (part for batch in batches for part in bound.prepare([batch], SINGLE_DEVICE)):
                arrays = bound.arrays_of(part)
                if bound.reports:
                    loss, count, reports = bound.loss.measure(model, arrays)
                    sums = sums + mx.stack([loss, count, *(reports[name] for name in bound.reports)])
                    mx.eval(sums)
                else:
                    losses = tokens(model, arrays)  # (P,)
                    sums = sums + mx.stack([losses.sum(), arrays["weights"].sum()])
                    mx.eval(sums, losses)
                    rows.append(of_batch(part, np.array(losses)))
            # Ranks finish at different times. On a GPU, the host must wait for the others, not the device: see
            # `SeveralRanks.sum`.
            total, count, *reported = strategy.ranks.sum(sums).tolist()
    finally:
        model.train(training)
    if not count:
        return Measured(math.nan, 0)
    if bound.reports:
        means = {name: value / count for name, value in zip(bound.reports, reported, strict=True)}
        return Measured(total / count, int(count), bound.finish(means))
    if strategy.ranks.size > 1:  # those of all ranks, in the order in which one process has them
        own = [[column.tolist() for column in part] for part in rows]
        told = [part for of_rank in strategy.ranks.everyone(own) for part in of_rank]
        rows = [(np.array(a, np.int64), np.array(b, np.float64), np.array(c, np.int64)) for a, b, c in told]
    numbers, losses, counts = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(numbers, kind="stable")
    return Measured(total / count, int(count), bound.finish({}), RowLosses(losses[order], counts[order]))


# Losses of single rows

SOUND_ROWS = 20  # from so many on, words have the interval, and a run is judged by it
FEWEST_ROWS = 3  # fewer give no interval that is worth a word


@dataclass(frozen=True)
class RowLosses:
    """The losses of the held-out rows in one validation.

    Attributes:
        sums: (R,) float64, nats: each row's loss, summed over its trained tokens; rows are in the order of their numbers.
        tokens: (R,) int64, the trained tokens of each row.
    """

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """The mean per token."""
        return float(self.sums.sum() / self.tokens.sum())


def of_batch(batch: Batch, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers, summed losses and trained tokens of a batch's rows; rows without a trained token are left out.

    Args:
        batch: of an encoded set.
        losses: (P,) nats, of its positions.
    """
    width, count = batch.inputs.shape[1], len(batch.inputs)
    owners, weights = batch.positions // width, batch.weights
    tokens = np.bincount(owners, weights, count)
    sums = np.bincount(owners, losses.astype(np.float64) * weights, count)
    numbers = np.arange(count) if batch.numbers is None else batch.numbers
    own = batch.real & (tokens > 0)
    return numbers[own], sums[own], tokens[own].astype(np.int64)


@dataclass(frozen=True)
class Change:
    """A change of the mean loss per token from one model to another, on the same rows.

    Attributes:
        change: nats; below 0 the second model is better.
        low, high: the ends of its 95% interval; infinite if there are too few rows for one.
        rows: how many.
        choices: the second model was chosen among so many by these rows, and the interval is wider for it.
    """

    change: float
    low: float
    high: float
    rows: int
    choices: int = 1

    @property
    def certain(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.low > 0 or self.high < 0

    def words(self) -> str:
        """Return the change of the perplexity: `35% lower (95% interval 31% to 39% lower, 24 rows)`; few rows have no interval."""
        ratio, low, high = (math.exp(min(nats, 700.0)) for nats in (self.change, self.low, self.high))
        words = f"{ratio:.3g} times as high" if ratio > 2 else _percent(ratio)
        if self.rows < SOUND_ROWS or not math.isfinite(self.low):
            return f"{words} ({counted(self.rows, 'row')})" if self.rows else words
        first, last = (high, low) if high <= 1 else (low, high)
        interval = f"{low:.3g} to {high:.3g} times" if ratio > 2 else f"{_percent(first)} to {_percent(last)}"
        if ratio <= 2 and (low <= 1) == (high <= 1):
            interval = f"{abs(1 - first):.0%} to {_percent(last)}"
        chosen = f" for the best of {self.choices} measurements" if self.choices > 1 else ""
        return f"{words} (95% interval {interval}{chosen}, {counted(self.rows, 'row')})"


def _percent(ratio: float) -> str:
    return f"{abs(1 - ratio):.0%} {'lower' if ratio <= 1 else 'higher'}"


def paired_change(before: RowLosses, after: RowLosses, choices: int = 1) -> Change:
    """Return the change of the mean loss from one measurement of some rows to another of the same rows; see `Change`."""
    differences, tokens, rows = after.sums - before.sums, after.tokens, len(after.tokens)
    change = float(differences.sum() / tokens.sum())
    half = math.inf if rows < FEWEST_ROWS else ratio_error(differences, tokens, choices)[1]
    return Change(change, change - half, change + half, rows, choices)
