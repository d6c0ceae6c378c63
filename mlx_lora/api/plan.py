"""Predict before a download whether a training run fits, with which settings, and how fast it is.

A plan needs the model's config.json, and no weights. If the data and the tokenizer are on this disk, the data is read and
measured: lengths, steps, validations. `dry_run` plans as `train` would begin it, and refuses what `train` would refuse.

Of several Macs, the plan says whether the run fits, and whether their link or their chips decide the speed. It is for Macs that
share the base; beside it stands what the other ways to divide the run would do.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from mlx_lora.api.base import Base, PathLike, speaks_python
from mlx_lora.api.train import data_source, plain
from mlx_lora.compat.foreign import TOKENIZER
from mlx_lora.config.defaults import (
    DataFacts,
    batch_tokens_for,
    length_problem,
    rate_problem,
    with_learning_rate,
    with_length,
)
from mlx_lora.config.fields import flag_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.rules import problems_with
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, ROWS, TrainSettings, shard_parts
from mlx_lora.data.data_sets import TINY_SHAKESPEARE, find_sets, find_splits, is_dataset_id, is_local, named_sets
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits, Seen, load_data
from mlx_lora.data.prompts import read_teacher_prompt
from mlx_lora.data.sampler import total_steps
from mlx_lora.gguf.reader import is_gguf
from mlx_lora.gguf.tokenizer import gguf_tokenizer_folder
from mlx_lora.kernels.choose import AUTO, KernelChoice
from mlx_lora.kernels.quantized_matmul import MatmulPaths
from mlx_lora.models.convert import cached_gguf_folder
from mlx_lora.models.folder import stored_tensors
from mlx_lora.models.load import Base as LoadedBase
from mlx_lora.models.load import check_highest, embedding_rows
from mlx_lora.models.meta import Outline, outline_for
from mlx_lora.models.tokenizer import load_folder_tokenizer
from mlx_lora.objectives.base import Objective, RunContext
from mlx_lora.objectives.prefix_sharing import joined, layout_problem
from mlx_lora.objectives.table import check_kind, objective_of, other_models_bytes, with_pictures
from mlx_lora.objectives.teacher import check_teacher, readable_data
from mlx_lora.parallel.offloaded_base import copy_rate, read_rate
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.parallel.sharded_base import units_of
from mlx_lora.parallel.strategy import offloaded
from mlx_lora.planner.fit import (
    AUTO_MODES,
    NO_DATA,
    Batches,
    DataLimits,
    Fitted,
    Prompts,
    advice,
    budget_of,
    fit,
    hidden_from,
    largest_batch,
    largest_batch_size,
    largest_sequence,
    run_of,
    runs_at_once,
)
from mlx_lora.planner.machine import ceilings_here, this_machine
from mlx_lora.planner.memory import KernelTerms, Machine, ModelShape, RunShape, offloaded_bytes, plan_memory
from mlx_lora.planner.several_macs import Link, Mac, Split, Units, best, least_tokens, memory_shares, plan_macs
from mlx_lora.planner.speed import (
    ASSUMED_BYTES_PER_S,
    ASSUMED_COPIED_PER_S,
    CHIPS,
    Ceilings,
    Reading,
    count_step,
    find_chip,
    forward_seconds,
    known_chip,
    listed_ceilings,
    plan_trunk,
    step_seconds,
)
from mlx_lora.rollouts.make_environment import check_template, shown_tools
from mlx_lora.trainer.evaluate import choose_held_out, in_steps
from mlx_lora.trainer.fit import (
    batches_by_tokens,
    data_facts,
    outlined_shape,
    prompts_of,
    quantized_shape,
    settled_offload,
    trained_share,
    training_plan,
    with_examples,
    with_kernels,
)
from mlx_lora.trainer.frozen_prefix import free_bytes, rows_problem
from mlx_lora.trainer.request import check_request, check_test_split
from mlx_lora.trainer.run_folder import check_continuation, find_checkpoint, first_day
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_config, resolve_model
from mlx_lora.utils.progress import waiting
from mlx_lora.utils.text import GIB, gigabytes

log = logging.getLogger(__name__)

# What a plan's JSON has of the settings and of a MemoryPlan.
CHOSEN = (
    "learning_rate", "epochs", "iters", "early_stopping_patience", "max_seq_length", "method", "rank", "optimizer", "dtype",
    "batch_size",
)  # fmt: skip
CHARACTERS_PER_TOKEN = 4  # about, in English; for the number of tokens in a data file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
MOST_AT_ONCE = 256  # runs that a plan counts
MEMORY_FACTS = ("fits", "peak_bytes", "parts", "cache_bytes", "needed_bytes", "budget_bytes", "phase", "phases")

# Thunderbolt 5 is sold as 80 Gbit/s; half of it is assumed for messages of a block's size, and was not measured.
LINK_GBIT = 40.0
MOST_GB = 4096
# What macOS needs in addition to the GPU's memory, where the limit for the GPU is raised by hand.
FOR_MACOS_GB = 4
LATENCY_S = 5e-5  # assumed, of a message
EQUAL_MACS = re.compile(r"(?P<count>\d{1,3})\s*[xX]\s*(?P<rest>.+)")
MAC_FACTS = ("fits", "peak_bytes", "needed_bytes", "budget_bytes", "parts", "phase")  # of one of several Macs
# What takes less memory, in the order in which it is tried.
RANKS, LENGTHS = (16, 8, 4), (2048, 1024, 512)
ATTENTION = "q_proj,k_proj,v_proj,o_proj"


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
        given |= {name: value for name, value in asdict(model.settings).items() if value is not None}
    else:
        given["model"] = os.fspath(model)
    if data is not None:
        given["data"] = data_source(data)
    return plan_run(train_settings(given), chip, memory_gb, all_chips)


def adapted_outline(settings: TrainSettings, dtype: str, kernels: KernelChoice | None) -> tuple[Outline, ModelShape]:
    """Return the outline of a run's model, in a dtype, and its shape with the adapter of the settings."""
    outline = outline_for(settings.model, device.compute_dtype(dtype))
    typed = replace(settings, model=replace(settings.model, dtype=dtype))
    return outline, outlined_shape(outline, typed, kernels)


def plan_run(
    settings: TrainSettings,
    chip: str | None = None,
    memory_gb: int | None = None,
    all_chips: bool = False,
    read: Callable[[Outline, Objective], DataSplits | None] | None = None,
    identity: Mapping[str, Any] | None = None,
    outlined: Callable[[TrainSettings, str, KernelChoice | None], tuple[Outline, ModelShape]] = adapted_outline,
) -> dict[str, Any]:
    """Return the plan of a run with these settings.

    Args:
        settings: of the run.
        chip, memory_gb, all_chips: as for `plan`.
        read: returns the data for the model with this outline; None: what is on this disk is read.
        identity: of the checkpoint that the run goes on from, if it does.
        outlined: `adapted_outline`, or what keeps its results for a caller that plans often; that is most of the work.

    Raises:
        InputError: there is no such chip or model, or the objective's settings exclude each other.
    """
    if not settings.model.model:
        raise InputError("--model is required: a hub id, a folder, a config.json or a .gguf file")
    settings = with_pictures(settings)
    objective = objective_of(settings.objective)  # refuses what `train` would
    settings, asked = offloaded(settings) if settings.loop.offload_base == "on" else settings, settings
    machine, ceilings = choose_machine(settings, chip, memory_gb)
    here = chip is None and memory_gb is None
    # A GPU computes with 16 bits, even if this machine does not.
    dtype = settings.model.dtype
    if dtype == "auto":
        dtype = "float32" if machine.number_bytes == 4 else "bfloat16"
    # Kernels of another machine cannot be measured here: those asked for, or ours.
    kernels = None if here else KernelChoice(settings.loop.kernels)
    outline, shape = outlined(settings, dtype, kernels)
    typed = replace(settings.model, dtype=dtype)  # of what stands beside the language model, too
    check_kind(outline.model, str(settings.model.model), objective)
    machine = with_kernels(settings, shape, machine, kernels)
    splits = read(outline, objective) if read else local_data(settings, outline, objective)
    size = None
    if splits is None and 0 < shape.most_tokens < settings.data.max_seq_length:
        settings = replace(settings, data=replace(settings.data, max_seq_length=shape.most_tokens))
    if splits is not None:
        check_test_split(settings, splits)
        limit = embedding_rows(outline.model, outline.config)
        for rows in filter(None, (splits.train, splits.valid, splits.test)):
            highest = int(rows.tokens.max(initial=0))
            check_highest(limit, highest, f"--data {settings.data.data}", settings.model.model or "")
        settings, size = measure_data(settings, splits, outline, shape)
        longest = int(size.rows.lengths.max(initial=2))
        settings = replace(settings, data=replace(settings.data, max_seq_length=longest))
        shape = _with_data(shape, replace(settings, model=typed), size, objective, outline)
    problems = [
        rate_problem(settings, shape.model_type, shape.width),
        f"--data {settings.data.data}: not read, because it or the model's tokenizer is not on this disk; planned for rows of "
        f"{settings.data.max_seq_length:,} tokens, and a time of one epoch"
        * (splits is None and settings.data.data is not None),
    ]
    settings = with_learning_rate(settings, shape.model_type, shape.width)
    reading = None
    if settings.loop.offload_base == "on":
        reading = reading_of(outline, shape, Path(settings.model.model or "") if here else None)
    planned = MachinePlan(settings, shape, machine, ceilings, size, reading)
    result = planned.to_dict()
    result["runs_at_once"] = runs_at_once(shape, settings.optimizer.optimizer, planned.fitted.memory, MOST_AT_ONCE)
    result["steps"], result["validation"] = settings.loop.iters, None
    if size is not None:
        loop, updates = planned.chosen.loop, planned.chosen.objective.updates
        plan = training_plan(loop, size.rows, identity["price_epochs"] if identity else loop.epochs or 1.0)
        result["steps"] = total_steps(plan, loop, updates)
        whole = in_steps(loop, result["steps"], updates)
        found = choose_held_out(size.valid, whole, plan, result["steps"], identity, updates)
        result["validation"] = {name: getattr(found, name) for name in ("examples", "tokens", "times", "words")}
        problems.append(length_problem(settings, result["steps"], len(plan) * updates / loop.grad_accumulation_steps))
    result["warnings"] = [problem for problem in problems if problem]
    may_read = asked.loop.offload_base == AUTO and not problems_with(asked.to_flat(), "offload_base", "on")
    if not result["fits"] and may_read and not all_chips:
        from_disk = plan_run(offloaded(asked), chip, memory_gb, False, read, identity, outlined)
        if from_disk["fits"]:
            return from_disk
    if not result["fits"]:
        of_base = replace(settings, model=typed)
        quantized = lambda: quantized_shape(outline, of_base, kernels)  # noqa: E731
        limits = DataLimits(len(size.rows), size.prompts) if size else NO_DATA
        result["advice"] = advice(settings, shape, machine, planned.width, quantized, limits)
    if all_chips:
        # As with --chip: in 16 bits if --dtype is open, with kernels that were not measured.
        dtype = "bfloat16" if settings.model.dtype == "auto" else settings.model.dtype
        ways = []
        for way in [settings, offloaded(settings)] if may_read else [settings]:
            # An outline of its own, since a block's graph is only read when it is asked for.
            outline, shape = outlined(way, dtype, KernelChoice(way.loop.kernels))
            reading = reading_of(outline, shape, None) if way.loop.offload_base == "on" else None
            typed = replace(way, model=replace(way.model, dtype=dtype))
            shape = shape if size is None else _with_data(shape, typed, size, objective, outline)
            ways.append(replace(planned, settings=way, shape=shape, reading=reading))
        result["chips"] = chip_rows(ways)
    return result


def _with_data(
    shape: ModelShape, settings: TrainSettings, size: PlannedData, objective: Objective, outline: Outline
) -> ModelShape:
    """Return a run's shape with what its data say: the share of trained positions, and the memory of pictures.

    Of other models and towers, the objective that read the data says what its pictures take.
    """
    others = other_models_bytes(settings, objective)
    shape = replace(shape, trained_share=trained_share(settings.objective, size.rows), beside_bytes=others)
    return shape if objective.pictures is None else objective.pictures.added_to(shape, settings, outline.model)


def chip_rows(ways: list[MachinePlan]) -> list[dict[str, Any]]:
    """Return a row for every chip and memory size: of the first way of running that fits, or if none does, of the first one."""
    number_bytes, rows = 4 if ways[0].settings.model.dtype == "float32" else 2, []
    for chip in CHIPS:
        for gib in chip.memory_gib:
            machine, ceilings = chip.machine(gib, number_bytes), listed_ceilings(chip, number_bytes)
            row: dict[str, Any] = {}
            for way in ways:
                if not row.get("fits"):
                    here = with_kernels(way.settings, way.shape, machine, KernelChoice(way.settings.loop.kernels))
                    found = replace(way, machine=here, ceilings=ceilings).chip_row()
                    row = found if found["fits"] or not row else row
            rows.append({"chip": chip.name, **row, "ceilings": chip.status})
    return rows


def reading_of(outline: Outline, shape: ModelShape, folder: Path | None) -> Reading:
    """Return how a run reads its base from files.

    Args:
        outline: of the adapted model.
        shape: of it.
        folder: that may have the files on this machine, whose disk is then measured; None: another machine is planned for.
    """
    units, stored = units_of(outline.model), stored_tensors(folder) if folder and folder.is_dir() else {}
    rates, source = (ASSUMED_BYTES_PER_S, ASSUMED_COPIED_PER_S), "assumed"
    if stored:
        rates, source = (read_rate(list(stored.values())), copy_rate(max(units.blocks))), "measured here"
    return Reading(units.blocks, shape.first_trained, *rates, source, head=units.head_bytes)


def choose_machine(settings: TrainSettings, chip: str | None, memory_gb: int | None) -> tuple[Machine, Ceilings]:
    """Return the machine to plan for, and its ceilings: measured for this one, listed for another."""
    if settings.loop.shard_base != "off":
        raise InputError(
            f"--shard-base {settings.loop.shard_base}: this plan is for one machine; name the Macs that share the base, as in "
            'plan --macs "M4 Pro:48,M2 Max:32"'
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


@dataclass(frozen=True)
class MachinePlan:
    """A run on one machine, and what is predicted of it.

    Attributes:
        settings: of the run; --max-seq-length is that of the longest row where the data is known.
        shape: of the model with its adapter.
        machine, ceilings: what it runs on.
        size: of the data; None: not read, so every row has --max-seq-length tokens.
        reading: of the base, if it is read from its files.
    """

    settings: TrainSettings
    shape: ModelShape
    machine: Machine
    ceilings: Ceilings
    size: PlannedData | None
    reading: Reading | None = None

    @property
    def width(self) -> int:
        """Positions of the longest row."""
        return self.settings.data.max_seq_length - 1

    @cached_property
    def fitted(self) -> Fitted:
        """What `train` would choose for memory."""
        size, hidden = self.size, 0
        if self.reading is not None:
            hidden = hidden_from(self.reading, self.settings, self.shape, self.machine, self.ceilings, self.width)
        tokens = batch_tokens_for(self.settings, size and size.facts, hidden)
        limits = (
            DataLimits(len(size.rows), size.prompts, tokens, size.batches) if size else DataLimits(most_tokens=tokens)
        )
        return fit(self.settings, self.shape, self.machine, self.width, limits)

    @cached_property
    def chosen(self) -> TrainSettings:
        """The settings with the run's length."""
        return with_length(self.settings, self.fitted.batch_tokens, self.size and self.size.facts)

    @cached_property
    def largest_run(self) -> RunShape:
        """The run's largest batch, with the data's share of trained positions."""
        rows, width = largest_batch(
            self.width, self.settings, self.fitted.batch_tokens, self.size and len(self.size.rows)
        )
        run = run_of(self.settings, rows, width, self.fitted.checkpointing)
        if self.size is None:
            return run
        # A row of n tokens has n - 1 positions.
        data = self.size.rows
        share = data.supervised_tokens / max(1, len(data.tokens) - len(data))
        return replace(run, trained_positions=round(share * run.positions))

    @property
    def passes(self) -> float:
        """How often the run sees its data: --epochs, or what the steps of --iters are of the batches that the data has."""
        loop, size = self.chosen.loop, self.size
        if loop.iters is None or size is None:
            return loop.epochs or 1.0
        batches = size.batches(self.fitted.batch_tokens)[0] * self.chosen.objective.updates
        return loop.iters * loop.grad_accumulation_steps / max(1, batches)

    def speed(self) -> dict[str, Any]:
        """Predict tokens per second of full rows, and the hours of the run if its length is known."""
        run, size, objective, shape = self.largest_run, self.size, self.settings.objective, self.shape
        seconds, parts = step_seconds(shape, run, self.machine, self.ceilings)
        together = objective.rows_per_example // objective.trained_rows_per_example
        forward_s = forward_seconds(shape, run, self.machine, self.ceilings)
        teacher_s = (
            forward_s if shape.teacher is None else forward_seconds(shape.teacher, run, self.machine, self.ceilings)
        )
        if together > 1:  # for each trained row, one that is only measured
            parts["other answers"] = (together - 1) * forward_s
            seconds += parts["other answers"]
        if objective.on_policy:
            parts["teacher"] = teacher_s
            seconds += teacher_s
        reading, hides_from, moved = self.reading, None, 0
        if reading is not None:
            hides_from = reading.hidden_from(run.positions, forward_s, seconds)
            parts["waiting for the disk"] = reading.waiting_s(forward_s, seconds)
            parts["copying weights"], parts["planning blocks"] = reading.copying_s, reading.planning_s
            if (
                self.settings.loop.offload_activations
            ):  # nothing is computed meanwhile; writing is taken to be as fast as reading
                moved = offloaded_bytes(shape, run, self.machine)
                parts["waiting for the disk"] += 2 * moved / reading.bytes_per_s
            seconds += parts["waiting for the disk"] + reading.copying_s + reading.planning_s
        tokens_per_s, tokens, loop, data = (
            together * run.positions / seconds,
            None,
            self.chosen.loop,
            self.chosen.data.data,
        )
        if size is not None:
            tokens = len(size.rows.tokens) * self.passes
        elif loop.iters is not None:
            tokens = float(loop.iters * loop.grad_accumulation_steps * together * run.positions)
        elif data is not None and Path(data).is_file():
            tokens = Path(data).stat().st_size / CHARACTERS_PER_TOKEN * (loop.epochs or 1.0)
        reference_s = None
        if size is not None and (objective.row.reference or objective.row.taught) and not objective.samples:
            reference_s = teacher_s * size.measured_tokens / run.positions  # measured before the first step
        return {
            "note": "predicted, not measured",
            "ceilings": self.ceilings.source,
            "tokens_per_s": tokens_per_s,
            "step_s": seconds,
            "parts_s": parts,
            "gflop_per_step": sum(count.flops for count in count_step(shape, run, self.machine).values()) / 1e9,
            "reference_s": reference_s,
            "hours": None if tokens is None else (tokens / tokens_per_s + (reference_s or 0)) / 3600,
            "hours_per_million_tokens": 1e6 / tokens_per_s / 3600,
            "reading": reading
            and {
                "bytes": reading.forward_bytes + reading.backward_bytes,
                "activation_bytes": moved,
                "disk_bytes_per_s": reading.bytes_per_s,
                "copied_bytes_per_s": reading.copied_per_s,
                "disk_source": reading.source,
                "waiting_share": parts["waiting for the disk"] / seconds,
                "hidden_from_tokens": hides_from,
            },
        }

    def trunk(self) -> dict[str, Any] | None:
        """Return what the run would do with the output of its frozen blocks; None without frozen blocks or data."""
        size, settings = self.size, self.settings
        if size is None or not self.shape.first_trained or settings.loop.cache_trunk == "off":
            return None
        run = self.largest_run
        # The disk of another machine is not known.
        free = free_bytes() if self.machine == this_machine(settings.model.dtype) else 10**15
        positions = len(size.rows.tokens) - len(size.rows)
        planned = plan_trunk(self.shape, run, self.machine, self.ceilings, positions, self.passes, free)
        problem = rows_problem(settings.objective.shared_prefix == "on", settings.objective)
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

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        settings, shape, fitted, machine = self.chosen, self.shape, self.fitted, self.machine
        memory, budget, objective = fitted.memory, budget_of(settings.loop, machine), settings.objective
        modes = dict.fromkeys([fitted.checkpointing, "block"])
        predicted, trunk, flat = self.speed(), self.trunk(), settings.to_flat()
        if trunk and trunk["kept"] and predicted["hours"] is not None:
            predicted["hours"] = max(0.0, predicted["hours"] - trunk["saved_s"] / 3600)
        return {
            "not_known": list(shape.not_known),
            **{name: getattr(memory, name) for name in MEMORY_FACTS},
            "peak_bytes_by_checkpointing": {
                mode: plan_memory(shape, run_of(settings, fitted.rows, fitted.width, mode), machine, budget).peak_bytes
                for mode in dict.fromkeys([*AUTO_MODES, fitted.checkpointing])
            },
            # What `train` would choose, and the batch that takes the most memory.
            "settings": {
                **{name: flat[name] for name in CHOSEN},
                "batch_tokens": fitted.batch_tokens,
                "rows": fitted.rows,
                "row_tokens": fitted.width + 1,
                "grad_checkpoint": fitted.checkpointing,
            },
            "largest_sequence": {mode: largest_sequence(settings, shape, machine, mode) for mode in modes},
            "largest_batch_size": {
                mode: largest_batch_size(settings, shape, machine, mode, self.width) for mode in modes
            },
            "predicted": predicted,
            "trunk": trunk,
            "objective": {
                "name": objective.objective,
                "records": objective.records,
                "rows_per_example": objective.rows_per_example,
                "reference": objective.row.reference,
                "teacher": objective.row.taught,
                "group_size": objective.answers_per_prompt if objective.samples else None,
            },
            "data": self.size
            and {
                "rows": len(self.size.rows),
                "longest": int(self.size.rows.lengths.max(initial=2)),
                "tokens": len(self.size.rows.tokens),
                "supervised_tokens": self.size.rows.supervised_tokens,
                "measured_tokens": self.size.measured_tokens,
            },
            "machine": asdict(machine),
            "model": {
                "model_type": shape.model_type,
                "blocks": len(shape.blocks),
                "parameters": shape.parameters,
                "trained_parameters": shape.trained,
                "base_bytes": shape.base_bytes,
            },
        }

    def chip_row(self) -> dict[str, Any]:
        """Return what the table of chips has of the plan."""
        memory = self.fitted.memory
        predicted = self.speed() if memory.fits else {}
        return {
            "memory_bytes": self.machine.memory_bytes,
            **{name: getattr(memory, name) for name in ("budget_bytes", "fits", "peak_bytes")},
            "batch_tokens": self.fitted.batch_tokens,
            "grad_checkpoint": self.fitted.checkpointing,
            "largest_sequence": largest_sequence(self.settings, self.shape, self.machine, "block"),
            **{name: predicted.get(name) for name in ("tokens_per_s", "reading")},
        }


# The data of a plan


@dataclass(frozen=True)
class PlannedData:
    """The data that a plan is for.

    Attributes:
        rows: to train on, as they are put into batches; an example of preference training has two.
        valid: held-out rows.
        measured_tokens: what a reference, or a teacher, measures before the first step: those of all rows; 0 without one.
        prompts: that answers are sampled to, as `fit` takes them.
        facts: what the defaults follow.
        batches: that the rows are divided into.
    """

    rows: EncodedSet
    valid: EncodedSet | None
    measured_tokens: int
    prompts: Prompts
    facts: DataFacts
    batches: Batches


def measure_data(
    settings: TrainSettings, splits: DataSplits, outline: Outline, shape: ModelShape
) -> tuple[TrainSettings, PlannedData]:
    """Return the data as the run would have it.

    The settings come back with --shared-prefix on where all answers to a prompt would share its row.
    """
    rows, valid = splits.train, splits.valid
    settings = with_examples(settings, rows)
    parts = [part for part in (splits.train, splits.valid, splits.test) if part is not None]
    asked = settings.objective
    if asked.shares_prompts and layout_problem(asked.shared_prefix, outline.model, shape, rows) is None:
        settings = replace(settings, objective=replace(asked, shared_prefix="on"))
        rows, parts = joined(rows), [joined(part) for part in parts]
    measures = (asked.row.reference or asked.row.taught) and not asked.samples
    measured = sum(len((part.teacher or part).tokens) for part in parts) if measures else 0
    facts = data_facts(rows, splits.valid)
    prompts, batches = prompts_of(settings.objective, rows), batches_by_tokens(settings, rows, facts)
    return settings, PlannedData(rows, valid, measured, prompts, facts, batches)


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
    return read_splits(settings, folder, outline, objective)


def read_splits(
    settings: TrainSettings, folder: Path, outline: Outline, objective: Objective, today: date | None = None
) -> DataSplits:
    """Return the run's data, encoded with the tokenizer in a model's folder; the objective then knows its pictures."""
    asked, tokenizer = (
        settings.objective,
        load_folder_tokenizer(folder, outline.config, settings.model.trust_remote_code),
    )
    data, room = readable_data(settings)
    if (
        room
    ):  # prompts, planned as if every answer took all of its room, as it will be only when the teacher has written them
        seen = Seen(read_teacher_prompt(asked.teacher_prompt))
        splits = load_data(data, TOKENIZER.of(tokenizer), settings.loop.seed, today, "prompts", seen)
        return splits.changed(lambda sets: {name: rows.with_room(1, room) for name, rows in sets.items()})
    paths = MatmulPaths("auto", {}, {})
    base = LoadedBase(
        outline.model, tokenizer, outline.config, folder, settings.model.model or "", None, "", paths, 0, ""
    )
    splits = objective.read_data(RunContext(replace(settings, data=data), objective, base, today=today), data)
    if asked.has_episodes and (tools := shown_tools(asked)):
        check_template(tokenizer, splits.chat_template, tools)
    return splits


def dry_run(settings: TrainSettings) -> dict[str, Any]:
    """Read a run's data, report on it and return the run's plan with `data_report`. Nothing is trained, and no run folder is written.

    The model's files are downloaded as `train` would, and its tokenizer is used, but its weights are not loaded.

    Raises:
        InputError: settings, model, data or run folder that `train` would refuse, or a run that does not fit.
    """
    check_request(settings, ALONE)
    settings = with_pictures(settings)
    settings = settled_offload(settings, ALONE)
    model = settings.model
    source = resolve_model(model.model or "", model.revision, trust_remote_code=model.trust_remote_code)
    folder = cached_gguf_folder(source) if source.kind == "gguf" else source.path
    found, report = find_checkpoint(settings.loop, ALONE), dict[str, Any]()

    def read(outline: Outline, objective: Objective) -> DataSplits | None:
        if readable_data(settings)[0].data is None:
            log.info(
                "Data: the model writes the prompts itself when the run begins; planned for rows of --max-seq-length"
            )
            return None
        splits = read_splits(settings, folder, outline, objective, first_day(settings.loop))
        log.info(splits.report.render())
        report.update(splits.report.to_dict())
        if settings.objective.teacher:
            tokenizer = load_folder_tokenizer(folder, outline.config, model.trust_remote_code)
            check_teacher(settings, TOKENIZER.of(tokenizer))
        if found is not None:
            # What only a loaded model tells is not compared.
            asked = {name: value for name, value in settings.to_flat().items() if not ROWS[name].may_change}
            known = {name: value for name, value in asked.items() if value is not None}
            check_continuation(found, {**found.identity, **known, "rows": splits.train.fingerprint})
        return splits

    with waiting("Planning the run"):
        result = plan_run(settings, read=read, identity=found and found.identity)
    if not result["fits"] and not result["not_known"] and settings.loop.memory_check:
        raise InputError(
            f"this run: needs {gigabytes(result['needed_bytes'])} at its peak by the plan, and may use "
            f"{gigabytes(result['budget_bytes'])}; {result['advice']}, or --no-memory-check to try it anyway"
        )
    return result | {"data_report": report or None}


# Several Macs


@dataclass(frozen=True)
class MacSpec:
    """One Mac as it is given.

    Attributes:
        chip: its name.
        memory_gb: as Apple sells it.
        working_set_bytes: that a run may use, as the Mac itself says; None: about two thirds or three quarters.
    """

    chip: str
    memory_gb: int
    working_set_bytes: int | None = None


def parse_macs(text: str) -> list[MacSpec]:
    """Return each Mac in `M4 Pro:48,M2 Max:32` or `2 x M4 Pro:48`; `M2 Max:32:28` has 28 GB for the GPU.

    Raises:
        InputError: it is written otherwise, or names one Mac only.
    """
    macs = []
    for part in text.split(","):
        several = EQUAL_MACS.fullmatch(part.strip())
        count = int(several["count"]) if several else 1
        chip, *sizes = (several["rest"] if several else part).split(":")
        numbers = [int(size) for size in sizes if size.strip().isdecimal() and len(size) < 6]
        if len(numbers) != len(sizes) or not 1 <= len(sizes) <= 2 or not min(numbers) >= 1 or not 1 <= count <= 256:
            raise InputError(f'--macs {text!r}: write chip and memory of each Mac, as in "M4 Pro:48,M2 Max:32"')
        memory_gb, *wired = numbers
        if memory_gb > MOST_GB or max(wired, default=0) > memory_gb:
            raise InputError(
                f"--macs {part.strip()}: no Mac has {max(numbers)} GB of {memory_gb} for its GPU; write at most {MOST_GB}"
            )
        macs += [MacSpec(find_chip(chip).name, memory_gb, wired[0] * GIB if wired else None)] * count
    if len(macs) < 2:
        raise InputError(f"--macs {text!r}: one Mac; use --chip and --memory-gb, or name two or more")
    return macs


@dataclass(frozen=True)
class SharedModel:
    """A model whose base Macs share, with its adapter.

    Attributes:
        settings: of the run.
        shape, units: of the model.
    """

    settings: TrainSettings
    shape: ModelShape
    units: Units


@lru_cache(maxsize=8)
def shared_model(settings: TrainSettings) -> SharedModel:
    """Return a model, from its config alone.

    Raises:
        InputError: there is no such model.
    """
    dtype = settings.model.dtype if settings.model.dtype != "auto" else "bfloat16"
    outline = outline_for(settings.model, device.compute_dtype(dtype))
    shape = outlined_shape(outline, settings, KernelChoice(settings.loop.kernels))
    return SharedModel(settings, shape, units_of(outline.model))


def plan_on_macs(settings: TrainSettings, macs: Sequence[MacSpec], link: Link) -> dict[str, Any]:
    """Return the plan of a run on several Macs that share its base, as JSON values.

    Args:
        settings: of the run; each row counts as --max-seq-length tokens, and a batch is that of all Macs together.
        macs: what it runs on.
        link: between them.

    Raises:
        InputError: there is no such chip or model, or the parts do not fit the Macs.
    """
    model = shared_model(settings)
    planned = planned_on(model, macs, link)
    found = None if planned["fits"] or planned["problem"] else suggested(model, macs, link)
    return {**planned, "suggested": found and found[0]}


def equal_macs(settings: TrainSettings, count: int, link: Link) -> list[dict[str, Any]]:
    """Return a plan for `count` equal Macs of every chip and memory size.

    Raises:
        InputError: there is no such model, or the parts do not fit the Macs.
    """
    model = shared_model(settings)
    sizes = [MacSpec(chip.name, memory) for chip in CHIPS for memory in chip.memory_gib]
    return [planned_on(model, [mac] * count, link) for mac in sizes]


def planned_on(model: SharedModel, macs: Sequence[MacSpec], link: Link) -> dict[str, Any]:
    """Return a model's plan on some Macs, as JSON values, with each way to divide the run; one of them is `best`."""
    settings, units, first_trained = model.settings, model.units, model.shape.first_trained
    chosen, run, shares = _asked(model, macs)
    found = plan_macs(model.shape, run, chosen, link, units, shares)
    # Why the processes of the run cannot share its base, as `train` would say.
    problem = next(iter(problems_with(settings.to_flat(), "shard_base", split_of(settings))), "")
    splits = [Split(True, problem=problem) if problem else found, plan_macs(model.shape, run, chosen, link)]
    computing_s, fastest = max(found.computing_s), best(splits)
    step_s = found.sending.step_s(computing_s)
    return {
        "fits": found.fits and not problem,
        "problem": problem or None,
        "macs": [
            {
                "name": mac.machine.name,
                "share": share,
                "computing_s": own_s,
                **{name: getattr(memory, name) for name in MAC_FACTS},
            }
            for mac, share, memory, own_s in zip(chosen, shares, found.memory, found.computing_s, strict=True)
        ],
        "shard_base": split_of(settings),
        "rank": settings.adapter.rank,
        "batch_tokens": run.positions,
        "batch_size": settings.loop.batch_size,
        "max_seq_length": run.width + 1,
        "grad_checkpoint": run.checkpointing,
        "units": {
            "blocks": len(units.blocks),
            "largest_bytes": max((*units.blocks, *units.tables)),
            "bytes": units.bytes,
        },
        "sent_bytes_per_step": found.sending.sent_bytes,
        "link_gbit_per_s": link.bytes_per_s * 8 / 1e9,
        "predicted": {
            "note": "predicted, not measured",
            "step_s": step_s,
            "computing_s": computing_s,
            "link_s": found.sending.link_s,
            "waiting_s": step_s - computing_s,
            "gradients_s": found.sending.sum_s,
            "decides": "link" if found.sending.link_s > computing_s else "chips",
            "tokens_per_s": run.positions / step_s,
            "sent_of_base": sum(size for size, _ in units.in_order(first_trained)) / max(1, units.bytes),
        },
        "least_batch_tokens": least_tokens(model.shape, units, run, chosen, shares, link),
        "splits": [
            {
                "name": split.words,
                "fits": not split.problem and split.fits,
                "tokens_per_s": split.tokens_per_s,
                "needed_bytes": split.most_needed_bytes,
                "verdict": split.verdict,
                "best": split is fastest,
            }
            for split in splits
        ],
        "whole_base_bytes": model.shape.base_bytes,
    }


def _asked(model: SharedModel, macs: Sequence[MacSpec]) -> tuple[list[Mac], RunShape, list[float]]:
    """Return the Macs, the largest batch and each Mac's part of the base, as the settings ask for them.

    A Mac may use what its system allows, and no more than --memory-budget.
    """
    settings, asked, chosen = model.settings, split_of(model.settings), []
    number_bytes = 4 if settings.model.dtype == "float32" else 2
    for mac in macs:
        chip = find_chip(mac.chip)
        machine = chip.machine(mac.memory_gb, number_bytes)
        usable = mac.working_set_bytes or machine.working_set_bytes
        if settings.loop.memory_budget is not None:
            usable = min(usable, int(settings.loop.memory_budget * 1e9))
        machine = replace(machine, kernels=KernelTerms(), working_set_bytes=usable)
        chosen.append(Mac(machine, listed_ceilings(chip, number_bytes)))
    parts = [1.0] * len(chosen) if asked == "even" else shard_parts(asked)
    if parts is not None and len(parts) != len(chosen):
        raise InputError(f"--shard-base {asked}: {len(parts)} parts for {len(chosen)} Macs; give one for each")
    shares = [part / sum(parts) for part in parts] if parts else memory_shares([mac.machine for mac in chosen])
    mode = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
    tokens = settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    rows, width = largest_batch(settings.data.max_seq_length - 1, settings, tokens)
    return chosen, run_of(settings, max(rows, len(macs)), width, mode), shares


def suggested(model: SharedModel, macs: Sequence[MacSpec], link: Link) -> tuple[str, SharedModel] | None:
    """Return the settings nearest to the asked ones with which a run fits, None if none of those that are tried does.

    They come as flags, with what to do on the Macs, and as the model with these settings. What is tried is parts by memory,
    smaller adapters, and a row for each Mac, of the asked length and shorter; first with the memory that macOS gives the GPU by
    default, then with all but a few GB.
    """
    settings, count = model.settings, len(macs)
    split = "" if split_of(settings) == "memory" else "--shard-base memory "
    by_memory = replace(settings, loop=replace(settings.loop, shard_base="memory"))
    adapters: list[tuple[str, dict[str, Any]]] = [("", {})]
    adapters += [(f"--rank {rank} ", {"rank": rank}) for rank in RANKS if rank < settings.adapter.rank]
    if any(layer.experts > 1 and layer.rank for block in model.shape.blocks for layer in block.layers):
        adapters.append((f"--target-modules {ATTENTION} ", {"target_modules": ATTENTION}))
    longest, by_examples = settings.data.max_seq_length, settings.loop.batch_size is not None
    smaller = []
    for words, fields in adapters:
        adapted = replace(by_memory, adapter=replace(settings.adapter, **fields))
        one = shared_model(adapted) if fields else model
        for length in (longest, *(shorter for shorter in LENGTHS if shorter < longest)):
            name, size = "batch_tokens", count * (length - 1)
            if by_examples:  # which --batch-tokens does not change
                name, size = "batch_size", max(1, count // settings.objective.rows_per_example)
            data = replace(settings.data, max_seq_length=length)
            other = replace(adapted, data=data, loop=replace(by_memory.loop, **{name: size}))
            flags = f"{words}{'' if length == longest else f'--max-seq-length {length} '}{flag_of(name)} {size}"
            smaller.append((split + flags, replace(one, settings=other)))
    raised = [
        replace(mac, working_set_bytes=max(mac.memory_gb - FOR_MACOS_GB, 1) * GIB)
        if mac.working_set_bytes is None and mac.memory_gb > 2 * FOR_MACOS_GB
        else mac
        for mac in macs
    ]
    limits = {mac.memory_gb: more.working_set_bytes for mac, more in zip(macs, raised, strict=True) if mac != more}
    sizes = " or ".join(f"{limit >> 20} with {memory} GB" for memory, limit in sorted(limits.items()) if limit)
    command = f"`sudo sysctl iogpu.wired_limit_mb=N` on each Mac, N = {sizes}; then "
    for given, first in ((macs, ""), (raised, command)):
        for words, other in smaller:
            chosen, run, shares = _asked(other, given)
            if plan_macs(other.shape, run, chosen, link, other.units, shares).fits:
                return first + words, other
    return None


def split_of(settings: TrainSettings) -> str:
    """Return the --shard-base that a plan is for; without one, parts follow each Mac's memory."""
    return "memory" if settings.loop.shard_base == "off" else settings.loop.shard_base
