"""Shorten a model to one block of each kind, so that a check of its kernels and its loss does not compute all of them.

Blocks of one kind have the same code and the same shapes: what computes one of them wrongly computes all of them wrongly. So
a few of them are checked, between the model's own embedding and its own last norm and head.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.kernel_choice import traced_calls


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
def few_blocks(model: nn.Module, tokens: int) -> Iterator[list[int]]:
    """Let a model have one block of each kind inside the block, or all of them if it cannot be shortened.

    Args:
        model: an mlx-lm model, adapted or not; its last block stays the last one.
        tokens: in the rows that it is called on.

    Yields:
        The numbers of the blocks that it has.
    """
    some = enough_blocks(model, tokens)
    with only_blocks(model, some):
        yield some


def enough_blocks(model: nn.Module, tokens: int) -> list[int]:
    """Return the numbers of a model's last blocks of each kind, as many as are needed, ascending.

    With these blocks alone, the model must use every kernel and shape that it uses with all of them: some choose a mask by a
    list of their own (GPT-OSS), which no block's settings show.
    """
    of_kind: dict[tuple, list[int]] = {}
    for number, block in enumerate(_blocks(model)):
        of_kind.setdefault(block_kind(block), []).append(number)
    everything, each = list(range(len(_blocks(model)))), 1
    of_all = _used(model, tokens) if everything else None
    while of_all is not None:
        some = sorted(number for numbers in of_kind.values() for number in numbers[-each:])
        with only_blocks(model, some) as shortened:
            if len(some) == len(everything) or not shortened:
                break
            if _used(model, tokens) == of_all:
                return some
        each *= 2
    return everything


def _used(model: nn.Module, tokens: int) -> set[Any] | None:
    """Return the kernels and shapes that the model uses, None if its code fails."""
    try:
        return {(kernel.name, shape) for kernel, shape in traced_calls(model, [tokens])}
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        return None


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
