"""Predict a workload's speed and memory with the planner, for the measuring machine and for chips without results.

Useful work does not include padding and what checkpointing repeats. MFU is useful work per second divided by the rate of
a large product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import mlx.core as mx

from mlx_lora.bench.workloads import MODELS, TIERS, Workload
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.fit import run_of
from mlx_lora.planner.memory import plan_memory
from mlx_lora.planner.shapes import Machine, ModelShape
from mlx_lora.planner.speed import CHIPS, Ceilings, Chip, count_step, known_chip, listed_ceilings, step_seconds
from mlx_lora.trainer.fit import outlined_shape

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The quantization of the embedded model's GGUF file: Q4_1, and Q8_0 for the embedding, which is also the head.
EMBEDDED_QUANTIZATION = {
    "group_size": 32,
    "bits": 4,
    "mode": "affine",
    "model.embed_tokens": {"group_size": 32, "bits": 8, "mode": "affine"},
}


@dataclass(frozen=True)
class Batch:
    """A batch of a workload.

    Attributes:
        rows, width: its shape.
        trained, real: numbers of positions that are trained, and that are not padding.
    """

    rows: int
    width: int
    trained: int
    real: int


def model_shape_of(workload: Workload, dtype: str = "bfloat16") -> ModelShape:
    """Return the shape of a workload's model with its adapter, from the list of workloads; nothing is read or downloaded.

    Workloads of the same model and adapter get the same object: building it and reading its blocks takes a second.

    Args:
        workload: the workload.
        dtype: of the floats.
    """
    packed_file = workload.packed and workload.tier == "embedded"
    alike = Workload("embedded" if packed_file else "8", workload.model, "chat", workload.packed, rank=workload.rank)
    return _shape_of(alike, dtype)


@cache
def _shape_of(workload: Workload, dtype: str) -> ModelShape:
    model = MODELS[workload.model]
    quantization = EMBEDDED_QUANTIZATION if workload.tier == "embedded" else model.quantization
    config = {**model.config, **({"quantization": quantization} if workload.packed else {})}
    outline = outline_of_config(config, getattr(mx, dtype))
    return outlined_shape(outline, _settings(workload))


@cache
def _settings(workload: Workload) -> TrainSettings:
    return train_settings(workload.flags())


def typical_batches(workload: Workload) -> list[Batch]:
    """Return a typical batch, for predictions without a tokenizer."""
    shape = workload.shape
    rows = max(1, workload.batch_tokens // shape.typical_width)
    positions = rows * shape.typical_width
    return [
        Batch(rows, shape.typical_width, round(positions * shape.trained_share), round(positions * shape.real_share))
    ]


def batches_of(records: Sequence[dict[str, Any]]) -> list[Batch]:
    """Return the batches of a run's steps; several micro-batches of a step share its tokens in proportion to size."""
    found = []
    for record in records:
        for shape in record["shapes"]:
            rows, width = (int(side) for side in shape.split("x"))
            share = rows * width / record["positions"]
            trained, real = (round(record[key] * share) for key in ("supervised_tokens", "real_tokens"))
            found.append(Batch(rows, width, trained, real))
    return found


def predict(workload: Workload, machine: Machine, ceilings: Ceilings, batches: Sequence[Batch]) -> dict[str, Any]:
    """Predict speed and memory of a workload.

    Args:
        workload: the workload.
        machine: the machine that it would run on.
        ceilings: the machine's rates.
        batches: the batches of its steps.

    Returns:
        `tokens_per_s` of real tokens, `peak_memory_bytes` and `needed_bytes` (with the buffer cache), whether it
        `fits`, and `flops_per_token` of useful work.
    """
    shape = model_shape_of(workload, "float32" if machine.number_bytes == 4 else "bfloat16")
    settings, mode = _settings(workload), workload.checkpointing
    seconds = flops = 0.0
    peak = needed = 0
    fits = True
    for batch in batches:
        run = run_of(settings, batch.rows, batch.width, mode, batch.trained)
        seconds += step_seconds(shape, run, machine, ceilings)[0]
        counts = count_step(shape, replace(run, checkpointing="none"), machine)
        flops += sum(count.flops for count in counts.values()) * batch.real / run.positions
        memory = plan_memory(shape, run, machine)
        peak, needed, fits = (
            max(peak, memory.peak_bytes),
            max(needed, memory.needed_bytes),
            fits and memory.fits,
        )
    real = sum(batch.real for batch in batches)
    return {
        "tokens_per_s": real / seconds,
        "peak_memory_bytes": peak,
        "needed_bytes": needed,
        "fits": fits,
        "flops_per_token": flops / real,
    }


def measured_machine(device: dict[str, Any], ceilings: dict[str, Any]) -> tuple[Machine, Ceilings]:
    """Return the results of bench/machine.py as the planner's types."""
    machine = Machine(
        device["name"],
        device["backend"],
        device["memory_bytes"],
        device["working_set_bytes"],
        NUMBER_BYTES[device["compute_dtype"]],
    )
    exponentials = ceilings["exponentials_per_s"]
    rates = Ceilings(
        ceilings["flops_per_s"],
        ceilings["bytes_per_s"],
        float("inf") if exponentials is None else exponentials,
        ceilings["launch_s"],
        "measured here",
    )
    return machine, rates


def listed_flops(device: dict[str, Any]) -> float | None:
    """Return a chip's listed peak in the run's dtype, None if the chip is not in the table."""
    chip = known_chip(device["name"]) if device["backend"] == "metal" else None
    if chip is None:
        return None
    return chip.tflops * 1e12 * (chip.half_rate if NUMBER_BYTES[device["compute_dtype"]] == 2 else 1.0)


def predict_chips(workload: Workload) -> list[dict[str, Any]]:
    """Predict a workload for every chip of the table, with the smallest memory sold that it fits in.

    Returns:
        One dict per chip: `chip`, `gpu_cores`, `status` (of the listed figures), `memory_gib` (None: it does not fit in
        any size that is sold), and what `predict` returns.
    """
    return [_predict_chip(workload, chip) for chip in CHIPS]


def _predict_chip(workload: Workload, chip: Chip) -> dict[str, Any]:
    batches = typical_batches(workload)
    for size in chip.memory_gib:
        expected = predict(workload, chip.machine(size), listed_ceilings(chip), batches)
        if expected["fits"]:
            break
    return {
        "chip": chip.name,
        "gpu_cores": chip.gpu_cores,
        "status": chip.status,
        "memory_gib": size if expected["fits"] else None,
        **expected,
    }


def predict_sizes(workload: Workload) -> list[tuple[int, dict[str, Any]]]:
    """Predict a workload for Macs with each tier's memory: (GB, what `predict` returns and `working_set_bytes`)."""
    found = []
    for size in (int(tier) for tier in TIERS if tier != "embedded"):
        chip = next(chip for chip in CHIPS if size in chip.memory_gib)
        machine = chip.machine(size)
        expected = predict(workload, machine, listed_ceilings(chip), typical_batches(workload))
        found.append((size, {**expected, "working_set_bytes": machine.working_set_bytes}))
    return found
