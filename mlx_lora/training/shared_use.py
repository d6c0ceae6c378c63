"""Use a model whose base ranks share (base_shards.py) for other things than a step: one text for all, weights of one block."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.training.base_shards import Messages, SharedBlock, is_shared


def first_ranks_choice(model: nn.Module, choose: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """Return a function that chooses as rank 0 does, so that ranks that share a base generate one text.

    Args:
        model: whose base may be shared.
        choose: log-probabilities (1, V) -> a token, (1,) uint32; for a whole base it is returned as it is.
    """
    if not is_shared(model):
        return choose
    messages = _messages(model)

    def choose_first(logprobs: mx.array) -> mx.array:
        [own] = mx.depends([choose(logprobs)], [*messages.before, *messages.sent])
        with messages.ranks.beside():
            every = messages.ranks.gathered(own)  # (N, 1)
        messages.before, messages.sent = [every], [every]
        return every[0]

    return choose_first


def await_messages(model: nn.Module) -> None:
    """Wait for the messages that were submitted ahead: a rank must not end before the others have them."""
    if is_shared(model):
        mx.eval(_messages(model).sent)


def with_weights(block: nn.Module | None) -> AbstractContextManager:
    """Return a context in which a block has its weights; all ranks must enter it. None: nothing is to be done."""
    return block.at_hand([]) if isinstance(block, SharedBlock) else nullcontext()


def unshareable_words(config: dict[str, Any]) -> str:
    """Return why a model's base cannot be shared, if its numbers are not finite then."""
    return (
        f"--shard-base: mlx-lm's {config.get('model_type')} reads weights of its blocks outside of them, where a process "
        "does not have them; leave it out"
    )


def _messages(model: nn.Module) -> Messages:
    return model.layers[0]._held.unit.messages
