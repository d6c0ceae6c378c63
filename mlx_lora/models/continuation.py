"""Decode text that continues a prompt, and keep its first space.

mlx-lm's detokenizers remove a text's first space. That is right for a separate answer (SentencePiece puts a space before
every text) and wrong after a prompt that ends between two words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper


class Continuation:
    """A detokenizer for tokens that follow others, with the interface of mlx-lm's detokenizers."""

    def __init__(self, tokenizer: TokenizerWrapper):
        """Decode one letter first, so that the detokenizer does not treat the text as the start.

        Args:
            tokenizer: mlx-lm's wrapper.
        """
        self._detokenizer = tokenizer.detokenizer
        for token in tokenizer.encode("a", add_special_tokens=False):
            self._detokenizer.add_token(token)
        self._start = self._told = len(self._detokenizer.text)

    def add_token(self, token: int) -> None:
        """Add the next token."""
        self._detokenizer.add_token(token)

    def finalize(self) -> None:
        """Release the text that was held back until more tokens came."""
        self._detokenizer.finalize()

    @property
    def text(self) -> str:
        """All text so far."""
        return self._detokenizer.text[self._start :]

    @property
    def last_segment(self) -> str:
        """The text that is new since this was last read."""
        text = self._detokenizer.text
        segment, self._told = text[self._told :], len(text)
        return segment


def continued(responses: Iterable[GenerationResponse], tokenizer: TokenizerWrapper) -> Iterator[GenerationResponse]:
    """Yield the responses of mlx-lm's `stream_generate`, with text that continues the prompt."""
    text = Continuation(tokenizer)
    for response in responses:
        if response.finish_reason != "stop":  # then its token is the end token, which has no text
            text.add_token(response.token)
        if response.finish_reason is not None:
            text.finalize()
        yield replace(response, text=text.last_segment)
