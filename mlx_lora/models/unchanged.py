"""Puts a model's arrays back after it was differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn

# What mlx's own Module keeps under private names.
MODULE_OWN = ("_no_grad", "_training")


@contextmanager
def left_unchanged(model: nn.Module) -> Iterator[None]:
    """Put back, at the end of the block, all parameters of a model and what its modules keep under private names.

    Differentiation leaves its own stand-ins in the trainable ones. mlx-lm's forward passes leave others, which mean
    nothing outside of the trace that made them: Gemma 3n overwrites frozen weights, and Kimi K3 remembers products of
    them for the next time it generates.
    """
    parameters = model.parameters()
    private = [
        (module, name, module[name] if name in module else vars(module)[name])
        for module in model.modules()
        for name in {*module, *vars(module)}
        if name.startswith("_") and name not in MODULE_OWN
    ]
    try:
        yield
    finally:
        model.update(parameters)
        for module, name, value in private:
            setattr(module, name, value)
