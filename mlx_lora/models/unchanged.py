"""Restore a model's arrays after it was differentiated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn

# Private names that belong to mlx's Module.
MODULE_OWN = ("_no_grad", "_training")


@contextmanager
def left_unchanged(model: nn.Module) -> Iterator[None]:
    """Restore all parameters of a model, and its modules' private attributes, at the end of the block.

    Differentiation leaves traced arrays in trainable parameters. mlx-lm's forward passes leave others, which are
    meaningless outside of the trace: Gemma 3n overwrites frozen weights, and Kimi K3 keeps products of them for the next
    generation.
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
