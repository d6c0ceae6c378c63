"""Share a frozen base between ranks: each keeps a part of every block's weights, and all have a block while they compute it.

    gather     all ranks' parts of a block become its weights, just before the block is computed
    compute    forward, or in the backward pass again and then backward: the block is checkpointed
    drop       the weights are freed as soon as nothing that is still to be computed reads them

A frozen base has no gradients and no optimizer state, and never changes, so this is all that sharing takes. A block is
one message, which holds its arrays as bytes, packed weights as they are. Messages are sent in the order in which blocks
are called, which is the same on all ranks: each waits for the one before. One is scheduled before the block before it
computes.

Every rank must call the model equally often; `ShardedBase` (parallel/divided_base.py) sees to that. Other uses of a shared
base have helpers here: one text for all ranks, and the weights of one block.

The embedding and the head are shared, too. A table of a small model is as large as many of its blocks. So it is cut along
the vocabulary into slices that are no larger than the largest block, and each slice is a unit like a block: gathered, used,
and dropped before the one after the next.

    embedding   each slice gives the rows of its own ids, and the others keep what they have
    head        the fused loss goes through the slices once (losses/fused.py); plain logits are made slice by slice, and
                the backward pass gathers the slices again

Shapes: N ranks, V vocabulary, D width, S rows of a slice.
Source: fully sharded data parallelism, arXiv 1910.02054 (stage 3) and 2304.11277, without what training a base takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.compat.instances import mix_in
from mlx_lora.models.folder import StoredTensor
from mlx_lora.models.head import EMBEDDING_HEADS, FLOAT_HEADS, QUANTIZED_HEADS, AtHand
from mlx_lora.parallel.messages import Messages, Named
from mlx_lora.planner.several_macs import Units
from mlx_lora.trainer.gradient_checkpointing import checkpoint_blocks
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.parallel.ranks import SeveralRanks

# Sharing

# Smaller modules outside the blocks (norms) stay whole: a message for them would cost more than their bytes.
LEAST_BYTES = 1 << 16


class Store(Protocol):
    """Where blocks have their weights from: other ranks (`Messages`), or files (parallel/offloaded_base.py).

    Attributes:
        flag: that asks for it.
    """

    flag: ClassVar[str]

    def unit(self, arrays: Named) -> Any:
        """Return a unit of a block's arrays, whose `gathered(before)` returns them, lazily."""
        ...

    def table_unit(self, arrays: Named) -> Any:
        """Return the same for arrays of modules outside of the blocks."""
        ...

    def rows_unit(self, path: str, arrays: Named, rows: slice, stored: Mapping[str, StoredTensor]) -> Any:
        """Return the same for rows of a table's arrays; `stored` says where lazy ones are stored, by path."""
        ...


def share_blocks(blocks: Sequence[nn.Module], store: Store) -> list[Any]:
    """Leave only a part of blocks, or nothing, in memory, and return their units.

    Args:
        blocks: checkpointed; their arrays may be lazy, and are then read one block at a time.
        store: where they have their weights from.

    Raises:
        InputError: blocks have weights in common.
    """
    _check_apart(blocks, store.flag)
    units = []
    for one in blocks:
        module: Any = one
        module._held = Held(module, store.unit)
        mix_in(SharedBlock, module)
        units.append(module._held.unit)
    return units


class SharedBlock(nn.Module):
    """A mixin that comes before a checkpointed block's own class, and has the block's weights only while it is computed."""

    _held: Held

    def at_hand(self, before: Sequence[mx.array]):
        return self._held.at_hand(self, before)

    def in_turn(self, own: list[mx.array], given: list[mx.array]) -> list[mx.array]:
        """Let the block before wait for this one's gradients, or MLX plans many blocks' gradients before any message."""
        return mx.depends(given, own) if own and given else given


def _check_apart(blocks: Sequence[nn.Module], flag: str) -> None:
    """Refuse blocks that have weights in common: the second of them would find them cut."""
    seen: set[int] = set()
    for block in blocks:
        own = {id(array) for _, array in tree_flatten(block.parameters())}
        if own & seen:
            raise InputError(f"{flag}: blocks of this model have weights in common; leave it out")
        seen |= own


class Sharded:
    """Arrays of which each rank keeps a part, and what stands in for them while they are not at hand."""

    unit: Any
    stand_ins: dict[str, Any]

    @contextmanager
    def at_hand(self, module: nn.Module, before: Sequence[mx.array]) -> Iterator[None]:
        """Give the module the arrays inside this context."""
        module.update(tree_unflatten(self.unit.gathered(before)))
        try:
            yield
        finally:
            module.update(self.stand_ins)


class Held(Sharded):
    """All frozen arrays of a module."""

    def __init__(self, module: nn.Module, make_unit: Callable[[Named], Any]):
        """Leave only a part of a module's frozen arrays, or nothing, in memory."""
        arrays = frozen_arrays(module)
        self.unit = make_unit(arrays)
        self.stand_ins = tree_unflatten(stand_ins(arrays))
        mx.eval(self.stand_ins, module.trainable_parameters())
        module.update(self.stand_ins)


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


def end_of_trial(model: nn.Module) -> None:
    """Forget messages that were planned and not sent, so that the next one does not wait for them."""
    for module in model.layers[:1]:
        if isinstance(module, SharedBlock):
            messages = module._held.unit.messages
            messages.sent, messages.before = [], []


def first_ranks_choice(model: nn.Module, choose: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """Return a function that chooses as rank 0 does, so that ranks that share a base generate one text.

    Args:
        model: whose base is shared.
        choose: log-probabilities (1, V) -> a token, (1,) uint32.
    """
    messages = _messages(model)

    def choose_first(logprobs: mx.array) -> mx.array:
        [own] = mx.depends([choose(logprobs)], [*messages.before, *messages.sent])
        with messages.ranks.beside():
            every = messages.ranks.gathered(own)  # (N, 1)
        messages.before, messages.sent = [every], [every]
        return every[0]

    return choose_first


def await_messages(model: nn.Module) -> None:
    """Wait for the messages that were submitted ahead: a rank must not end before the others have them."""
    mx.eval(_messages(model).sent)


def unshareable_words(config: dict[str, Any]) -> str:
    """Return why a model's base cannot be shared, if its numbers are not finite then."""
    return (
        f"--shard-base: mlx-lm's {config.get('model_type')} reads weights of its blocks outside of them, where a process "
        "does not have them; leave it out"
    )


def _messages(model: nn.Module) -> Messages:
    return model.layers[0]._held.unit.messages


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
    units = share_blocks(model.layers, store)
    paths = {id(module): path for path, module in model.named_modules()}
    for table in tables:
        units += _share_table(table, paths[id(table)], store, most, stored, mixin_of)
    mx.eval(model.parameters())
    return units


def _share_table(
    table: Any,
    path: str,
    store: Store,
    most_bytes: int,
    stored: Mapping[str, StoredTensor],
    mixin_of: Callable[[nn.Module, Sequence[Any]], type[SharedTable]],
) -> list[Any]:
    """Let a module outside of the blocks have its weights from a store; arguments as in `share_modules`."""
    if not isinstance(table, FLOAT_HEADS + QUANTIZED_HEADS):
        table._held = Held(table, store.table_unit)
        mix_in(SharedWhole, table)
        return [table._held.unit]
    arrays = frozen_arrays(table)
    instead = stand_ins(arrays)
    mx.eval([array for _, array in instead])
    slices = [
        Slice(
            rows,
            store.rows_unit(path, arrays, rows, stored),
            tree_unflatten(instead),
        )
        for rows in slices_of(table, most_bytes)
    ]
    table.update(tree_unflatten(instead))
    table._slices = Slices(tuple(slices))
    units = [one.unit for one in slices]
    mix_in(mixin_of(table, units), table)
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
class Slice(Sharded):
    """Some rows of a table, which the module has as if they were all.

    Attributes:
        rows: which.
        unit: this rank's part of them.
        stand_ins: for the whole table's arrays while they are not at hand.
    """

    rows: slice
    unit: Any
    stand_ins: dict[str, Any]


@dataclass(frozen=True)
class Slices:
    """All slices of a table, in order."""

    every: tuple[Slice, ...]


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

    _held: Held

    def __call__(self, x: mx.array) -> mx.array:
        with self._held.at_hand(self, [x]):
            return super().__call__(x)
