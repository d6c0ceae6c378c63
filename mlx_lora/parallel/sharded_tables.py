"""Share the embedding and the head between ranks in slices of the vocabulary, and with them a whole base.

A table of a small model is as large as many of its blocks. So it is cut along the vocabulary into slices that are no larger
than the largest block, and each slice is a unit like a block (parallel/sharded_base.py): gathered, used, and dropped before
the one after the next.

    embedding   each slice gives the rows of its own ids, and the others keep what they have
    head        the fused loss goes through the slices once (losses/fused.py); plain logits are made slice by slice, and
                the backward pass gathers the slices again

MLX reads a tensor of a safetensors file in whole, even if only some rows are needed. A vocabulary's table is too large for
that on a machine that keeps a part of the base. Its rows are read from the file, if the model has the tensor as it is
stored; if mlx-lm changes it while loading (a few families do), it is read in whole.

Shapes: V vocabulary, D width, S rows of a slice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import _get_classes

from mlx_lora.adapters.base import mix_in
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.models.head import EMBEDDING_HEADS, FLOAT_HEADS, QUANTIZED_HEADS, AtHand
from mlx_lora.parallel.ranks import SeveralRanks
from mlx_lora.parallel.sharded_base import (
    LEAST_BYTES,
    Held,
    Messages,
    Sharded,
    Unit,
    frozen_arrays,
    frozen_bytes,
    share_blocks,
    stand_ins,
)
from mlx_lora.planner.several_macs import Units
from mlx_lora.trainer.gradient_checkpointing import checkpoint_blocks

# Sharing


def share_base(
    model: nn.Module,
    ranks: SeveralRanks,
    shares: Sequence[float] = (),
    stored: Mapping[str, StoredTensor] = MappingProxyType({}),
) -> list[Unit]:
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
    messages = Messages(ranks, [share / sum(wanted) for share in wanted])
    tables, most = tables_of(model), slice_bytes(model)  # before the blocks are cut
    checkpoint_blocks(model.layers, products=False)
    units = share_blocks(model.layers, messages)
    paths = {id(module): path for path, module in model.named_modules()}
    for table in tables:
        units += _share_table(table, paths[id(table)], messages, most, stored)
    mx.eval(model.parameters())
    return units


def _share_table(
    table: Any, path: str, messages: Messages, most_bytes: int, stored: Mapping[str, StoredTensor]
) -> list[Unit]:
    """Leave only this rank's part of a module outside of the blocks in memory; arguments as in `share_base`."""
    if not isinstance(table, FLOAT_HEADS + QUANTIZED_HEADS):
        table._held = Held(table, messages)
        mix_in(SharedWhole, table)
        return [table._held.unit]
    arrays = frozen_arrays(table)
    instead = stand_ins(arrays)
    mx.eval([array for _, array in instead])
    slices = [
        Slice(
            rows,
            Unit([(name, read_rows(f"{path}.{name}", array, rows, stored)) for name, array in arrays], messages),
            tree_unflatten(instead),
        )
        for rows in slices_of(table, most_bytes)
    ]
    table.update(tree_unflatten(instead))
    table._slices = Slices(tuple(slices))
    mix_in(SharedEmbedding if isinstance(table, EMBEDDING_HEADS) else SharedLinear, table)
    return [one.unit for one in slices]


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
    unit: Unit
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

    def _products(self, call: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
        """Return (..., V), made slice by slice.

        Args:
            call: computes (..., S) with the rows at hand.
            x: (..., D).
        """

        @mx.custom_function
        def run(x: mx.array) -> mx.array:
            made: list[mx.array] = []
            for _, at_hand in self.parts():
                with at_hand(made[-1:] or [x]):
                    made.append(call(x))
            return mx.concatenate(made, axis=-1)

        @run.vjp
        def run_vjp(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
            total: Any = None
            for rows, at_hand in self.parts():
                with at_hand([cotangent if total is None else total]):
                    [pull] = mx.vjp(call, [x], [cotangent[..., rows]])[1]
                total = pull if total is None else total + pull
            return total

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


# Rows of stored tensors

# safetensors' names of the types of weights.
TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32, "U16": mx.uint16, "U8": mx.uint8,
         "I32": mx.int32, "I8": mx.int8}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored.

    Attributes:
        file: a safetensors file.
        begin: of its bytes in that file.
        shape, dtype: as it is stored.
    """

    file: Path
    begin: int
    shape: tuple[int, ...]
    dtype: mx.Dtype

    def rows(self, rows: slice) -> mx.array:
        """Read rows, and return them in their stored dtype."""
        row_bytes = math.prod(self.shape[1:]) * self.dtype.size
        count = rows.stop - rows.start
        content = np.fromfile(self.file, np.uint8, count * row_bytes, offset=self.begin + rows.start * row_bytes)
        return mx.array(content).view(self.dtype).reshape(count, *self.shape[1:])


class Watched:
    """Sees the tensors that mlx-lm loads, before it changes them for its model."""

    def __init__(self) -> None:
        self._own: type[nn.Module] | None = None
        self._loaded: dict[str, mx.array] = {}

    def classes(self, config: dict[str, Any]) -> tuple[type, type]:
        """Return mlx-lm's classes of a model; `load_model` takes this function."""
        own, arguments = _get_classes(config)
        if not hasattr(own, "sanitize"):
            return own, arguments
        loaded = self._loaded

        def sanitize(self: nn.Module, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            loaded.update(weights)
            return own.sanitize(self, weights)  # pyright: ignore[reportAttributeAccessIssue]

        self._own = own
        return type(own.__name__, (own,), {"sanitize": sanitize, "__module__": own.__module__}), arguments

    def unchanged(self, model: nn.Module, folder: Path) -> dict[str, StoredTensor]:
        """Give the model its own class, and return where its parameters are stored, by path; those that are as stored.

        Args:
            model: as `load_model` returned it.
            folder: with its files.
        """
        if self._own is None:
            return {}
        model.__class__ = self._own
        stored = {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in _tensors(file).items()}
        names = {id(array): name for name, array in self._loaded.items()}
        found = {path: names.get(id(array)) for path, array in tree_flatten(model.parameters())}
        self._loaded.clear()
        return {path: stored[name] for path, name in found.items() if name in stored}


def read_rows(path: str, array: mx.array, rows: slice, stored: Mapping[str, StoredTensor]) -> mx.array:
    """Return some rows of a parameter, read from its file if possible.

    Args:
        path: of the parameter.
        array: the parameter, which may be lazy.
        rows: of its first axis.
        stored: where parameters are stored, see `Watched`.
    """
    at = stored.get(path)
    if at is None or at.shape != array.shape:
        return array[rows]
    return at.rows(rows).astype(array.dtype)


def _tensors(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, which has been checked (models/folder.py)."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), TYPES[entry["dtype"]])
        for name, entry in header.items()
        if entry["dtype"] in TYPES
    }
