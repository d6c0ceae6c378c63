"""Fit a run into memory: describe its model to the planner, choose what is open, refuse what cannot fit, divide the base.

A model's shape is read from the loaded model, or from an outline without weights, in the planner's types. A run that cannot
fit is refused before anything is downloaded or read.

--parallel auto measures the link of the processes for some seconds, and then compares plans for what they could divide. The
data have not been read by then, so a batch is assumed to have a row for every process. Memory and time are the planner's;
the link, and each machine's peak rates, are measured.

Each rank then gets its part of the base, as --shard-base and --parallel say.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.adapters.base import Wire
from mlx_lora.adapters.inject import adapt_model
from mlx_lora.adapters.qat import begin_qat
from mlx_lora.config.checks import shard_parts, sharing_problems, whole_base_reasons
from mlx_lora.config.defaults import DataFacts, batch_tokens_for, with_learning_rate, with_length
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, LoopSettings, TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits
from mlx_lora.data.sampler import BatchPlan, ShapePrice
from mlx_lora.kernels.measure import MLX
from mlx_lora.kernels.quantized_matmul import has_two_ways, use_measured_matmul
from mlx_lora.kernels.table import KernelChoice, planned_kernels
from mlx_lora.losses.cross_entropy import PLAIN_LOGITS
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.load import Base
from mlx_lora.models.meta import Outline, layer_caches, model_shape, outline_for, outline_of, with_quantization
from mlx_lora.models.quantize import choose_quantization
from mlx_lora.objectives.compute import Compute
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.hosts import probe_link
from mlx_lora.parallel.ranks import Ranks, SeveralRanks
from mlx_lora.parallel.sharded_base import frozen_bytes, is_shared
from mlx_lora.parallel.sharded_tables import share_base, units_of
from mlx_lora.parallel.tensor import RankPosition, cut_layers, cut_model
from mlx_lora.planner.fit import (
    SMALLEST_BATCH,
    DataLimits,
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
from mlx_lora.planner.machine import measure_ceilings, this_machine
from mlx_lora.planner.memory import MemoryPlan
from mlx_lora.planner.several_macs import (
    DATA,
    TENSOR,
    Link,
    Mac,
    Split,
    best,
    cut_config,
    cut_problem,
    memory_shares,
    plan_macs,
    rank_part,
    split_by_rows,
    split_by_tensor,
    split_with_shared_base,
)
from mlx_lora.planner.shapes import KernelTerms, Machine, ModelShape, NotKnown, RunShape
from mlx_lora.planner.speed import Ceilings
from mlx_lora.trainer.block_memory import LAG, SHARED_LAG, with_block_memory
from mlx_lora.trainer.gradient_checkpointing import Tape
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

log = logging.getLogger(__name__)

# The run


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
    limits = DataLimits(len(rows), prompts, tokens, shapes)
    fitted = fit(settings, shape, machine, width, limits, ranks)
    check_fits(settings, fitted, shape, machine, width, data=limits)
    return fitted


def fit_settings(
    asked: TrainSettings,
    shape: ModelShape,
    splits: DataSplits,
    chosen: Compute,
    shared: SharedBase,
    ranks: Ranks,
    begun: Mapping[str, Any] | None = None,
) -> tuple[TrainSettings, MemoryPlan]:
    """Return the settings with everything chosen that was open, and the memory that the run needs.

    Args:
        asked: the settings as given.
        shape, splits, chosen, shared, ranks: of the run.
        begun: the identity of the checkpoint to go on from, whose choices are kept; None: the run begins.

    Raises:
        InputError: the run does not fit.
    """
    asked = with_learning_rate(as_begun(asked, begun), shape.model_type, shape.width)
    dealt_to = 1 if shared.cut_by > 1 else ranks.size  # ranks with parts of layers all compute every row
    facts = data_facts(splits.train, splits.valid)
    fitted = fit_run(asked, shape, splits.train, chosen.terms, dealt_to, facts)
    asked = with_length(asked, fitted.batch_tokens, facts, begun["price_epochs"] if begun else None)
    day = splits.chat_day.isoformat() if splits.chat_day else None  # the same one with --resume on another day
    checkpointing = shared.checkpointing(fitted.checkpointing, ranks)
    loop = replace(asked.loop, grad_checkpoint=checkpointing)
    return replace(asked, data=replace(asked.data, chat_date=day), loop=loop), fitted.memory


def as_begun(asked: TrainSettings, begun: Mapping[str, Any] | None) -> TrainSettings:
    """Return the settings with the rate and the batch that the run was begun with, where they are open."""
    if begun is None:
        return asked
    rate, tokens = asked.optimizer.learning_rate, asked.loop.batch_tokens
    optimizer = replace(asked.optimizer, learning_rate=begun.get("learning_rate") if rate is None else rate)
    loop = replace(asked.loop, batch_tokens=begun.get("batch_tokens") if tokens is None else tokens)
    return replace(asked, optimizer=optimizer, loop=loop)


def shape_of(asked: TrainSettings, base: Base, chosen: Compute, shared: SharedBase) -> ModelShape:
    """Return the shape of the adapted model, or of this rank's part of it, with the memory of what was chosen."""
    kernels = chosen.kernels or KernelChoice(MLX)
    shape = shared.shape(asked, base, kernels)
    shape = replace(shape, plain_loss=chosen.loss.kernel == PLAIN_LOGITS)  # then the logits are whole
    if not chosen.loss.part_of_last:
        shape = replace(shape, blocks=tuple(replace(block, at_one=None) for block in shape.blocks))
    return shape


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


def quantized_shape(
    outline: Outline, settings: TrainSettings, kernels: KernelChoice | None = None
) -> ModelShape | None:
    """Return the shape of a float model with a 4-bit base, None if it is already quantized."""
    if outline.is_quantized:
        return None
    quantization = choose_quantization(4, None, None)
    quantized = with_quantization(outline, quantization, device.compute_dtype(settings.model.dtype))
    return outlined_shape(quantized, settings, kernels)


# The model

# Frozen copies of the factors that a method keeps: PiSSA's start, and ReLoRA's finished cycles.
FROZEN_COPIES = {"pissa": 1, "relora": 3}


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
    shape = model_shape(model, config, source_bytes, FROZEN_COPIES.get(settings.adapter.method, 0))
    plain_loss = shape.plain_loss or settings.loop.kernels == MLX
    others = objective_of(settings.objective).other_models_bytes(settings)
    shape = replace(shape, plain_loss=plain_loss, beside_bytes=others)
    choice = known_kernels(settings, shape) if kernels is None else kernels
    lag = LAG if settings.loop.shard_base == "off" else SHARED_LAG
    shape = with_block_memory(shape, model, dict(config), choice, lag)
    shape = replace(shape, teacher=teacher_shape(settings), teacher_stays=settings.objective.on_policy)
    return with_caches(shape, model) if settings.objective.samples else shape


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
    if adapter.method == "pissa":  # its initial factors need weights, which an outline does not have
        adapter = replace(adapter, method="lora")
    adapt_model(outline.model, adapter, settings.loop.seed)
    if adapter.qat:
        begin_qat(outline.model)
    if any(has_two_ways(layer) for layer in outline.model.modules()):  # a packed model may have none of these layers
        use_measured_matmul(outline.model, "dense")  # it takes more memory; for a plan the faster one is not measured
    config = outline.config
    if cut_by > 1:
        cut_layers(outline.model, config, RankPosition(0, cut_by), Wire(lambda x: x))
        config = cut_config(config, cut_by)
    return replace(adapted_shape(outline.model, config, settings, outline.cast_bytes, kernels), loss_ranks=cut_by)


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


# --parallel auto

PROBE_BYTES = 1 << 22  # seconds even at 100 Mbit/s
AUTO = "auto"


def settled_parallel(settings: TrainSettings, ranks: Ranks) -> TrainSettings:
    """Return the settings with what the processes divide.

    Args:
        settings: of the run.
        ranks: of the run; every one must call this.

    Raises:
        InputError: the model cannot be read, or its adapter does not fit it.
    """
    if settings.loop.parallel != AUTO:
        return settings
    if not isinstance(ranks, SeveralRanks):
        return replace(settings, loop=replace(settings.loop, parallel=DATA))
    rates = probe_link(ranks, PROBE_BYTES)
    turns = ranks.size - 1
    measured = ranks.everyone([rates.latency_s / turns, rates.bytes_per_s])
    link = Link(min(rate for _, rate in measured), max(latency for latency, _ in measured))
    machine = this_machine(settings.model.dtype)
    own = [budget_of(settings.loop, machine), asdict(measure_ceilings(settings.model.dtype, rounds=3))]
    macs = [
        Mac(replace(machine, working_set_bytes=budget, kernels=KernelTerms()), Ceilings(**ceilings))
        for budget, ceilings in ranks.everyone(own)
    ]
    splits = _splits(settings, macs, link)
    chosen = best(splits)
    name, shared, words = ranks.from_first([chosen.name, chosen.shared, _choice_words(chosen, splits, link)])
    mx.clear_cache()
    mx.reset_peak_memory()  # the measurements' peak is not the run's
    loop = replace(settings.loop, parallel=name, shard_base="memory" if shared else "off")
    log.info(words)
    return replace(settings, loop=loop)


def _choice_words(chosen: Split, splits: Sequence[Split], link: Link) -> str:
    """Return the choice and its reasons in a line."""
    told = [f"{split.words} {split.verdict}" for split in splits]
    return (
        f"Parallel: {chosen.words}, by the measured link ({link.bytes_per_s * 8 / 1e9:.2g} Gbit/s each way, "
        f"{link.latency_s * 1e6:,.0f} us for a small message); predicted: {'; '.join(told)}"
    )


def _splits(settings: TrainSettings, macs: Sequence[Mac], link: Link) -> list[Split]:
    """Return what is predicted of each way to divide the run."""
    count, smallest = len(macs), min((mac.machine for mac in macs), key=lambda one: one.working_set_bytes)
    flat, dtype = settings.to_flat(), device.compute_dtype(settings.model.dtype)
    outline = outline_for(settings.model, dtype)
    architecture = type(outline.model).__module__.rpartition(".")[2]
    whole = outlined_shape(outline, settings)
    found = [split_by_rows(whole, _batch(settings, count, (whole, smallest)), macs, link)]
    problems = sharing_problems({**flat, "shard_base": "memory"})
    if problems:
        found.append(Split(DATA, True, problem=problems[0]))
    else:
        batch, shares = _batch(settings, count), memory_shares([mac.machine for mac in macs])
        plan = plan_macs(whole, units_of(outline.model), batch, macs, shares, link)
        found.append(split_with_shared_base(plan, batch.positions))
    problems = [f"{setting}: {reason}" for setting, reason in whole_base_reasons(flat)]
    problem = cut_problem(architecture, outline.config, count) or next(iter(problems), None)
    if problem:
        return [*found, Split(TENSOR, problem=problem)]
    fresh = outline_for(settings.model, dtype)
    part = outlined_shape(fresh, settings, cut_by=count)
    batch = _batch(settings, count, (part, smallest))
    return [*found, split_by_tensor(part, batch, macs, link, dtype.size)]


def _batch(settings: TrainSettings, count: int, of: tuple[ModelShape, Machine] | None = None) -> RunShape:
    """Return a batch of all ranks, with a row for each at least.

    Args:
        settings: of the run.
        count: of ranks.
        of: the shape and the machine that checkpointing, and tokens if they are open, must fit; None: blocks are computed
            again, and the tokens are the default.
    """
    loop, longest = settings.loop, settings.data.max_seq_length - 1
    tokens, mode = loop.batch_tokens or DEFAULT_BATCH_TOKENS, "block"
    width = longest if loop.batch_size else max(1, min(longest, tokens // count))
    if of is not None:
        fitted = fit(settings, *of, width)
        tokens, mode = fitted.batch_tokens, fitted.checkpointing
    rows, width = largest_batch(width, settings, tokens)
    return run_of(settings, max(rows, count), width, mode)


# Parts of the base


@dataclass(frozen=True)
class SharedBase:
    """How a run's base is shared.

    Attributes:
        share: of this rank, from 0 to 1; None: blocks are not gathered.
        words: for the run header.
        cut_by: in how many parts layers are cut; 1: they are whole.
    """

    share: float | None = None
    words: str = ""
    cut_by: int = 1

    def shape(self, settings: TrainSettings, base: Base, kernels: KernelChoice) -> ModelShape:
        """Return the shape of this rank's part of the adapted model.

        Where it is a part, it is read from an outline: blocks that are gathered have no weights but their part, and the
        graphs of layers that are cut have messages in them.
        """
        if self.share is not None:
            return rank_shape(settings, self.share, kernels)
        if self.cut_by > 1:
            return outlined_shape(_outline(settings), settings, kernels, self.cut_by)
        return adapted_shape(base.model, base.config, settings, kernels=kernels)

    def checkpointing(self, own: str, ranks: Ranks) -> str:
        """Return a rank's checkpointing, and one for all ranks where a block that is computed again sends messages.

        Args:
            own: of this rank, which may have chosen it by its own memory.
            ranks: of the run.
        """
        return "block" if self.cut_by > 1 and len(set(ranks.everyone(own))) > 1 else own


def share_among(settings: TrainSettings, base: Base, ranks: Ranks) -> tuple[TrainSettings, SharedBase]:
    """Leave only this rank's part of the base in memory, if the settings say so.

    The base is cut at its layers (--parallel tensor) or between its bytes (--shard-base).

    Args:
        settings: of the run.
        base: adapted; its weights may not have been read yet.
        ranks: the processes of the run.

    Returns:
        The settings with what sharing decides, and how the base is shared.

    Raises:
        InputError: a single process, parts that do not fit the processes, or a model that cannot be shared.
    """
    if settings.loop.parallel == TENSOR:
        return _cut_among(settings, base, ranks)
    asked = settings.loop.shard_base
    if asked == "off":
        return settings, SharedBase()
    if not isinstance(ranks, SeveralRanks):
        raise InputError(
            f"--shard-base {asked}: this run is a single process; start several with mlx.launch, or leave it out"
        )
    shares = shares_of(settings, ranks)
    alive = units_of(base.model).largest
    units = share_base(base.model, ranks, shares, base.stored)
    device.wait_beyond(mx.get_active_memory() + alive)  # until the run has a plan
    checkpointing = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
    loop = replace(settings.loop, grad_checkpoint=checkpointing, sample_tokens=0)
    own = sum(unit.parts[ranks.rank] for unit in units)
    words = f"base shared by {ranks.size} processes ({own / 1e6:,.0f} of {sum(unit.bytes for unit in units) / 1e6:,.0f} MB here)"
    return replace(settings, loop=loop), SharedBase(shares[ranks.rank], words)


def _cut_among(settings: TrainSettings, base: Base, ranks: Ranks) -> tuple[TrainSettings, SharedBase]:
    """Leave this rank's part of each layer in memory; see `share_among`."""
    if not isinstance(ranks, SeveralRanks):
        raise InputError(
            "--parallel tensor: this run is a single process; start several with mlx.launch, or leave it out"
        )
    cut_model(base.model, base.config, ranks)
    own, whole = frozen_bytes(base.model), base.size_bytes
    words = f"layers cut among {ranks.size} processes ({own / 1e6:,.0f} of {whole / 1e6:,.0f} MB here)"
    # What tries kernels calls the model, so all ranks try the same ones.
    loop = replace(settings.loop, sample_tokens=0, kernels=ranks.from_first(settings.loop.kernels))
    return replace(settings, loop=loop), SharedBase(words=words, cut_by=ranks.size)


def shares_of(settings: TrainSettings, ranks: Ranks) -> list[float]:
    """Return each rank's share of the base, which add up to 1.

    Raises:
        InputError: as many parts were given as there are not processes.
    """
    asked = settings.loop.shard_base
    if asked == "memory":
        parts: Sequence[float] = ranks.everyone(this_machine(settings.model.dtype).working_set_bytes)
    else:
        parts = shard_parts(asked) or [1.0] * ranks.size
    if len(parts) != ranks.size:
        raise InputError(f"--shard-base {asked}: {len(parts)} parts for {ranks.size} processes; give one for each")
    return [part / sum(parts) for part in parts]


def in_parts(loop: LoopSettings) -> bool:
    """Return whether a rank keeps only a part of the base, so that its weights are read when it is known which."""
    return loop.shard_base != "off" or loop.parallel == TENSOR


def rank_shape(settings: TrainSettings, share: float, kernels: KernelChoice | None = None) -> ModelShape:
    """Return the shape of one rank's part of the adapted model.

    Args:
        settings: of the run.
        share: of the rank, from 0 to 1.
        kernels: see `adapted_shape`.
    """
    outline = _outline(settings)
    shape = outlined_shape(outline, settings, kernels)
    return rank_part(shape, units_of(outline.model), share)


def _outline(settings: TrainSettings) -> Outline:
    return outline_for(settings.model, device.compute_dtype(settings.model.dtype))


def check_blocks_are_apart(base: Base, tape: Tape | None) -> None:
    """Refuse a shared base whose blocks pass a state to each other.

    Args:
        base: of the run.
        tape: of the checkpointing; None: there is none.

    Raises:
        InputError: such blocks are not checkpointed, so each would keep its gathered weights until the backward pass.
    """
    if is_shared(base.model) and tape is not None and tape.left_out:
        raise InputError(
            f"--shard-base: blocks of {base.config.get('model_type')} pass a state to the next block, so every block "
            "would have to keep its weights until the backward pass; leave --shard-base out"
        )
