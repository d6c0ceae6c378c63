"""Map a GGUF tensor to mlx-lm's parameters, in both directions.

llama.cpp's converter reorders rows and columns, adds an offset to norms, joins tensors and drops axes of length one. A
`TensorMapping` records which of these were applied to a tensor. Reordering moves whole rows, or whole groups of columns,
so packed weights keep their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Order:
    """A reordering of an axis: its entries are split into (outer, first, second, inner) and the middle two are swapped.

    One of the four sizes may be -1, which numpy infers from the axis' length.

    Attributes:
        outer, first, second, inner: the split in mlx-lm's weight; the file has (outer, second, first, inner).
        start: the first entry that moves.
    """

    outer: int
    first: int
    second: int
    inner: int
    start: int = 0

    def to_file(self, length: int) -> np.ndarray:
        """Return the index into mlx-lm's axis for each entry of the file's axis, (length,) int64."""
        split = np.arange(self.start, length).reshape(self.outer, self.first, self.second, self.inner)
        return np.concatenate([np.arange(self.start), split.swapaxes(1, 2).ravel()])

    def from_file(self, length: int) -> np.ndarray:
        """Return the index into the file's axis for each entry of mlx-lm's axis, (length,) int64."""
        return np.argsort(self.to_file(length))

    def in_groups(self, size: int) -> Order | None:
        """Return the same reordering in groups of `size` entries, or None if it would split a group."""
        if self.inner < 0 or self.inner % size or self.start % size:
            return None
        return Order(self.outer, self.first, self.second, self.inner // size, self.start // size)


def rope_order(n_heads: int) -> Order:
    """Return llama.cpp's order of q and k rows: within each head, (half, pair) becomes (pair, half)."""
    return Order(n_heads, 2, -1, 1)


@dataclass(frozen=True)
class TensorMapping:
    """The mlx-lm parameters that one GGUF tensor holds, and how it stores them.

    Attributes:
        name: mlx-lm's parameter, e.g. `model.layers.0.self_attn.q_proj.weight`.
        then: further parameters of the same shape, whose rows follow those of `name` in the file.
        rows, columns: how the file reorders them; None: not at all.
        offset: what the file adds to the values (1 for Gemma's norms).
        axis: an axis of length one that mlx-lm's parameter has and the file's tensor lacks.
        values: `plain`, or `minus_exp` if the file holds -exp(value).
        exact: whether it always stays float: routers, convolutions, biases of experts.
        scaled: whether another tensor multiplies this layer's output.
    """

    name: str
    then: tuple[str, ...] = ()
    rows: Order | None = None
    columns: Order | None = None
    offset: float = 0.0
    axis: int | None = None
    values: Literal["plain", "minus_exp"] = "plain"
    exact: bool = False
    scaled: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all its parameters."""
        return (self.name, *self.then)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that these weights belong to."""
        return tuple(name.removesuffix(".weight") for name in self.names)

    @property
    def moves(self) -> bool:
        """Whether the file's values, or their order, differ from mlx-lm's."""
        return bool(self.rows or self.columns or self.offset or self.values != "plain")

    def file_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that the file's tensor has for a parameter of shape `ours`."""
        if self.axis is None:
            return ours
        return tuple(size for axis, size in enumerate(ours) if axis != self.axis % len(ours))

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """Return a parameter's values as the file holds them.

        Args:
            values: float32, in the parameter's shape.

        Returns:
            float32, in the file's shape.
        """
        values = values if self.axis is None else np.squeeze(values, self.axis)
        values = -np.exp(values) if self.values == "minus_exp" else values
        values = values if self.rows is None else values[self.rows.to_file(len(values))]
        values = values if self.columns is None else values[..., self.columns.to_file(values.shape[-1])]
        return values + np.float32(self.offset) if self.offset else values

    def from_file(self, values: np.ndarray) -> np.ndarray:
        """Return a tensor's values as mlx-lm's parameter holds them: the inverse of `to_file`."""
        values = values - np.float32(self.offset) if self.offset else values
        values = values if self.columns is None else values[..., self.columns.from_file(values.shape[-1])]
        values = values if self.rows is None else values[self.rows.from_file(len(values))]
        values = np.log(-values) if self.values == "minus_exp" else values
        return values if self.axis is None else np.expand_dims(values, self.axis)
