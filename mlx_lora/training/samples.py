"""Sample greedy text after the beginning of a held-out row, to compare the model before and after training."""

from __future__ import annotations

import numpy as np
from mlx_lm import stream_generate

from mlx_lora.data.encode import EncodedSet
from mlx_lora.models.continuation import continued
from mlx_lora.models.load import Base

MOST_PROMPT_TOKENS = 256
OF_PLAIN_TEXT = 24  # tokens of the beginning if a row is trained from its first token
CANDIDATES = 25


def held_out_beginning(rows: EncodedSet) -> list[int]:
    """Return the tokens before the first trained token of a typical row, the median by length of the first few.

    Args:
        rows: at least one.

    Returns:
        Token ids, at most the last 256; for a row that is trained from the start, its first 24.
    """
    order = np.argsort(rows.lengths[:CANDIDATES], kind="stable")
    tokens, mask = rows.row(int(order[len(order) // 2]))
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
        made = stream_generate(base.model, base.tokenizer, prompt, max_tokens=max_tokens)
        return "".join(piece.text for piece in continued(made, base.tokenizer))
    finally:
        base.model.train(training)
