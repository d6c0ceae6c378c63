"""Greedy text after a held-out beginning: what the model says before the training, and after it."""

from __future__ import annotations

import numpy as np
from mlx_lm import stream_generate

from mlx_lora.data.encode import EncodedSet
from mlx_lora.models.continuation import continued
from mlx_lora.models.load import Base

MOST_PROMPT_TOKENS = 256
OF_PLAIN_TEXT = 24  # tokens of a row that is trained from its first on
CANDIDATES = 25


def held_out_beginning(rows: EncodedSet) -> list[int]:
    """Return the tokens before the first trained one of a typical row: the middle one by length of the first few.

    Args:
        rows: at least one.

    Returns:
        Token ids, the last 256 at most; of a row that is trained from the start its first 24.
    """
    order = np.argsort(rows.lengths[:CANDIDATES], kind="stable")
    tokens, mask = rows.row(int(order[len(order) // 2]))
    trained = np.flatnonzero(mask)
    before = int(trained[0]) if len(trained) else len(tokens)
    # The mask is of tokens: the first can never be trained, so plain text begins at the second.
    end = before if before > 1 else min(OF_PLAIN_TEXT, len(tokens) - 1)
    return tokens[max(0, end - MOST_PROMPT_TOKENS) : max(end, 1)].tolist()


def greedy_text(base: Base, prompt: list[int], max_tokens: int) -> str:
    """Return what the model goes on with; no random number is drawn, and the model is left in the mode it was in.

    Args:
        base: with or without an adapter on it.
        prompt: token ids.
        max_tokens: at most so many are made.
    """
    training = base.model.training
    base.model.eval()
    try:
        made = stream_generate(base.model, base.tokenizer, prompt, max_tokens=max_tokens)
        return "".join(piece.text for piece in continued(made, base.tokenizer))
    finally:
        base.model.train(training)
