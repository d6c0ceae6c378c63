"""Predict a run's speed, and what its frozen blocks cost, from what is known of it before it starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mlx_lora.config.defaults import DataFacts
from mlx_lora.config.settings import TrainSettings
from mlx_lora.objectives.table import objective_of
from mlx_lora.planner.fit import Fitted, Prompts, Shapes, largest_batch, run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.shapes import Machine, ModelShape, RunShape
from mlx_lora.planner.speed import Ceilings, count_step, forward_seconds, plan_trunk, step_seconds
from mlx_lora.trainer.frozen_prefix import free_bytes, rows_problem

CHARACTERS_PER_TOKEN = 4  # about, in English; for the number of tokens in a data file


@dataclasses.dataclass(frozen=True)
class DataSize:
    """The facts about the data that a plan needs.

    Attributes:
        rows: to train on; an example of preference training has two.
        longest: tokens of the longest row.
        tokens: of all rows.
        supervised_tokens: those of them that are trained.
        measured_tokens: of all rows, held-out ones included, which is what a reference, or a teacher, measures before the first step.
        prompts: that answers are sampled to, as `fit` takes them; not part of the plan's JSON.
        facts: what the defaults follow; not part of the plan's JSON.
        trained_share: of the positions of trained rows; not part of the plan's JSON.
        shapes: of the batches, as `fit` takes them; not part of the plan's JSON.
    """

    rows: int
    longest: int
    tokens: int
    supervised_tokens: int
    measured_tokens: int
    prompts: Prompts = ()
    facts: DataFacts | None = None
    trained_share: float = 1.0
    shapes: Shapes | None = None

    def numbers(self) -> dict[str, int]:
        """Return the numbers by name."""
        left_out = ("prompts", "facts", "trained_share", "shapes")
        fields = (field.name for field in dataclasses.fields(self) if field.name not in left_out)
        return {name: getattr(self, name) for name in fields}


def predict(
    settings: TrainSettings,
    shape: ModelShape,
    machine: Machine,
    ceilings: Ceilings,
    fitted: Fitted,
    size: DataSize | None,
) -> dict[str, Any]:
    """Predict the speed: tokens per second of full rows, and the hours of the run if its length is known."""
    run = largest_run(settings, fitted, size)
    rows, columns = run.rows, run.width
    seconds, parts = step_seconds(shape, run, machine, ceilings)
    objective, asked = settings.objective, objective_of(settings.objective)
    together = objective.rows_per_example // objective.trained_rows_per_example
    forward_s = forward_seconds(shape, run, machine, ceilings)
    if together > 1:  # for each trained row, one that is only measured
        parts["other answers"] = (together - 1) * forward_s
        seconds += parts["other answers"]
    if asked.distills is not None and asked.samples:
        parts["teacher"] = forward_seconds(shape.teacher or shape, run, machine, ceilings)
        seconds += parts["teacher"]
    tokens_per_s = together * run.positions / seconds
    tokens = tokens_of(settings, together * rows * columns, size)
    reference_s = None
    if (
        size is not None and (asked.reference or asked.distills is not None) and not asked.samples
    ):  # measured before the first step
        own = forward_s if shape.teacher is None else forward_seconds(shape.teacher, run, machine, ceilings)
        reference_s = own * size.measured_tokens / run.positions
    return {
        "note": "predicted, not measured",
        "ceilings": ceilings.source,
        "tokens_per_s": tokens_per_s,
        "step_s": seconds,
        "parts_s": parts,
        "gflop_per_step": sum(count.flops for count in count_step(shape, run, machine).values()) / 1e9,
        "reference_s": reference_s,
        "hours": None if tokens is None else (tokens / tokens_per_s + (reference_s or 0)) / 3600,
        "hours_per_million_tokens": 1e6 / tokens_per_s / 3600,
    }


def largest_run(settings: TrainSettings, fitted: Fitted, size: DataSize | None) -> RunShape:
    """Return the run's largest batch, with the data's share of trained positions."""
    width = settings.data.max_seq_length - 1
    rows, columns = largest_batch(width, settings, fitted.batch_tokens, size and size.rows)
    run = run_of(settings, rows, columns, fitted.checkpointing)
    if size is None:
        return run
    share = size.supervised_tokens / max(1, size.tokens - size.rows)  # a row of n tokens has n - 1 positions
    return dataclasses.replace(run, trained_positions=round(share * run.positions))


def planned_trunk(
    settings: TrainSettings,
    shape: ModelShape,
    machine: Machine,
    ceilings: Ceilings,
    fitted: Fitted,
    size: DataSize | None,
) -> dict[str, Any] | None:
    """Return what the run would do with the output of its frozen blocks; None without frozen blocks or data."""
    if size is None or not shape.first_trained or settings.loop.cache_trunk == "off":
        return None
    run, positions = largest_run(settings, fitted, size), size.tokens - size.rows
    passes = (tokens_of(settings, run.positions, size) or 0) / max(1, size.tokens)
    # The disk of another machine is not known.
    free = free_bytes() if machine == this_machine(settings.model.dtype) else 10**15
    planned = plan_trunk(shape, run, machine, ceilings, positions, passes, free)
    problem = rows_problem(settings.objective.shared_prefix == "on", objective_of(settings.objective))
    problem = problem or planned.problem(settings.loop.cache_trunk)
    return {
        "kept": problem is None,
        "words": planned.words() if problem is None else f"computed in every epoch ({problem})",
        "blocks": planned.blocks,
        "disk_bytes": planned.disk_bytes,
        "epoch_s": planned.epoch_s,
        "later_epoch_s": planned.later_s,
        "saved_s": planned.saved_s,
    }


def tokens_of(settings: TrainSettings, positions: int, size: DataSize | None) -> float | None:
    """Return about how many tokens the run trains on, by --iters or the size of the data, if known."""
    loop, data = settings.loop, settings.data.data
    if loop.iters is not None:
        return float(loop.iters * loop.grad_accumulation_steps * positions)
    if size is not None:
        return size.tokens * (loop.epochs or 1.0)
    if data is None or not Path(data).is_file():
        return None
    return Path(data).stat().st_size / CHARACTERS_PER_TOKEN * (loop.epochs or 1.0)
