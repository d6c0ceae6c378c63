"""Sample greedy texts after the beginnings of held-out rows, to compare the model before and after training."""

from __future__ import annotations

import numpy as np
from mlx_lm import stream_generate

from mlx_lora.data.encode import EncodedSet
from mlx_lora.models.continuation import continued
from mlx_lora.models.decode_weights import held_weights
from mlx_lora.models.load import Base
from mlx_lora.models.token_steps import TokenSteps

MOST_PROMPT_TOKENS = 256
OF_PLAIN_TEXT = 24  # tokens of the beginning if a row is trained from its first token
CANDIDATES = 25


def held_out_beginnings(rows: EncodedSet, most: int) -> list[list[int]]:
    """Return the tokens before the first trained token of some typical rows, the middle one by length first.

    Args:
        rows: at least one.
        most: how many to return; fewer if the rows are few, or begin alike.

    Returns:
        Token ids, at most the last 256 of each; for a row that is trained from the start, its first 24.
    """
    order = np.argsort(rows.lengths[:CANDIDATES], kind="stable").tolist()
    middle = len(order) // 2
    found: list[list[int]] = []
    for number in sorted(order, key=lambda number: abs(order.index(number) - middle)):
        beginning = _beginning(*rows.row(number))
        if len(found) < most and beginning not in found:
            found.append(beginning)
    return found


def _beginning(tokens: np.ndarray, mask: np.ndarray) -> list[int]:
    trained = np.flatnonzero(mask)
    before = int(trained[0]) if len(trained) else len(tokens)
    # The first token can never be trained, so plain text is trained from the second.
    end = before if before > 1 else min(OF_PLAIN_TEXT, len(tokens) - 1)
    return tokens[max(0, end - MOST_PROMPT_TOKENS) : max(end, 1)].tolist()


def greedy_text(base: Base, prompt: list[int], max_tokens: int) -> str:
    """Return the model's continuation of a prompt; this draws no random number and keeps the model's mode.

    Args:
        base: with or without an adapter.
        prompt: token ids.
        max_tokens: the most tokens to generate.
    """
    training = base.model.training
    base.model.eval()
    try:
        with held_weights(base):
            made = stream_generate(TokenSteps(base.model), base.tokenizer, prompt, max_tokens=max_tokens)  # pyright: ignore[reportArgumentType] # it is called as a model
            return "".join(piece.text for piece in continued(made, base.tokenizer))
    finally:
        base.model.train(training)
