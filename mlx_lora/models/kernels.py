"""Replace the kernels of a model's layers while a training step is traced.

mlx-lm's architectures share one attention function, one gated activation and one function for each common recurrence,
which each imports by name. These names are replaced in the modules of this model's classes while the step is traced, and
then restored, so generation and evaluation do not change. A call's shapes decide which function takes it.

Recurrences of a single architecture (models/recurrent_layers.py) have no row in the table: ours always replace them.
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

# Kernels without a state that passes from token to token.
POSITIONWISE = frozenset({"attention", "gated activation"})

Choose = Callable[[Kernel, ShapeClass], str]
"""(row of the table, shape class of a call) -> name of the candidate that takes the call."""


def assumed(kernel: Kernel, shape: ShapeClass) -> str:
    """Return the candidate that is used without measuring, which is ours."""
    return kernel.assumed


@contextmanager
def training_kernels(model: nn.Module, attend: AttentionCall = attend, choose: Choose = assumed) -> Iterator[list[str]]:
    """Let the model's layers use the chosen kernels inside the block.

    Args:
        model: any mlx-lm model; layers that do not use the shared functions keep their own.
        attend: computes attention by the kernel that its `Tiles` name.
        choose: returns the candidate for a call.

    Yields:
        The names of the kernels that the model uses, those of the table first.
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
    """Return whether any layer has a recurrence that we have a kernel for."""
    with training_kernels(model) as names:
        return not {*names} <= POSITIONWISE


def _by_shape(row: Kernel, choose: Choose) -> Callable[..., Any]:
    """Return a function that replaces mlx-lm's and passes each call to the candidate chosen for its shapes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        shape = row.class_of(*args, **kwargs)
        if shape is None:
            return row.theirs(*args, **kwargs)
        return row.candidates[choose(row, shape)](*args, **kwargs)

    return call
