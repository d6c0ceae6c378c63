"""Check whether a run fits in memory: describe its model, loaded or only outlined, in the planner's types."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.adapt import adapt_model
from mlx_lora.adapters.cut_layers import Wire
from mlx_lora.adapters.model_shape import model_shape
from mlx_lora.data.batches import BatchPlan
from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.joining import joined
from mlx_lora.data.widths import ShapePrice
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.kernel_choice import KernelChoice, planned_kernels
from mlx_lora.models.kernel_row import MLX
from mlx_lora.models.layer_caches import layer_caches
from mlx_lora.models.matmul import has_two_ways, use_measured_matmul
from mlx_lora.models.outline import Outline, outline_for, outline_of, with_quantization
from mlx_lora.models.quantize import choose_quantization
from mlx_lora.planner.fitting import (
    SMALLEST_BATCH,
    Fitted,
    Prompts,
    Shapes,
    answer_room,
    budget_of,
    check_fits,
    fit,
    largest_batch,
    run_of,
)
from mlx_lora.planner.memory import MemoryPlan, plan_memory
from mlx_lora.planner.shapes import KernelTerms, Machine, ModelShape, NotKnown
from mlx_lora.planner.tensor_plan import cut_config
from mlx_lora.planner.this_machine import this_machine
from mlx_lora.settings.config import DEFAULT_BATCH_TOKENS, LoopSettings, ObjectiveSettings, TrainSettings
from mlx_lora.settings.defaults import DataFacts, batch_tokens_for, with_length
from mlx_lora.system import device
from mlx_lora.system.errors import InputError
from mlx_lora.training.beside import beside_bytes
from mlx_lora.training.block_memory import LAG, SHARED_LAG, with_block_memory
from mlx_lora.training.tensor_parallel import Place, cut_layers

# Frozen copies of the factors that a method keeps: PiSSA's start, and ReLoRA's finished cycles.
FROZEN_COPIES = {"pissa": 1, "relora": 3}


def fit_run(
    settings: TrainSettings,
    shape: ModelShape,
    rows: EncodedSet,
    kernels: KernelTerms,
    ranks: int = 1,
    facts: DataFacts | None = None,
) -> Fitted:
    """Choose the settings that the user did not give, and refuse a run that does not fit in memory.

    Args:
        settings: of the run.
        shape: the adapted model.
        rows: training data; its longest row and its number of rows bound a batch.
        kernels: the memory of the chosen kernels.
        ranks: processes that share each batch's rows.
        facts: about the data, for the size of a batch; None: as much as fits, up to the default.

    Raises:
        InputError: see `check_fits`.
    """
    machine = replace(this_machine(settings.model.dtype), kernels=kernels)
    width = max(1, int(rows.lengths.max(initial=2)) - 1)
    prompts = prompts_of(settings.objective, rows)
    shape = replace(shape, trained_share=trained_share(settings.objective, rows))
    shapes, tokens = batch_shapes(settings, rows, facts), batch_tokens_for(settings, facts)
    fitted = fit(settings, shape, machine, width, len(rows), prompts, ranks, tokens, shapes)
    check_fits(settings, fitted, shape, machine, width, most_rows=len(rows), prompts=prompts)
    return fitted


def batch_shapes(settings: TrainSettings, rows: EncodedSet, facts: DataFacts | None) -> Shapes:
    """Return what gives the shapes of the batches that some rows are divided into.

    Short rows may take more memory together than the longest one: a batch of them is fuller.
    """

    def shapes(tokens: int) -> list[tuple[int, int]]:
        loop = with_length(settings, tokens, facts).loop
        return [(count, width) for count, width, _ in training_plan(loop, rows, loop.epochs or 1.0).shapes]

    return lru_cache(shapes)


def training_plan(loop: LoopSettings, rows: EncodedSet, epochs: float) -> BatchPlan:
    """Plan the batches to train on.

    Args:
        loop: of the run; its --batch-tokens is chosen by now.
        rows: to train on.
        epochs: that a new shape's price is weighed against. A resumed run with more steps keeps the shapes that it began
            with.
    """
    tokens: Any = loop.batch_tokens
    price = ShapePrice(epochs=epochs)
    return BatchPlan(rows, batch_tokens=tokens, batch_size=loop.batch_size, seed=loop.seed, price=price)


def trained_share(objective: ObjectiveSettings, rows: EncodedSet) -> float:
    """Return the share of positions that is trained, of the rows that are; 1 for sampled answers, which are not known yet."""
    positions = int((rows.lengths[rows.trained_numbers] - 1).sum())
    return 1.0 if objective.samples or not positions else rows.supervised_tokens / positions


def data_facts(rows: EncodedSet, held_out: EncodedSet | None) -> DataFacts:
    """Return the size of the data to train on, which the defaults follow."""
    return DataFacts(rows.examples, int((rows.lengths - 1).sum()), 0 if held_out is None else held_out.examples)


def prompts_of(objective: ObjectiveSettings, rows: EncodedSet) -> Prompts:
    """Return the lengths of the prompts of rows with room for answers; none if the data have the answers."""
    if not objective.samples or not len(rows):
        return ()
    longest = (rows.lengths - 1).reshape(-1, rows.group).max(axis=1)
    tokens, counts = np.unique(np.maximum(1, longest - answer_room(objective)), return_counts=True)
    return tuple(zip(tokens.tolist(), np.cumsum(counts).tolist(), strict=True))


def joined_memory(settings: TrainSettings, shape: ModelShape, rows: EncodedSet, kernels: KernelTerms) -> MemoryPlan:
    """Return the memory of a run's largest batch if the answers to a prompt share a row.

    Args:
        settings: of the run, with everything chosen for rows with one answer each.
        shape: the adapted model.
        rows: training data, with room for an answer in each row.
        kernels: the memory of the chosen kernels.
    """
    machine = replace(this_machine(settings.model.dtype), kernels=kernels)
    width, tokens = max(1, int(rows.lengths.max(initial=2)) - 1), settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    prompts = largest_batch(width, settings, tokens, len(rows))[0] // rows.group
    together = replace(settings, objective=replace(settings.objective, shared_prefix="on"))
    columns = int(joined(rows).lengths.max(initial=2)) - 1
    run = run_of(together, prompts, columns, settings.loop.grad_checkpoint)
    return plan_memory(shape, run, machine, budget_of(settings.loop, machine))


def check_base_fits(settings: TrainSettings) -> None:
    """Refuse a model with which not even the shortest row fits, before weights are loaded or downloaded.

    Raises:
        InputError: see `check_fits`.
    """
    loop = settings.loop
    if not loop.memory_check or loop.shard_base != "off" or loop.parallel == "tensor":  # with parts it is told later
        return
    dtype = device.compute_dtype(settings.model.dtype)
    try:
        outline = outline_for(settings.model, dtype)
        shape = outlined_shape(outline, settings)
    except (InputError, *FOREIGN_ERRORS) as error:
        if not isinstance(error, InputError) and not is_foreign(error):
            raise
        return  # loading reports what is wrong with the model
    machine = with_kernels(settings, shape, this_machine(settings.model.dtype))
    short = replace(settings, loop=replace(settings.loop, batch_size=1, grad_checkpoint="block"))
    fitted = fit(short, shape, machine, SMALLEST_BATCH)
    check_fits(settings, fitted, shape, machine, SMALLEST_BATCH, lambda: quantized_shape(outline, settings))


def outlined_shape(
    outline: Outline, settings: TrainSettings, kernels: KernelChoice | None = None, cut_by: int = 1
) -> ModelShape:
    """Return the shape of an outline with the settings' adapter; kernels as in `adapted_shape`.

    Args:
        outline, settings, kernels: of the run.
        cut_by: the number of ranks that have parts of its layers; the shape is that of one rank's.

    Raises:
        InputError: the adapter does not fit the model, or it cannot be cut.
    """
    adapter = settings.adapter
    if adapter.method_name == "pissa":  # its initial factors need weights, which an outline does not have
        adapter = replace(adapter, method="lora", fine_tune_type=None)
    adapt_model(outline.model, adapter, settings.loop.seed)
    if any(has_two_ways(layer) for layer in outline.model.modules()):  # a packed model may have none of these layers
        use_measured_matmul(outline.model, "dense")  # it takes more memory; for a plan the faster one is not measured
    config = outline.config
    if cut_by > 1:
        cut_layers(outline.model, config, Place(0, cut_by), Wire(lambda x: x))
        config = cut_config(config, cut_by)
    return replace(adapted_shape(outline.model, config, settings, outline.cast_bytes, kernels), loss_ranks=cut_by)


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
    lag = LAG if settings.loop.shard_base == "off" else SHARED_LAG
    shape = with_block_memory(shape, model, dict(config), choice, lag)
    shape = replace(shape, teacher=teacher_shape(settings), teacher_stays=settings.objective.on_policy)
    return with_caches(shape, model) if settings.objective.samples else shape


def teacher_shape(settings: TrainSettings) -> ModelShape | None:
    """Return the shape of --teacher, from its files' headers; None if there is none: the base itself takes no more memory.

    Raises:
        InputError: there is no such model, or mlx-lm does not have its architecture.
    """
    name = settings.objective.teacher
    if not name:
        return None
    outline = outline_of(name, None, device.compute_dtype(settings.model.dtype))
    outline.model.freeze()
    return model_shape(outline.model, outline.config, outline.cast_bytes)


def with_caches(shape: ModelShape, model: nn.Module) -> ModelShape:
    """Return the shape with what the model's layers keep while answers are sampled."""
    try:
        return replace(shape, caches=layer_caches(model))
    except NotKnown as error:
        return replace(shape, not_known=(*shape.not_known, str(error)))


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
