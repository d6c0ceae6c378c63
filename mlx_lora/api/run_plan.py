"""Predict before a download whether a training run fits, with which settings, and how fast it is."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mlx_lora.api.base import Base, PathLike
from mlx_lora.api.given_data import data_source
from mlx_lora.api.given_settings import plain
from mlx_lora.api.planned_data import check_splits, local_data
from mlx_lora.api.python_errors import speaks_python
from mlx_lora.data.joining import joined
from mlx_lora.data.loading import DataSplits
from mlx_lora.models.kernel_choice import KernelChoice
from mlx_lora.models.outline import Outline, outline_of
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.planner.ceilings import measure_ceilings
from mlx_lora.planner.chips import CHIPS, Chip, find_chip, known_chip
from mlx_lora.planner.fitting import (
    AUTO_MODES,
    Fitted,
    advice,
    budget_of,
    fit,
    largest_batch,
    largest_batch_size,
    largest_sequence,
    run_of,
)
from mlx_lora.planner.memory import plan_memory
from mlx_lora.planner.shapes import Machine, ModelShape, Run
from mlx_lora.planner.speed import Ceilings, count_step, forward_seconds, listed_ceilings, step_seconds
from mlx_lora.planner.this_machine import this_machine
from mlx_lora.planner.trunk_plan import plan_trunk
from mlx_lora.runs.trunk_choice import free_bytes, rows_problem
from mlx_lora.settings.config import TrainSettings
from mlx_lora.settings.resolve import train_settings
from mlx_lora.system import device
from mlx_lora.system.errors import InputError
from mlx_lora.training.prefix_sharing import layout_problem
from mlx_lora.training.run_fit import outlined_shape, quantized_shape, with_kernels

CHARACTERS_PER_TOKEN = 4  # about, in English; for the number of tokens in a data file


@dataclasses.dataclass(frozen=True)
class DataSize:
    """The facts about the data that a plan needs.

    Attributes:
        rows: to train on; an example of preference training has two.
        longest: tokens of the longest row.
        tokens: of all rows.
        supervised_tokens: those of them that are trained.
        measured_tokens: of all rows, held-out ones included, which is what a reference measures before the first step.
    """

    rows: int
    longest: int
    tokens: int
    supervised_tokens: int
    measured_tokens: int


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


def plan_run(
    settings: TrainSettings,
    chip: str | None = None,
    memory_gb: int | None = None,
    all_chips: bool = False,
    say: Callable[[str], None] = lambda line: None,
    read: Callable[[Outline], DataSplits | None] | None = None,
) -> dict[str, Any]:
    """Return the plan of a run with these settings.

    Args:
        settings: of the run.
        chip, memory_gb, all_chips: as for `plan`.
        say: takes a line from time to time while the data is encoded.
        read: returns the data for the model with this outline; None: what is on this disk is read.

    Raises:
        InputError: there is no such chip or model, or the objective's settings exclude each other.
    """
    if not settings.model.model:
        raise InputError("--model is required: a hub id, a folder, a config.json or a .gguf file")
    objective_of(settings.objective)  # refuses what `train` would
    machine, ceilings = choose_machine(settings, chip, memory_gb)
    # A GPU computes with 16 bits, even if this machine does not.
    dtype = settings.model.dtype
    if dtype == "auto":
        dtype = "float32" if machine.number_bytes == 4 else "bfloat16"
    outline = outline_of(settings.model.model or "", settings.model.revision, device.compute_dtype(dtype))
    # Kernels of another machine cannot be measured here: those asked for, or ours.
    elsewhere = KernelChoice(settings.loop.kernels)
    kernels = None if chip is None and memory_gb is None else elsewhere
    shape = outlined_shape(outline, settings, kernels)
    machine = with_kernels(settings, shape, machine, kernels)
    splits = read(outline) if read else local_data(settings, outline, say)
    if splits is not None:
        check_splits(settings, splits, outline)
    settings, size = measure_data(settings, splits, outline, shape)
    if size is not None:
        settings = dataclasses.replace(
            settings, data=dataclasses.replace(settings.data, max_seq_length=max(2, size.longest))
        )
    settings_of_base = dataclasses.replace(settings, model=dataclasses.replace(settings.model, dtype=dtype))
    result = plan_for(settings, shape, machine, ceilings, size)
    if not result["fits"]:
        width = settings.data.max_seq_length - 1
        result["advice"] = advice(
            settings,
            shape,
            machine,
            width,
            lambda: quantized_shape(outline, settings_of_base, kernels),
            size and size.rows,
        )
    if all_chips:
        if machine.backend != "metal" or kernels is None:
            outline = outline_of(settings.model.model or "", settings.model.revision, device.compute_dtype("bfloat16"))
            shape = outlined_shape(outline, settings, elsewhere)
        result["chips"] = list(for_all_chips(settings, shape, size))
    return result


def measure_data(
    settings: TrainSettings, splits: DataSplits | None, outline: Outline, shape: ModelShape
) -> tuple[TrainSettings, DataSize | None]:
    """Return the size of the data in tokens; None without data.

    The settings come back with --shared-prefix on where a run would share the prompts of these pairs.
    """
    if splits is None:
        return settings, None
    objective = objective_of(settings.objective)
    rows = objective.targets_of(splits.train)
    parts = [part for part in (splits.train, splits.valid, splits.test) if part is not None]
    asked = settings.objective.shared_prefix
    if objective.records == "pairs" and layout_problem(asked, outline.model, shape, rows) is None:
        settings = dataclasses.replace(settings, objective=dataclasses.replace(settings.objective, shared_prefix="on"))
        rows, parts = joined(rows), [joined(part) for part in parts]
    longest, measured = int(rows.lengths.max(initial=2)), sum(len(part.tokens) for part in parts)
    return settings, DataSize(len(rows), longest, len(rows.tokens), rows.supervised_tokens, measured)


def choose_machine(settings: TrainSettings, chip: str | None, memory_gb: int | None) -> tuple[Machine, Ceilings]:
    """Return the machine to plan for, and its ceilings: measured for this one, listed for another."""
    number_bytes = 4 if settings.model.dtype == "float32" else 2
    if chip is not None:
        found = find_chip(chip)
        return found.machine(memory_gb, number_bytes), listed_ceilings(found, number_bytes)
    here = this_machine(settings.model.dtype)
    if memory_gb is None:
        return here, measure_ceilings(settings.model.dtype)
    known = known_chip(here.name)
    if known is None:
        raise InputError(f"--memory-gb {memory_gb}: {here.name} is not in the table of chips; name one with --chip")
    return known.machine(memory_gb, number_bytes), listed_ceilings(known, number_bytes)


def plan_for(
    settings: TrainSettings, shape: ModelShape, machine: Machine, ceilings: Ceilings, size: DataSize | None
) -> dict[str, Any]:
    """Return the plan for one machine, as JSON values."""
    width = settings.data.max_seq_length - 1
    fitted = fit(settings, shape, machine, width, size and size.rows)
    memory, budget = fitted.memory, budget_of(settings.loop, machine)
    rows, columns = largest_batch(width, settings, fitted.batch_tokens, size and size.rows)
    modes = {
        mode: plan_memory(shape, run_of(settings, rows, columns, mode), machine, budget).peak_bytes
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
        "settings": chosen_settings(settings, fitted, rows),
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
        },
        "data": size and dataclasses.asdict(size),
        "machine": dataclasses.asdict(machine),
        "model": {
            "model_type": shape.model_type,
            "blocks": len(shape.blocks),
            "parameters": shape.numbers,
            "trained_parameters": shape.trained,
            "base_bytes": shape.base_bytes,
        },
    }


def chosen_settings(settings: TrainSettings, fitted: Fitted, rows: int) -> dict[str, Any]:
    """Return the settings that `train` would choose."""
    return {
        "batch_tokens": fitted.batch_tokens,
        "rows": rows,
        "grad_checkpoint": fitted.checkpointing,
        "max_seq_length": settings.data.max_seq_length,
        "method": settings.adapter.method_name,
        "rank": settings.adapter.rank,
        "optimizer": settings.optimizer.optimizer,
        "dtype": settings.model.dtype,
    }


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
    objective, reference = settings.objective, objective_of(settings.objective).reference
    together = objective.rows_per_example // objective.trained_rows_per_example
    forward_s = forward_seconds(shape, run, machine, ceilings)
    if together > 1:  # for each trained row, one that is only measured
        parts["other answers"] = (together - 1) * forward_s
        seconds += parts["other answers"]
    tokens_per_s = together * run.positions / seconds
    tokens = tokens_of(settings, together * rows * columns, size)
    reference_s = forward_s * size.measured_tokens / run.positions if reference and size is not None else None
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


def largest_run(settings: TrainSettings, fitted: Fitted, size: DataSize | None) -> Run:
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


def for_all_chips(settings: TrainSettings, shape: ModelShape, size: DataSize | None) -> Iterator[dict[str, Any]]:
    """Yield one row for each chip and memory size."""
    number_bytes = 4 if settings.model.dtype == "float32" else 2
    width = settings.data.max_seq_length - 1
    for chip in CHIPS:
        for memory_gib in chip.memory_gib:
            machine = chip.machine(memory_gib, number_bytes)
            fitted = fit(settings, shape, machine, width, size and size.rows)
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
