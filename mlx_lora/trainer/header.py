"""The lines that a run prints before its first step and after its last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import Adapted, adapter_parameters, starting_rank
from mlx_lora.config.defaults import chosen_words, length_problem, rate_problem
from mlx_lora.config.fields import flag_of
from mlx_lora.config.settings import FIELDS
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE
from mlx_lora.trainer.fit import data_facts
from mlx_lora.trainer.guards import LOSS, score_words
from mlx_lora.trainer.method_events import restart_every
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.utils import console
from mlx_lora.utils.text import command_line, counted, words_of

if TYPE_CHECKING:
    from mlx_lora.config.settings import AdapterSettings, LoopSettings, TrainSettings
    from mlx_lora.data.load import DataSplits
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.objectives.base import RunContext
    from mlx_lora.planner.memory import ModelShape
    from mlx_lora.trainer.evaluate import Measured
    from mlx_lora.trainer.trainer import Outcome


def describe_method(adapter: AdapterSettings, steps: int) -> str:
    """Return the method and its own numbers, for the run header."""
    if adapter.method == "full":
        idle = [flag_of(name) for name in ("rank", "alpha") if getattr(adapter, name) != FIELDS[name].default]
        return f"full ({' and '.join(idle)} without effect)" if idle else "full"
    words = f"{adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g}"
    if adapter.method == "adalora":
        words += f", from rank {starting_rank(adapter)} down"
    if adapter.method == "relora":
        words += f", a restart every {restart_every(adapter, steps)} steps"
    return words


def choices(
    asked: TrainSettings, settings: TrainSettings, shape: ModelShape, data: DataSplits, steps: int, per_epoch: float
) -> list[str]:
    """Return lines on what was chosen for this model and data, and warnings of what was given; some are empty.

    Args:
        asked, settings: before and after everything was chosen.
        shape, data, steps: of the run.
        per_epoch: steps of an epoch.
    """
    facts = data_facts(data.train, data.valid)
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


def shared_work(ctx: RunContext, plan: BatchPlan) -> list[str]:
    """Return what the header says of examples that are compared within a step, and of processes that sample answers together."""
    asked, a_step, ranks = ctx.settings.objective, ctx.settings.loop.grad_accumulation_steps, ctx.strategy.ranks
    examples = [a_step * rows // plan.rows.group for rows, _, _ in plan.shapes]
    if asked.row.examples_per_step:
        return [f"up to {counted(max(examples), 'example')} in a step, which are compared with one another"]
    if not asked.samples or ranks.size == 1:
        return []
    words, waiting = f"prompts answered by {ranks.size} processes", ranks.size - min(examples)
    if waiting > 0:
        words += (
            f", of which {counted(waiting, 'one')} may wait, because a step can have only "
            f"{counted(min(examples), 'prompt')}; raise --batch-size or --grad-accumulation-steps"
        )
    return [words]


def describe_run(
    ctx: RunContext, adapted: Adapted, plan: BatchPlan, steps: int, details: list[str], about: list[str]
) -> tuple[str, str, str]:
    """Return three lines on what will be trained: the adapter, the run, and what computes a step.

    Args:
        ctx, adapted, plan, steps: of the run.
        details: of what computes a step.
        about: more on the run; some are empty.
    """
    base, settings, epoch_batches = ctx.base, ctx.settings, len(plan) * ctx.settings.objective.updates
    trainable = sum(p.size for p in adapter_parameters(base.model).values())
    total = sum(p.size for _, p in tree_flatten(base.model.parameters()))
    adapter, optimizer = settings.adapter, settings.optimizer
    names = ", ".join(dict.fromkeys(key.rsplit(".", 1)[-1] for key in adapted.targets.keys))
    what = (
        f"Adapter: {describe_method(adapter, steps)}, "
        f"{counted(len(adapted.targets.paths), 'layer')} ({names}), {trainable:,} trainable parameters, {trainable * 4 / 1e6:.1f} MB"
        + (f" ({trainable / total:.2%} of what is in memory)" if not base.quantization else "")
    )
    run = (
        f"Run: {counted(steps, 'step')}, {counted(epoch_batches, 'batch', 'batches')} per epoch, {optimizer.optimizer}, lr {optimizer.learning_rate:g} "
        f"{optimizer.lr_schedule}, warm-up {optimizer.warmup:g}, clip {optimizer.max_grad_norm:g}, seed {settings.loop.seed}; {'; '.join(filter(None, about))}"
    )
    details = [*details, counted(len(plan.shapes), "batch shape"), f"{plan.padding_fraction:.1%} padding"]
    return what, run, "Step: " + "; ".join([*details, *base.matmul_paths.describe()])


def loss_words(measured: Measured) -> str:
    """Write a loss on data that were not trained on."""
    if measured.reports:
        known = [(name, value) for name, value in measured.reports.items() if not math.isnan(value)]
        reports = ", ".join(f"{words_of(name)} {value:.4f}" for name, value in known)
        of_tokens = "kl" in measured.reports and "reward" not in measured.reports
        unit = "supervised tokens" if of_tokens else "examples"
        return f"loss {measured.loss:.4f}, {reports}, over {measured.count} {unit}"
    perplexity = console.perplexity(measured.loss)
    return f"loss {measured.loss:.4f}, perplexity {perplexity:.3f}, {measured.count} supervised tokens"


def outcome_line(loop: LoopSettings, outcome: Outcome, best: str | None, rewarded: bool = False) -> str:
    """Return a run's outcome and folder, in one line.

    Args:
        loop: the run's settings.
        outcome: how it ended.
        best: words on the adapter that --keep-best restored.
        rewarded: whether the validation gives minus a mean reward instead of a loss.
    """
    folder = Path(loop.adapter_path)
    file = folder / WEIGHTS_FILE
    size = f"adapter of {file.stat().st_size / 1e6:.1f} MB" if file.exists() else "nothing to save"
    val = "" if outcome.val_loss is None else f", held-out loss {outcome.val_loss:.4f}"
    if rewarded and outcome.val_loss is not None:
        val = f", held-out reward {-outcome.val_loss + 0:.4f}"
    metric = loop.metric_for_best_model
    worse = "the held-out loss no longer falls" if metric == LOSS else f"the {score_words(metric)} no longer rises"
    early = f", ended early: {worse}" if outcome.stopped_early else ""
    return f"{counted(outcome.steps, 'step')} done{early}{val}; {size} in {folder}{f'; {best}' if best else ''}"


def told_after(verdict: Mapping[str, Any]) -> str:
    """Return a run's verdict, its figures, what mends it, and the command for that, on lines of their own.

    An objective with a measure of its own has its notes, too: on how few rows that was measured, or that the loss rose meanwhile.

    Args:
        verdict: as report.json has it.
    """
    notes = [] if verdict.get("name") else verdict.get("notes", [])
    headline, figures, mend = (str(verdict.get(name, "")) for name in ("headline", "figures", "mend"))
    lines = [headline, figures, *notes, mend]
    command = str(verdict.get("command", ""))
    return "\n".join([*filter(None, lines), *([f"    {command}"] if command else [])])


def left_by(loop: LoopSettings, outcome: Outcome) -> str:
    """Return what a run leaves that ended because a callback failed, with advice."""
    if not outcome.interrupted:
        return f"the run itself is complete; its adapter is in {loop.adapter_path}"
    if not outcome.steps:
        return "nothing is saved yet; correct the callback, or leave it out"
    saved = f"the adapter of step {outcome.steps} is saved in {loop.adapter_path}"
    again = "continue with --resume" if loop.save_every else "start again"
    return f"{saved}; correct the callback, or leave it out, and {again}"


def interrupted_line(folder: str, outcome: Outcome) -> str:
    """Return what an interrupted run leaves in its folder, which may be an earlier run's adapter."""
    if outcome.steps:
        left = f"the adapter is saved in {folder}"
        if any((Path(folder) / CHECKPOINTS).glob("step-*")):
            command = command_line(["train", "--config", str(Path(folder) / "run.yaml"), "--resume"])
            left += f". To continue: {command}"
    else:
        left = "nothing to save yet"
        left += f"; the earlier adapter in {folder} is unchanged" if (Path(folder) / WEIGHTS_FILE).exists() else ""
    return f"Interrupted after {counted(outcome.steps, 'step')}; {left}"
