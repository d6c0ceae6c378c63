"""Compute a model block by block, each for all batches before the next, so that one block's work is in memory at a time.

    batches -> embedding -> block 0 | -> block 1 | -> ...        | the outputs of all batches, which the walk keeps

The model's own code calls its blocks, with the masks and arguments of the family. A block that the walk has passed returns
the kept output at once; block k is computed; then the forward pass ends. MLX computes only what a result needs, so passed
blocks and the embedding cost nothing. In a model that hands other values past its blocks (shared keys, early embeddings) a
kept output is not enough: `BlockWalk` compares both ways on its first batch, and computes such a model from its first
block each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.compat.functions import answering

CHECK_TOKENS = 64
TOLERANCE = 1e-3  # of an output's largest value: both ways compute the same operations


class _BlockReached(Exception):
    """Ends a forward pass at a block, whose output it carries."""


class BlockWalk:
    """A walk through the blocks of one model.

    Attributes:
        model: in eval mode.
        batches: (B, T) token ids of each.
        at: the block to compute next; the number of blocks: what lies behind the last one.
        keeps: whether outputs are kept; else each block is computed from the tokens.
    """

    def __init__(self, model: nn.Module, batches: Sequence[mx.array]):
        """Begin at the first block.

        Args:
            model: an mlx-lm model, adapted or not; nothing of it is changed after a step.
            batches: at least one.
        """
        self.model, self.batches, self.at = model, batches, 0
        self._kept: list[Any] = [None] * len(batches)
        self._output: Any = None
        self.keeps = self._keeping_is_enough()

    def step(self) -> Iterator[int]:
        """Compute the next block for all batches; yield the number of each batch before it is computed."""
        with self._watched():
            for number in range(len(self.batches)):
                yield number
                out = self._through(self.batches[number], self._kept[number])
                if self.at < len(self.model.layers):  # else logits, which are large and nobody's input
                    mx.eval(out)
                    self._kept[number] = out
        self.at += 1

    def _through(self, ids: mx.array, kept: Any) -> Any:
        self._output = kept if self.keeps else None
        try:
            out = self.model(ids)
        except _BlockReached as reached:
            (out,) = reached.args
        return out

    def _watched(self) -> AbstractContextManager:
        """Let the blocks take part in the walk inside the block."""
        return answering(*((block, partial(self._called, number)) for number, block in enumerate(self.model.layers)))

    def _called(self, number: int, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if number < self.at and self.keeps:
            return self._output
        out = own(*args, **kwargs)
        if number == self.at:
            raise _BlockReached(out)
        return out

    def _keeping_is_enough(self) -> bool:
        """Tell whether blocks that start from kept outputs compute what they compute in a whole pass, on one batch."""
        few, kept = self.batches[0][:1, :CHECK_TOKENS], None
        self.keeps = True
        with self._watched():
            for _ in self.model.layers:
                kept = self._through(few, kept)
                self.at += 1
            found = self._through(few, kept)
        self.at = 0
        return _same(found, self.model(few))


def _same(found: Any, wanted: Any) -> bool:
    pairs = zip(tree_flatten(found), tree_flatten(wanted), strict=True)
    return all(
        mx.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * mx.abs(b).max().item()).item() for (_, a), (_, b) in pairs
    )
