"""Share a frozen base between ranks: each keeps a part of every block's weights, and all have a block while they compute it.

    gather     all ranks' parts of a block become its weights, just before the block is computed
    compute    forward, or in the backward pass again and then backward: the block is checkpointed
    drop       the weights are freed as soon as nothing that is still to be computed reads them

A frozen base has no gradients and no optimizer state, and never changes, so this is all that sharing takes. A block is
one message, which holds its arrays as bytes, packed weights as they are. Messages are sent in the order in which blocks
are called, which is the same on all ranks: each waits for the one before. One is on its way while the block before it
computes. The embedding and the head are units of their own, like blocks.

Every rank must call the model equally often; `Sharing` and `mean_loss` see to that.

Shapes: N ranks.
Source: fully sharded data parallelism, arXiv 1910.02054 (stage 3) and 2304.11277, without what training a base takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.planner.macs_plan import Units
from mlx_lora.system.distributed import SeveralRanks
from mlx_lora.system.errors import InputError
from mlx_lora.training.checkpointing import checkpoint_blocks

ALIGNMENT = 16  # bytes; of each array in a message
# Smaller modules outside the blocks (norms) stay whole: a message for them would cost more than their bytes.
LEAST_BYTES = 1 << 16


@dataclass
class Messages:
    """The order of a rank's messages.

    Attributes:
        ranks: that share the base.
        shares: of each rank in every unit, positive numbers.
        sent: a number that is computed from the last message, for the next one to wait for.
        before: what the last unit waited for.
    """

    ranks: SeveralRanks
    shares: Sequence[float]
    sent: list[mx.array] = field(default_factory=list)
    before: list[mx.array] = field(default_factory=list)

    def gather(self, own: mx.array, parts: Sequence[int], before: Sequence[mx.array]) -> mx.array:
        """Return all ranks' parts of a unit, as bytes, lazily.

        Args:
            own: (largest part,) uint8, this rank's part and padding.
            parts: bytes of each rank's part.
            before: arrays that this unit's computation starts from. The message waits only for those of the unit before, so
                that it is on its way while that unit computes.
        """
        [own] = mx.depends([own], [*self.before, *self.sent])
        every = mx.stop_gradient(self.ranks.gathered(own))  # (N, largest part)
        self.before = list(before)
        self.sent = [every[0, :1] + 0]  # a copy: a view would keep the whole message alive
        if len(set(parts)) == 1:
            return every.reshape(-1)
        return mx.concatenate([every[rank, :size] for rank, size in enumerate(parts)])


@dataclass(frozen=True)
class Place:
    """Where an array is in a unit's bytes."""

    name: str
    begin: int
    bytes: int
    dtype: mx.Dtype
    shape: tuple[int, ...]

    def of(self, content: mx.array) -> mx.array:
        """Return the array, a view of the unit's bytes."""
        return content[self.begin : self.begin + self.bytes].view(self.dtype).reshape(self.shape)


class Unit:
    """This rank's part of a module's frozen arrays, and what stands in for them while they are not at hand."""

    def __init__(self, module: nn.Module, messages: Messages):
        """Cut a module's frozen arrays, and leave only this rank's part of them in memory.

        Args:
            module: its arrays may be lazy; they are read here, and freed again.
            messages: the order of messages.
        """
        trained = {name for name, _ in tree_flatten(module.trainable_parameters())}
        arrays = [(name, array) for name, array in tree_flatten(module.parameters()) if name not in trained]
        arrays.sort(key=lambda pair: -pair[1].dtype.size)
        ends = list(accumulate((-(-array.nbytes // ALIGNMENT) * ALIGNMENT for _, array in arrays), initial=0))
        self.places = [
            Place(name, begin, array.nbytes, array.dtype, array.shape)
            for (name, array), begin in zip(arrays, ends, strict=False)
        ]
        self.messages = messages
        self.parts = cut(ends[-1], messages.shares)
        self.own = self._own_part([array for _, array in arrays], ends)
        self.stand_ins = [(name, _stand_in(array)) for name, array in arrays]
        mx.eval(self.own, [array for _, array in self.stand_ins], module.trainable_parameters())
        module.update(tree_unflatten(self.stand_ins))

    @property
    def bytes(self) -> int:
        """Of all ranks' parts."""
        return sum(self.parts)

    def _own_part(self, arrays: list[mx.array], ends: list[int]) -> mx.array:
        """Return this rank's part, padded to the largest part, (largest part,) uint8."""
        rank, pieces = self.messages.ranks.rank, []
        begin = sum(self.parts[:rank])
        end = begin + self.parts[rank]
        for array, start, stop in zip(arrays, ends, ends[1:], strict=False):
            if start >= end or stop <= begin:
                continue
            flat = mx.pad(array.reshape(-1).view(mx.uint8), (0, stop - start - array.nbytes))
            pieces.append(flat[max(0, begin - start) : end - start])
        pieces.append(mx.zeros((max(self.parts) - self.parts[rank],), mx.uint8))
        return mx.concatenate(pieces)

    @contextmanager
    def at_hand(self, module: nn.Module, before: Sequence[mx.array]) -> Iterator[None]:
        """Give the module its arrays inside this context."""
        content = self.messages.gather(self.own, self.parts, before)
        module.update(tree_unflatten([(place.name, place.of(content)) for place in self.places]))
        try:
            yield
        finally:
            module.update(tree_unflatten(self.stand_ins))


def cut(size: int, shares: Sequence[float]) -> list[int]:
    """Return the bytes of each rank's part of a unit, as the shares say; multiples of ALIGNMENT, but for the last."""
    whole = sum(shares)
    edges = [int(size * end / whole) // ALIGNMENT * ALIGNMENT for end in accumulate(shares)]
    edges[-1] = size
    return [end - begin for begin, end in zip([0, *edges], edges, strict=False)]


def _stand_in(array: mx.array) -> mx.array:
    """Return an array of the same shape and dtype that takes no memory.

    Floats are NaN: code that reads a weight past its module (an embedding's, as a head) must not go unnoticed.
    """
    value = math.nan if mx.issubdtype(array.dtype, mx.floating) else 0
    return mx.broadcast_to(mx.array(value, array.dtype), array.shape)


class SharedBlock(nn.Module):
    """A mixin that comes before a checkpointed block's own class, and has the block's weights only while it is computed."""

    def at_hand(self, before: Sequence[mx.array]):
        return self._unit.at_hand(self, before)


class SharedTable(SharedBlock):
    """The same for an embedding or a head."""

    def __call__(self, x: mx.array) -> mx.array:
        with self.at_hand([x]):
            return super().__call__(x)

    def as_linear(self, x: mx.array) -> mx.array:
        with self.at_hand([x]):
            return super().as_linear(x)  # pyright: ignore[reportAttributeAccessIssue] # an embedding's


def share_base(model: nn.Module, ranks: SeveralRanks, shares: Sequence[float] = ()) -> list[Unit]:
    """Leave only this rank's part of the frozen base in memory.

    Args:
        model: adapted; its arrays may be lazy, and are then read one unit at a time.
        ranks: that share it; each must call this.
        shares: of each rank, positive numbers; empty: equal ones.

    Returns:
        The units, blocks first.

    Raises:
        InputError: blocks have weights in common.
    """
    messages = Messages(ranks, list(shares) or [1.0] * ranks.size)
    _check_apart(model.layers)
    tables = tables_of(model)
    checkpoint_blocks(model.layers, products=False)
    units = []
    for mixin, modules in ((SharedBlock, model.layers), (SharedTable, tables)):
        for one in modules:
            module: Any = one
            module._unit = Unit(module, messages)
            base = type(module)
            module.__class__ = type(f"Shared{base.__name__}", (mixin, base), {})
            units.append(module._unit)
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


def units_of(model: nn.Module) -> Units:
    """Return the bytes of each unit of a model that is adapted and not yet shared; its arrays need not be computed."""
    tables = tables_of(model)
    tied = any(hasattr(table, "as_linear") for table in tables) and len(tables) == 1
    return Units(tuple(map(frozen_bytes, model.layers)), tuple(map(frozen_bytes, tables)), tied)


def first_ranks_choice(model: nn.Module, choose: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """Return a function that chooses as rank 0 does, so that ranks that share a base generate one text.

    Args:
        model: whose base may be shared.
        choose: log-probabilities (1, V) -> a token, (1,) uint32; for a whole base it is returned as it is.
    """
    if not is_shared(model):
        return choose
    messages: Messages = model.layers[0]._unit.messages

    def choose_first(logprobs: mx.array) -> mx.array:
        own = choose(logprobs)
        content = own.view(mx.uint8)
        every = messages.gather(content, [content.nbytes] * messages.ranks.size, [own])
        return every[: content.nbytes].view(own.dtype)

    return choose_first


def await_messages(model: nn.Module) -> None:
    """Wait for the messages that were submitted ahead: a rank must not end before the others have them."""
    if is_shared(model):
        mx.eval(model.layers[0]._unit.messages.sent)


def end_of_trial(model: nn.Module) -> None:
    """Forget messages that were planned and not sent, so that the next one does not wait for them."""
    for module in model.layers[:1]:
        if isinstance(module, SharedBlock):
            module._unit.messages.sent, module._unit.messages.before = [], []


def is_shared(model: nn.Module) -> bool:
    """Return whether ranks share the model's base, so that each must call it equally often."""
    return any(isinstance(module, SharedBlock) for module in getattr(model, "layers", ()))


def unshareable_words(config: dict[str, Any]) -> str:
    """Return why a model's base cannot be shared, if its numbers are not finite then."""
    return (
        f"--shard-base: mlx-lm's {config.get('model_type')} reads weights of its blocks outside of them, where a process "
        "does not have them; leave it out"
    )


def with_weights(block: nn.Module | None) -> AbstractContextManager:
    """Return a context in which a block has its weights; all ranks must enter it. None: nothing is to be done."""
    return block.at_hand([]) if isinstance(block, SharedBlock) else nullcontext()


def frozen_bytes(module: nn.Module) -> int:
    """Return the bytes of a module's arrays that are not trained."""
    trained = {name for name, _ in tree_flatten(module.trainable_parameters())}
    return sum(array.nbytes for name, array in tree_flatten(module.parameters()) if name not in trained)


def _check_apart(blocks: Sequence[nn.Module]) -> None:
    """Refuse blocks that have weights in common: the second of them would find them cut."""
    seen: set[int] = set()
    for block in blocks:
        own = {id(array) for _, array in tree_flatten(block.parameters())}
        if own & seen:
            raise InputError("--shard-base: blocks of this model have weights in common; leave it out")
        seen |= own
