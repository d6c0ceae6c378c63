"""Read and measure the data that a plan is for, if it and the tokenizer are on this disk: lengths, steps, validations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from mlx_lora.config.defaults import (
    DataFacts,
)
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.files import TINY_SHAKESPEARE, find_sets, find_splits, is_dataset_id, is_local, named_sets
from mlx_lora.data.load import DataSplits
from mlx_lora.gguf.reader import is_gguf
from mlx_lora.gguf.tokenizer import gguf_tokenizer_folder
from mlx_lora.models.load import check_highest, embedding_rows
from mlx_lora.models.meta import Outline
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.prefix_sharing import joined, layout_problem
from mlx_lora.objectives.table import objective_of
from mlx_lora.objectives.teacher_answers import readable_data
from mlx_lora.planner.fit import (
    Prompts,
    Shapes,
)
from mlx_lora.planner.shapes import ModelShape
from mlx_lora.rollouts.make_environment import check_template
from mlx_lora.trainer.fit import (
    batches_by_tokens,
    data_facts,
    prompts_of,
    trained_share,
    training_plan,
)
from mlx_lora.trainer.held_out import choose_held_out
from mlx_lora.trainer.run import check_test_split
from mlx_lora.trainer.trainer import total_steps
from mlx_lora.utils.hub import resolve_config

log = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4  # about, in English; for the number of tokens in a data file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
COUNTS = ("rows", "longest", "tokens", "supervised_tokens", "measured_tokens")  # of the data, in the plan's JSON


@dataclass(frozen=True)
class DataSize:
    """The facts about the data that a plan needs.

    Attributes:
        rows: to train on; an example of preference training has two.
        longest: tokens of the longest row.
        tokens: of all rows.
        supervised_tokens: those of them that are trained.
        measured_tokens: of all rows, held-out ones included, which is what a reference, or a teacher, measures before the first step.
        prompts, shapes: that answers are sampled to, and of the batches, as `fit` takes them.
        facts: what the defaults follow.
        trained_share: of the positions of trained rows.
        batches: tokens of a batch -> how many batches the rows are divided into.
    """

    rows: int
    longest: int
    tokens: int
    supervised_tokens: int
    measured_tokens: int
    prompts: Prompts
    facts: DataFacts
    trained_share: float
    shapes: Shapes | None
    batches: Callable[[int], int]

    def numbers(self) -> dict[str, int]:
        """Return the counts by name."""
        return {name: getattr(self, name) for name in COUNTS}


def measure_data(
    settings: TrainSettings, splits: DataSplits, outline: Outline, shape: ModelShape
) -> tuple[TrainSettings, DataSize]:
    """Return the size of the data in tokens.

    The settings come back with --shared-prefix on where all answers to a prompt would share its row.
    """
    objective = objective_of(settings.objective)
    rows = objective.targets_of(splits.train)
    settings = objective.settled_by(settings, rows)
    parts = [part for part in (splits.train, splits.valid, splits.test) if part is not None]
    if (
        objective.shares_prompts
        and layout_problem(settings.objective.shared_prefix, outline.model, shape, rows) is None
    ):
        settings = replace(settings, objective=replace(settings.objective, shared_prefix="on"))
        rows, parts = joined(rows), [joined(part) for part in parts]
    longest, measured = int(rows.lengths.max(initial=2)), sum(len((part.teacher or part).tokens) for part in parts)
    prompts, facts = prompts_of(settings.objective, rows), data_facts(rows, splits.valid)
    share, planned = trained_share(settings.objective, rows), batches_by_tokens(settings, rows, facts)
    return settings, DataSize(
        rows=len(rows), longest=longest, tokens=len(rows.tokens), supervised_tokens=rows.supervised_tokens,
        measured_tokens=measured, prompts=prompts, facts=facts, trained_share=share,
        shapes=lambda tokens: planned(tokens)[1], batches=lambda tokens: planned(tokens)[0],
    )  # fmt: skip


def steps_and_validation(
    settings: TrainSettings, splits: DataSplits, identity: Mapping[str, Any] | None
) -> tuple[int, dict[str, Any], float]:
    """Return the run's steps, how much it validates on, how often and why, and the steps of one epoch.

    Args:
        settings: of the run with nothing open, and with --shared-prefix on where prompts are shared.
        splits: its data.
        identity: as for `plan_run`.
    """
    objective, loop = objective_of(settings.objective), settings.loop
    splits = splits.changed(lambda sets: {name: objective.targets_of(rows) for name, rows in sets.items()})
    rows, shared = splits.train, settings.objective.shared_prefix == "on"
    epochs = identity["price_epochs"] if identity else loop.epochs or 1.0
    plan = training_plan(loop, joined(rows) if shared else rows, epochs)
    steps = total_steps(plan, loop, objective.updates)
    found = choose_held_out(splits.valid, loop, plan, steps, identity, objective.updates)
    validation = {"examples": found.examples, "tokens": found.tokens, "times": found.times, "words": found.words}
    return steps, validation, len(plan) * objective.updates / loop.grad_accumulation_steps


def local_data(settings: TrainSettings, outline: Outline, objective: Objective) -> DataSplits | None:
    """Return the run's data; None if some of it is not on this disk, or the model's folder has no tokenizer.

    Raises:
        InputError: --data names what is nowhere, or data that `train` would refuse.
    """
    if settings.data.data is None:  # with --objective distill, the model writes the prompts when the run begins
        return None
    elsewhere = [name for name, _ in named_sets(settings.data.data) if not is_local(name)]
    for name in elsewhere:
        if name != TINY_SHAKESPEARE and not is_dataset_id(name):
            find_splits(name)  # says that there is no such file
    if elsewhere:
        return None
    find_sets(settings.data.data)  # refuses files that cannot be read, without a tokenizer too
    folder = resolve_config(settings.model.model or "", settings.model.revision)
    if folder.is_file() and is_gguf(folder):
        folder = gguf_tokenizer_folder(folder)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return read_splits(settings, folder, outline.config, objective)


def read_splits(
    settings: TrainSettings, folder: Path, config: dict[str, Any], objective: Objective, today: date | None = None
) -> DataSplits:
    """Return the run's data, encoded with the tokenizer in a model's folder; the objective then knows its pictures."""
    tokenizer = load_folder_tokenizer(folder, config, settings.model.trust_remote_code)
    data, room = readable_data(settings)
    records, asked = "prompts" if room else objective.records, replace(settings, data=data)
    splits = objective.read_planned(asked, tokenizer._tokenizer, folder, config, today, records)
    if tools := objective.shown_tools(settings.objective, {}):
        check_template(tokenizer, splits.chat_template, tools)
    if not room:
        return splits
    # Planned as if every answer took all of its room, as it will be only when the teacher has written them.
    return splits.changed(lambda sets: {name: rows.with_room(1, room) for name, rows in sets.items()})


def check_splits(settings: TrainSettings, splits: DataSplits, outline: Outline) -> None:
    """Refuse data that `train` would refuse after reading it.

    Raises:
        InputError: there are tokens that the model does not have, or --test without a test split.
    """
    data, limit = settings.data.data, embedding_rows(outline.model, outline.config)
    check_test_split(settings, splits)
    for rows in filter(None, (splits.train, splits.valid, splits.test)):
        check_highest(limit, int(rows.tokens.max(initial=0)), f"--data {data}", settings.model.model or "")


# A run without training (--dry-run)
