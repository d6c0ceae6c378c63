"""Fit a run into memory: choose what is open, and refuse what cannot fit, before anything is downloaded or read if possible.

With it goes what the processes of a run divide, and whether its base is read from files.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import asdict, astuple, dataclass, field, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.adapters.inject import adapt_model, adapter_layers
from mlx_lora.adapters.qat import begin_qat
from mlx_lora.compat.functions import answering
from mlx_lora.config.defaults import DataFacts, batch_tokens_for, with_learning_rate, with_length
from mlx_lora.config.rules import problems_with
from mlx_lora.config.settings import AUTO, DATA, DEFAULT_BATCH_TOKENS, LoopSettings, TrainSettings
from mlx_lora.data.sampler import BatchPlan, ShapePrice
from mlx_lora.kernels.attention import Tiles, Windows, attend
from mlx_lora.kernels.choose import Choose, KernelChoice, assumed, planned_kernels, training_kernels
from mlx_lora.kernels.measure import MLX, left_unchanged
from mlx_lora.kernels.quantized_matmul import has_two_ways, use_measured_matmul
from mlx_lora.losses.cross_entropy import PLAIN_LOGITS
from mlx_lora.models.blocks import block_kind
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.graph import AHEAD, as_on_gpu, count_memory, gradient_graph, uncollected
from mlx_lora.models.head import Head, find_head, only_at, with_last_block
from mlx_lora.models.meta import (
    Outline,
    layer_caches,
    model_shape,
    outline_for,
    outline_of,
    with_quantization,
)
from mlx_lora.models.quantize import choose_quantization
from mlx_lora.objectives.table import objective_of, other_models_bytes
from mlx_lora.parallel.ranks import Ranks, SeveralRanks
from mlx_lora.parallel.strategy import SINGLE_DEVICE, DataParallel, Strategy, dividing_flag, offloaded
from mlx_lora.planner.fit import (
    SMALLEST_BATCH,
    Batches,
    DataLimits,
    Fitted,
    Prompts,
    answer_room,
    budget_of,
    check_fits,
    fit,
    largest_batch,
    run_of,
)
from mlx_lora.planner.machine import measure_ceilings, this_machine
from mlx_lora.planner.memory import (
    BlockBytes,
    KernelTerms,
    Machine,
    MemoryPlan,
    ModelShape,
    NotKnown,
    RunShape,
    position_chunks,
)
from mlx_lora.planner.speed import Ceilings
from mlx_lora.trainer.gradient_checkpointing import in_chunks, number_bytes, parts_of, position_numbers
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.losses.agree import Compute
    from mlx_lora.models.load import Base


# Describe a model with its adapter to the planner, and read from each block's graph what it keeps for the backward pass.
#
# A shape is read from the loaded model, or from an outline without weights, in the planner's types.
#
# The planner has no table of layer types: a block's own operations show its recurrent states, latent attention, windows,
# shared keys and experts. A block is called once inside its model, to record its arguments; then its gradient's graph is
# listed at a few widths (models/graph.py), and widths between them are interpolated. Nothing is computed.
#
# Shapes: B rows, T positions of a row, D width.

# The widths at which graphs are read; beyond the last, the last two are extrapolated. Between 512 and 640
# positions, attention stops keeping its probabilities.
WIDTHS = (32, 64, 128, 256, 512, 640, 1024, 2048, 4096)
# The rise of the bytes per position between the last two widths that is not one of scores of all queries and keys.
LITTLE = 0.05
# More chunks of an MLP are counted as so many, which is at most a few percent too much; the graph of 32 takes twice as long to read.
MOST_TRACED_CHUNKS = 16
# The graph of a block that MLX runs a position at a time grows with the row, so it is only read in short rows.
LOOP_WIDTHS = (16, 32)
LOOP_NODES = 1500
LOOP_SHARE = 1 / 8  # of the nodes of the longer row, those that the shorter one has not
# The dispatches that MLX prepares ahead on a CPU where memory beyond the plan is waited for (trainer/fit.py): less than it would.
BOUNDED_LAG = 50

# The model

# Frozen copies of the factors that a method keeps: PiSSA's start, and ReLoRA's finished cycles.
FROZEN_COPIES = {"pissa": 1, "relora": 3}


def shape_of(asked: TrainSettings, base: Base, chosen: Compute, strategy: Strategy) -> ModelShape:
    """Return the shape of the adapted model, or of this rank's part of it, with the memory of what was chosen.

    A part is read from an outline, because blocks that are gathered have no weights but their part.
    """
    kernels = chosen.kernels or KernelChoice(MLX)
    if strategy.divides_base:
        outline = outline_for(asked.model, device.compute_dtype(asked.model.dtype))
        shape = strategy.part_of(outlined_shape(outline, asked, kernels), outline.model)
    else:
        shape = adapted_shape(base.model, base.config, asked, kernels=kernels)
    shape = replace(shape, plain_loss=chosen.loss.kernel == PLAIN_LOGITS)  # then the logits are whole
    if not chosen.loss.part_of_last:
        shape = replace(shape, blocks=tuple(replace(block, at_one=None) for block in shape.blocks))
    return shape


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

    Raises:
        InputError: there is no such --teacher, or mlx-lm does not have its architecture.
    """
    loop, known = settings.loop, _SHARED.get()
    known = {} if known is None else known
    case = (
        settings.model,
        settings.adapter,
        settings.objective,
        loop.kernels,
        loop.shard_base,
        loop.offload_base,
        source_bytes,
    )
    if case in known:
        return known[case]
    shape = model_shape(model, config, source_bytes, FROZEN_COPIES.get(settings.adapter.method, 0))
    plain_loss = shape.plain_loss or loop.kernels == MLX
    others = other_models_bytes(settings, objective_of(settings.objective))
    rounded = settings.adapter.qat or 1.0  # without --qat, no layer has it
    shape = replace(shape, plain_loss=plain_loss, beside_bytes=others, rounded_share=rounded)
    # Without kernels that were chosen, those that a run would use by this machine's measurements; ours if there are none.
    dtype = device.compute_dtype(settings.model.dtype)
    choice = planned_kernels(shape, loop.kernels, dtype) if kernels is None else kernels
    lag = BOUNDED_LAG if loop.offload_base == "on" or loop.shard_base != "off" else AHEAD
    shape = with_block_memory(shape, model, dict(config), choice, lag)
    teacher = None
    if name := settings.objective.teacher:  # from its files' headers; the base itself takes no more memory
        outline = outline_of(name, None, dtype)
        outline.model.freeze()
        teacher = model_shape(outline.model, outline.config, outline.cast_bytes)
        teacher = without_read_parts(teacher, outline.model) if loop.offload_base == "on" else teacher
    shape = replace(shape, teacher=teacher, teacher_stays=settings.objective.on_policy)
    known[case] = with_caches(shape, model) if settings.objective.samples else shape
    return known[case]


_SHARED: ContextVar[dict[Any, ModelShape] | None] = ContextVar("shapes of the adapters on one base", default=None)


@contextmanager
def shared_shapes() -> Iterator[None]:
    """Work out the shapes of runs on one base only once in this block, where their adapters and objectives are the same."""
    known = _SHARED.get()
    token = _SHARED.set({} if known is None else known)
    try:
        yield
    finally:
        _SHARED.reset(token)


def outlined_shape(outline: Outline, settings: TrainSettings, kernels: KernelChoice | None = None) -> ModelShape:
    """Return the shape of an outline with the settings' adapter; kernels as in `adapted_shape`.

    Args:
        outline, settings, kernels: of the run. The outline gets the adapter, and belongs to this shape from then on.

    Raises:
        InputError: the adapter does not fit the model.
        ValueError: the outline has an adapter already. Graphs of blocks are read when they are asked for, so a second
            adapter would count in the first shape as well.
    """
    if adapter_layers(outline.model):
        raise ValueError("this outline has an adapter already; each shape needs an outline of its own")
    pictures = objective_of(settings.objective).pictures
    adapter = settings.adapter if pictures is None else pictures.outlined(outline.model, settings)
    if adapter.method == "pissa":  # its initial factors need weights, which an outline does not have
        adapter = replace(adapter, method="lora")
    adapt_model(outline.model, adapter, settings.loop.seed)
    if adapter.qat:
        begin_qat(outline.model)
    if any(has_two_ways(layer) for layer in outline.model.modules()):  # a packed model may have none of these layers
        use_measured_matmul(outline.model, "dense")  # it takes more memory; for a plan the faster one is not measured
    shape = adapted_shape(outline.model, outline.config, settings, outline.cast_bytes, kernels)
    return without_read_parts(shape, outline.model) if settings.loop.offload_base == "on" else shape


def without_read_parts(shape: ModelShape, model: nn.Module) -> ModelShape:
    """Return the shape of a model whose blocks and tables are read from files when they are used: two parts are in memory at a time."""
    from mlx_lora.parallel.sharded_base import units_of  # a base in memory has none of these

    units = units_of(model)
    read = units.bytes - units.largest
    return replace(shape, base_bytes=shape.base_bytes - read, source_bytes=0, shared=True, head_rows=units.head_rows)


def with_caches(shape: ModelShape, model: nn.Module) -> ModelShape:
    """Return the shape with what the model's layers keep while answers are sampled."""
    try:
        return replace(shape, caches=layer_caches(model))
    except NotKnown as error:
        return replace(shape, not_known=(*shape.not_known, str(error)))


def with_kernels(
    settings: TrainSettings, shape: ModelShape, machine: Machine, kernels: KernelChoice | None = None
) -> Machine:
    """Return a machine with the memory of `kernels`; None: chosen from this machine's measurements."""
    if kernels is None:
        dtype = device.compute_dtype(settings.model.dtype)
        return replace(machine, kernels=planned_kernels(shape, settings.loop.kernels, dtype).terms())
    return replace(machine, kernels=KernelTerms.of_mlx(machine.backend) if kernels.asked == MLX else KernelTerms())


# What a block keeps


@dataclass
class TracedBlock:
    """The memory of one kind of block, for any batch shape.

    Attributes:
        call: rows, width, whether on a GPU -> the block's memory.
        widths: at which it is read; none: those that its graph allows.
        chunked: its memory if parts of it are computed in chunks of positions; None: they never are.
    """

    call: Callable[[int, int, bool], BlockBytes]
    widths: tuple[int, ...] = ()
    chunked: ChunkedBlock | None = None
    _answers: dict[tuple[int, int, bool], BlockBytes] = field(default_factory=dict)

    def __post_init__(self):
        self.call = cache(self.call)

    def at(self, rows: int, width: int, on_gpu: bool) -> BlockBytes:
        """Return the block's memory for a batch; answers are kept, because a search for settings asks repeatedly.

        Args:
            rows: B.
            width: T.
            on_gpu: whether it runs on a GPU.

        Raises:
            NotKnown: the block's graph cannot be read.
        """
        case = (rows, width, on_gpu)
        if case not in self._answers:
            found = self._between(1, width, on_gpu)
            if rows > 1:
                # Count what does not grow with the rows (dense copies of packed weights) once.
                further = self._between(2, width, on_gpu).minus(found)
                found = found.plus(further.times(rows - 1))
            self._answers[case] = found
        return self._answers[case]

    def _between(self, rows: int, width: int, on_gpu: bool) -> BlockBytes:
        """Interpolate bytes per position, which is exact for what grows with the width or with its square."""
        widths = self.widths
        if not widths:
            short, long = LOOP_WIDTHS
            nodes = self.call(1, long, on_gpu).nodes
            # A graph may also be large whatever the row's length (weights that are rounded in it by --qat), or differ a little because
            # a short row is attended to in another way.
            loops = nodes > LOOP_NODES and nodes - self.call(1, short, on_gpu).nodes >= LOOP_SHARE * nodes
            widths = LOOP_WIDTHS if loops else WIDTHS
        upper = min(max(bisect_left(widths, width), 1), len(widths) - 1)
        low, high = widths[upper - 1], widths[upper]
        first = self.call(rows, low, on_gpu)
        if width == low:
            return first
        last = self.call(rows, high, on_gpu)
        share = (width - low) / (high - low)
        at_low, at_high = first.times(1 / low), last.times(1 / high)
        if share > 1:
            return _beyond(at_low, at_high, share - 1).times(width)
        return at_low.times(1 - share).plus(at_high.times(share)).times(width)


@dataclass
class ChunkedBlock:
    """The memory of one kind of block whose MLP is computed in chunks of positions where a batch is large.

    Attributes:
        whole: its memory where a batch is small.
        position_bytes: of the outputs of the MLP's layers for one position; with several parts, of the largest.
        trace: number of chunks -> the memory with so many of them.
    """

    whole: TracedBlock
    position_bytes: int
    trace: Callable[[int], TracedBlock]
    _known: dict[int, TracedBlock] = field(default_factory=dict)

    def at(self, rows: int, width: int, on_gpu: bool) -> BlockBytes:
        """Return the block's memory for a batch; arguments and errors as of `TracedBlock.at`.

        If the graph of chunks cannot be read, the whole block counts, which takes more.
        """
        chunks = min(position_chunks(rows * width * self.position_bytes), MOST_TRACED_CHUNKS)
        if chunks == 1:
            return self.whole.at(rows, width, on_gpu)
        if chunks not in self._known:
            self._known[chunks] = self.trace(chunks)
        try:
            return self._known[chunks].at(rows, width, on_gpu)
        except NotKnown:
            self._known[chunks] = self.whole
            return self.whole.at(rows, width, on_gpu)


def _beyond(low: BlockBytes, high: BlockBytes, share: float) -> BlockBytes:
    """Extrapolate bytes per position, which were read at one width and at twice that width.

    If they fall, it is by what does not grow with the row, which is a small part by then. If they rise by little, they approach
    a limit, which is as far away again at twice the width; what grows with the row's square makes them rise by more.

    Args:
        low, high: at the two widths.
        share: of the distance between these, beyond the second.
    """
    found = []
    for before, now in zip(astuple(low), astuple(high), strict=True):
        rise = max(0.0, now - before)
        found.append(now + rise * (share if rise > LITTLE * now else min(share, 1.0)))
    return BlockBytes(*found)


def with_block_memory(
    shape: ModelShape, model: nn.Module, config: dict[str, Any], choose: Choose = assumed, lag: int = AHEAD
) -> ModelShape:
    """Return the shape with the memory of every block whose graph can be read.

    Args:
        shape: of this model.
        model: an mlx-lm model with its adapters; its arrays need not be computed yet.
        config: its config.json.
        choose: returns the kernels that it trains with, by shape.
        lag: the number of operations that MLX prepares ahead on a CPU.
    """
    found, reasons = [], []
    for block, traced in zip(shape.blocks, trace_blocks(model, config, choose, lag), strict=True):
        try:
            traced.at(1, WIDTHS[0], on_gpu=device.on_gpu())
        except NotKnown as error:
            reasons.append(str(error))
            traced = None
        found.append(replace(block, memory=traced, chunked=None if traced is None else traced.chunked))
    found *= passes_over_blocks(model, config)
    if found and found[-1].memory is not None:
        found[-1] = replace(found[-1], at_one=trace_last_at_one(model, config, choose, lag))
    return replace(shape, blocks=tuple(found), not_known=tuple(dict.fromkeys(reasons)))


def passes_over_blocks(model: nn.Module, config: dict[str, Any]) -> int:
    """Return how often the model runs all of its blocks for one batch: more than once if it is a looped model (Nanbeige).

    A block's activations of each pass are kept for the backward pass, and its work is done again. No block is computed here: a few
    look at numbers, which an outline does not have.
    """
    head, calls = find_head(model, config), [0] * len(model.layers)

    def count(number: int, _: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        calls[number] += 1
        return x

    try:
        counted = answering(*((block, partial(count, number)) for number, block in enumerate(model.layers)))
        with counted, device.uncompiled():
            (head.hidden if isinstance(head, Head) else model)(mx.zeros((1, LOOP_WIDTHS[0]), mx.int32))
    except FOREIGN_ERRORS:
        return 1  # blocks that take or return more than hidden states; looped models of this kind are not known
    return max(1, min(calls, default=1))


def trace_blocks(
    model: nn.Module, config: dict[str, Any], choose: Choose = assumed, lag: int = AHEAD
) -> list[TracedBlock]:
    """Return the memory of each block of an adapted model; blocks of the same kind share one object."""
    head = find_head(model, config)
    kinds = [block_kind(block) for block in model.layers]
    first = {kind: number for number, kind in reversed(list(enumerate(kinds)))}
    calls = _Calls(model, head.hidden if isinstance(head, Head) else model, max(first.values(), default=0))
    traced = {kind: _traced(model.layers[n], n, calls, choose, lag, config) for kind, n in first.items()}
    return [traced[kind] for kind in kinds]


def _traced(
    block: nn.Module, number: int, calls: _Calls, choose: Choose, lag: int, config: dict[str, Any]
) -> TracedBlock:
    """Return the memory of a block; arguments as of `_reader`."""
    whole = TracedBlock(_reader(block, number, calls, choose, lag))
    parts = parts_of(block)
    if parts:
        numbers = max(position_numbers(part, config) for part in parts)

        def trace(chunks: int) -> TracedBlock:
            widths = tuple(width for width in WIDTHS if width >= chunks)
            return TracedBlock(_reader(block, number, calls, choose, lag, chunks=chunks), widths)

        whole.chunked = ChunkedBlock(whole, numbers * number_bytes(block), trace)
    return whole


def trace_last_at_one(
    model: nn.Module, config: dict[str, Any], choose: Choose = assumed, lag: int = AHEAD
) -> TracedBlock | None:
    """Return the memory of the last block with a single trained position, None if the whole block is computed anyway."""
    head = find_head(model, config)
    last = with_last_block(head, model)[0].last if isinstance(head, Head) else None
    if not isinstance(head, Head) or last is None:
        return None
    number = len(model.layers) - 1
    traced = TracedBlock(
        _reader(last, number, _Calls(model, head.hidden, number), choose, lag, mx.zeros((1,), mx.int32))
    )
    try:
        traced.at(1, WIDTHS[0], on_gpu=device.on_gpu())
    except NotKnown:
        return None
    return traced


def _reader(
    block: nn.Module,
    number: int,
    calls: _Calls,
    choose: Choose,
    lag: int,
    positions: mx.array | None = None,
    chunks: int = 1,
) -> Callable[[int, int, bool], BlockBytes]:
    def read(rows: int, width: int, on_gpu: bool) -> BlockBytes:
        try:
            with as_on_gpu() if on_gpu and not device.on_gpu() else nullcontext():
                call = calls.of(number, rows, width)
                only = nullcontext() if positions is None else only_at(block, positions, rows * width)
                with only, in_chunks(block, chunks) if chunks > 1 else nullcontext():
                    return _read_block(block, choose, AHEAD if on_gpu else lag, calls.windows, *call)
        except FOREIGN_ERRORS as error:
            raise NotKnown(f"{type(block).__name__}: {' '.join(str(error).split())[:120]}") from error

    return read


def _read_block(
    block: nn.Module, choose: Choose, lag: int, windows: Windows, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> BlockBytes:
    """List a block's graph and count its memory."""
    own = tree_flatten(block.parameters())
    trained = [name for name, _ in tree_flatten(block.trainable_parameters())]
    frozen = [name for name, _ in own if name not in set(trained)]
    of = dict(own)
    leaves = [leaf for _, leaf in tree_flatten((args, kwargs)) if isinstance(leaf, mx.array)]
    floats = [leaf for leaf in leaves if _is_float(leaf)]
    others = [leaf for leaf in leaves if not _is_float(leaf)]
    attended: list[int] = []

    def function(varied: list[mx.array], fixed: list[mx.array]) -> list[mx.array]:
        for leaf, listed in zip(others, fixed, strict=False):
            windows.replaced(leaf, listed)
        values = zip(trained + frozen, varied[len(floats) :] + fixed[len(others) :], strict=True)
        block.update(tree_unflatten(list(values)))
        given = iter(varied[: len(floats)]), iter(fixed[: len(others)])
        new_args, new_kwargs = tree_map(
            lambda leaf: next(given[not _is_float(leaf)]) if isinstance(leaf, mx.array) else leaf, (args, kwargs)
        )
        attended.clear()
        returned = tree_flatten([block(*new_args, **new_kwargs)])
        return [leaf for _, leaf in returned if _is_float(leaf)]

    def noted(q: mx.array, k: mx.array, v: mx.array, tiles: Tiles, sinks: mx.array | None = None) -> mx.array:
        out = attend(q, k, v, tiles, sinks)
        attended.append(out.nbytes)
        return out

    was_training = block.training
    block.train()  # with dropout, and anything else that a model does only in training
    try:
        with left_unchanged(block), training_kernels(block, noted, choose, windows), uncollected():
            graph = gradient_graph(function, floats + [of[n] for n in trained], others + [of[n] for n in frozen])
    finally:
        block.train(was_training)
    with uncollected():
        counted = count_memory(graph, lag, fuses=device.on_gpu())  # on a CPU, most runs are not compiled
    inputs = sum(leaf.nbytes for leaf in floats[:1])
    ends, nodes = inputs + sum(attended), len(graph.nodes)
    return BlockBytes(inputs + counted.kept_bytes, counted.window_bytes, ends, nodes, counted.early_bytes)


@dataclass
class _Calls:
    """The arguments of a model's calls of its blocks, by batch shape; their arrays are zeros.

    Attributes:
        model: whose blocks are called.
        run: calls the model on token ids.
        last: number of the last block whose arguments are asked for; blocks after it are not called.
        windows: of the masks among the arguments.
    """

    model: nn.Module
    run: Callable[[mx.array], mx.array]
    last: int
    windows: Windows = field(default_factory=Windows)
    _found: dict[tuple[int, int], dict[int, tuple[tuple, dict]]] = field(default_factory=dict)

    def of(self, number: int, rows: int, width: int) -> tuple[tuple, dict]:
        """Return block `number`'s arguments for a batch of token ids (rows, width)."""
        if (rows, width) not in self._found:
            found: dict[int, tuple[tuple, dict]] = {}

            def record(index: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                found[index] = (args, kwargs)
                if found.keys() >= set(range(self.last + 1)):
                    raise _EnoughRecorded
                return own(*args, **kwargs)

            recorded = answering(*((block, partial(record, index)) for index, block in enumerate(self.model.layers)))
            kernels = training_kernels(self.model, windows=self.windows)
            with kernels, suppress(_EnoughRecorded), recorded, device.uncompiled():
                self.run(mx.zeros((rows, width), mx.int32))
            self._found[rows, width] = {index: tree_map(self._zeros, call) for index, call in found.items()}
        if number not in self._found[rows, width]:
            raise ValueError("the model does not call this block as a whole")
        return self._found[rows, width][number]

    def _zeros(self, leaf: Any) -> Any:
        """Return zeros in the place of an array, without what computes it."""
        if not isinstance(leaf, mx.array):
            return leaf
        zeros = mx.zeros(leaf.shape, leaf.dtype)
        self.windows.replaced(leaf, zeros)
        return zeros


class _EnoughRecorded(Exception):
    """Ends a model's call when the arguments of all blocks that are asked for are known."""


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


# Fit a run into memory: choose what is open, and refuse what cannot fit, before anything is downloaded or read if possible

log = logging.getLogger(__name__)


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
    if begun is not None:
        rate, tokens = asked.optimizer.learning_rate, asked.loop.batch_tokens
        rate = begun.get("learning_rate") if rate in (None, AUTO) else rate
        tokens = begun.get("batch_tokens") if tokens is None else tokens
        optimizer, loop = replace(asked.optimizer, learning_rate=rate), replace(asked.loop, batch_tokens=tokens)
        asked = replace(asked, optimizer=optimizer, loop=loop)
    asked = with_learning_rate(asked, shape.model_type, shape.width)
    rows, facts = splits.train, data_facts(splits.train, splits.valid)
    width = max(1, int(rows.lengths.max(initial=2)) - 1)
    open_batch = asked.loop.batch_tokens is None and asked.loop.batch_size is None
    hidden_from = strategy.hidden_from(asked, shape, width) if open_batch else 0
    machine = replace(this_machine(asked.model.dtype), kernels=chosen.terms)
    shape = replace(shape, trained_share=trained_share(asked.objective, rows))

    def fit_rows(asked: TrainSettings, hidden_from: int) -> Fitted:
        """Choose checkpointing, and the batch if it is open, for this rank's memory; or refuse the run."""
        tokens, batches = batch_tokens_for(asked, facts, hidden_from), batches_by_tokens(asked, rows, facts)
        limits = DataLimits(len(rows), prompts_of(asked.objective, rows), tokens, batches)
        found = fit(asked, shape, machine, width, limits, strategy.ranks.size)
        check_fits(asked, found, shape, machine, width, data=limits)
        return found

    fitted = fit_rows(asked, hidden_from)
    # A batch is that of all ranks, so the one with the least memory decides.
    least = min(strategy.everyone(fitted.batch_tokens))
    if open_batch and least < fitted.batch_tokens:
        asked = replace(asked, loop=replace(asked.loop, batch_tokens=least))
        fitted = fit_rows(asked, 0)
    if hidden_from and fitted.batch_tokens > batch_tokens_for(asked, facts):
        log.info(
            f"Batches: larger than usual for these data, because from {hidden_from:,} tokens on no step waits for the disk"
        )
    asked = with_length(asked, fitted.batch_tokens, facts, begun["price_epochs"] if begun else None)
    day = splits.chat_day.isoformat() if splits.chat_day else None  # the same one with --resume on another day
    loop = replace(asked.loop, grad_checkpoint=fitted.checkpointing)
    return replace(asked, data=replace(asked.data, chat_date=day), loop=loop), fitted.memory


def batches_by_tokens(settings: TrainSettings, rows: EncodedSet, facts: DataFacts | None) -> Batches:
    """Return what gives, by the tokens of a batch, how many batches some rows are divided into, and their shapes.

    Short rows may take more memory together than the longest one: a batch of them is fuller.
    """

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


def with_examples(settings: TrainSettings, rows: EncodedSet) -> TrainSettings:
    """Return the settings with batches of as many examples as the objective compares in a step, if their size is open."""
    loop, wanted = settings.loop, settings.objective.row.examples_per_step
    given = (loop.batch_tokens, loop.batch_size) != (None, None) or loop.grad_accumulation_steps != 1
    if wanted is None or given:
        return settings
    mean = 1.25 * float((rows.lengths - 1).sum()) / max(1, rows.examples)
    positions = math.ceil(min(wanted, rows.examples) * mean)
    tokens = max(2, min(DEFAULT_BATCH_TOKENS, positions))
    return replace(
        settings, loop=replace(loop, batch_tokens=tokens, grad_accumulation_steps=math.ceil(positions / tokens))
    )


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


# What the processes of a run divide, and whether its base is read from files, where the settings leave it open
#
# With --parallel auto, the link of the processes is measured for some seconds, and then plans are compared for what they could
# divide. The data have not been read by then, so a batch is assumed to have a row for every process. Memory and time are the
# planner's; the link, and each machine's peak rates, are measured.

PROBE_BYTES = 1 << 22  # seconds even at 100 Mbit/s
READ_WORDS = "Base: does not fit in memory, so its blocks are read from its files when they are used (--offload-base)"


def choose_strategy(settings: TrainSettings, ranks: Ranks, fits: bool = False) -> tuple[TrainSettings, Strategy]:
    """Return the settings with what the processes divide, or read from files, and the strategy of that.

    Args:
        settings: of the run.
        ranks: of the run; every one must call this.
        fits: whether the base is in memory already, or is not trained.

    Raises:
        InputError: a single process is to divide its base, the model cannot be read or does not fit, or its adapter does not
            fit it.
    """
    if settings.loop.parallel == AUTO:
        if isinstance(ranks, SeveralRanks):
            settings = choose_split(settings, ranks)
        else:
            settings = replace(settings, loop=replace(settings.loop, parallel=DATA))
    settings = settings if fits else settled_offload(settings, ranks)
    return settings, strategy_of(settings, ranks)


def strategy_of(settings: TrainSettings, ranks: Ranks) -> Strategy:
    """Return the strategy that the settings name for these processes.

    Args:
        settings: of the run; --parallel is not `auto`.
        ranks: its processes.

    Raises:
        InputError: a single process is to divide its base.
    """
    loop = settings.loop
    if loop.offload_base == "on":
        if ranks.size > 1:
            raise InputError(
                f"--offload-base on in {ranks.size} processes: works in a single process; share the base instead (--shard-base)"
            )
        from mlx_lora.parallel.offloaded_base import (
            OffloadedBase,  # a run with the whole base in memory loads none of these
        )

        return OffloadedBase(
            loop.seed, activations=Path(settings.loop.adapter_path) if loop.offload_activations else None
        )
    if not dividing_flag(loop):
        return DataParallel(ranks, loop.seed) if ranks.size > 1 else SINGLE_DEVICE
    if not isinstance(ranks, SeveralRanks):
        raise InputError(
            f"--shard-base {loop.shard_base}: this run is a single process; start several with mlx.launch, or leave it out"
        )
    from mlx_lora.parallel.sharded_base import ShardedBase

    return ShardedBase(ranks, loop.seed)


def settled_offload(settings: TrainSettings, ranks: Ranks) -> TrainSettings:
    """Return the settings with whether the base is read from files: only if it does not fit otherwise.

    An outline decides, whose weights need not be read or downloaded in vain.

    Args:
        settings: of the run; what its processes divide is known by now.
        ranks: of the run.

    Raises:
        InputError: it does not fit in either way.
    """
    on = offloaded(settings)
    if settings.loop.offload_base == "on":
        settings = on
    if not may_read_base(settings, ranks):
        check_base_fits(settings)
        return settings
    try:
        check_base_fits(settings)
    except InputError as problem:
        try:
            check_base_fits(on)
        except InputError:
            raise problem from None
        log.info(READ_WORDS)
        return on
    return settings


def may_read_base(settings: TrainSettings, ranks: Ranks) -> bool:
    """Return whether it is open whether the base is read from files, and a run can."""
    may = settings.loop.offload_base == AUTO and ranks.size == 1
    return may and not problems_with(settings.to_flat(), "offload_base", "on")


def choose_split(settings: TrainSettings, ranks: SeveralRanks) -> TrainSettings:
    """Return the settings with what the processes divide, and log the choice with its reasons.

    Args:
        settings: of the run; --parallel is `auto`.
        ranks: of the run; every one must call this.

    Raises:
        InputError: the model cannot be read, or its adapter does not fit it.
    """
    # A single process loads no planner of several Macs.
    from mlx_lora.parallel.hosts import probe_link
    from mlx_lora.parallel.sharded_base import units_of
    from mlx_lora.planner.several_macs import Link, Mac, Split, best, memory_shares, plan_macs

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
    smallest = min((mac.machine for mac in macs), key=lambda one: one.working_set_bytes)
    outline = outline_for(settings.model, device.compute_dtype(settings.model.dtype))
    whole = outlined_shape(outline, settings)
    splits = [plan_macs(whole, _batch(settings, len(macs), (whole, smallest)), macs, link)]
    if problems := problems_with(settings.to_flat(), "shard_base", "memory"):
        splits.append(Split(True, problem=problems[0]))
    else:
        shares = memory_shares([mac.machine for mac in macs])
        batch = _batch(settings, len(macs))
        splits.append(plan_macs(whole, batch, macs, link, units_of(outline.model), shares))
    chosen = best(splits)
    reasons = (
        f"Parallel: {chosen.words}, by the measured link ({link.bytes_per_s * 8 / 1e9:.2g} Gbit/s each way, "
        f"{link.latency_s * 1e6:,.0f} us for a small message); predicted: "
        f"{'; '.join(f'{split.words} {split.verdict}' for split in splits)}"
    )
    shared, words = ranks.from_first([chosen.shared, reasons])
    mx.clear_cache()
    mx.reset_peak_memory()  # the measurements' peak is not the run's
    log.info(words)
    return replace(settings, loop=replace(settings.loop, parallel=DATA, shard_base="memory" if shared else "off"))


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
