"""Fit a run into memory: choose what is open, and refuse what cannot fit, before anything is downloaded or read if possible."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.config.defaults import DataFacts, batch_tokens_for, with_learning_rate, with_length
from mlx_lora.config.settings import AUTO
from mlx_lora.data.sampler import BatchPlan, ShapePrice
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.meta import Outline, outline_for, with_quantization
from mlx_lora.models.quantize import choose_quantization
from mlx_lora.planner.fit import SMALLEST_BATCH, DataLimits, Fitted, Prompts, Shapes, answer_room, check_fits, fit
from mlx_lora.planner.machine import this_machine
from mlx_lora.trainer.model_shape import outlined_shape, with_kernels
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.config.settings import LoopSettings, TrainSettings
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.kernels.table import KernelChoice
    from mlx_lora.losses.check import Compute
    from mlx_lora.parallel.strategy import Strategy
    from mlx_lora.planner.memory import MemoryPlan
    from mlx_lora.planner.shapes import KernelTerms, ModelShape

log = logging.getLogger(__name__)


def fit_run(
    settings: TrainSettings,
    shape: ModelShape,
    rows: EncodedSet,
    kernels: KernelTerms,
    ranks: int = 1,
    facts: DataFacts | None = None,
    hidden_from: int = 0,
) -> Fitted:
    """Choose the settings that the user did not give, and refuse a run that does not fit in memory.

    Args:
        settings: of the run.
        shape: the adapted model.
        rows: training data; its longest row and its number of rows bound a batch.
        kernels: the memory of the chosen kernels.
        ranks: processes that share each batch's rows.
        facts: about the data, for the size of a batch; None: as much as fits, up to the default.
        hidden_from: see `batch_tokens_for`.

    Raises:
        InputError: see `check_fits`.
    """
    machine = replace(this_machine(settings.model.dtype), kernels=kernels)
    width = longest(rows)
    prompts = prompts_of(settings.objective, rows)
    shape = replace(shape, trained_share=trained_share(settings.objective, rows))
    shapes, tokens = batch_shapes(settings, rows, facts), batch_tokens_for(settings, facts, hidden_from)
    limits = DataLimits(len(rows), prompts, tokens, shapes)
    fitted = fit(settings, shape, machine, width, limits, ranks)
    check_fits(settings, fitted, shape, machine, width, data=limits)
    return fitted


def fit_settings(
    asked: TrainSettings,
    shape: ModelShape,
    splits: DataSplits,
    chosen: Compute,
    strategy: Strategy,
    begun: Mapping[str, Any] | None = None,
) -> tuple[TrainSettings, MemoryPlan]:
    """Return the settings with everything chosen that was open, and the memory that the run needs.

    Args:
        asked: the settings as given.
        shape, splits, chosen, strategy: of the run.
        begun: the identity of the checkpoint to go on from, whose choices are kept; None: the run begins.

    Raises:
        InputError: the run does not fit.
    """
    asked = with_learning_rate(as_begun(asked, begun), shape.model_type, shape.width)
    facts = data_facts(splits.train, splits.valid)
    width, open_batch = longest(splits.train), asked.loop.batch_tokens is None and asked.loop.batch_size is None
    hidden_from = strategy.hidden_from(asked, shape, width) if open_batch else 0
    size = strategy.ranks.size
    fitted = fit_run(asked, shape, splits.train, chosen.terms, size, facts, hidden_from)
    # A batch is that of all ranks, so the one with the least memory decides.
    least = min(strategy.everyone(fitted.batch_tokens))
    if open_batch and least < fitted.batch_tokens:
        asked = replace(asked, loop=replace(asked.loop, batch_tokens=least))
        fitted = fit_run(asked, shape, splits.train, chosen.terms, size, facts)
    if hidden_from and fitted.batch_tokens > batch_tokens_for(asked, facts):
        log.info(
            f"Batches: larger than usual for these data, because from {hidden_from:,} tokens on no step waits for the disk"
        )
    asked = with_length(asked, fitted.batch_tokens, facts, begun["price_epochs"] if begun else None)
    day = splits.chat_day.isoformat() if splits.chat_day else None  # the same one with --resume on another day
    loop = replace(asked.loop, grad_checkpoint=fitted.checkpointing)
    return replace(asked, data=replace(asked.data, chat_date=day), loop=loop), fitted.memory


def longest(rows: EncodedSet) -> int:
    """Return the positions of the longest row."""
    return max(1, int(rows.lengths.max(initial=2)) - 1)


def as_begun(asked: TrainSettings, begun: Mapping[str, Any] | None) -> TrainSettings:
    """Return the settings with the rate and the batch that the run was begun with, where they are open."""
    if begun is None:
        return asked
    rate, tokens = asked.optimizer.learning_rate, asked.loop.batch_tokens
    optimizer = replace(asked.optimizer, learning_rate=begun.get("learning_rate") if rate in (None, AUTO) else rate)
    loop = replace(asked.loop, batch_tokens=begun.get("batch_tokens") if tokens is None else tokens)
    return replace(asked, optimizer=optimizer, loop=loop)


def batch_shapes(settings: TrainSettings, rows: EncodedSet, facts: DataFacts | None) -> Shapes:
    """Return what gives the shapes of the batches that some rows are divided into.

    Short rows may take more memory together than the longest one: a batch of them is fuller.
    """
    planned = batches_by_tokens(settings, rows, facts)
    return lambda tokens: planned(tokens)[1]


def batches_by_tokens(
    settings: TrainSettings, rows: EncodedSet, facts: DataFacts | None
) -> Callable[[int], tuple[int, list[tuple[int, int, int]]]]:
    """Return what gives, by the tokens of a batch, how many batches some rows are divided into, and their shapes."""

    def planned(tokens: int) -> tuple[int, list[tuple[int, int, int]]]:
        loop = with_length(settings, tokens, facts).loop
        plan = training_plan(loop, rows, loop.epochs or 1.0)
        return len(plan), list(plan.shapes)

    return lru_cache(planned)


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


def check_base_fits(settings: TrainSettings) -> None:
    """Refuse a model with which not even the shortest row fits, before weights are loaded or downloaded.

    Raises:
        InputError: see `check_fits`.
    """
    loop = settings.loop
    if not loop.memory_check or loop.shard_base != "off":  # with parts it is told later
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


def quantized_shape(
    outline: Outline, settings: TrainSettings, kernels: KernelChoice | None = None
) -> ModelShape | None:
    """Return the shape of a float model with a 4-bit base, None if it is already quantized."""
    if outline.is_quantized:
        return None
    quantization = choose_quantization(4, None, None)
    quantized = with_quantization(outline, quantization, device.compute_dtype(settings.model.dtype))
    return outlined_shape(quantized, settings, kernels)
