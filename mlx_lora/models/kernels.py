"""Where a model's own layers get other kernels from, while a step is traced.

mlx-lm's architectures share one attention function, one gated activation and one form of each usual recurrence, which
each imports by name. Those names are exchanged in the modules of this model's classes for as long as the step is traced,
and put back: generation and evaluation never see it. Which function takes a call is decided by its shapes.

Recurrences that one architecture has for itself (models/recurrent_layers.py) have no row in the table: they are ours
wherever anything is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

from mlx_lora.models.attention import AttentionCall, attend
from mlx_lora.models.kernel_row import Kernel, ShapeClass
from mlx_lora.models.kernel_table import kernel_rows
from mlx_lora.models.recurrent_layers import recurrent_kernels

# Kernels without a state that goes from token to token.
POSITIONWISE = frozenset({"attention", "gated activation"})

Choose = Callable[[Kernel, ShapeClass], str]
"""(row of the table, class of a call) -> name of the candidate that takes it."""


def assumed(kernel: Kernel, shape: ShapeClass) -> str:
    """Choose ours wherever there is one."""
    return kernel.assumed


@contextmanager
def training_kernels(model: nn.Module, attend: AttentionCall = attend, choose: Choose = assumed) -> Iterator[list[str]]:
    """Let the model's layers use the chosen kernels inside the block.

    Args:
        model: any mlx-lm model; layers that do not use the shared functions keep their own.
        attend: computes attention by the kernel it is told.
        choose: says which kernel.

    Yields:
        The names of the kernels that any layer of the model uses, those of the table first.
    """
    rows = {row.shared: row for row in kernel_rows(attend)}
    homes = [vars(sys.modules[name]) for name in {type(module).__module__ for module in model.modules()}]
    exchanged = [(home, name) for home in homes for name, row in rows.items() if home.get(name) is row.theirs]
    for home, name in exchanged:
        home[name] = _by_shape(rows[name], choose)
    try:
        with recurrent_kernels(model) as recurrent:
            yield [
                *(row.name for name, row in rows.items() if any(name == other for _, other in exchanged)),
                *recurrent,
            ]
    finally:
        for home, name in exchanged:
            home[name] = rows[name].theirs


def has_recurrence(model: nn.Module) -> bool:
    """Tell whether any layer carries a state from token to token, by a function that we have one for."""
    with training_kernels(model) as names:
        return not {*names} <= POSITIONWISE


def _by_shape(row: Kernel, choose: Choose) -> Callable[..., Any]:
    """Return a function in the place of the row's own: each call goes to the candidate that its shapes call for."""

    def call(*args: Any, **kwargs: Any) -> Any:
        shape = row.class_of(*args, **kwargs)
        if shape is None:
            return row.theirs(*args, **kwargs)
        return row.candidates[choose(row, shape)](*args, **kwargs)

    return call
