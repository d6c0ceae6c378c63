"""Check whether a run fits in memory: describe its model, loaded or only outlined, in the planner's types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import mlx.nn as nn

from mlx_lora.adapters.adapt import adapt_model
from mlx_lora.adapters.model_shape import model_shape
from mlx_lora.data.encode import EncodedSet
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.kernel_choice import KernelChoice, planned_kernels
from mlx_lora.models.kernel_row import MLX
from mlx_lora.models.matmul import has_two_ways, use_measured_matmul
from mlx_lora.models.outline import Outline, outline_of, with_quantization
from mlx_lora.models.quantize import choose_quantization
from mlx_lora.planner.fitting import SMALLEST_BATCH, Fitted, check_fits, fit
from mlx_lora.planner.shapes import KernelTerms, Machine, ModelShape
from mlx_lora.planner.this_machine import this_machine
from mlx_lora.settings.config import TrainSettings
from mlx_lora.system import device
from mlx_lora.system.errors import InputError
from mlx_lora.training.beside import beside_bytes
from mlx_lora.training.block_memory import with_block_memory

# Frozen copies of the factors that a method keeps: PiSSA's start, and ReLoRA's finished cycles.
FROZEN_COPIES = {"pissa": 1, "relora": 3}


def fit_run(settings: TrainSettings, shape: ModelShape, rows: EncodedSet, kernels: KernelTerms) -> Fitted:
    """Choose the settings that the user did not give, and refuse a run that does not fit in memory.

    Args:
        settings: of the run.
        shape: the adapted model.
        rows: training data; its longest row and its number of rows bound a batch.
        kernels: the memory of the chosen kernels.

    Raises:
        InputError: see `check_fits`.
    """
    machine = replace(this_machine(settings.model.dtype), kernels=kernels)
    width = max(1, int(rows.lengths.max(initial=2)) - 1)
    fitted = fit(settings, shape, machine, width, len(rows))
    check_fits(settings, fitted, shape, machine, width, most_rows=len(rows))
    return fitted


def check_base_fits(settings: TrainSettings) -> None:
    """Refuse a model with which not even the shortest row fits, before weights are loaded or downloaded.

    Raises:
        InputError: see `check_fits`.
    """
    if not settings.loop.memory_check:
        return
    dtype = device.compute_dtype(settings.model.dtype)
    try:
        outline = outline_of(settings.model.model or "", settings.model.revision, dtype)
        shape = outlined_shape(outline, settings)
    except (InputError, *FOREIGN_ERRORS) as error:
        if not isinstance(error, InputError) and not is_foreign(error):
            raise
        return  # loading reports what is wrong with the model
    machine = with_kernels(settings, shape, this_machine(settings.model.dtype))
    short = replace(settings, loop=replace(settings.loop, batch_size=1, grad_checkpoint="block"))
    fitted = fit(short, shape, machine, SMALLEST_BATCH)
    check_fits(settings, fitted, shape, machine, SMALLEST_BATCH, lambda: quantized_shape(outline, settings))


def outlined_shape(outline: Outline, settings: TrainSettings, kernels: KernelChoice | None = None) -> ModelShape:
    """Return the shape of an outline with the settings' adapter; kernels as in `adapted_shape`.

    Raises:
        InputError: the adapter does not fit the model.
    """
    adapter = settings.adapter
    if adapter.method_name == "pissa":  # its initial factors need weights, which an outline does not have
        adapter = replace(adapter, method="lora", fine_tune_type=None)
    adapt_model(outline.model, adapter, settings.loop.seed)
    if any(has_two_ways(layer) for layer in outline.model.modules()):  # a packed model may have none of these layers
        use_measured_matmul(outline.model, "dense")  # it takes more memory; for a plan the faster one is not measured
    return adapted_shape(outline.model, outline.config, settings, outline.cast_bytes, kernels)


def adapted_shape(
    model: nn.Module,
    config: Mapping[str, Any],
    settings: TrainSettings,
    source_bytes: int = 0,
    kernels: KernelChoice | None = None,
) -> ModelShape:
    """Return the shape of an adapted model, with all arrays that its method will hold during the run.

    Args:
        model, config: an mlx-lm model and its config.json.
        settings: of the run.
        source_bytes: see `ModelShape`.
        kernels: the kernels that it trains with; None: chosen from this machine's measurements.
    """
    shape = model_shape(model, config, source_bytes, FROZEN_COPIES.get(settings.adapter.method_name, 0))
    plain_loss = shape.plain_loss or settings.loop.kernels == MLX
    shape = replace(shape, plain_loss=plain_loss, beside_bytes=beside_bytes(settings))
    choice = known_kernels(settings, shape) if kernels is None else kernels
    return with_block_memory(shape, model, dict(config), choice)


def known_kernels(settings: TrainSettings, shape: ModelShape) -> KernelChoice:
    """Return the kernels that a run would use by this machine's measurements, ours if there are none."""
    return planned_kernels(shape, settings.loop.kernels, device.compute_dtype(settings.model.dtype))


def with_kernels(
    settings: TrainSettings, shape: ModelShape, machine: Machine, kernels: KernelChoice | None = None
) -> Machine:
    """Return a machine with the memory of `kernels`; None: chosen from this machine's measurements."""
    if kernels is None:
        return replace(machine, kernels=known_kernels(settings, shape).terms())
    return replace(machine, kernels=KernelTerms.of_mlx(machine.backend) if kernels.asked == MLX else KernelTerms())


def quantized_shape(
    outline: Outline, settings: TrainSettings, kernels: KernelChoice | None = None
) -> ModelShape | None:
    """Return the shape of a float model with a 4-bit base, None if it is already quantized."""
    if outline.is_quantized:
        return None
    quantization = choose_quantization(4, None, None)
    quantized = with_quantization(outline, quantization, device.compute_dtype(settings.model.dtype))
    return outlined_shape(quantized, settings, kernels)
