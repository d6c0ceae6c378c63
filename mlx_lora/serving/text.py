"""Turns a request's tokens into text as they come, and ends it where a stop sequence begins.

Text that may be the beginning of a stop sequence is held back until the next tokens decide.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_lm.tokenizer_utils import StreamingDetokenizer

from mlx_lora.models.continuation import Continuation


@dataclass(frozen=True)
class TokenReport:
    """A token's log-probability, and the likeliest tokens' at its place.

    Attributes:
        text: of the token by itself.
        logprob: natural logarithm.
        top: (text, logprob), best first.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """What can be sent.

    Attributes:
        text: new text.
        reports: of the tokens that made it, where the request wants them.
        stopped: a stop sequence was found; the text ends before it.
    """

    text: str
    reports: tuple[TokenReport, ...] = ()
    stopped: bool = False


class TextStream:
    """One request's text."""

    def __init__(self, detokenizer: StreamingDetokenizer | Continuation, stops: tuple[str, ...]):
        """Begin.

        Args:
            detokenizer: fresh.
            stops: none of them empty.
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._sent = 0
        self._waiting: list[tuple[int, TokenReport]] = []

    def add(self, token: int, report: TokenReport | None = None) -> Piece:
        """Take the next token and return what can be sent after it."""
        if report is not None:
            self._waiting.append((len(self._detokenizer.text), report))
        self._detokenizer.add_token(token)
        text = self._detokenizer.text
        return self._stopped(text) or self._released(text, len(text) - self._held(text))

    def finish(self) -> Piece:
        """Return what is left when no more tokens come."""
        self._detokenizer.finalize()
        text = self._detokenizer.text
        return self._stopped(text) or self._released(text, len(text), rest=True)

    def _stopped(self, text: str) -> Piece | None:
        # What was sent holds no beginning of a stop sequence.
        places = [place for place in (text.find(stop, self._sent) for stop in self._stops) if place >= 0]
        if not places:
            return None
        piece = self._released(text, min(places))
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
