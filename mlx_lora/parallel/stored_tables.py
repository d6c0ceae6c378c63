"""Embedding and head of a base that is larger than memory: their rows stay in the model's files, like the weights of its blocks.

    lookup     the rows of a batch's own tokens are read
    product    slices of the vocabulary are read one after another, each while the one before is computed with

A plan of a product would hold all of its slices. So it is computed at once, a slice at a time, and the block-by-block walk keeps its
result for the further plans of a step (`Walk.outside`, parallel/block_walk.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.kernels.quantized_matmul import packed_arrays
from mlx_lora.models.head import EMBEDDING_HEADS, FLOAT_HEADS, QUANTIZED_HEADS, AtHand
from mlx_lora.parallel.block_walk import Mode, Walk, apart
from mlx_lora.parallel.sharded_base import SharedEmbedding, SharedLinear, SharedTable, Slice, shared_mixin, stand_ins
from mlx_lora.utils.errors import RunError

if TYPE_CHECKING:
    from mlx_lora.models.folder import StoredTensor


OURS = f"{__name__.partition('.')[0]}."  # classes that compute the same in another way
PULLED_ROWS = 4096  # of a head that are unpacked at a time for the gradient of whole logits


class StoredTable(SharedTable):
    """A mixin that comes before the class of an embedding or a linear layer whose rows are in files."""

    _walk: Walk
    _rows: StoredRows

    def parts(self) -> list[tuple[slice, AtHand]]:
        return [(one.rows, partial(self._read, one)) for one in self._slices.every]

    def at_once(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(self._walk.outside, function)

    def pulled(self, call: Callable[[mx.array], mx.array], x: mx.array, cotangent: mx.array) -> mx.array:
        """Return the same, unpacking few rows at a time: within a gradient that is being planned, MLX keeps all that was computed."""
        own = next(
            kind
            for kind in type(self).__mro__
            if not kind.__module__.startswith(OURS) and not issubclass(kind, SharedTable)
        )
        if self._walk.mode is Mode.PLANNED or own not in FLOAT_HEADS + QUANTIZED_HEADS:
            return super().pulled(call, x, cotangent)
        table: Any = self
        packed = own in QUANTIZED_HEADS
        arrays, total = packed_arrays(table) if packed else [table.weight], mx.zeros(x.shape)
        layout = {"group_size": table.group_size, "bits": table.bits, "mode": table.mode} if packed else {}
        slopes = apart(cotangent)
        for start in range(0, slopes.shape[-1], PULLED_ROWS):
            rows = [array[start : start + PULLED_ROWS] for array in arrays]
            dense = mx.dequantize(*rows, **layout) if layout else rows[0]
            part = slopes[..., start : start + PULLED_ROWS] @ dense.astype(slopes.dtype)
            total = apart(total + part.astype(mx.float32))
        return total.astype(x.dtype)

    @contextmanager
    def _read(self, one: Slice, before: Sequence[mx.array]) -> Iterator[None]:
        """Give the module a slice's rows inside this context, once what is before was computed; in a plan, stand-ins of them."""
        if self._walk.mode is Mode.PLANNED:
            arrays = [(name, array[one.rows]) for name, array in tree_flatten(one.stand_ins)]
            self.update(tree_unflatten(stand_ins(arrays)))
            yield
            self.update(one.stand_ins)
            return
        mx.eval(before)
        with one.at_hand(self, before):
            yield


class StoredEmbedding(StoredTable, SharedEmbedding):
    """The mixin for an embedding, with or without a head that is tied to it."""

    def __call__(self, x: mx.array) -> mx.array:
        """Return the embeddings of token ids, (...) -> (..., D)."""
        look_up = super(SharedEmbedding, self).__call__
        if self._walk.mode is Mode.PLANNED:
            return look_up(x)
        ids, local = np.unique(np.array(x), return_inverse=True)
        self.update(tree_unflatten(self._rows.of(ids)))
        try:
            return look_up(mx.array(local.reshape(x.shape).astype(np.uint32)))
        finally:
            self.update(self._slices.every[0].stand_ins)


class StoredLinear(StoredTable, SharedLinear):
    """The mixin for a linear layer outside of the blocks, such as a head."""


class StoredRows:
    """Single rows of a table, read from its files."""

    def __init__(self, tensors: Sequence[tuple[str, StoredTensor, mx.Dtype]], flag: str):
        """Open nothing yet.

        Args:
            tensors: name, place and the model's dtype of each array of the table.
            flag: that asks for it, for messages.
        """
        self._tensors, self._flag = tensors, flag
        self._ids, self._kept = np.zeros(0, np.int64), []

    def of(self, ids: np.ndarray) -> list[tuple[str, mx.array]]:
        """Return the arrays of some rows; those of the last call are kept for another one with the same rows.

        Args:
            ids: sorted, each once.

        Raises:
            RunError: a file cannot be read.
        """
        if not np.array_equal(ids, self._ids) or not self._kept:
            self._kept = [(name, self._read(at, ids).astype(dtype)) for name, at, dtype in self._tensors]
            self._ids = ids
        return self._kept

    def _read(self, at: StoredTensor, ids: np.ndarray) -> mx.array:
        row = math.prod(at.shape[1:]) * at.dtype.size
        content = np.empty((len(ids), row), np.uint8)
        try:
            with at.file.open("rb", buffering=0) as file:
                # Through the system's cache, unlike blocks: rows are small, and a text repeats its tokens.
                for number, token in enumerate(ids.tolist()):
                    if os.preadv(file.fileno(), [content[number]], at.begin + token * row) != row:
                        raise OSError("the file ends early")
        except OSError as error:
            raise RunError(
                f"{at.file}: cannot be read ({error.strerror or error}) while the run reads its base from it ({self._flag}); "
                "check the disk, and continue with --resume auto"
            ) from error
        return mx.array(content).view(at.dtype).reshape(len(ids), *at.shape[1:])


def stored_mixin(table: Any, units: Sequence[Any]) -> type[SharedTable]:
    """Return the mixin of a table: one that reads it, or one that has it in memory if it is not stored as the model has it."""
    if not all(unit.bytes for unit in units):
        return shared_mixin(table, units)
    return StoredEmbedding if isinstance(table, EMBEDDING_HEADS) else StoredLinear
