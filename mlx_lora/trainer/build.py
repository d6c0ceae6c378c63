"""Build a run that is ready for its first step: `compose` takes the settings and does everything else in order.

It adapts the base, chooses loss, kernels and layout of rows, fits the run in memory, plans the batches, and makes the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.adapters.inject import Adapted, adapt_model
from mlx_lora.config.defaults import chosen_words, length_problem, rate_problem, with_learning_rate, with_length
from mlx_lora.config.settings import DataSettings, LoopSettings, TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, put_start, read_adapter_config, read_start
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.measure import MLX
from mlx_lora.kernels.table import AUTO, OURS, KernelChoice, assumed, choose_model_kernels
from mlx_lora.losses.check import check_kernels, choose_loss
from mlx_lora.losses.cross_entropy import PLAIN_LOGITS, Loss
from mlx_lora.models.head import SCORE_WEIGHT, put_score_head
from mlx_lora.models.load import Base
from mlx_lora.models.meta import model_shape
from mlx_lora.models.prefix_attention import rotate_by_token
from mlx_lora.objectives.answer_logps import with_reference
from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.distill import Scorer, Taught, with_teacher
from mlx_lora.objectives.policy_task import at_temperature
from mlx_lora.objectives.prefix_sharing import joined, layout_problem, sharing_problem
from mlx_lora.objectives.row_layout import Layout, asked_before, shared_layout, that_fits
from mlx_lora.objectives.sft import loss_of_plan
from mlx_lora.objectives.table import objective_of
from mlx_lora.objectives.task import Task, task_of
from mlx_lora.parallel.agreement import check_one_run, take_first_ranks
from mlx_lora.parallel.ranks import Ranks
from mlx_lora.parallel.sharded_base import end_of_trial
from mlx_lora.parallel.strategy import called_together, sharing_of
from mlx_lora.parallel.tensor import is_cut, row_ranks
from mlx_lora.planner.fit import planned_words
from mlx_lora.planner.memory import MemoryPlan
from mlx_lora.planner.shapes import KernelTerms, ModelShape
from mlx_lora.rollouts.decode import kept_form
from mlx_lora.rollouts.rewards import Reward, reward_files
from mlx_lora.rollouts.rollout import AnyPlan
from mlx_lora.rollouts.sampled_answers import answered_by, answering_of, form_of, shared_words
from mlx_lora.trainer.checkpoint import Checkpoint, Position
from mlx_lora.trainer.evaluate import choose_held_out
from mlx_lora.trainer.fit import SharedBase, check_blocks_are_apart, data_facts, fit_run, share_among, training_plan
from mlx_lora.trainer.frozen_prefix import KeptTrunk, TrunkAsked, blocks_before, choose_trunk
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing
from mlx_lora.trainer.header import describe_run
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.run_folder import RunFolder, check_continuation, find_checkpoint, identity_of
from mlx_lora.trainer.schedules import make_events, rates_of, restart_every, restart_warmup
from mlx_lora.trainer.step import Step
from mlx_lora.trainer.step_variant import choose_step_variant
from mlx_lora.trainer.trainer import total_steps
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError


@dataclass(frozen=True)
class Composed:
    """A run that is ready for its first step.

    Attributes:
        folder: writes the results; its settings are the run's own, in which nothing is open.
        task: what step and validation take of the objective.
        plan, validation: the batches to train on, and the held-out ones.
        steps: of the whole run.
        found: the checkpoint to go on from, if there is one.
        memory: the plan.
        words: lines for the run header; the last one, on what computes a step, is for --verbose.
        trunk: what it does with the output of its frozen blocks.
        test: the test set, with what the objective compares it with; None: there is none.
        scorer: the teacher of sampled answers, which stays in memory; None: there is none.
    """

    folder: RunFolder
    task: Task
    plan: AnyPlan
    validation: AnyPlan | None
    steps: int
    found: Checkpoint | None
    memory: MemoryPlan
    words: list[str]
    trunk: KeptTrunk
    test: EncodedSet | None = None
    scorer: Scorer | None = None


def compose(
    asked: TrainSettings, base: Base, splits: DataSplits, ranks: Ranks, rewards: Sequence[Reward] = (),
) -> Composed:  # fmt: skip
    """Adapt the base, choose what the settings leave open, plan the batches and make the step.

    Args:
        asked: settings as they were given.
        base: a loaded model; gets adapter layers.
        splits, ranks, rewards: the data, the processes of the run, and what rewards sampled answers.

    Raises:
        InputError: the adapter, a checkpoint or a rank does not belong to this run, or the machine cannot take it.
    """
    objective = objective_of(asked.objective)
    taught = compared_with(asked, base, splits.sets, ranks)
    splits = replace(splits, **taught.sets)
    mx.random.seed(asked.loop.seed)
    adapted, info = adapt(asked, base, splits.chat_template)
    asked, shared = share_among(asked, base, ranks)
    found = find_checkpoint(asked.loop, ranks)
    chosen, layout = choose_layout(asked, base, splits.train, objective, found)
    shape = shape_of(asked, base, chosen, shared)
    begun = found.identity if found else None
    settings, memory = fit_settings(layout.settled(asked), shape, layout.of(splits), chosen, shared, ranks, begun)
    layout, memory = that_fits(layout, settings, shape, splits.train, chosen.terms, memory)
    if objective.reference and splits.train.reference is None:
        of = chosen.loss, chosen.kernels  # in batches that fit, so that its peak is below a step's
        splits = splits.changed(lambda sets: with_reference(settings, base, sets, ranks, *of))
    fingerprint = splits.train.fingerprint  # of the rows apart, so that a run may be resumed whatever shares a row
    splits = layout.of(splits)
    loop = settings.loop
    epochs = found.identity["price_epochs"] if found else loop.epochs or 1.0
    form, memory = form_of(settings, base, memory, ranks, found.identity if found else None)
    answering = answering_of(settings, base, objective, chosen.loss, rewards, form, taught.scorer, layout.joining)
    plan: Any = answered_by(answering, training_plan(loop, splits.train, epochs), ranks=ranks)
    steps = total_steps(plan, loop)
    held_out = choose_held_out(splits.valid, loop, plan, steps, found.identity if found else None)
    validation: Any = answered_by(answering, held_out.plan, held_out=True)
    settings = replace(settings, loop=replace(loop, val_batches=held_out.val_batches))
    device.compile_for(steps)
    identity = identity_of(settings, base.fingerprint, fingerprint, plan, epochs)
    identity |= layout.identity | held_out.identity | taught.identity
    passes = steps * loop.grad_accumulation_steps / len(plan)
    of_trunk = TrunkAsked(settings, base, plan, validation, passes, ranks, blocks_before(found, loop.cache_trunk))
    if found:
        check_continuation(found, identity | of_trunk.identity | kept_form(found.identity))
    step, task, trunk, details, about = make_step(settings, base, chosen, objective, memory, steps, of_trunk)
    identity |= trunk.identity
    if answering is not None:
        task, identity = answering.reported(task), identity | form.identity
        about += [form.describe(), *shared_words(plan, loop.grad_accumulation_steps, ranks)]
    about = [words for words in (*about, layout.words, trunk.words, shared.words) if words]
    check_one_run(ranks, settings, identity | reward_files(settings.objective))
    take_first_ranks(ranks, step)
    at = beginning(found, loop)
    first, *rest = describe_run(settings, base, adapted, plan, steps, details, about, held_out.words)
    words = [first, *filter(None, [taught.words, *choices(asked, settings, shape, splits, plan, steps)]), *rest]
    folder = RunFolder(settings, info, identity, ranks, step, at)
    return Composed(folder, task, plan, validation, steps, found, memory, words, trunk, splits.test, taught.scorer)


def beginning(found: Checkpoint | None, loop: LoopSettings) -> Position:
    """Return where the run goes on, or begins, in at least as many parts of a batch as are asked for."""
    at = found.position if found else Position()
    at.parts = max(at.parts, loop.batch_parts)
    return at


def compared_with(settings: TrainSettings, base: Base, sets: dict[str, EncodedSet], ranks: Ranks) -> Taught:
    """Return the sets with what another adapter as the reference, or a teacher, says about their rows.

    Args:
        settings, ranks: as in `compose`.
        base: not yet adapted: it may be the teacher, and the reference's adapter is put on it and taken off again.
        sets: name -> rows; `test` is left out without --test.
    """
    sets = {name: rows for name, rows in sets.items() if name != "test" or settings.loop.test}
    if objective_of(settings.objective).reference and settings.objective.reference_adapter:
        sets = with_reference(settings, base, sets, ranks)
    return with_teacher(settings, base, sets, ranks)


def adapt(settings: TrainSettings, base: Base, chat_template: str | None) -> tuple[Adapted, AdapterInfo]:
    """Adapt the base, and return the facts about the adapter.

    Args:
        settings: of the run.
        base: gets adapter layers.
        chat_template: that the data were rendered with; kept with the adapter when it is not the model's own, so that
            generate renders prompts the same way.
    """
    own_template = chat_template == base.hf_tokenizer.chat_template
    adapter = settings.adapter
    scores = objective_of(settings.objective).scores
    start = read_start(base, adapter.resume_adapter_file, scores) if adapter.resume_adapter_file else None
    adapted, full = adapt_model(base.model, adapter, settings.loop.seed), ()
    if scores:
        put_score_head(base.model, base.config, settings.loop.seed)
        full = (SCORE_WEIGHT,)
    if start:
        put_start(base.model, start, full)
    return adapted, AdapterInfo(
        method=adapter.method,
        rank=adapted.rank,
        alpha=adapter.alpha,
        scale=adapted.scale,
        dropout=adapter.dropout,
        num_layers=adapted.targets.num_layers,
        keys=adapted.targets.keys,
        base_model=base.model_id,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        chat_template=None if own_template else chat_template,
        full=adapted.full + full,
    )


@dataclass(frozen=True)
class LossAndKernels:
    """What computes a run's numbers.

    Attributes:
        loss: of the supervised positions.
        kernels: of the model's layers; None: its own.
        terms: their memory, for the planner.
        words: on the kernels, for the run header.
    """

    loss: Loss
    kernels: KernelChoice | None
    terms: KernelTerms
    words: str


def choose_layout(
    settings: TrainSettings,
    base: Base,
    rows: EncodedSet,
    objective: Objective,
    found: Checkpoint | None,
) -> tuple[LossAndKernels, Layout]:
    """Choose loss and kernels, and whether a prompt is computed once for its answers.

    Args:
        settings, base: as in `compose`.
        rows: to train on, apart.
        objective: of the run.
        found: a checkpoint to go on from, whose layout is kept.

    Raises:
        InputError: --shared-prefix asks for what the model or the checkpoint does not allow.
    """
    asked = settings.objective.shared_prefix
    if found is not None:
        before = asked_before(found.identity)
        if asked not in (before, "auto"):
            raise InputError(f"--shared-prefix {asked}: the run that you resume has it {before}; leave the flag out")
        asked = before
    sampled = objective.policy is not None
    if objective.records != "pairs" and not sampled:
        return choose_loss_and_kernels(settings, base, rows, found), Layout()
    shape = model_shape(base.model, base.config)
    problem = layout_problem(asked, base.model, shape, rows)
    # Sampled answers may be shorter than their room, so that sharing saves more work than is known here.
    little = problem if sampled and asked == "auto" and layout_problem("on", base.model, shape, rows) is None else None
    if problem is None or little is not None:
        planned, also = (joined(rows), None) if little is None else (rows, joined(rows))
        rotate_by_token(base.model)  # before kernels are recorded on such rows
        chosen = choose_loss_and_kernels(settings, base, planned, found, also)
        problem = sharing_problem(base.model, base.config, chosen.loss, chosen.kernels)
        if problem is None:
            return chosen, shared_layout(objective, shape, rows, little)
    if asked == "on":
        raise InputError(f"--shared-prefix on: {problem}; leave the flag out")
    words = f"{'a row for each answer' if sampled else 'separate rows for both answers'} ({problem})"
    return choose_loss_and_kernels(settings, base, rows, found), Layout(words=words)


def choose_loss_and_kernels(
    settings: TrainSettings,
    base: Base,
    rows: EncodedSet,
    found: Checkpoint | None,
    joined_too: EncodedSet | None = None,
) -> LossAndKernels:
    """Choose loss and kernels: the best that were measured here, and that agree with the model's own on this model.

    Args:
        settings: of the run.
        base: adapted.
        rows: training data, whose lengths the kernels are chosen for.
        found: a checkpoint to go on from.
        joined_too: the same rows joined, if some batches will be.
    """
    asked = settings.loop.kernels
    loss = choose_loss(base.model, base.config, asked, measure=True)
    dtype = device.compute_dtype(settings.model.dtype)
    if asked == AUTO and called_together(base.model):
        asked = OURS  # what one rank measures, another might not
    rows_of = {one.starts is not None: one for one in (rows, joined_too) if one is not None}
    lengths = {shared: sorted({max(1, int(n) - 1) for n in one.lengths}) for shared, one in rows_of.items()}
    choice = choose_model_kernels(base.model, lengths.get(False, []), asked, dtype, lengths.get(True, []))
    kernels, words = check_kernels(base.model, base.config, loss, choice)
    terms = replace((kernels or choice.of_mlx()).terms(), loss=loss.kernel)
    return LossAndKernels(loss, kernels, terms, words)


def shape_of(asked: TrainSettings, base: Base, chosen: LossAndKernels, shared: SharedBase) -> ModelShape:
    """Return the shape of the adapted model, or of this rank's part of it, with the memory of what was chosen."""
    kernels = chosen.kernels or KernelChoice(MLX)
    shape = shared.shape(asked, base, kernels)
    shape = replace(shape, plain_loss=chosen.loss.kernel == PLAIN_LOGITS)  # then the logits are whole
    if not chosen.loss.part_of_last:
        shape = replace(shape, blocks=tuple(replace(block, at_one=None) for block in shape.blocks))
    return shape


def fit_settings(
    asked: TrainSettings,
    shape: ModelShape,
    splits: DataSplits,
    chosen: LossAndKernels,
    shared: SharedBase,
    ranks: Ranks,
    begun: Mapping[str, Any] | None = None,
) -> tuple[TrainSettings, MemoryPlan]:
    """Return the settings with everything chosen that was open, and the memory that the run needs.

    Args:
        asked: the settings as given.
        shape, splits, chosen, shared, ranks: of the run.
        begun: the identity of the checkpoint to go on from, whose choices are kept; None: the run begins.

    Raises:
        InputError: the run does not fit.
    """
    asked = with_learning_rate(as_begun(asked, begun), shape.model_type, shape.width)
    dealt_to = 1 if shared.cut_by > 1 else ranks.size  # ranks with parts of layers all compute every row
    facts = data_facts(splits.train, splits.valid)
    fitted = fit_run(asked, shape, splits.train, chosen.terms, dealt_to, facts)
    asked = with_length(asked, fitted.batch_tokens, facts, begun["price_epochs"] if begun else None)
    day = splits.chat_day.isoformat() if splits.chat_day else None  # the same one with --resume on another day
    checkpointing = shared.checkpointing(fitted.checkpointing, ranks)
    loop = replace(asked.loop, grad_checkpoint=checkpointing)
    return replace(asked, data=replace(asked.data, chat_date=day), loop=loop), fitted.memory


def as_begun(asked: TrainSettings, begun: Mapping[str, Any] | None) -> TrainSettings:
    """Return the settings with the rate and the batch that the run was begun with, where they are open."""
    if begun is None:
        return asked
    rate, tokens = asked.optimizer.learning_rate, asked.loop.batch_tokens
    optimizer = replace(asked.optimizer, learning_rate=begun.get("learning_rate") if rate is None else rate)
    loop = replace(asked.loop, batch_tokens=begun.get("batch_tokens") if tokens is None else tokens)
    return replace(asked, optimizer=optimizer, loop=loop)


def choices(
    asked: TrainSettings, settings: TrainSettings, shape: ModelShape, splits: DataSplits, plan: AnyPlan, steps: int
) -> list[str]:
    """Return lines on what was chosen for this model and data, and warnings of what was given; some are empty.

    Args:
        asked, settings: before and after everything was chosen.
        shape, splits, plan, steps: of the run.
    """
    facts, per_epoch = data_facts(splits.train, splits.valid), len(plan) / settings.loop.grad_accumulation_steps
    return [
        chosen_words(asked, settings, f"{shape.model_type} of width {shape.width:,}", facts, steps),
        *(
            f"Warning: {problem}."
            for problem in (
                rate_problem(asked, shape.model_type, shape.width),
                length_problem(asked, steps, per_epoch),
            )
            if problem
        ),
    ]


def make_step(
    settings: TrainSettings,
    base: Base,
    chosen: LossAndKernels,
    objective: Objective,
    memory: MemoryPlan,
    steps: int,
    of_trunk: TrunkAsked,
) -> tuple[Step, Task, KeptTrunk, list[str], list[str]]:
    """Apply the checkpointing, try the chosen loss and kernels on a few tokens, and create the compiled step.

    Returns:
        The step, what validations take of the objective, what is done with the output of frozen blocks, what computes the
        step, and what else the header says of the run.

    Raises:
        InputError: the model cannot be trained.
    """
    adapter, loop, model, ranks = settings.adapter, settings.loop, base.model, of_trunk.ranks
    tape = apply_checkpointing(model, loop.grad_checkpoint)
    attention = (tape.attend if tape else attend) if chosen.kernels else None
    variant = choose_step_variant(
        model, base.config, chosen.loss, attention, base.model_id, chosen.kernels or assumed, not called_together(model)
    )
    end_of_trial(model)
    check_blocks_are_apart(base, tape)
    loss = variant.loss
    if objective.policy is not None:
        loss = at_temperature(loss, model, base.config, settings.objective.temp)
    loss = loss_of_plan(objective, loss, base, of_trunk.plan)
    whole = task_of(objective, loss, model)
    trunk = choose_trunk(of_trunk, variant, objective)  # after the checkpointing, whose blocks it wraps
    task = trunk.for_steps(whole)
    step = Step(
        model,
        build_optimizer(settings.optimizer, steps, restart_every(adapter, steps), restart_warmup(adapter, steps)),
        task.loss.train,
        settings.optimizer.max_grad_norm,
        variant.attend,
        wait=loop.short_buffers,
        rate_of=rates_of(adapter),
        events=make_events(adapter, model, steps, loop.seed),
        sharing=sharing_of(model, ranks, loop.seed),
        compiled=variant.compiled,
        choose=variant.choose,
        prepare=lambda batches: task.prepare(batches, row_ranks(model, ranks)),
        arrays_of=task.arrays_of,
        reports=task.reports,
    )
    details = [task.loss.description, chosen.words]
    details += ["blocks that share a state are not checkpointed"] if tape is not None and tape.left_out else []
    about = [planned_words(memory), f"checkpointing {loop.grad_checkpoint}", *variant.notes]
    about += ["a pause after each micro-batch"] if loop.short_buffers else []
    about += [f"rows shared by {ranks.size} processes"] if ranks.size > 1 and not is_cut(model) else []
    return step, trunk.for_validation(whole), trunk, details, about


# Adapters that were trained before


def put_adapter(
    base: Base, folder: Path, data: DataSettings, objective: Objective, ignore_fingerprint: bool = False
) -> None:
    """Put a trained adapter on the base, and its chat template on the tokenizer unless the settings name another.

    Raises:
        InputError: the adapter cannot be read, or does not fit the base.
    """
    template = load_adapter(base, folder, ignore_fingerprint, objective.scores).chat_template
    if template and not data.chat_template:
        base.hf_tokenizer.chat_template = template


def adapter_template(folder: Path | None) -> str | None:
    """Return the chat template that an adapter was trained with, None where it is the model's own."""
    own = read_adapter_config(folder).get("mlx_lora") if folder else None
    return own.get("chat_template") if isinstance(own, dict) else None
