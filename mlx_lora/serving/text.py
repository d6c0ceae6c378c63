"""Turn a request's tokens into text as they come, and end the text before a stop sequence.

Text that may be the beginning of a stop sequence is held back until the following tokens decide.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm.tokenizer_utils import StreamingDetokenizer

from mlx_lora.models.continuation import Continuation


@dataclass(frozen=True)
class TokenReport:
    """A token's log-probability, and those of the likeliest tokens at its position.

    Attributes:
        text: the text of the token alone.
        logprob: natural logarithm.
        top: (text, logprob) of the likeliest tokens, best first.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """Text that can be sent.

    Attributes:
        text: the new text.
        reports: on its tokens, if the request asks for them.
        stopped: a stop sequence was found; the text ends before it.
    """

    text: str
    reports: tuple[TokenReport, ...] = ()
    stopped: bool = False


class TextStream:
    """The text of one request."""

    def __init__(self, detokenizer: StreamingDetokenizer | Continuation, stops: tuple[str, ...]):
        """Start without text.

        Args:
            detokenizer: a new one.
            stops: stop sequences, none of them empty.
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._sent = 0
        self._waiting: list[tuple[int, TokenReport]] = []

    def add(self, token: int, report: TokenReport | None = None) -> Piece:
        """Add the next token and return the text that can be sent now."""
        if report is not None:
            self._waiting.append((len(self._detokenizer.text), report))
        self._detokenizer.add_token(token)
        text = self._detokenizer.text
        return self._stopped(text) or self._released(text, len(text) - self._held(text))

    def finish(self) -> Piece:
        """Return the remaining text after the last token."""
        self._detokenizer.finalize()
        text = self._detokenizer.text
        return self._stopped(text) or self._released(text, len(text), rest=True)

    def _stopped(self, text: str) -> Piece | None:
        # Text that was already sent has no beginning of a stop sequence.
        starts = [start for start in (text.find(stop, self._sent) for stop in self._stops) if start >= 0]
        if not starts:
            return None
        piece = self._released(text, min(starts))
        return Piece(piece.text, piece.reports, stopped=True)

    def _held(self, text: str) -> int:
        """Return how many characters at the end could begin a stop sequence."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        tail = text[max(self._sent, len(text) - longest) :] if longest else ""
        for start in range(len(tail)):
            if any(stop.startswith(tail[start:]) for stop in self._stops):
                return len(tail) - start
        return 0

    def _released(self, text: str, end: int, rest: bool = False) -> Piece:
        ready = [report for start, report in self._waiting if rest or start < end]
        self._waiting = self._waiting[len(ready) :]
        piece = Piece(text[self._sent : end], tuple(ready))
        self._sent = max(self._sent, end)
        return piece
