"""Predict before a download whether a training run fits, with which settings, and how fast it is.

A plan needs the model's config.json, and no weights. If the data and the tokenizer are on this disk, the data is read and
measured. `dry_run` plans as `train` would: it reads the data, reports on it, and refuses what `train` would refuse.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from mlx_lora.api.base import Base, PathLike
from mlx_lora.api.errors import speaks_python
from mlx_lora.api.predict import DataSize, planned_trunk, predict
from mlx_lora.api.train import data_source, plain
from mlx_lora.config.defaults import batch_tokens_for, length_problem, rate_problem, with_learning_rate, with_length
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import ROWS, TrainSettings
from mlx_lora.data.files import TINY_SHAKESPEARE, find_sets, find_splits, is_dataset_id, is_local, named_sets
from mlx_lora.data.load import UNCACHED, DataSplits, load_data
from mlx_lora.data.prompts import read_teacher_prompt
from mlx_lora.gguf.reader import is_gguf
from mlx_lora.gguf.tokenizer import gguf_tokenizer_folder
from mlx_lora.kernels.table import AUTO, KernelChoice
from mlx_lora.models.convert import cached_gguf_folder
from mlx_lora.models.load import check_highest, embedding_rows
from mlx_lora.models.meta import Outline, outline_for
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.prefix_sharing import joined, layout_problem
from mlx_lora.objectives.table import objective_of
from mlx_lora.objectives.teacher import check_teacher
from mlx_lora.objectives.teacher_answers import readable_data
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.planner.fit import (
    AUTO_MODES,
    NO_DATA,
    DataLimits,
    Fitted,
    advice,
    budget_of,
    fit,
    largest_batch_size,
    largest_sequence,
    run_of,
)
from mlx_lora.planner.machine import ceilings_here, this_machine
from mlx_lora.planner.memory import plan_memory
from mlx_lora.planner.shapes import Machine, ModelShape
from mlx_lora.planner.speed import CHIPS, Ceilings, Chip, find_chip, known_chip, listed_ceilings
from mlx_lora.trainer.checkpoint import Checkpoint
from mlx_lora.trainer.evaluate import choose_held_out
from mlx_lora.trainer.fit import (
    batch_shapes,
    check_base_fits,
    data_facts,
    outlined_shape,
    prompts_of,
    quantized_shape,
    trained_share,
    training_plan,
    with_kernels,
)
from mlx_lora.trainer.run import check_request, check_test_split, wants_training
from mlx_lora.trainer.run_folder import check_continuation, find_checkpoint, first_day
from mlx_lora.trainer.trainer import total_steps
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_config, resolve_model
from mlx_lora.utils.progress import waiting
from mlx_lora.utils.text import gigabytes

log = logging.getLogger(__name__)

CHARACTERS_PER_TOKEN = 4  # about, in English; for the number of tokens in a data file


@speaks_python()
def plan(
    model: Base | PathLike,
    *,
    data: Any = None,
    chip: str | None = None,
    memory_gb: int | None = None,
    all_chips: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Return the plan of a training run, as `mlx-lora plan --json` prints it; no weights are read.

    Args:
        model: hub id, folder, config.json or .gguf file, or a loaded base.
        data: as for `train`; its lengths are measured if it is on this disk. None: every row has `max_seq_length` tokens.
        chip: plan for this chip ("M2 Pro") instead of this machine.
        memory_gb: memory of that chip (default: the least sold).
        all_chips: add `chips`, a list of plans for every chip and memory size of the table.
        settings: of the run, as for `train`, and `revision` and `dtype` of the model.

    Returns:
        `fits`, `peak_bytes`, `parts`, `settings`, `predicted` and more; with `advice` where the run does not fit.

    Raises:
        InputError: an argument cannot be used, or mlx-lm does not have the model's architecture.
    """
    given = plain(settings)
    if isinstance(model, Base):
        given |= {name: value for name, value in dataclasses.asdict(model.settings).items() if value is not None}
    else:
        given["model"] = os.fspath(model)
    if data is not None:
        given["data"] = data_source(data)
    return plan_run(train_settings(given), chip, memory_gb, all_chips)


class PlanParts:
    """Makes what a plan is computed from; a caller that plans often may keep it, because this is most of the work."""

    def machine(self, settings: TrainSettings, chip: str | None, memory_gb: int | None) -> tuple[Machine, Ceilings]:
        """Return the machine to plan for, and its ceilings."""
        return choose_machine(settings, chip, memory_gb)

    def shape(self, settings: TrainSettings, dtype: str, kernels: KernelChoice | None) -> tuple[Outline, ModelShape]:
        """Return the outline of the model, in a dtype, and its shape with the adapter of the settings."""
        outline = outline_for(settings.model, device.compute_dtype(dtype))
        return outline, outlined_shape(outline, settings, kernels)


def plan_run(
    settings: TrainSettings,
    chip: str | None = None,
    memory_gb: int | None = None,
    all_chips: bool = False,
    read: Callable[[Outline], DataSplits | None] | None = None,
    identity: Mapping[str, Any] | None = None,
    parts: PlanParts | None = None,
) -> dict[str, Any]:
    """Return the plan of a run with these settings.

    Args:
        settings: of the run.
        chip, memory_gb, all_chips: as for `plan`.
        read: returns the data for the model with this outline; None: what is on this disk is read.
        identity: of the checkpoint that the run goes on from, if it does.
        parts: makes machine and shape; None: they are made anew.

    Raises:
        InputError: there is no such chip or model, or the objective's settings exclude each other.
    """
    if not settings.model.model:
        raise InputError("--model is required: a hub id, a folder, a config.json or a .gguf file")
    objective_of(settings.objective)  # refuses what `train` would
    parts = parts or PlanParts()
    machine, ceilings = parts.machine(settings, chip, memory_gb)
    # A GPU computes with 16 bits, even if this machine does not.
    dtype = settings.model.dtype
    if dtype == "auto":
        dtype = "float32" if machine.number_bytes == 4 else "bfloat16"
    # Kernels of another machine cannot be measured here: those asked for, or ours.
    elsewhere = KernelChoice(settings.loop.kernels)
    kernels = None if chip is None and memory_gb is None else elsewhere
    outline, shape = parts.shape(settings, dtype, kernels)
    machine = with_kernels(settings, shape, machine, kernels)
    splits = read(outline) if read else local_data(settings, outline)
    if splits is not None:
        check_splits(settings, splits, outline)
    settings, size = measure_data(settings, splits, outline, shape)
    if size is not None:
        settings = dataclasses.replace(
            settings, data=dataclasses.replace(settings.data, max_seq_length=max(2, size.longest))
        )
    warning = rate_problem(settings, shape.model_type, shape.width)
    settings = with_learning_rate(settings, shape.model_type, shape.width)
    settings_of_base = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype=dtype))
    if size is not None:
        shape = dataclasses.replace(shape, trained_share=size.trained_share)
    result = plan_for(settings, shape, machine, ceilings, size)
    result["steps"], result["validation"], problems = settings.loop.iters, None, [warning]
    if splits is not None and size is not None:
        chosen = with_length(settings, result["settings"]["batch_tokens"], size.facts)
        result["steps"], result["validation"], per_epoch = steps_and_validation(chosen, splits, identity)
        problems.append(length_problem(settings, result["steps"], per_epoch))
    result["warnings"] = [problem for problem in problems if problem]
    if not result["fits"]:
        width, limits = settings.data.max_seq_length - 1, DataLimits(size.rows, size.prompts) if size else NO_DATA
        quantized = lambda: quantized_shape(outline, settings_of_base, kernels)  # noqa: E731
        result["advice"] = advice(settings, shape, machine, width, quantized, limits)
    if all_chips:
        if machine.backend != "metal" or kernels is None:
            outline = outline_for(settings.model, device.compute_dtype("bfloat16"))
            shape = dataclasses.replace(outlined_shape(outline, settings, elsewhere), trained_share=shape.trained_share)
        result["chips"] = list(for_all_chips(settings, shape, size))
    return result


def measure_data(
    settings: TrainSettings, splits: DataSplits | None, outline: Outline, shape: ModelShape
) -> tuple[TrainSettings, DataSize | None]:
    """Return the size of the data in tokens; None without data.

    The settings come back with --shared-prefix on where all answers to a prompt would share its row.
    """
    if splits is None:
        return settings, None
    objective = objective_of(settings.objective)
    rows = objective.targets_of(splits.train)
    parts = [part for part in (splits.train, splits.valid, splits.test) if part is not None]
    asked = settings.objective.shared_prefix
    several = objective.records == "pairs" or objective.policy is not None
    if several and layout_problem(asked, outline.model, shape, rows) is None:
        settings = dataclasses.replace(settings, objective=dataclasses.replace(settings.objective, shared_prefix="on"))
        rows, parts = joined(rows), [joined(part) for part in parts]
    longest, measured = int(rows.lengths.max(initial=2)), sum(len((part.teacher or part).tokens) for part in parts)
    prompts = prompts_of(settings.objective, rows)
    facts = data_facts(rows, splits.valid)
    share = trained_share(settings.objective, rows)
    shapes = batch_shapes(settings, rows, facts)
    size = DataSize(
        len(rows), longest, len(rows.tokens), rows.supervised_tokens, measured, prompts, facts, share, shapes
    )
    return settings, size


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


def choose_machine(settings: TrainSettings, chip: str | None, memory_gb: int | None) -> tuple[Machine, Ceilings]:
    """Return the machine to plan for, and its ceilings: measured for this one, listed for another."""
    if settings.loop.shard_base != "off":
        raise InputError(
            f"--shard-base {settings.loop.shard_base}: this plan is for one machine; name the Macs that share the base, as in "
            'plan --macs "M4 Pro:48,M2 Max:32"'
        )
    if settings.loop.parallel == "tensor":
        raise InputError(
            '--parallel tensor: this plan is for one machine; name the Macs that divide the layers, as in plan --macs "M4 Pro:48,M2 Max:32"'
        )
    number_bytes = 4 if settings.model.dtype == "float32" else 2
    if chip is not None:
        found = find_chip(chip)
        return found.machine(memory_gb, number_bytes), listed_ceilings(found, number_bytes)
    here = this_machine(settings.model.dtype)
    if memory_gb is None:
        return here, ceilings_here(settings.model.dtype, polynomials=settings.loop.kernels == AUTO)
    known = known_chip(here.name)
    if known is None:
        raise InputError(f"--memory-gb {memory_gb}: {here.name} is not in the table of chips; name one with --chip")
    return known.machine(memory_gb, number_bytes), listed_ceilings(known, number_bytes)


def fitted_for(settings: TrainSettings, shape: ModelShape, machine: Machine, size: DataSize | None) -> Fitted:
    """Return what `train` would choose for memory on a machine."""
    tokens = batch_tokens_for(settings, size and size.facts)
    limits = DataLimits(size.rows, size.prompts, tokens, size.shapes) if size else DataLimits(most_tokens=tokens)
    return fit(settings, shape, machine, settings.data.max_seq_length - 1, limits)


def plan_for(
    settings: TrainSettings, shape: ModelShape, machine: Machine, ceilings: Ceilings, size: DataSize | None
) -> dict[str, Any]:
    """Return the plan for one machine, as JSON values."""
    width = settings.data.max_seq_length - 1
    fitted = fitted_for(settings, shape, machine, size)
    settings = with_length(settings, fitted.batch_tokens, size and size.facts)
    memory, budget = fitted.memory, budget_of(settings.loop, machine)
    modes = {
        mode: plan_memory(shape, run_of(settings, fitted.rows, fitted.width, mode), machine, budget).peak_bytes
        for mode in dict.fromkeys([*AUTO_MODES, fitted.checkpointing])
    }
    predicted = predict(settings, shape, machine, ceilings, fitted, size)
    trunk = planned_trunk(settings, shape, machine, ceilings, fitted, size)
    if trunk and trunk["kept"] and predicted["hours"] is not None:
        predicted["hours"] = max(0.0, predicted["hours"] - trunk["saved_s"] / 3600)
    return {
        "fits": memory.fits,
        "not_known": list(shape.not_known),
        "peak_bytes": memory.peak_bytes,
        "parts": memory.parts,
        "cache_bytes": memory.cache_bytes,
        "needed_bytes": memory.needed_bytes,
        "budget_bytes": memory.budget_bytes,
        "phase": memory.phase,
        "phases": memory.phases,
        "peak_bytes_by_checkpointing": modes,
        "settings": chosen_settings(settings, fitted),
        "largest_sequence": {
            mode: largest_sequence(settings, shape, machine, mode)
            for mode in dict.fromkeys([fitted.checkpointing, "block"])
        },
        "largest_batch_size": {
            mode: largest_batch_size(settings, shape, machine, mode, width)
            for mode in dict.fromkeys([fitted.checkpointing, "block"])
        },
        "predicted": predicted,
        "trunk": trunk,
        "objective": {
            "name": settings.objective.objective,
            "records": objective_of(settings.objective).records,
            "rows_per_example": settings.objective.rows_per_example,
            "reference": objective_of(settings.objective).reference,
            "teacher": objective_of(settings.objective).distills is not None,
            "group_size": settings.objective.answers_per_prompt if settings.objective.samples else None,
        },
        "data": size and size.numbers(),
        "machine": dataclasses.asdict(machine),
        "model": {
            "model_type": shape.model_type,
            "blocks": len(shape.blocks),
            "parameters": shape.parameters,
            "trained_parameters": shape.trained,
            "base_bytes": shape.base_bytes,
        },
    }


def chosen_settings(settings: TrainSettings, fitted: Fitted) -> dict[str, Any]:
    """Return the settings that `train` would choose, and the batch that takes the most memory."""
    return {
        "learning_rate": settings.optimizer.learning_rate,
        "epochs": settings.loop.epochs,
        "iters": settings.loop.iters,
        "early_stopping_patience": settings.loop.early_stopping_patience,
        "batch_tokens": fitted.batch_tokens,
        "rows": fitted.rows,
        "row_tokens": fitted.width + 1,
        "grad_checkpoint": fitted.checkpointing,
        "max_seq_length": settings.data.max_seq_length,
        "method": settings.adapter.method,
        "rank": settings.adapter.rank,
        "optimizer": settings.optimizer.optimizer,
        "dtype": settings.model.dtype,
    }


def for_all_chips(settings: TrainSettings, shape: ModelShape, size: DataSize | None) -> Iterator[dict[str, Any]]:
    """Yield one row for each chip and memory size."""
    number_bytes = 4 if settings.model.dtype == "float32" else 2
    for chip in CHIPS:
        for memory_gib in chip.memory_gib:
            machine = chip.machine(memory_gib, number_bytes)
            fitted = fitted_for(settings, shape, machine, size)
            yield _chip_row(settings, shape, chip, machine, fitted, size)


def _chip_row(
    settings: TrainSettings, shape: ModelShape, chip: Chip, machine: Machine, fitted: Fitted, size: DataSize | None
) -> dict[str, Any]:
    number_bytes = machine.number_bytes
    speed = predict(settings, shape, machine, listed_ceilings(chip, number_bytes), fitted, size)
    return {
        "chip": chip.name,
        "memory_bytes": machine.memory_bytes,
        "budget_bytes": fitted.memory.budget_bytes,
        "fits": fitted.memory.fits,
        "peak_bytes": fitted.memory.peak_bytes,
        "batch_tokens": fitted.batch_tokens,
        "grad_checkpoint": fitted.checkpointing,
        "largest_sequence": largest_sequence(settings, shape, machine, "block"),
        "tokens_per_s": speed["tokens_per_s"] if fitted.memory.fits else None,
        "ceilings": chip.status,
    }


# The data

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def local_data(settings: TrainSettings, outline: Outline) -> DataSplits | None:
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
    return read_splits(settings, folder, outline.config)


def read_splits(
    settings: TrainSettings,
    folder: Path,
    config: dict[str, Any],
    today: date | None = None,
) -> DataSplits:
    """Return the run's data, encoded with the tokenizer in a model's folder.

    Args:
        settings: of the run.
        folder, config: of the model.
        today: as for `load_data`.

    Raises:
        InputError: the data cannot be used.
    """
    tokenizer = load_folder_tokenizer(folder, config, settings.model.trust_remote_code)
    prompt = read_teacher_prompt(settings.objective.teacher_prompt)
    data, room = readable_data(settings)
    records = UNCACHED if room else objective_of(settings.objective).records
    splits = load_data(data, tokenizer._tokenizer, settings.loop.seed, today, records, prompt)
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


def dry_run(settings: TrainSettings) -> dict[str, Any]:
    """Read a run's data, report on it and return the run's plan. Nothing is trained, and no run folder is written.

    The model's files are downloaded as `train` would, and its tokenizer is used, but its weights are not loaded.

    Args:
        settings: of the run.

    Raises:
        InputError: settings, model, data or run folder that `train` would refuse, or a run that does not fit.
    """
    check_request(settings, ALONE)
    if not wants_training(settings):
        raise InputError("--dry-run: nothing would be trained with --test alone; give --train too")
    with waiting("Planning the run"):
        return _planned(settings)


def _planned(settings: TrainSettings) -> dict[str, Any]:
    check_base_fits(settings)
    model = settings.model
    source = resolve_model(model.model or "", model.revision, trust_remote_code=model.trust_remote_code)
    folder = cached_gguf_folder(source) if source.kind == "gguf" else source.path

    found = find_checkpoint(settings.loop, ALONE)

    def read(outline: Outline) -> DataSplits | None:
        if readable_data(settings)[0].data is None:
            log.info(
                "Data: the model writes the prompts itself when the run begins; planned for rows of --max-seq-length"
            )
            return None
        splits = read_splits(settings, folder, outline.config, first_day(settings.loop))
        log.info(splits.report.render())
        if settings.objective.teacher:
            tokenizer = load_folder_tokenizer(folder, outline.config, model.trust_remote_code)
            check_teacher(settings, tokenizer._tokenizer)
        if found is not None:
            _check_resume(settings, splits, found)
        return splits

    result = plan_run(settings, read=read, identity=found and found.identity)
    if not result["fits"] and not result["not_known"] and settings.loop.memory_check:
        raise InputError(
            f"this run: needs {gigabytes(result['needed_bytes'])} at its peak by the plan, and may use "
            f"{gigabytes(result['budget_bytes'])}; {result['advice']}, or --no-memory-check to try it anyway"
        )
    return result


def _check_resume(settings: TrainSettings, splits: DataSplits, found: Checkpoint) -> None:
    """Refuse a checkpoint of a run with other settings or data; what only a loaded model tells is not compared."""
    rows = objective_of(settings.objective).targets_of(splits.train)
    asked = {name: value for name, value in settings.to_flat().items() if not ROWS[name].may_change}
    known = {name: value for name, value in asked.items() if value is not None}
    check_continuation(found, {**found.identity, **known, "rows": rows.fingerprint})
