"""Tell special tokens that a chat template writes from those that a message only spells.

A user may type `<|im_end|>`. A chat template puts its markers and the messages' content into one text, and the tokenizer
cannot tell them apart. So content is rendered with stand-ins for such tokens, of the same length (`Controls`). Their places
are known in the finished text, where the tokenizer's control tokens are then replaced by the tokens of the same characters
as ordinary text. All other tokens stay as they are, and content without control tokens is not touched at all.

`Specials` finds the special tokens in a rendered text, and tells which of them end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.data.examples import FormatError

# What content may rightly have: thinking, calls, and places of images and sounds. These tokens end no turn.
OF_CONTENT = re.compile(r"think|reason|tool|function|image|img|vision|video|audio|sound", re.IGNORECASE)
STAND_INS = 0xF0000  # characters for private use, which no text has: the first one's number
ESCAPED = re.compile(r"\\udb[89ab]", re.IGNORECASE)  # such a character in JSON that a template escaped
LEAD = "a"  # a tokenizer may put a space before a text's first word


@dataclass(frozen=True)
class Hidden:
    """Messages with stand-ins for control tokens.

    Attributes:
        messages: To render.
        names: The control tokens that the content has, as text, sorted.
        texts: All control tokens; the n-th one's stand-in is the n-th character for private use, repeated.
    """

    messages: list[dict[str, Any]]
    names: tuple[str, ...]
    texts: Sequence[str]

    def shown(self, rendered: str) -> tuple[str, list[tuple[int, int]]]:
        """Return a rendered text with its control tokens again, and the spans of characters of those from content.

        Raises:
            FormatError: the template changed a stand-in.
        """
        if not self.names:
            return rendered, []
        characters, spans = list(rendered), []
        at = 0
        while at < len(rendered):
            number = ord(rendered[at]) - STAND_INS
            if not 0 <= number < len(self.texts):
                at += 1
                continue
            text = self.texts[number]
            end = at + len(text)
            if rendered[at:end] != rendered[at] * len(text):
                raise FormatError(f"the chat template changes {text} in a message; remove it from the data")
            characters[at:end] = text
            spans.append((at, end))
            at = end
        if ESCAPED.search(rendered):
            raise FormatError(f"the chat template escapes {self.names[0]} in a message; remove it from the data")
        return "".join(characters), spans


class Controls:
    """The control tokens of a tokenizer that content must not bring in."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Read them from a tokenizer."""
        special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        kept = {
            text: number
            for text, number in special.items()
            if text and text != tokenizer.unk_token and not OF_CONTENT.search(text)
        }
        self.texts = sorted(kept, key=len, reverse=True)
        self._ids = frozenset(kept.values())
        self._any = re.compile("|".join(map(re.escape, self.texts)) or r"(?!)")
        self._tokenizer = tokenizer

    def found(self, messages: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        """Return the control tokens that messages have in their content, sorted."""
        return tuple(sorted({text for leaf in _leaves(_given(messages)) for text in self._any.findall(leaf)}))

    def hide(self, messages: list[dict[str, Any]]) -> Hidden:
        """Return messages with stand-ins for control tokens; the same messages if they have none."""
        names = self.found(messages)
        if not names:
            return Hidden(messages, (), self.texts)
        number_of = {text: number for number, text in enumerate(self.texts)}

        def stand_in(match: re.Match[str]) -> str:
            return chr(STAND_INS + number_of[match[0]]) * len(match[0])

        def hidden(value: Any) -> Any:
            if isinstance(value, str):
                return self._any.sub(stand_in, value)
            if isinstance(value, dict):
                return {key: value[key] if key in ("role", "type") else hidden(value[key]) for key in value}
            return [hidden(item) for item in value] if isinstance(value, list) else value

        return Hidden([hidden(message) for message in messages], names, self.texts)

    def as_text(
        self, text: str, ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]
    ) -> tuple[list[int], np.ndarray]:
        """Return tokens in which control tokens inside some spans are replaced by those of ordinary text.

        Args:
            text: What was tokenized.
            ids, offsets: Its tokens, and the characters of each.
            spans: Where control tokens are content.

        Returns:
            The tokens, and for each the number of the token that it stands for, int64.
        """
        found: list[int] = []
        origin: list[int] = []
        for number, (token, (start, end)) in enumerate(zip(ids, offsets, strict=True)):
            inside = token in self._ids and any(start < after and first < end for first, after in spans)
            new = self._ordinary(text[start:end]) if inside else [token]
            found += new
            origin += [number] * len(new)
        return found, np.array(origin, np.int64)

    def _ordinary(self, text: str) -> list[int]:
        """Return the tokens of a control token's characters as ordinary text."""
        led = self._plain.encode(LEAD + text, add_special_tokens=False)
        apart = bool(led.ids) and led.offsets[0] == (0, len(LEAD))
        ids = led.ids[1:] if apart else self._plain.encode(text, add_special_tokens=False).ids
        if self._ids.isdisjoint(ids) or len(text) < 2:
            return ids
        return self._ordinary(text[:1]) + self._ordinary(text[1:])  # the vocabulary has the text as an ordinary piece

    @cached_property
    def _plain(self) -> Tokenizer:
        tokenizer = self._tokenizer
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise FormatError("control tokens in a message require a fast tokenizer (a tokenizer.json)")
        backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return backend


@lru_cache(maxsize=4)
def controls_of(tokenizer: PreTrainedTokenizerBase) -> Controls:
    """Return the control tokens of a tokenizer; kept, because some have thousands."""
    return Controls(tokenizer)


def _given(messages: Sequence[dict[str, Any]]) -> list[Any]:
    return [value for message in messages for key, value in message.items() if key not in ("role", "type")]


def _leaves(value: Any) -> list[str]:
    """Return all texts in plain data, without the keys of its objects."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [leaf for part in parts for leaf in _leaves(part)]


class Specials:
    """The texts of a tokenizer's special tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        """Read them from a tokenizer."""
        texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        texts |= set(tokenizer.all_special_tokens)
        ordered = sorted(texts, key=len, reverse=True)
        closing = [text for text in ordered if text != tokenizer.bos_token or text == tokenizer.eos_token]
        self._any = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._closing = re.compile("|".join(map(re.escape, closing)) or r"(?!)")
        self._texts = closing

    def end_after(self, text: str, end: int) -> int | None:
        """Return the end of the special token that closes a turn whose content ends at `end`."""
        for special in self._any.finditer(text, max(0, end - 64), end + 64):
            if special.start() < end < special.end():  # two end tokens that share their last letters
                return special.end()
        while text[end : end + 1].isspace():
            end += 1
        match = self._closing.match(text, end)
        return match.end() if match else None

    def closing(self, text: str) -> str:
        """Return the special token that a text ends with, or an empty string."""
        return next((special for special in self._texts if text.endswith(special)), "")

    def closing_at(self, text: str, start: int) -> str:
        """Return the special token that begins at `start`, or an empty string."""
        found = self._closing.match(text, start)
        return found[0] if found else ""

    def are_all(self, text: str) -> bool:
        """Return whether a text only has special tokens and white space."""
        return not self._any.sub("", text).strip()

    def tail(self, text: str) -> str:
        """Return a text from its last special token on; an empty string if it has none."""
        return text[max((found.start() for found in self._any.finditer(text)), default=len(text)) :]

    def last_end(self, text: str) -> int:
        """Return where the last special token ends; 0 if there is none."""
        return max((found.end() for found in self._any.finditer(text)), default=0)

    def next_in(self, text: str, start: int) -> int:
        """Return where the next special token begins, or the text's end."""
        found = self._any.search(text, start)
        return found.start() if found else len(text)
