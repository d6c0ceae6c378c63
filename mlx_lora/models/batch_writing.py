"""Write a text after each of many prompts, several at once, with a base as it is.

The texts do not depend on how they are batched, apart from rounding: each has a random stream of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import mlx.core as mx

from mlx_lora.models.decode_weights import held_weights
from mlx_lora.models.group_sampling import SamplingOptions, check_groups, sample_groups
from mlx_lora.models.load import Base
from mlx_lora.models.token_steps import TokenSteps

MOST_ROWS = 32  # texts at once
# Tokens of all texts at once, prompts included. Not a share of the free memory: rounding, and so now and then a text,
# depends on which texts are batched, and should be the same on another day.
MOST_TOKENS = 16_384


def write_texts(
    base: Base,
    prompts: Sequence[Sequence[int]],
    numbers: Collection[int],
    options: SamplingOptions,
    ends: frozenset[int],
    keys: mx.array,
    take: Callable[[list[int], list[list[int]]], None],
) -> None:
    """Sample one text after each prompt.

    Args:
        base: without an adapter, or with one.
        prompts: token ids, at least one each.
        numbers: of the prompts to write after.
        options: how; the group is 1.
        ends: tokens that end a text.
        keys: (prompts, 2) uint32, the key of each text's random stream.
        take: called after each batch with its numbers and the tokens of its texts.

    Raises:
        InputError: the model cannot hold several texts at once.
    """
    check_groups(base.model, base.model_id)
    order = sorted(numbers, key=lambda number: (len(prompts[number]), number))
    if not order:
        return
    rows = max(1, min(MOST_ROWS, MOST_TOKENS // (len(prompts[order[-1]]) + options.max_new_tokens)))
    training = base.model.training
    base.model.eval()
    try:
        with held_weights(base, rows):
            model = TokenSteps(base.model)
            for start in range(0, len(order), rows):
                batch = order[start : start + rows]
                texts, _ = sample_groups(model, [prompts[n] for n in batch], options, ends, keys[mx.array(batch)])  # pyright: ignore[reportArgumentType] # it is called as a model
                take(batch, texts)
    finally:
        base.model.train(training)
