"""Read some rows of a stored tensor, for ranks that keep only a part of it.

MLX reads a tensor of a safetensors file in whole, even if only some rows are needed. A vocabulary's table is too large for
that on a machine that keeps a part of the base. Its rows are read from the file, if the model has the tensor as it is stored;
if mlx-lm changes it while loading (a few families do), it is read in whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

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
    """Return the tensors of a safetensors file, which has been checked (sources/safetensors.py)."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        header = json.loads(content.read(size))
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(file, 8 + size + entry["data_offsets"][0], tuple(entry["shape"]), TYPES[entry["dtype"]])
        for name, entry in header.items()
        if entry["dtype"] in TYPES
    }
