"""Gradient checkpointing per block instance: keep a block's input, recompute the rest in the backward pass."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn


class Checkpointed:
    """Mixed in front of a block's class; only blocks given this class recompute."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = super().__call__

        def run(parameters: dict, *inputs: Any, **named: Any) -> Any:
            self.update(parameters)
            return call(*inputs, **named)

        # The parameters go in as an argument: mx.checkpoint differentiates arguments alone.
        return mx.checkpoint(run)(self.trainable_parameters(), *args, **kwargs)


def checkpoint_blocks(blocks: list[nn.Module]) -> None:
    """Make these block instances recompute in the backward pass.

    mlx-lm patches the block's class, which reaches every model of the process and nests when repeated;
    here the instance gets a class of its own, and a second call changes nothing.
    """
    for block in blocks:
        base = type(block)
        if not issubclass(base, Checkpointed):
            block.__class__ = type(f"Checkpointed{base.__name__}", (Checkpointed, base), {})
