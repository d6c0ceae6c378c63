"""Find a tokenizer's special tokens in rendered text, and which of them end a turn."""

from __future__ import annotations

import re

from transformers import PreTrainedTokenizerBase


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
