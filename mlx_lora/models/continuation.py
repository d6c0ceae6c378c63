"""Text that goes on from a prompt, its first space included.

mlx-lm's detokenizers take the first space off what they make, which is right for an answer of its own (SentencePiece
puts one before every text) and wrong after a prompt that breaks off between two words.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from mlx_lm.generate import GenerationResponse
from mlx_lm.tokenizer_utils import TokenizerWrapper


class Continuation:
    """A detokenizer of tokens that follow others; used as mlx-lm's own are."""

    def __init__(self, tokenizer: TokenizerWrapper):
        """Begin.

        Args:
            tokenizer: mlx-lm's wrapper, whose detokenizer is made to believe that a letter stands before the text.
        """
        self._detokenizer = tokenizer.detokenizer
        for token in tokenizer.encode("a", add_special_tokens=False):
            self._detokenizer.add_token(token)
        self._start = self._told = len(self._detokenizer.text)

    def add_token(self, token: int) -> None:
        """Take the next token."""
        self._detokenizer.add_token(token)

    def finalize(self) -> None:
        """Give out what was held back for want of more tokens."""
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
    """Yield what mlx-lm's `stream_generate` yields, with its text as one that goes on from the prompt."""
    text = Continuation(tokenizer)
    for response in responses:
        if response.finish_reason != "stop":  # then its token is the end token, which has no text
            text.add_token(response.token)
        if response.finish_reason is not None:
            text.finalize()
        yield replace(response, text=text.last_segment)
