"""Choose the held-out rows that a run validates on, and measure the loss of such rows.

A validation is a forward pass; a trained token costs two of them, because the backward pass through a frozen base takes
about as long again. So all validations of a run may take a fifth of its trained tokens, which is a tenth of its work, each
of them an equal part, and never more than about 25 batches. A run too short for that validates on a few rows all the same:
a loss over fewer says nothing. The rows are spaced evenly by length, and follow from settings and data alone. A checkpoint
has their number, so that a resumed run, with more steps too, measures the same rows again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, LoopSettings
from mlx_lora.data.dataset import EncodedSet, positions_by_example, spaced_by_length
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.trainer.evaluate import Measured, mean_loss
from mlx_lora.trainer.guards import VALIDATED
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.objectives.base import Objective, RunContext
    from mlx_lora.rollouts.rollout import HeldOutRollouts

    HeldOutBatches = BatchPlan | HeldOutRollouts

SHARE, SHARE_WORDS = 0.1, "a tenth"  # of the run's work, for all its validations together
PASSES_PER_STEP = 2  # forward passes that a trained token costs
FEWEST = 8  # examples
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
    tokens = settings.batch_tokens or DEFAULT_BATCH_TOKENS
    return BatchPlan(rows, batch_tokens=tokens, batch_size=settings.batch_size, seed=0)


def measured_batches(objective: Objective, plan: BatchPlan) -> HeldOutBatches:
    """Return the batches of a plan, with sampled answers if the objective samples them."""
    return plan if objective.rollouts is None else objective.rollouts.held_out(plan)


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
    base, loop, objective, strategy = ctx.base, ctx.settings.loop, ctx.objective, ctx.strategy
    loss = choose_loss(base.model, base.config, loop.kernels, strategy=strategy)
    bound = objective.bind(ctx, loss, rows)
    plan = measured_batches(objective, held_out_plan(rows, loop))
    batches = strategy.held_out(plan, loop.test_batches)
    if strategy.ranks.size == 1:
        batches = tracked(batches, "Measuring", strategy.held_out_count(plan, loop.test_batches), "batches")
    return mean_loss(base.model, bound, batches, strategy)
