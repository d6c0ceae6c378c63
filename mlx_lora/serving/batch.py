"""Generate with a batch of rows, each with its own adapter and random stream, which join and leave between steps.

mlx-lm's caches hold the rows. Its BatchGenerator does not tell the model which rows a call is for, but our layers have
to know, so the loop is our own. As in mlx-lm, step n + 1 is computed while the host reads step n.

A request's tokens depend on its prompt, adapter, settings and seed, and not on the other rows of the batch. Its text ends
before a stop sequence; text that may be the beginning of one is held back until the following tokens decide.

The keys and values of earlier prompts are cached per adapter, within one byte budget: an adapter changes every key and value
from its first layer on, so adapters cannot share them.

Shapes: B rows, V vocabulary, k likeliest tokens."""

from __future__ import annotations

import copy
import secrets
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import apply_top_k, apply_top_p
from mlx_lm.tokenizer_utils import StreamingDetokenizer

from mlx_lora.models.tokenizer import Continuation, add_token
from mlx_lora.rollouts.decode import TokenSteps
from mlx_lora.rollouts.row_batches import extract_row, merge_rows
from mlx_lora.serving.pools import Routing

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
        top: (text, logprob, bytes) of the likeliest tokens, best first.
        data: the token's own bytes, which may be a part of a character.
        start: where in the answer its text begins, in characters.
    """

    text: str
    logprob: float
    top: tuple[tuple[str, float, bytes], ...]
    data: bytes = b""
    start: int = 0


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
        self._waiting: list[TokenReport] = []

    def add(self, token: int, report: TokenReport | None = None) -> Piece:
        """Add the next token and return the text that can be sent now."""
        if report is not None:
            self._waiting.append(replace(report, start=len(self._detokenizer.text)))
        add_token(self._detokenizer, token)
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
        ready = [report for report in self._waiting if rest or report.start < end]
        self._waiting = self._waiting[len(ready) :]
        piece = Piece(text[self._sent : end], tuple(ready))
        self._sent = max(self._sent, end)
        return piece


# Batches


@dataclass(eq=False)
class BatchRow:
    """One sequence.

    Attributes:
        owner: what its tokens are for; the engine's own object.
        adapter: number of its adapter, None for the base.
        sampler: draws its tokens.
        tokens: the tokens whose keys and values its cache holds.
        fresh: the next token that a step returns is the prompt's last, which is not new.
        kept: whether its keys and values are cached for later prompts.
    """

    owner: Any
    adapter: int | None
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    fresh: bool = True
    kept: bool = True


class Prefill:
    """A prompt that is computed in parts, so that running rows do not wait for a long prompt."""

    def __init__(self, model: TokenSteps, routing: Routing, row: BatchRow, tokens: list[int], caches: list[Any] | None):
        """Prepare to compute a prompt.

        Args:
            model: the routed model.
            routing: tells its layers which adapter to use.
            row: the sequence; `row.tokens` are those that `caches` holds.
            tokens: the rest of the prompt, at least one token.
            caches: of one sequence; None: empty ones.
        """
        self._model, self._routing = model, routing
        self.row = row
        self.rest = tokens
        self.caches = make_prompt_cache(model.model) if caches is None else caches

    @property
    def done(self) -> bool:
        """Whether only the last token is left, which the batch's next step computes."""
        return len(self.rest) == 1

    def advance(self, most: int) -> None:
        """Compute up to `most` tokens of the prompt."""
        part, self.rest = self.rest[: min(most, len(self.rest) - 1)], self.rest[min(most, len(self.rest) - 1) :]
        self._routing.rows = (self.row.adapter,)
        self._model(mx.array([part]), cache=self.caches)
        mx.eval([cache.state for cache in self.caches])
        self.row.tokens += part


class RunningBatch:
    """The rows that generate together."""

    def __init__(self, model: TokenSteps, routing: Routing):
        self._model, self._routing = model, routing
        self.rows: list[BatchRow] = []
        self._caches: list[Any] = []
        self._next: Any = None  # (B,) each row's next token, which may not be computed yet
        self._reports: list[Likelihoods | None] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the rows' keys and values."""
        return sum(cache.nbytes for cache in self._caches)

    def join(self, prefill: Prefill) -> None:
        """Add a row whose prompt is computed except for its last token."""
        merged = merge_rows(self._model, [prefill.caches])
        if self._caches:
            for own, new in zip(self._caches, merged, strict=True):
                own.extend(new)
        else:
            self._caches = merged
        last = mx.array(prefill.rest, mx.uint32)
        self._next = last if self._next is None else mx.concatenate([self._next.astype(mx.uint32), last])
        self.rows.append(prefill.row)
        self._reports.append(None)

    def step(self) -> list[tuple[BatchRow, int, Likelihoods | None]]:
        """Start computing every row's next token, and return the tokens that the previous step started."""
        known, reports = self._next, self._reports
        self._routing.rows = tuple(row.adapter for row in self.rows)
        logits = self._model(known[:, None], cache=self._caches)[:, -1]  # (B, V)
        self._next, self._reports = sample_rows(logits, [row.sampler for row in self.rows])
        mx.async_eval(self._next, [array for report in self._reports if report for array in report.arrays()])
        news = []
        for row, token, report in zip(self.rows, known.tolist(), reports, strict=True):
            row.tokens.append(token)
            if row.fresh:
                row.fresh = False
            else:
                news.append((row, token, report))
        return news

    def extract(self, row: BatchRow) -> list[Any]:
        """Return the caches of one row, for the prompt cache."""
        return [extract_row(cache, self.rows.index(row)) for cache in self._caches]

    def leave(self, leaving: list[BatchRow]) -> None:
        """Remove rows."""
        keep = [index for index, row in enumerate(self.rows) if row not in leaving]
        self.rows = [self.rows[index] for index in keep]
        self._reports = [self._reports[index] for index in keep]
        if not keep:
            self._caches, self._next = [], None
            return
        chosen = mx.array(keep)
        for cache in self._caches:
            cache.filter(chosen)
        self._next = self._next[chosen]


# Keys and values of earlier prompts


@dataclass(frozen=True)
class _Entry:
    tokens: tuple[int, ...]
    caches: list[Any]
    nbytes: int


class PromptCache:
    """A cache that evicts the least recently used entries first."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.reused_tokens = 0
        self._entries: OrderedDict[tuple[int | None, tuple[int, ...]], _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapter: int | None, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """Return a copy of the caches of the longest known prefix of `tokens`, and its length.

        At least the last token remains to be computed, because generation starts from its logits.

        Args:
            adapter: number of the adapter, None for the base.
            tokens: the prompt.
        """
        best, length = None, 0
        for key, entry in self._entries.items():
            if key[0] != adapter:
                continue
            common = min(_common(entry.tokens, tokens), len(tokens) - 1)
            if common > length and (common == len(entry.tokens) or can_trim_prompt_cache(entry.caches)):
                best, length = key, common
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        self.reused_tokens += length
        entry = self._entries[best]
        caches = copy.deepcopy(entry.caches)
        if length < len(entry.tokens):
            trim_prompt_cache(caches, len(entry.tokens) - length)
        return caches, length

    def keep(self, adapter: int | None, tokens: list[int], caches: list[Any]) -> None:
        """Store the caches of `tokens`, which must not be changed afterwards; entries for their prefixes are dropped."""
        nbytes = sum(cache.nbytes for cache in caches)
        if nbytes > self.budget_bytes or not tokens:
            return
        own = tuple(tokens)
        covered = [key for key in self._entries if key[0] == adapter and own[: len(key[1])] == key[1]]
        for key in covered if can_trim_prompt_cache(caches) else [key for key in covered if key[1] == own]:
            self._forget(key)
        self._entries[adapter, own] = _Entry(own, caches, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.budget_bytes:
            self._forget(next(iter(self._entries)))

    def drop(self, adapter: int) -> None:
        """Drop all entries of an adapter."""
        for key in [key for key in self._entries if key[0] == adapter]:
            self._forget(key)

    def _forget(self, key: tuple[int | None, tuple[int, ...]]) -> None:
        self.nbytes -= self._entries.pop(key).nbytes


def _common(one: tuple[int, ...], other: list[int]) -> int:
    """Return how many tokens two sequences share at their start."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
