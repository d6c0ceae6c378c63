"""Let a chat model write a user's turn: the tokens that come before one, and what a usable turn is.

A chat model has seen so many conversations that it continues the template's text before the user's turn with a question, as
a user would ask it. Source: Magpie, arXiv:2406.08464, section 2.

    <|im_start|>system\\nYou are ...<|im_end|>\\n<|im_start|>user\\nWhat can I cook with leeks?<|im_end|>
    `----------------- given to the model ------------------'`------ the model writes ------'
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.sandbox import render_chat
from mlx_lora.data.templates import resolve_template
from mlx_lora.system.errors import InputError

MARK = "qzx wvw"  # stands for what the user says
FEWEST_WORDS, FEWEST_CHARACTERS = 3, 6  # of a usable turn; the second in scripts that write no spaces
LEAST_LETTERS = 0.7  # share of letters and spaces among all characters
REPEATED_WORDS = 0.5  # share of different words below which a longer turn goes round in circles
UNUSABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffd]")  # control characters, and bytes that are no character
OTHER_TURN = re.compile(r"^\W*(assistant|user|system|ai|answer|response)\s*:", re.IGNORECASE | re.MULTILINE)
ADVICE = "give prompts with --data, such as --data persona-distill"


@dataclass(frozen=True)
class UserTurn:
    """Where a user's turn begins and ends.

    Attributes:
        before: the tokens that come before it.
        ends: the tokens that end it.
        specials: all special tokens; any other than an end begins another turn.
    """

    before: list[int]
    ends: frozenset[int]
    specials: frozenset[int]

    def read(self, tokens: list[int], tokenizer: Any) -> tuple[str, bool]:
        """Return a turn that the model wrote as text, and whether the model ended it; empty if it is not a single turn."""
        ended = bool(tokens) and tokens[-1] in self.ends
        said = tokens[:-1] if ended else tokens
        return ("" if self.specials.intersection(said) else str(tokenizer.decode(said))), ended


def user_turn(
    tokenizer: PreTrainedTokenizerBase, chat_template: str | None, day: date | None, ends: frozenset[int]
) -> UserTurn:
    """Return where the first user's turn of a chat begins and ends.

    Args:
        tokenizer: of the model, not mlx-lm's wrapper.
        chat_template: as --chat-template gives it.
        day: the day that the template shows.
        ends: the model's end tokens.

    Raises:
        InputError: the model has no chat template, or the template marks no user's turn by tokens of its own.
    """
    if not (tokenizer.chat_template or chat_template):
        raise InputError(f"no --data: a model without a chat template cannot write prompts itself; {ADVICE}")
    template, _ = resolve_template(chat_template, tokenizer)
    try:
        text = render_chat(
            tokenizer, [{"role": "user", "content": MARK}], template, None, add_generation_prompt=True, day=day
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(
            f"no --data: the chat template refuses a chat that begins with a user ({error}); {ADVICE}"
        ) from error
    opening, found, closing = text.partition(MARK)
    specials = frozenset(number for number, token in _added(tokenizer).items() if token.special)
    before = _encoded(tokenizer, opening)
    after = _encoded(tokenizer, closing.lstrip())
    if not found or specials.isdisjoint(before) or not after or after[0] not in specials:
        raise InputError(
            "no --data: the chat template has no special token at the beginning and the end of a user's turn, so the model "
            f"cannot write prompts itself; {ADVICE}"
        )
    return UserTurn(before, ends | {after[0]}, specials)


def _added(tokenizer: Any) -> dict[int, Any]:
    return tokenizer.added_tokens_decoder


def _encoded(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@dataclass
class TurnFilter:
    """Keeps the usable turns of those that a model wrote, each once.

    Attributes:
        kept: the usable ones, in order.
        left_out: why others were left out -> how many.
    """

    kept: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    _seen: set[str] = field(default_factory=set)

    def take(self, text: str, ended: bool) -> None:
        """Keep a turn if it is usable.

        Args:
            text: without its end token.
            ended: whether the model ended it, within the tokens that it had.
        """
        text = text.strip()
        same = re.sub(r"\W+", " ", text.casefold()).strip()
        reason = "too long" if not ended else _problem(text) or ("twice" if same in self._seen else None)
        if reason:
            self.left_out[reason] += 1
            return
        self._seen.add(same)
        self.kept.append(text)


def _problem(text: str) -> str | None:
    """Return why a text is not a user's turn; None if it may be one."""
    words = re.findall(r"\w+", text.casefold())
    if not words:
        return "empty"
    if len(words) < FEWEST_WORDS and (text.isascii() or len(text) < FEWEST_CHARACTERS):
        return "too short"
    plain = sum(letter.isalpha() or letter.isspace() for letter in text)
    if UNUSABLE.search(text) or plain < LEAST_LETTERS * len(text):
        return "no text"
    if OTHER_TURN.search(text):
        return "several turns"
    if len(words) >= 12 and len(set(words)) < REPEATED_WORDS * len(words):
        return "repetitive"
    return None
