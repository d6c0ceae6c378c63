"""The messages in which ranks share a frozen base, and the part of its weights that each keeps.

A unit (a block, a slice of a table) is one message, or two where ranks keep unequal parts. Each waits for the one before, so
that all ranks send them in the same order.

Shapes: N ranks, E bytes of one of N equal parts.

Share a frozen base between ranks: each keeps a part of every block's weights, and all have a block while they compute it.

    gather     all ranks' parts of a block become its weights, just before the block is computed
    compute    forward, or in the backward pass again and then backward: the block is checkpointed
    drop       the weights are freed as soon as nothing that is still to be computed reads them

A frozen base has no gradients and no optimizer state, and never changes, so this is all that sharing takes. A block is
one message, which holds its arrays as bytes, packed weights as they are. Messages are sent in the order in which blocks
are called, which is the same on all ranks: each waits for the one before. One is scheduled before the block before it
computes.

Every rank must call the model equally often; `ShardedBase` sees to that. Other uses of a shared
base have helpers here: one text for all ranks, and the weights of one block.

The embedding and the head are shared, too. A table of a small model is as large as many of its blocks. So it is cut along
the vocabulary into slices that are no larger than the largest block, and each slice is a unit like a block: gathered, used,
and dropped before the one after the next.

    embedding   each slice gives the rows of its own ids, and the others keep what they have
    head        the fused loss goes through the slices once (losses/fused.py); plain logits are made slice by slice, and
                the backward pass gathers the slices again

Shapes: N ranks, V vocabulary, D width, S rows of a slice.
Source: fully sharded data parallelism, arXiv 1910.02054 (stage 3) and 2304.11277, without what training a base takes.

The strategies in which a process keeps only a part of the frozen base.

Another way to keep a part is another class and a line in `strategy_of` (trainer/fit.py); parallel/offloaded_base.py
is one for a single process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.compat.functions import mix_in
from mlx_lora.config.settings import shard_parts
from mlx_lora.models.folder import StoredTensor, read_rows
from mlx_lora.models.head import EMBEDDING_HEADS, FLOAT_HEADS, QUANTIZED_HEADS, AtHand
from mlx_lora.parallel.ranks import Ranks, SeveralRanks
from mlx_lora.parallel.strategy import DataParallel
from mlx_lora.planner.fit import budget_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.several_macs import Units, rank_part
from mlx_lora.trainer.gradient_checkpointing import checkpoint_blocks
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.models.load import Base
    from mlx_lora.planner.memory import ModelShape

ALIGNMENT = 16  # bytes; of each array in a message
# Operations of a message that do nothing: more than there are one after the other in a block, forward and backward.
LEVELS = 200
Named = Sequence[tuple[str, mx.array]]


@dataclass
class Messages:
    """The order of a rank's messages, and who keeps what.

    Attributes:
        ranks: that share the base.
        shares: of each rank in all units together; they add up to 1.
        sent: a number that is computed from the last message, for the next one to wait for.
        before: what the last unit waited for.
        cut_bytes: of the units so far.
        held_bytes: of those, what each rank keeps.
    """

    ranks: SeveralRanks
    shares: Sequence[float]
    sent: list[mx.array] = field(default_factory=list)
    before: list[mx.array] = field(default_factory=list)
    cut_bytes: int = 0
    held_bytes: list[int] = field(default_factory=list)
    flag: ClassVar[str] = "--shard-base"

    def unit(self, arrays: Named) -> Unit:
        """Keep this rank's part of arrays."""
        return Unit(arrays, self)

    table_unit = unit

    def rows_unit(self, path: str, arrays: Named, rows: slice, stored: Mapping[str, StoredTensor]) -> Unit:
        """Keep this rank's part of some rows of a table's arrays, which are read from their files alone if possible."""
        return Unit([(name, read_rows(f"{path}.{name}", array, rows, stored)) for name, array in arrays], self)

    def gather(self, even: mx.array, rest: mx.array, at: slice, before: Sequence[mx.array]) -> list[mx.array]:
        """Return a unit's bytes, lazily: those of its even part and those of the rest.

        Args:
            even: (E,) uint8, this rank's of N equal parts.
            rest: (at.stop - at.start,) uint8, this rank's part of the rest.
            at: where that is; its step is the size of the rest.
            before: arrays that this unit's computation starts from. The message waits only for those of the unit before, so
                that it is on its way while that unit computes.
        """
        content, waited = [], [*self.before, *self.sent]
        # Not in the computation's own stream, where this would wait for all that was planned before it.
        with self.ranks.beside():
            if even.size:
                [own] = mx.depends([even], waited)
                every = mx.stop_gradient(self.ranks.gathered(own)).reshape(-1)
                waited = [every[:1] + 0]  # a copy: a view would keep the whole message alive
                content.append(_planned_early(every))
            if at.step:
                [own] = mx.depends([rest], waited)
                every = mx.stop_gradient(self.ranks.put_together(own.view(mx.uint32), at.start // 4, at.step // 4))
                every = every.view(mx.uint8)
                waited = [every[:1] + 0]
                content.append(_planned_early(every))
        self.before, self.sent = list(before), waited
        return content

    def divide(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        """Decide which arrays of the next unit are kept in equal parts, and each rank's bytes of the others.

        Equal parts are gathered, which sends the least; what only some ranks keep is added to the others' zeros. Neither
        takes memory beside the unit itself. Unequal ranks keep as much in equal parts as the smallest has room for.

        Args:
            sizes: bytes of its arrays, multiples of ALIGNMENT.

        Returns:
            Numbers of the arrays in equal parts, and (N,) bytes.
        """
        count = len(self.shares)
        self.held_bytes = self.held_bytes or [0] * count
        self.cut_bytes += sum(sizes)
        if max(self.shares) - min(self.shares) < 1e-6:
            even = list(range(len(sizes)))
        else:
            missing = [share * self.cut_bytes - size for share, size in zip(self.shares, self.held_bytes, strict=True)]
            room, even = count * min(missing), []
            for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
                if sizes[number] <= room:
                    even.append(number)
                    room -= sizes[number]
        in_even = sum(sizes[number] for number in even)
        rest = sum(sizes) - in_even
        held = [size + in_even / count for size in self.held_bytes]
        missing = [max(0.0, share * self.cut_bytes - size) for share, size in zip(self.shares, held, strict=True)]
        parts = cut(rest, missing if sum(missing) else self.shares)
        self.held_bytes = [round(size + part) for size, part in zip(held, parts, strict=True)]
        return sorted(even), parts


@dataclass(frozen=True)
class ArraySlot:
    """Where an array is in a unit's bytes.

    Attributes:
        name: its path in the module.
        message: 0 for the first of the unit's messages, 1 for the second.
        begin, bytes, dtype, shape: of it.
    """

    name: str
    message: int
    begin: int
    bytes: int
    dtype: mx.Dtype
    shape: tuple[int, ...]

    def of(self, content: Sequence[mx.array]) -> mx.array:
        """Return the array, a view of the unit's bytes."""
        return content[self.message][self.begin : self.begin + self.bytes].view(self.dtype).reshape(self.shape)


class Unit:
    """This rank's part of some frozen arrays that are computed with together."""

    def __init__(self, arrays: Named, messages: Messages):
        """Keep only this rank's part of the arrays.

        Args:
            arrays: by name; they may be lazy, and are read here.
            messages: the order of messages.
        """
        arrays = sorted(arrays, key=lambda pair: -pair[1].dtype.size)
        sizes = [_aligned(array.nbytes) for _, array in arrays]
        numbers, parts = messages.divide(sizes)
        even = [arrays[number] for number in numbers]
        rest = [pair for number, pair in enumerate(arrays) if number not in numbers]
        in_even = sum(sizes[number] for number in numbers)
        count, rank = messages.ranks.size, messages.ranks.rank
        even_part = _aligned(-(-in_even // count))
        begin = sum(parts[:rank])
        self.messages = messages
        self.places = [*_places(even, 0), *_places(rest, int(bool(even)))]
        self.at = slice(begin, begin + parts[rank], sum(parts))
        self.even = _bytes_of(even, rank * even_part, (rank + 1) * even_part)
        self.rest = _bytes_of(rest, begin, begin + parts[rank])
        self.parts = [even_part + part for part in parts]
        mx.eval(self.even, self.rest)

    @property
    def bytes(self) -> int:
        """Of all ranks' parts."""
        return sum(self.parts)

    def gathered(self, before: Sequence[mx.array]) -> list[tuple[str, mx.array]]:
        """Return the arrays, lazily; `before` as for `Messages.gather`."""
        content = self.messages.gather(self.even, self.rest, self.at, before)
        return [(place.name, place.of(content)) for place in self.places]


def _planned_early(message: mx.array) -> mx.array:
    """Return a message through operations that do nothing, so that MLX sends it before it computes the unit before.

    MLX plans a graph from its end, level by level, so a message that only the next unit needs would be sent after nearly all
    operations of this one. These add levels, if MLX plans whole graphs (device.plan_whole_graphs).
    """
    for _ in range(LEVELS):
        message = mx.stop_gradient(message)
    return message


def cut(size: int, shares: Sequence[float]) -> list[int]:
    """Return the bytes of each rank's part, as the shares say; multiples of ALIGNMENT, but for the last."""
    whole = sum(shares)
    edges = [int(size * end / whole) // ALIGNMENT * ALIGNMENT for end in accumulate(shares)]
    edges[-1] = size
    return [end - begin for begin, end in zip([0, *edges], edges, strict=False)]


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _places(arrays: Named, message: int) -> Iterator[ArraySlot]:
    begin = 0
    for name, array in arrays:
        yield ArraySlot(name, message, begin, array.nbytes, array.dtype, array.shape)
        begin += _aligned(array.nbytes)


def _bytes_of(arrays: Named, begin: int, end: int) -> mx.array:
    """Return some of the bytes of arrays that lie one after the other, with zeros after the last."""
    pieces, start = [mx.zeros((0,), mx.uint8)], 0
    for _, array in arrays:
        stop = start + _aligned(array.nbytes)
        if start < end and stop > begin:
            flat = mx.pad(array.reshape(-1).view(mx.uint8), (0, stop - start - array.nbytes))
            pieces.append(flat[max(0, begin - start) : end - start])
        start = stop
    return mx.concatenate([*pieces, mx.zeros((end - max(begin, start) if end > start else 0,), mx.uint8)])


# Share a frozen base between ranks

# Sharing

# Smaller modules outside the blocks (norms) stay whole: a message for them would cost more than their bytes.
LEAST_BYTES = 1 << 16


class Store(Protocol):
    """Where blocks have their weights from: other ranks (`Messages`), or files (parallel/offloaded_base.py).

    A unit's `gathered(before)` returns its arrays, lazily.

    Attributes:
        flag: that asks for it.
        unit: makes a unit of a block's arrays.
        table_unit: the same for arrays of modules outside of the blocks.
        rows_unit: (path, arrays, rows, stored) -> the same for rows of a table's arrays; `stored` says where lazy ones are
            stored, by path.
    """

    flag: ClassVar[str]
    unit: Callable[[Named], Any]
    table_unit: Callable[[Named], Any]
    rows_unit: Callable[[str, Named, slice, Mapping[str, StoredTensor]], Any]


class SharedBlock(nn.Module):
    """A mixin that comes before a checkpointed block's own class, and has the block's weights only while it is computed."""

    _held: Sharded

    def at_hand(self, before: Sequence[mx.array]):
        return self._held.at_hand(self, before)

    def in_turn(self, own: list[mx.array], given: list[mx.array]) -> list[mx.array]:
        """Let the block before wait for this one's gradients, or MLX plans many blocks' gradients before any message."""
        return mx.depends(given, own) if own and given else given


@dataclass(frozen=True)
class Sharded:
    """Arrays of a module of which each rank keeps a part.

    Attributes:
        unit: this rank's part.
        stand_ins: for the arrays while they are not at hand; of a table, for all of its rows.
        rows: of a table, which the module has as if they were all.
    """

    unit: Any
    stand_ins: dict[str, Any]
    rows: slice = field(default_factory=lambda: slice(None))

    @contextmanager
    def at_hand(self, module: nn.Module, before: Sequence[mx.array]) -> Iterator[None]:
        """Give the module the arrays inside this context."""
        module.update(tree_unflatten(self.unit.gathered(before)))
        try:
            yield
        finally:
            module.update(self.stand_ins)


def held(module: nn.Module, make_unit: Callable[[Named], Any]) -> Sharded:
    """Leave only a part of a module's frozen arrays, or nothing, in memory."""
    arrays = frozen_arrays(module)
    found = Sharded(make_unit(arrays), tree_unflatten(stand_ins(arrays)))
    mx.eval(found.stand_ins, module.trainable_parameters())
    module.update(found.stand_ins)
    return found


def frozen_arrays(module: nn.Module) -> list[tuple[str, mx.array]]:
    """Return a module's arrays that are not trained, by path."""
    trained = {name for name, _ in tree_flatten(module.trainable_parameters())}
    return [(name, array) for name, array in tree_flatten(module.parameters()) if name not in trained]


def frozen_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's arrays that are not trained."""
    return sum(array.nbytes for _, array in frozen_arrays(module))


def stand_ins(arrays: Named) -> list[tuple[str, mx.array]]:
    """Return arrays of the same shapes and dtypes that take no memory.

    Floats are NaN: code that reads a weight past its module (an embedding's, as a head) must not go unnoticed.
    """
    values = [math.nan if mx.issubdtype(array.dtype, mx.floating) else 0 for _, array in arrays]
    return [
        (name, mx.broadcast_to(mx.array(value, array.dtype), array.shape))
        for (name, array), value in zip(arrays, values, strict=True)
    ]


# Use of a shared base


# Tables: the embedding and the head in slices of the vocabulary

# Sharing


def share_base(
    model: nn.Module,
    ranks: SeveralRanks,
    shares: Sequence[float] = (),
    stored: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> list[Any]:
    """Leave only this rank's part of the frozen base in memory.

    Args:
        model: adapted; its arrays may be lazy, and are then read one unit at a time.
        ranks: that share it; each must call this.
        shares: of each rank, positive numbers; empty: equal ones.
        stored: where lazy arrays are stored, by path, so that slices of tables can be read alone (`read_rows`).

    Returns:
        The units.

    Raises:
        InputError: blocks have weights in common.
    """
    wanted = list(shares) or [1.0] * ranks.size
    return share_modules(model, Messages(ranks, [share / sum(wanted) for share in wanted]), stored)


def shared_mixin(table: nn.Module, units: Sequence[Any]) -> type[SharedTable]:
    """Return the mixin of a table whose slices ranks share."""
    return SharedEmbedding if isinstance(table, EMBEDDING_HEADS) else SharedLinear


def share_modules(
    model: nn.Module,
    store: Store,
    stored: Mapping[str, StoredTensor],
    mixin_of: Callable[[nn.Module, Sequence[Any]], type[SharedTable]] = shared_mixin,
) -> list[Any]:
    """Let blocks and tables have their weights from a store, and return the units.

    Args:
        model, stored: as in `share_base`.
        store: where the weights come from.
        mixin_of: (table, units of its slices) -> what makes it use them.
    """
    tables, most = tables_of(model), slice_bytes(model)  # before the blocks are cut
    checkpoint_blocks(model.layers, products=False)
    seen: set[int] = set()  # the second of two blocks with weights in common would find them cut
    for block in model.layers:
        own = {id(array) for _, array in tree_flatten(block.parameters())}
        if own & seen:
            raise InputError(f"{store.flag}: blocks of this model have weights in common; leave it out")
        seen |= own
    units = []
    for each in model.layers:
        block: Any = each
        block._held = held(block, store.unit)
        mix_in(SharedBlock, block)
        units.append(block._held.unit)
    paths = {id(module): path for path, module in model.named_modules()}
    for module in tables:
        table: Any = module
        if not isinstance(table, FLOAT_HEADS + QUANTIZED_HEADS):
            table._held = held(table, store.table_unit)
            mix_in(SharedWhole, table)
            units.append(table._held.unit)
            continue
        arrays, path = frozen_arrays(table), paths[id(table)]
        instead = stand_ins(arrays)
        mx.eval([array for _, array in instead])
        slices = [
            Sharded(store.rows_unit(path, arrays, rows, stored), tree_unflatten(instead), rows)
            for rows in slices_of(table, most)
        ]
        table.update(tree_unflatten(instead))
        table._slices = Slices(tuple(slices))
        own = [one.unit for one in slices]
        mix_in(mixin_of(table, own), table)
        units += own
    mx.eval(model.parameters())
    return units


def tables_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules outside of the blocks whose weights are shared: embedding and head, unless they are adapted."""
    inside = {id(module) for block in model.layers for module in block.modules()}
    adapted = {id(part) for layer in adapter_layers(model).values() for part in layer.modules()}
    return [
        module
        for module in model.modules()
        if id(module) not in inside | adapted and not module.children() and frozen_bytes(module) >= LEAST_BYTES
    ]


def slice_bytes(model: nn.Module) -> int:
    """Return the most bytes of a slice: as many as the largest block has."""
    return max([LEAST_BYTES, *map(frozen_bytes, model.layers)])


def slices_of(table: nn.Module, most_bytes: int) -> list[slice]:
    """Return about equal slices of a table's rows, none of which has more bytes, unless a single row does."""
    length = table.weight.shape[0]
    count = min(length, -(-frozen_bytes(table) // most_bytes))
    edges = [length * number // count for number in range(count + 1)]
    return [slice(begin, end) for begin, end in pairwise(edges)]


def units_of(model: nn.Module) -> Units:
    """Return the bytes of each unit of a model that is adapted and not yet shared; its arrays need not be computed."""
    tables, most = tables_of(model), slice_bytes(model)
    tied = any(hasattr(table, "as_linear") for table in tables) and len(tables) == 1
    sizes, head_rows = [], 0
    for table in tables:
        whole = frozen_bytes(table)
        if not isinstance(table, FLOAT_HEADS + QUANTIZED_HEADS):
            sizes.append(whole)
            continue
        row = whole // table.weight.shape[0]
        slices = [rows.stop - rows.start for rows in slices_of(table, most)]
        sizes += [row * count for count in slices]
        head_rows = max(slices)  # the head, if there is one, is the last
    return Units(tuple(map(frozen_bytes, model.layers)), tuple(sizes), tied, head_rows)


# Modules outside of the blocks


@dataclass(frozen=True)
class Slices:
    """All slices of a table, in order."""

    every: tuple[Sharded, ...]


class SharedTable(nn.Module):
    """A mixin that comes before the class of an embedding or a linear layer, of which ranks share slices."""

    _slices: Slices

    def parts(self) -> list[tuple[slice, AtHand]]:
        """Return each slice's rows, with a context in which the module has them alone."""
        return [(one.rows, partial(one.at_hand, self)) for one in self._slices.every]

    def at_once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that uses all parts, as it may be called while a step is planned."""
        return function

    def pulled(self, call: Callable[[mx.array], mx.array], x: mx.array, cotangent: mx.array) -> mx.array:
        """Return the gradient of x, (..., D), from that of its product with the rows at hand, (..., S)."""
        return mx.vjp(call, [x], [cotangent])[1][0]

    def _products(self, call: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """Return (..., V), made slice by slice.

        Args:
            call: computes (..., S) with the rows at hand.
            x: (..., D).
        """

        def products(x: mx.array) -> list[mx.array]:
            made: list[mx.array] = []
            for _, at_hand in self.parts():
                with at_hand(made[-1:] or [x]):
                    made.append(call(x))
            return [mx.concatenate(made, axis=-1)]

        def pulled(x: mx.array, cotangent: mx.array) -> list[mx.array]:
            total: Any = None
            for rows, at_hand in self.parts():
                with at_hand([cotangent if total is None else total]):
                    pull = self.pulled(call, x, cotangent[..., rows])
                    total = pull if total is None else total + pull
            return [total]

        @mx.custom_function
        def run(x: mx.array) -> mx.array:
            return self.at_once(products)(x)[0]

        @run.vjp
        def run_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            return self.at_once(pulled)(x, cotangent)[0]

        return run(x)


class SharedEmbedding(SharedTable):
    """The mixin for an embedding."""

    def __call__(self, x: mx.array) -> mx.array:
        found: Any = None
        for rows, at_hand in self.parts():
            with at_hand([x if found is None else found]):
                local = mx.clip(x.astype(mx.int32) - rows.start, 0, rows.stop - rows.start - 1)
                taken = super().__call__(local)
            inside = (local == x - rows.start)[..., None]
            found = taken if found is None else mx.where(inside, taken, found)
        return found

    def as_linear(self, x: mx.array) -> mx.array:
        return self._products(super().as_linear, x)  # pyright: ignore[reportAttributeAccessIssue] # an embedding's


class SharedLinear(SharedTable):
    """The mixin for a linear layer outside of the blocks, such as a head."""

    def __call__(self, x: mx.array) -> mx.array:
        return self._products(super().__call__, x)


class SharedWhole(nn.Module):
    """The mixin for any other module outside of the blocks, which is one unit."""

    _held: Sharded

    def __call__(self, x: mx.array) -> mx.array:
        with self._held.at_hand(self, [x]):
            return super().__call__(x)


# The strategies in which a process keeps only a part of the frozen base


class ShardedBase(DataParallel):
    """Each rank computes some rows, and keeps a part of every block's weights.

    Attributes:
        share: of this rank in the base, from 0 to 1; 1 until the base is divided.
    """

    lockstep = True
    divides_base = "--shard-base"
    whole_blocks = "it gets its weights in whole"

    def __init__(self, ranks: SeveralRanks, seed: int = 0):
        super().__init__(ranks, seed)
        self._several, self.share = ranks, 1.0

    def divide(self, base: Base, settings: TrainSettings) -> TrainSettings:
        ranks = self._several
        shares = shares_of(settings, ranks)
        alive = units_of(base.model).largest
        units = share_base(base.model, ranks, shares, base.stored)
        device.wait_beyond(mx.get_active_memory() + alive)  # until the run has a plan
        own = sum(unit.parts[ranks.rank] for unit in units)
        whole = sum(unit.bytes for unit in units)
        self.share = shares[ranks.rank]
        self.words = f"base shared by {ranks.size} processes ({own / 1e6:,.0f} of {whole / 1e6:,.0f} MB here)"
        checkpointing = "block" if settings.loop.grad_checkpoint == "auto" else settings.loop.grad_checkpoint
        return replace(settings, loop=replace(settings.loop, grad_checkpoint=checkpointing, sample_tokens=0))

    def part_of(self, shape: ModelShape, model: nn.Module) -> ModelShape:
        return rank_part(shape, units_of(model), self.share)

    def end_of_trial(self, model: nn.Module) -> None:
        """Forget messages that were planned and not sent, so that the next one does not wait for them."""
        for module in model.layers[:1]:
            if isinstance(module, SharedBlock):
                messages = module._held.unit.messages
                messages.sent, messages.before = [], []

    def same_choice(self, model: nn.Module, choose: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
        messages = model.layers[0]._held.unit.messages

        def choose_first(logprobs: mx.array) -> mx.array:
            [own] = mx.depends([choose(logprobs)], [*messages.before, *messages.sent])
            with messages.ranks.beside():
                every = messages.ranks.gathered(own)  # (N, 1)
            messages.before, messages.sent = [every], [every]
            return every[0]

        return choose_first

    def await_messages(self, model: nn.Module) -> None:
        mx.eval(model.layers[0]._held.unit.messages.sent)


def shares_of(settings: TrainSettings, ranks: Ranks) -> list[float]:
    """Return each rank's share of the base, which add up to 1.

    Raises:
        InputError: as many parts were given as there are not processes.
    """
    asked = settings.loop.shard_base
    if asked == "memory":
        parts: Sequence[float] = ranks.everyone(budget_of(settings.loop, this_machine(settings.model.dtype)))
    else:
        parts = shard_parts(asked) or [1.0] * ranks.size
    if len(parts) != ranks.size:
        raise InputError(f"--shard-base {asked}: {len(parts)} parts for {ranks.size} processes; give one for each")
    return [part / sum(parts) for part in parts]
