"""Compute the MLP of a block in chunks of positions, so that a long row does not need all of it at once.

With checkpointing, what one block computes again decides how long a row may be, and most of that is the MLP: its width is
several times the model's, and a backward pass needs a handful of such arrays. An MLP computes each position by itself, so it
may be computed for some positions at a time:

    forward     y = [f(x_1), f(x_2), ...], one chunk after the other; only x is kept
    backward    for each chunk: f(x_i) again, d_x_i, and the sums of the gradients of the adapter's factors (float32)

This changes no result but for the order in which the factors' gradients are added up, and computes nothing more than a
checkpointed block does, unless the block has a norm behind its MLP (Gemma): that norm needs y in the backward pass.
Mixtures of experts choose experts for each position, so they are chunked in the same way.

A batch that is not larger than a bound is computed as a whole (planner/memory.py has the bound, which the planner follows).
With dropout, chunks would drop other features, so the MLP stays whole; so it does if ranks have parts of it, and send their sums.

Shapes: B rows, T positions of a row, D width.
Source: sequence tiling of ALST, arXiv 2506.13996 section 3.1; Blockwise Parallel Transformers, arXiv 2305.19370.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import LINEAR, SWITCH, base_dims
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.compat.instances import classes_put_back, mix_in
from mlx_lora.models.head import is_known_block
from mlx_lora.planner.memory import CHUNKED_FROM_BYTES, position_chunks
from mlx_lora.trainer.gradient_checkpointing import as_function

# The names that a block's parts behind attention have in mlx-lm's families (models/head.py lists those that were read).
PARTS = ("mlp", "feed_forward", "block_sparse_moe", "shared_mlp")


class InChunks(nn.Module):
    """Computes some positions at a time; a mixin that comes before the class of a module of one array, (B, T, D) -> (B, T, D).

    Attributes:
        numbers_per_position: the outputs of its layers.
        forced_chunks: how many chunks there are, if that is not to follow from the batch's size.
    """

    numbers_per_position: int
    forced_chunks: int | None

    def __call__(self, x: mx.array) -> mx.array:
        chunks = self.forced_chunks or position_chunks(
            x.shape[0] * x.shape[1] * self.numbers_per_position * x.dtype.size
        )
        chunks = min(chunks, x.shape[1])
        if chunks <= 1 or drops(self):
            return super().__call__(x)
        function, primals = as_function(self, super().__call__, (x,), {})
        edges = [x.shape[1] * number // chunks for number in range(chunks + 1)]

        @mx.custom_function
        def run(*primals: mx.array) -> list[mx.array]:
            *own, x = primals
            parts: list[mx.array] = []
            for begin, end in pairwise(edges):
                # Force the order: otherwise all chunks may be in memory at once.
                [part] = mx.depends([x[:, begin:end]], parts[-1:]) if parts else [x[:, begin:end]]
                parts.append(function(*own, part))
            return [mx.concatenate(parts, axis=1)]

        @run.vjp
        def run_vjp(primals: Any, cotangents: Any, _: Any) -> list[mx.array]:
            *own, x = primals if isinstance(primals, list | tuple) else [primals]
            [d] = cotangents if isinstance(cotangents, list | tuple) else [cotangents]
            return gradients_in_chunks(lambda *arrays: [function(*arrays)], own, x, d, edges)

        return run(*primals)[0]


def gradients_in_chunks(
    function: Any, own: Sequence[mx.array], x: mx.array, d: mx.array, edges: Sequence[int]
) -> list[mx.array]:
    """Return the cotangents of a module's parameters and of its input.

    Args:
        function: of the parameters and some positions of the input.
        own: the parameters.
        x, d: (B, T, D), the input and the output's cotangent.
        edges: the first position of each chunk, and T.
    """
    sums = [mx.zeros(array.shape, mx.float32) for array in own]
    parts: list[mx.array] = []
    for begin, end in pairwise(edges):
        # The first chunk also waits: otherwise compiling may merge it with the forward pass's chunk, and keep that.
        part, d_part = mx.depends([x[:, begin:end], d[:, begin:end]], [parts[-1], *sums] if parts else [d])
        *of_own, of_x = mx.vjp(function, [*own, part], [d_part])[1]
        sums = [total + found.astype(mx.float32) for total, found in zip(sums, of_own, strict=True)]
        parts.append(of_x)
    return [*(total.astype(array.dtype) for total, array in zip(sums, own, strict=True)), mx.concatenate(parts, axis=1)]


def drops(module: nn.Module) -> bool:
    """Return whether an adapter of the module drops features now."""
    return any(layer.dropout.active for layer in adapter_layers(module).values())


def parts_of(block: nn.Module) -> list[Any]:
    """Return the parts of a block that may be computed in chunks; none of a block whose code was not read."""
    if not is_known_block(block):
        return []
    found = [block.get(name) for name in PARTS]
    return [part for part in found if part is not None]


def position_numbers(part: nn.Module, config: Mapping[str, Any]) -> int:
    """Return the outputs of a part's layers for one position."""
    text = {**config, **(config.get("text_config") or {})}
    active = text.get("num_experts_per_tok") or text.get("moe_topk") or 1
    layers = [layer for layer in part.modules() if isinstance(layer, (*LINEAR, *SWITCH))]
    return sum(base_dims(layer)[1] * (active if isinstance(layer, SWITCH) else 1) for layer in layers)


def chunk_positions(model: nn.Module, config: Mapping[str, Any], mode: str, most_positions: int = 0) -> list[str]:
    """Let the blocks of a checkpointed model compute their MLPs in chunks where a batch is large.

    Args:
        model: adapted.
        config: its config.json.
        mode: --grad-checkpoint; other modes than `block` keep what an MLP computes.
        most_positions: of a batch, for the words.

    Returns:
        Words for the run's header, if batches are so large.
    """
    if mode != "block":
        return []
    from_positions = []
    for block in model.layers:
        for part in parts_of(block):
            part.numbers_per_position, part.forced_chunks = position_numbers(part, config), None
            mix_in(InChunks, part)
            from_positions.append(CHUNKED_FROM_BYTES // (part.numbers_per_position * number_bytes(model)))
    if not from_positions or most_positions <= min(from_positions):
        return []
    return [f"MLPs of batches of more than {min(from_positions):,} positions in chunks"]


def number_bytes(module: nn.Module) -> int:
    """Return the bytes of one of the numbers that a model or a block computes: those of its norms, which are not quantized."""
    norms = (one for one in module.modules() if type(one).__name__.endswith("Norm") and "weight" in one)
    return next((norm.weight.dtype.size for norm in norms), 4)


@contextmanager
def in_chunks(block: nn.Module, chunks: int) -> Iterator[None]:
    """Let a block compute its parts in this many chunks inside the block, whatever the batch's size is."""
    parts = parts_of(block)
    with classes_put_back(parts):
        for part in parts:
            part.numbers_per_position, part.forced_chunks = 0, chunks
            mix_in(InChunks, part)
        yield
