"""Predict the bytes that sampling holds at its peak: keys and values of all answers, and the scores of the vocabulary.

Sampling has two moments (models/group_sampling.py). First, prompts are computed one by one, and each layer keeps a prompt's
keys and values. Then these are copied for each answer, and grow with it: mlx-lm's caches by CACHE_STEP tokens at a time. A
layer's old buffer is there until its new one is filled. Base, adapter and optimizer are held all along.

Shapes: N prompts, G answers to each, A = N G rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlx_lora.planner.shapes import Block, LayerCache, Machine, ModelShape, Rollout, in_steps

PREFILL_TOKENS = 512  # of a prompt that are computed at once (models/group_sampling.py)
SINGLE = 4  # bytes of a float32

# Fitted on a CPU (tests/test_rollout_memory.py compares with measured peaks).
GROWING_LAYERS = 1  # layers whose old keys and values, and room for new ones, are there beside both together
SCORE_ARRAYS = 6.0  # arrays of A x V: logits, their softmax, and the noise that a token is drawn with
DENSE_ROWS = 4  # rows from which a CPU multiplies by a quantized head as floats (models/matmul.py measures it)
PREFILL_ARRAYS = 1.0  # of a block's layers, widths in and out summed, per position
PREFILL_SCORES = 3.0  # arrays of mlx's attention on a CPU: scores, masked scores, their softmax


def rollout_parts(shape: ModelShape, rollout: Rollout, machine: Machine) -> dict[str, int]:
    """Return what sampling takes at its peak beside the held parts, by name.

    Args:
        shape: the model, with what its layers keep.
        rollout: the largest batch of prompts.
        machine: that it runs on.
    """
    rows = rollout.prompts * rollout.group
    of_prompts = rollout.prompts * _bytes_of(shape.caches, in_steps(rollout.prompt_tokens - 1))
    whole = rows * _bytes_of(shape.caches, rollout.cached_tokens)
    first = {"keys and values": of_prompts, "work ahead": _prefill_window(shape.blocks, rollout, machine)}
    later = {
        "keys and values": whole,
        "copies of them": int(whole * min(1.0, GROWING_LAYERS / max(1, len(shape.caches)))),
        "logits": int(SCORE_ARRAYS * rows * shape.vocabulary * SINGLE) + _dense_head(shape, rows, machine),
    }
    return max(first, later, key=lambda parts: sum(parts.values()))


def _bytes_of(caches: Iterable[LayerCache], tokens: int) -> int:
    """Return the bytes that all layers keep of a row with room for so many tokens."""
    return sum(
        cache.fixed_bytes
        + cache.token_bytes * (tokens if cache.most_tokens is None else min(tokens, cache.most_tokens))
        for cache in caches
    )


def _dense_head(shape: ModelShape, rows: int, machine: Machine) -> int:
    """Return the bytes of a quantized head as floats: a CPU multiplies by it, a GPU by the packed one for so few rows."""
    if not shape.head_packed or machine.backend != "cpu" or rows < DENSE_ROWS:
        return 0
    return shape.vocabulary * shape.width * machine.number_bytes * machine.dense_copies


def _prefill_window(blocks: Iterable[Block], rollout: Rollout, machine: Machine) -> int:
    """Return the bytes of a forward pass over a prompt, or its first part, of which one block is in memory at a time."""
    tokens, size = min(PREFILL_TOKENS, rollout.prompt_tokens), machine.number_bytes
    most = 0.0
    for block in blocks:
        layers = PREFILL_ARRAYS * block.widths * tokens
        packed = max((layer.numbers for layer in block.layers if layer.packed and layer.experts == 1), default=0)
        scores = PREFILL_SCORES * block.heads * tokens * rollout.prompt_tokens if machine.backend == "cpu" else 0
        most = max(most, max(layers + packed * machine.dense_copies, scores))
    return int(most * size)
