"""Compute only some blocks of a model, with the model's own code around them.

    few_blocks    one block of each kind, so that a check of kernels and loss does not compute all of them. Blocks of one kind have
                  the same code and the same shapes: what computes one of them wrongly computes all of them wrongly. They are
                  checked between the model's own embedding, last norm and head.
    start_at      those behind the first ones, from what these returned: frozen blocks below the first adapted one return the
                  same in every epoch
    output_of     those up to one, whose output is returned
    BlockWalk     block by block, each for all batches before the next, so that one block's work is in memory at a time

        batches -> embedding -> block 0 | -> block 1 | -> ...        | the outputs of all batches, which the walk keeps

The model calls its blocks itself, with the masks and arguments of the family; mlx-lm's code is not changed. A block that was passed
returns the known output at once. MLX computes only what a result needs, so passed blocks and the embedding cost nothing. A model
that hands other values past its blocks (shared keys, early embeddings) gets wrong ones that way; callers compare both ways.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.compat.functions import answering
from mlx_lora.kernels.choose import recorded_calls

CHECK_TOKENS = 64
TOLERANCE = 1e-3  # of an output's largest value: both ways compute the same operations


# One block of each kind


@contextmanager
def few_blocks(model: nn.Module, tokens: int, planned: AbstractContextManager | None = None) -> Iterator[list[int]]:
    """Let a model have one block of each kind inside the block, or all of them if it cannot be shortened.

    Args:
        model: an mlx-lm model, adapted or not; its last block stays the last one.
        tokens: in the rows that it is called on.
        planned: a context in which the model only plans what it computes, if it would compute at once.

    Yields:
        The numbers of the blocks that it has.
    """
    with planned or nullcontext():
        some = enough_blocks(model, tokens)
    with only_blocks(model, some):
        yield some


def enough_blocks(model: nn.Module, tokens: int) -> list[int]:
    """Return the numbers of a model's last blocks of each kind, as many as are needed, ascending.

    With these blocks alone, the model must use every kernel and shape that it uses with all of them: some choose a mask by a
    list of their own (GPT-OSS), which no block's settings show.
    """

    def used() -> set[Any] | None:
        calls = recorded_calls(model, [tokens])
        return None if calls is None else {(kernel.name, shape) for kernel, shape in calls}

    blocks, of_kind = _blocks(model), {}
    for number, block in enumerate(blocks):
        of_kind.setdefault(block_kind(block), []).append(number)
    everything, each = list(range(len(blocks))), 1
    of_all = used() if everything else None
    while of_all is not None:
        some = sorted(number for numbers in of_kind.values() for number in numbers[-each:])
        with only_blocks(model, some) as shortened:
            if len(some) == len(everything) or not shortened:
                break
            if used() == of_all:
                return some
        each *= 2
    return everything


def block_kind(block: nn.Module) -> tuple:
    """Return what two blocks of the same kind have in common: types, shapes, and settings other than their index."""
    parameters = tuple((name, p.shape, p.dtype) for name, p in tree_flatten(block.parameters()))
    trained = tuple(name for name, _ in tree_flatten(block.trainable_parameters()))
    settings = tuple(
        (path, name, value)
        for path, module in block.named_modules()
        for name, value in sorted(vars(module).items())
        if isinstance(value, (bool, str))
        or (isinstance(value, (int, float)) and "idx" not in name and "index" not in name)
    )
    return tuple(type(m) for m in block.modules()), parameters, trained, settings


@contextmanager
def only_blocks(model: nn.Module, some: Sequence[int]) -> Iterator[bool]:
    """Let a model have only some of its blocks inside the block.

    Args:
        model: an mlx-lm model whose blocks are in a list of one of its modules.
        some: the numbers of the blocks to keep.

    Yields:
        Whether it has only these.
    """
    blocks = _blocks(model)
    homes = [
        (module, name, value)
        for module in model.modules()
        for name, value in module.items()
        if isinstance(value, list) and len(value) == len(blocks) and all(map(operator.is_, value, blocks))
    ]
    for module, name, value in homes:
        module[name] = [value[number] for number in some]
    try:
        yield len(_blocks(model)) == len(some)
    finally:
        for module, name, value in homes:
            module[name] = value


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return the model's blocks; a model that shows none is left whole."""
    return list(getattr(model, "layers", ()))


# From a block, and up to one


class _Reached(Exception):
    """Ends a forward pass at a block, whose output it carries."""


def start_at(model: nn.Module, number: int, output: Any) -> AbstractContextManager:
    """Let forward passes inside the context start at a block: the blocks below it return `output` at once."""
    return answering(*((block, lambda *_, **__: output) for block in model.layers[:number]))


def output_of(model: nn.Module, number: int, inputs: mx.array) -> Any:
    """Return what a block returns for token ids (B, T), without what is above it; None: the model does not call it."""

    def stop(own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise _Reached(own(*args, **kwargs))

    with answering((model.layers[number], stop)):
        try:
            model(inputs)
        except _Reached as reached:
            return reached.args[0]
    return None


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
        few, kept = batches[0][:1, :CHECK_TOKENS], None
        self.keeps = True
        # Whether blocks that start from kept outputs compute what they compute in a whole pass.
        for self.at in range(len(model.layers) + 1):
            kept = self._through(few, kept)
        self.at, self.keeps = 0, _same(kept, model(few))

    def step(self) -> Iterator[int]:
        """Compute the next block for all batches; yield the number of each batch before it is computed."""
        for number, batch in enumerate(self.batches):
            yield number
            out = self._through(batch, self._kept[number])
            if self.at < len(self.model.layers):  # else logits, which are large and nobody's input
                mx.eval(out)
                self._kept[number] = out
        self.at += 1

    def _through(self, ids: mx.array, kept: Any) -> Any:
        """Return the output of the block at which the walk is."""
        with start_at(self.model, self.at if self.keeps else 0, kept):
            return self.model(ids) if self.at == len(self.model.layers) else output_of(self.model, self.at, ids)


def _same(found: Any, wanted: Any) -> bool:
    pairs = zip(tree_flatten(found), tree_flatten(wanted), strict=True)
    return all(
        mx.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * mx.abs(b).max().item()).item() for (_, a), (_, b) in pairs
    )
