"""Sample greedy texts after the beginnings of held-out rows, to compare the model before and after training."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from mlx_lm import stream_generate

from mlx_lora.data.encode import EncodedSet
from mlx_lora.models.continuation import continued
from mlx_lora.models.decode_weights import held_weights
from mlx_lora.models.load import Base
from mlx_lora.models.token_steps import TokenSteps

MOST_PROMPT_TOKENS = 2048  # a prompt that lost its beginning would lack the system text and the tools
OF_PLAIN_TEXT = 24  # tokens of the beginning if a row is trained from its first token
CANDIDATES = 25
SENTENCE_ENDS = tuple(".!?\"'”’)")


def held_out_beginnings(
    rows: EncodedSet, most: int, begins_word: Callable[[int, int], bool] = lambda before, token: True
) -> list[list[int]]:
    """Return the tokens before the first trained token of some typical rows, the middle one by length first.

    Args:
        rows: at least one.
        most: how many to return; fewer if the rows are few, or begin alike.
        begins_word: whether a token after another one begins a word, so that plain text is not cut inside a word.

    Returns:
        Token ids, at most the last 2048 of each; for a row that is trained from the start, its first 24 or a few less.
    """
    return [beginning for _, beginning in held_out_prompts(rows, most, begins_word)]


def held_out_prompts(
    rows: EncodedSet, most: int, begins_word: Callable[[int, int], bool] = lambda before, token: True
) -> list[tuple[int, list[int]]]:
    """Return the number and the beginning of each row of `held_out_beginnings`."""
    order = np.argsort(rows.lengths[:CANDIDATES], kind="stable").tolist()
    middle = len(order) // 2
    found: dict[int, list[int]] = {}
    for number in sorted(order, key=lambda number: abs(order.index(number) - middle)):
        beginning = _beginning(*rows.row(number), begins_word)
        if len(found) < most and beginning not in found.values():
            found[number] = beginning
    return list(found.items())


def before_answer(rows: EncodedSet, number: int) -> list[int]:
    """Return all tokens before the first trained one of a row, or of a prompt alone, all of its tokens."""
    tokens, mask = rows.row(number)
    return tokens[: int(np.argmax(mask)) if mask.any() else len(tokens)].tolist()


def row_answer(rows: EncodedSet, number: int) -> list[int]:
    """Return the trained tokens after a row's prompt, up to the next turn; none for plain text, or for a prompt alone."""
    tokens, mask = rows.row(number)
    trained = np.flatnonzero(mask)
    if not len(trained) or trained[0] <= 1:
        return []
    untrained = np.flatnonzero(~mask[trained[0] :])
    end = trained[0] + untrained[0] if len(untrained) else len(tokens)
    return tokens[trained[0] : end].tolist()


def _beginning(tokens: np.ndarray, mask: np.ndarray, begins_word: Callable[[int, int], bool]) -> list[int]:
    trained = np.flatnonzero(mask)
    before = int(trained[0]) if len(trained) else len(tokens)
    # The first token can never be trained, so plain text is trained from the second.
    end = before
    if before <= 1:
        most = min(OF_PLAIN_TEXT, len(tokens) - 1)
        ends = (n for n in range(most, most // 2, -1) if begins_word(int(tokens[n - 1]), int(tokens[n])))
        end = next(ends, most)
    return tokens[max(0, end - MOST_PROMPT_TOKENS) : max(end, 1)].tolist()


def greedy_text(base: Base, prompt: list[int], max_tokens: int) -> str:
    """Return the model's continuation of a prompt; this draws no random number and keeps the model's mode.

    Args:
        base: with or without an adapter.
        prompt: token ids.
        max_tokens: the most tokens to generate; a text that ends there ends with a whole word and three dots.
    """
    training = base.model.training
    base.model.eval()
    try:
        with held_weights(base):
            made = stream_generate(TokenSteps(base.model), base.tokenizer, prompt, max_tokens=max_tokens)  # pyright: ignore[reportArgumentType] # it is called as a model
            pieces = list(continued(made, base.tokenizer))
        text = "".join(piece.text for piece in pieces)
        return whole_words(text) if pieces and pieces[-1].finish_reason == "length" else text
    finally:
        base.model.train(training)


def whole_words(text: str) -> str:
    """Return a text that was cut, without the beginning of a word at its end, and with three dots unless a sentence ends."""
    kept = re.sub(r"(?<=\S)\s+\w{1,40}$", "", text).rstrip()
    return kept if kept[-1:] in SENTENCE_ENDS else f"{kept} ..."
