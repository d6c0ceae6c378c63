"""Build a run that is ready for its first step: `build_run` adapts the base, fits the run in memory and makes the step.

What differs from one objective to another are calls of its methods, in the order of objectives/base.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_lora.adapters.qat import begin_qat, end_qat, is_rounded
from mlx_lora.data.sampler import total_steps
from mlx_lora.exporters.adapter_config import head_of
from mlx_lora.exporters.adapter_folder import read_adapter_config
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import assumed, exchanging
from mlx_lora.losses.agree import choose_compute, choose_step_variant
from mlx_lora.models.config import is_encoder
from mlx_lora.objectives.table import other_models_bytes
from mlx_lora.planner.fit import planned_words
from mlx_lora.trainer.adapter import about_head, adapt, first_qat_step
from mlx_lora.trainer.checkpoint import Checkpoint, take_first_ranks
from mlx_lora.trainer.evaluate import choose_held_out, in_steps, measured_batches
from mlx_lora.trainer.fit import fit_settings, shape_of, training_plan, with_examples
from mlx_lora.trainer.frozen_prefix import KeptTrunk, TrunkAsked, blocks_before, choose_trunk
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing, chunk_positions
from mlx_lora.trainer.guards import Position
from mlx_lora.trainer.header import choices, describe_run, shared_work
from mlx_lora.trainer.method_events import make_events, rates_of, restart_every, restart_warmup
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.run_folder import RunFolder, check_continuation, find_checkpoint, identity_of
from mlx_lora.trainer.step import Step, StepOptions
from mlx_lora.utils import device

if TYPE_CHECKING:
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.objectives.base import BoundObjective, RunContext
    from mlx_lora.trainer.evaluate import HeldOutBatches


@dataclass(frozen=True)
class BuiltRun:
    """A run that is ready for its first step.

    Attributes:
        ctx: with settings in which nothing is open, and the memory plan.
        folder: writes the results.
        bound: what step and validation take of the objective.
        plan, validation: the batches to train on, and the held-out ones.
        steps: of the whole run.
        found: the checkpoint to go on from, if there is one.
        words: lines for the run header; the last one, on what computes a step, is for --verbose.
        trunk: what it does with the output of its frozen blocks.
        test: the test set, with what the objective compares it with; None: there is none.
    """

    ctx: RunContext
    folder: RunFolder
    bound: BoundObjective
    plan: BatchPlan
    validation: HeldOutBatches | None
    steps: int
    found: Checkpoint | None
    words: list[str]
    trunk: KeptTrunk
    test: EncodedSet | None = None


def build_run(ctx: RunContext, data: DataSplits) -> BuiltRun:
    """Adapt the base, choose what the settings leave open, plan the batches and make the step.

    Args:
        ctx: with the settings as they were given, and a base without an adapter.
        data: as the objective read it.

    Raises:
        InputError: the adapter, a checkpoint or a rank does not belong to this run, or the machine cannot take it.
    """
    objective, base, strategy = ctx.objective, ctx.base, ctx.strategy
    sets = {name: rows for name, rows in data.sets.items() if name != "test" or ctx.settings.loop.test}
    data = replace(data, **objective.compare(ctx, sets))
    mx.random.seed(ctx.settings.loop.seed)
    adapted, info = adapt(ctx.settings, base, objective, data.chat_template)
    ctx.settings = strategy.divide(base, ctx.settings)
    found = find_checkpoint(ctx.settings.loop, strategy.ranks)
    asked, updates, ctx.resumed = ctx.settings, ctx.settings.objective.updates, found.identity if found else None
    if found and objective.head and strategy.ranks.leads:  # which writes the adapter, and has the checkpoint
        ctx.score_head = head_of(read_adapter_config(found.folder), found.folder)
    laid_out = objective.settle(ctx, data)
    ctx.settings = with_examples(ctx.settings, data.train)
    ctx.compute = ctx.compute or choose_compute(ctx.settings, base, data.train, strategy)
    # What this run's objective says of other models, because it knows its data and what it has loaded.
    shape = shape_of(asked, base, ctx.chosen, strategy)
    shape = replace(shape, beside_bytes=other_models_bytes(asked, objective))
    shape = shape if objective.pictures is None else objective.pictures.added_to(shape, asked, base.model)
    ctx.settings, ctx.memory = fit_settings(ctx.settings, shape, laid_out, ctx.chosen, strategy, ctx.resumed)
    epochs = found.identity["price_epochs"] if found else ctx.settings.loop.epochs or 1.0
    fingerprint = data.train.fingerprint  # of a text in each row, so that a run may be resumed whatever shares a row
    with _rounded_as_at_first(ctx, laid_out.train, epochs):
        data = objective.finish_data(ctx, data, shape)
    loop = ctx.settings.loop
    plan = training_plan(loop, data.train, epochs)
    steps, per_epoch = total_steps(plan, loop, updates), len(plan) * updates
    loop = in_steps(loop, steps, updates)
    held_out = choose_held_out(data.valid, loop, plan, steps, ctx.resumed, updates)
    ctx.settings = replace(ctx.settings, loop=replace(loop, val_batches=held_out.val_batches))
    device.compile_for(steps)
    identity = identity_of(ctx.settings, base.fingerprint, fingerprint, plan, epochs, updates)
    identity |= ctx.record.identity | held_out.identity
    passes = steps * loop.grad_accumulation_steps / per_epoch
    of_trunk = TrunkAsked(
        ctx.settings, base, plan, held_out.plan, passes, shape, strategy, blocks_before(found, loop.cache_trunk)
    )
    if found:
        free = {name: found.identity[name] for name in ctx.record.may_change & found.identity.keys()}
        check_continuation(found, identity | of_trunk.identity | free)
    step, bound, trunk, details, about = make_step(ctx, plan, steps, of_trunk)
    identity |= trunk.identity
    strategy.check_same(ctx.settings, identity | ctx.record.shared)
    take_first_ranks(strategy, step)
    about = [*about, *ctx.record.about, *shared_work(ctx, plan), trunk.words, strategy.words]
    chosen = choices(asked, ctx.settings, shape, data, steps, per_epoch / loop.grad_accumulation_steps)
    of_adapter, of_run, of_step = describe_run(ctx, adapted, plan, steps, details, about)
    words = list(filter(None, (of_adapter, *ctx.record.lines, *chosen, of_run, held_out.words, of_step)))
    at = found.position if found else Position()
    at.parts = max(at.parts, loop.batch_parts)
    folder = RunFolder(ctx.settings, info, identity, strategy, step, at, lambda: about_head(objective))
    validation = measured_batches(objective, held_out.plan) if held_out.plan is not None else None
    return BuiltRun(ctx, folder, bound, plan, validation, steps, found, words, trunk, data.test)


@contextmanager
def _rounded_as_at_first(ctx: RunContext, rows: EncodedSet, epochs: float) -> Iterator[None]:
    """Let a model that is the reference compute as at the first step: with --qat X it is not rounded there.

    Args:
        ctx: of the run.
        rows: that are trained on.
        epochs: see `training_plan`.
    """
    adapter, loop, asked, model = ctx.settings.adapter, ctx.settings.loop, ctx.settings.objective, ctx.base.model
    later = asked.row.reference and is_rounded(model) and adapter.qat < 1
    if later:
        later = bool(first_qat_step(adapter.qat, total_steps(training_plan(loop, rows, epochs), loop, asked.updates)))
    if later:
        end_qat(model)
    try:
        yield
    finally:
        if later:
            begin_qat(model)


def make_step(
    ctx: RunContext, plan: BatchPlan, steps: int, of_trunk: TrunkAsked
) -> tuple[Step, BoundObjective, KeptTrunk, list[str], list[str]]:
    """Apply the checkpointing, try the chosen loss and kernels on a few tokens, and create the compiled step.

    Returns:
        The step, what validations take of the objective, what is done with the output of frozen blocks, what computes the
        step, and what else the header says of the run.

    Raises:
        InputError: the model cannot be trained.
    """
    settings, objective, chosen, model = ctx.settings, ctx.objective, ctx.chosen, ctx.base.model
    adapter, loop, strategy = settings.adapter, settings.loop, ctx.strategy
    tape = apply_checkpointing(model, loop.grad_checkpoint)
    in_chunks = chunk_positions(model, ctx.base.config, loop.grad_checkpoint, plan.most_positions)
    attention = (tape.attend if tape else attend) if chosen.kernels else None
    with strategy.only_planned(model):
        variant = choose_step_variant(
            model,
            ctx.base.config,
            chosen.loss,
            attention,
            ctx.base.model_id,
            chosen.kernels or assumed,
            # The units of a divided base wait for one another, across what is compiled by itself.
            (objective.pictures is None or objective.pictures.compiles) and not strategy.divides_base,
        )
    strategy.end_of_trial(model)
    left_out = tape is not None and bool(tape.left_out)
    strategy.check_checkpointing(ctx.base.config, left_out)
    whole = objective.bind(ctx, variant.loss, plan.rows)
    trunk = choose_trunk(of_trunk, variant)  # after the checkpointing, whose blocks it wraps
    bound = trunk.under(whole, 0)
    options = StepOptions(
        exchanging(variant.attend, variant.choose),
        variant.compiled,
        wait=loop.short_buffers,
        rate_of=rates_of(adapter, objective.head.encoder_rate if objective.head and is_encoder(model) else 1.0),
        events=make_events(adapter, model, steps, loop.seed),
        prepare=lambda batches: bound.prepare(batches, strategy),
        arrays_of=bound.arrays_of,
        reports=bound.reports,
    )
    optimizer = build_optimizer(
        settings.optimizer, steps, restart_every(adapter, steps), restart_warmup(adapter, steps)
    )
    step = Step(model, optimizer, bound.loss.train, settings.optimizer.max_grad_norm, options, strategy)
    details = [bound.loss.description, chosen.words]
    details += ["blocks that share a state are not checkpointed"] if left_out else []
    about = [planned_words(ctx.memory)] if ctx.memory else []
    about += [f"checkpointing {loop.grad_checkpoint}", *in_chunks, *variant.notes]
    about += ["a pause after each micro-batch"] if loop.short_buffers else []
    about += [strategy.row_words] if strategy.row_words else []
    return step, trunk.under(whole, -1), trunk, details, about
