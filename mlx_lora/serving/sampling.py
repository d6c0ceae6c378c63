"""Draw each row's next token from its own random stream, report log-probabilities, and turn the tokens into text as they come.

A request's tokens depend on its prompt, adapter, settings and seed, and not on the other rows of the batch. Its text ends
before a stop sequence; text that may be the beginning of one is held back until the following tokens decide.

Shapes: B rows, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import apply_top_k, apply_top_p
from mlx_lm.tokenizer_utils import StreamingDetokenizer

from mlx_lora.models.tokenizer import Continuation

# Tokens


@dataclass(frozen=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: draw from the nucleus with this mass, before the temperature as in `generate`; 1 is off, and 0 takes the
            likeliest token.
        top_k: draw from the k likeliest tokens; 0 is off.
        seed: of the request's own random stream; None: a random seed.
        top_logprobs: report the log-probability of the token and of this many likeliest ones; None: report none.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    top_logprobs: int | None = None


class Sampler:
    """One request's random stream."""

    def __init__(self, settings: Sampling, vocabulary: int):
        """Start the stream.

        Args:
            settings: the request's settings.
            vocabulary: width of the logits; a larger top_k means all tokens.
        """
        self.settings = settings
        self.top_k = settings.top_k if settings.top_k < vocabulary else 0
        self._greedy = settings.temperature == 0 or settings.top_p == 0
        if not self._greedy:
            self._key = mx.random.key(secrets.randbits(63) if settings.seed is None else settings.seed)

    def __call__(self, logprobs: mx.array) -> mx.array:
        """Return a token (1,) for log-probabilities (1, V) float32; every call advances the stream."""
        if self._greedy:
            return mx.argmax(logprobs, axis=-1)
        if self.settings.top_p < 1:
            logprobs = apply_top_p(logprobs, self.settings.top_p)
        if self.top_k:
            logprobs = apply_top_k(logprobs, self.top_k)
        self._key, key = mx.random.split(self._key)
        return mx.random.categorical(logprobs / self.settings.temperature, key=key)


@dataclass(frozen=True)
class Likelihoods:
    """The log-probabilities that a row reports, as arrays that are computed together with its token.

    Attributes:
        token: () float32, the drawn token's log-probability.
        ids, values: (k,) arrays or None, the likeliest tokens, unordered, and their log-probabilities.
    """

    token: mx.array
    ids: Any
    values: Any

    def arrays(self) -> list[mx.array]:
        """Return the arrays to evaluate."""
        return [array for array in (self.token, self.ids, self.values) if array is not None]

    def top(self) -> list[tuple[int, float]]:
        """Return (id, log-probability) of the likeliest tokens, best first."""
        if self.ids is None:
            return []
        return sorted(zip(self.ids.tolist(), self.values.tolist(), strict=True), key=lambda pair: -pair[1])


def sample_rows(logits: mx.array, samplers: list[Sampler]) -> tuple[mx.array, list[Likelihoods | None]]:
    """Draw every row's next token.

    Args:
        logits: (B, V) of any float dtype.
        samplers: one per row.

    Returns:
        Tokens (B,), and the likelihoods of the rows that report them.
    """
    reporting = [sampler.settings.top_logprobs is not None for sampler in samplers]
    greedy = [sampler.settings.temperature == 0 for sampler in samplers]
    if all(greedy) and not any(reporting):
        return mx.argmax(logits, axis=-1), [None] * len(samplers)
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    tokens = (
        mx.argmax(logprobs, axis=-1)
        if all(greedy)
        else mx.concatenate([sampler(logprobs[row : row + 1]) for row, sampler in enumerate(samplers)])
    )
    reports = [
        _likelihoods(logprobs[row], tokens[row], sampler.settings.top_logprobs or 0) if reporting[row] else None
        for row, sampler in enumerate(samplers)
    ]
    return tokens, reports


def _likelihoods(logprobs: mx.array, token: mx.array, count: int) -> Likelihoods:
    if count == 0:
        return Likelihoods(logprobs[token], None, None)
    ids = mx.argpartition(-logprobs, count - 1)[:count]
    return Likelihoods(logprobs[token], ids, logprobs[ids])


# Text


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
