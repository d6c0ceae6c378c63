"""Where one GGUF tensor goes among mlx-lm's parameters, and what its values go through on the way.

llama.cpp's converter reorders rows and columns, adds to norms, joins tensors and drops axes of length one; a `Weight`
says which of these a tensor had, and both directions read it. Orders move whole rows, or whole groups of columns, so
packed weights keep their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Order:
    """A reordering of an axis: entries from `start` on, seen as (outer, first, second, inner), swap the middle two.

    One of the four sizes is -1: whatever the axis' length makes of it.

    Attributes:
        outer, first, second, inner: the split on our side; the file has (outer, second, first, inner).
        start: entries before it stay.
    """

    outer: int
    first: int
    second: int
    inner: int
    start: int = 0

    def to_file(self, length: int) -> np.ndarray:
        """Return, for each entry of the file's axis, which of ours stands there, (length,) int64."""
        split = np.arange(self.start, length).reshape(self.outer, self.first, self.second, self.inner)
        return np.concatenate([np.arange(self.start), split.swapaxes(1, 2).ravel()])

    def from_file(self, length: int) -> np.ndarray:
        """Return, for each of our entries, which of the file's stands there, (length,) int64."""
        return np.argsort(self.to_file(length))

    def in_groups(self, size: int) -> Order | None:
        """Return the order of groups of `size` entries, or None where it tears groups apart."""
        if self.inner < 0 or self.inner % size or self.start % size:
            return None
        return Order(self.outer, self.first, self.second, self.inner // size, self.start // size)


def rope_order(n_heads: int) -> Order:
    """Return llama.cpp's order of q and k rows: within a head from (half, pair) to (pair, half)."""
    return Order(n_heads, 2, -1, 1)


@dataclass(frozen=True)
class Weight:
    """Where one GGUF tensor goes.

    Attributes:
        name: mlx-lm's parameter, e.g. `model.layers.0.self_attn.q_proj.weight`.
        then: further parameters, whose rows the file has after those of `name`; each has as many.
        rows, columns: their order in the file; None: ours.
        offset: what the file added to the values (1 for Gemma's norms).
        axis: of length one, which ours has and the file's lacks.
        values: `plain`, or `minus_exp` where the file holds -exp of ours.
        exact: whether it always stays float: routers, convolutions, biases of experts.
        scaled: whether another tensor multiplies what comes out of it.
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
        """All of its parameters."""
        return (self.name, *self.then)

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose weights they are."""
        return tuple(name.removesuffix(".weight") for name in self.names)

    @property
    def moves(self) -> bool:
        """Whether the file's values, or their places, are not ours."""
        return bool(self.rows or self.columns or self.offset or self.values != "plain")

    def file_shape(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """Return the tensor's shape for a parameter's."""
        if self.axis is None:
            return ours
        return tuple(size for axis, size in enumerate(ours) if axis != self.axis % len(ours))

    def to_file(self, values: np.ndarray) -> np.ndarray:
        """Return a parameter's values as the file holds them.

        Args:
            values: float32, in our shape.

        Returns:
            float32, in the file's.
        """
        values = values if self.axis is None else np.squeeze(values, self.axis)
        values = -np.exp(values) if self.values == "minus_exp" else values
        values = values if self.rows is None else values[self.rows.to_file(len(values))]
        values = values if self.columns is None else values[..., self.columns.to_file(values.shape[-1])]
        return values + np.float32(self.offset) if self.offset else values

    def from_file(self, values: np.ndarray) -> np.ndarray:
        """Return a tensor's values as our parameter holds them: the way back of `to_file`."""
        values = values - np.float32(self.offset) if self.offset else values
        values = values if self.columns is None else values[..., self.columns.from_file(values.shape[-1])]
        values = values if self.rows is None else values[self.rows.from_file(len(values))]
        values = np.log(-values) if self.values == "minus_exp" else values
        return values if self.axis is None else np.expand_dims(values, self.axis)
