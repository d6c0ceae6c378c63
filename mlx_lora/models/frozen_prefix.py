"""Start a model at its first adapted block: the trunk below it is the same in every epoch, so its output can be kept.

    tokens -> embedding -> blocks 0 .. k-1 | -> blocks k .. n-1 -> norm -> head
              the trunk: nothing trained   | what is trained

The wrapped blocks belong to one model; mlx-lm's code is not changed. While a kept output is given, block k gets it as its
input, and the blocks below return their input at once. MLX computes only what a result needs, so the trunk, embedding
included, is never computed then. A model that hands other values past the first adapted block (shared keys, early
embeddings) gets wrong ones that way; trainer/frozen_prefix.py finds that out.

Shapes: B rows, T columns, D width; some models have more than one dimension in the place of D.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.compat.instances import mix_in
from mlx_lora.kernels.attention import AttentionCall
from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.kernels.table import Choose, assumed, training_kernels


class NoTrunk(Exception):
    """A model's blocks are not called one after the other with one array; the message says what was found."""


class _Reached(Exception):
    """Ends a forward pass at the first adapted block, whose input it carries."""


class Trunk:
    """The blocks of one model below its first adapted one.

    Attributes:
        blocks: how many there are.
        kept: the output that takes their place; None: they are computed.
        wanted: whether a forward pass ends with their output.
    """

    def __init__(self, model: nn.Module, blocks: int):
        """Wrap the blocks; until a kept output is given, they work as before.

        Args:
            model: an mlx-lm model with its adapters.
            blocks: at least 1; block number `blocks` is the first adapted one.
        """
        self.blocks = blocks
        self.kept: mx.array | None = None
        self.wanted = False
        for number, block in enumerate(model.layers[: blocks + 1]):
            mix_in(TrunkBlock, block, TrunkBlock.__module__)
            block.trunk, block.is_above = self, number == blocks

    @contextmanager
    def given(self, kept: mx.array) -> Iterator[None]:
        """Start each forward pass inside this context with the trunk's output, (B, T, D)."""
        self.kept = kept
        try:
            yield
        finally:
            self.kept = None

    def output(self, model: nn.Module, inputs: mx.array) -> mx.array:
        """Return the trunk's output for token ids (B, T).

        Raises:
            NoTrunk: the model does not pass an array with an entry for each position from block to block.
        """
        self.wanted = True
        try:
            model(inputs)
        except _Reached as reached:
            (found,) = reached.args
        else:
            raise NoTrunk("it does not call its first adapted block as a whole")
        finally:
            self.wanted = False
        if not isinstance(found, mx.array) or found.shape[:2] != inputs.shape or found.ndim < 3:
            raise NoTrunk("it passes more than one array from block to block")
        return found


class TrunkBlock(nn.Module):
    """A block of the trunk, or the first above it; a mixin that comes before the block's own class."""

    trunk: Trunk
    is_above: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        trunk = self.trunk
        if trunk.wanted and self.is_above:
            raise _Reached(args[0] if args else None)
        if trunk.kept is None:
            return super().__call__(*args, **kwargs)
        return super().__call__(trunk.kept, *args[1:], **kwargs) if self.is_above else args[0]


def trunk_outputs(
    model: nn.Module, trunk: Trunk, attend: AttentionCall | None, choose: Choose = assumed, compiled: bool = True
) -> Callable[[mx.array], mx.array]:
    """Return a function from token ids (B, T) to the trunk's output, computed as in a training step, without gradient.

    Args:
        model: the trunk's.
        trunk: of the model.
        attend, choose, compiled: as in trainer/step.py.
    """

    def outputs(inputs: mx.array) -> mx.array:
        training = model.training
        model.train()  # as in a step: some models compute other kernels in eval mode
        try:
            with left_unchanged(model), training_kernels(model, attend, choose) if attend else nullcontext():
                return trunk.output(model, inputs)
        finally:
            model.train(training)

    return mx.compile(outputs, inputs=[model.state]) if compiled else outputs
