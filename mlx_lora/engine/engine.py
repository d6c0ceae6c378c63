"""Generate with a batch of rows, each with its own adapter and random stream, which join and leave between steps.

mlx-lm's caches hold the rows. Its BatchGenerator does not tell the model which rows a call is for, but our layers have
to know, so the loop is our own. As in mlx-lm, step n + 1 is computed while the host reads step n.

A request's tokens depend on its prompt, adapter, settings and seed, and not on the other rows of the batch. Its text ends
before a stop sequence; text that may be the beginning of one is held back until the following tokens decide.

The keys and values of earlier prompts are cached per adapter, within one byte budget: an adapter changes every key and value
from its first layer on, so adapters cannot share them.

Shapes: B rows, V vocabulary, k likeliest tokens.

Run the model in one thread, which takes requests, emits tokens, and loads and unloads adapters between steps.

    submit -> waiting -> Prefill (computes a prompt in parts) -> Batch (one token per row and step) -> Event

Everything that uses MLX runs in this thread, including the loading of the base.
"""

from __future__ import annotations

import copy
import queue
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import apply_top_k, apply_top_p
from mlx_lm.tokenizer_utils import StreamingDetokenizer

from mlx_lora.engine.adapter_store import (
    AdapterSource,
    AdapterStore,
    NoRoom,
    Resident,
    Routing,
    UnknownAdapter,
    base_name,
    check_names,
)
from mlx_lora.models.load import Base
from mlx_lora.models.tokenizer import Continuation, add_token, spelling
from mlx_lora.rollouts.generator import (
    ANSWERS,
    TokenSteps,
    check_rows,
    extract_row,
    hold_weights,
    merge_rows,
    one_row_because,
)
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError, first_line

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
    reports: list[Likelihoods | None] = [None] * len(samplers)
    for row, sampler in enumerate(samplers):
        if reporting[row]:
            own, count = logprobs[row], sampler.settings.top_logprobs or 0
            ids = mx.argpartition(-own, count - 1)[:count] if count else None
            reports[row] = Likelihoods(own[tokens[row]], ids, None if ids is None else own[ids])
    return tokens, reports


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
        return self._piece(rest=False)

    def finish(self) -> Piece:
        """Return the remaining text after the last token."""
        self._detokenizer.finalize()
        return self._piece(rest=True)

    def _piece(self, rest: bool) -> Piece:
        """Return what can be sent now; unless it is the rest, an end that could begin a stop sequence is held back."""
        text = self._detokenizer.text
        # Text that was already sent has no beginning of a stop sequence.
        starts = [start for start in (text.find(stop, self._sent) for stop in self._stops) if start >= 0]
        end = min(starts, default=len(text))
        if not starts and not rest:
            longest = max((len(stop) for stop in self._stops), default=1) - 1
            places = range(max(self._sent, len(text) - longest), len(text))
            end = next((at for at in places if any(stop.startswith(text[at:]) for stop in self._stops)), end)
        ready = [report for report in self._waiting if (rest and not starts) or report.start < end]
        self._waiting = self._waiting[len(ready) :]
        piece = Piece(text[self._sent : end], tuple(ready), stopped=bool(starts))
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
        mx.async_eval(self._next, [[report.token, report.ids, report.values] for report in self._reports if report])
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


class PromptCache:
    """A cache that evicts the least recently used entries first."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.reused_tokens = 0
        self._entries: OrderedDict[tuple[int | None, tuple[int, ...]], tuple[list[Any], int]] = OrderedDict()

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
        for key, (caches, _) in self._entries.items():
            known = key[1]
            if key[0] != adapter:
                continue
            common = next(
                (n for n, (a, b) in enumerate(zip(known, tokens, strict=False)) if a != b), min(len(known), len(tokens))
            )
            common = min(common, len(tokens) - 1)
            if common > length and (common == len(known) or can_trim_prompt_cache(caches)):
                best, length = key, common
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        self.reused_tokens += length
        caches = copy.deepcopy(self._entries[best][0])
        if length < len(best[1]):
            trim_prompt_cache(caches, len(best[1]) - length)
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
        self._entries[adapter, own] = caches, nbytes
        self.nbytes += nbytes
        while self.nbytes > self.budget_bytes:
            self._forget(next(iter(self._entries)))

    def drop(self, adapter: int) -> None:
        """Drop all entries of an adapter."""
        for key in [key for key in self._entries if key[0] == adapter]:
            self._forget(key)

    def _forget(self, key: tuple[int | None, tuple[int, ...]]) -> None:
        self.nbytes -= self._entries.pop(key)[1]


# Run the model in one thread, which takes requests, emits tokens, and loads and unloads adapters between steps

T = TypeVar("T")
# Steps after which unused buffers are freed, as in mlx-lm.
STEPS_PER_CLEARING = 512


# Requests and answers


class QueueFull(Exception):
    """The queue of waiting requests is full."""


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """One generation.

    Attributes:
        tokens: the prompt, at least one token.
        adapter: name of a known adapter, or None for the base.
        max_tokens: the most new tokens.
        sampling: how tokens are drawn.
        stops: texts before which the answer ends.
        ignore_eos: continue after an end token (for measurements).
        continues: the text continues the prompt, as in a completion; a chat's answer is a new text.
        pictures: a PicturePrompt (prompts.py), with what is needed of its pictures; None: it has none.
    """

    tokens: list[int]
    adapter: str | None
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    continues: bool = False
    pictures: Any = None


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens: the prompt's, those of them that came from the cache, and new ones without the end token."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Event:
    """A part of an answer; the last has a finish reason or an error.

    Attributes:
        piece: new text.
        finish: `stop`, `length`, or None if more follows.
        usage: only in the last event.
        error: why there is no answer: UnknownAdapter, InputError, OSError or Stopped.
    """

    piece: Piece
    finish: str | None = None
    usage: Usage | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether no event follows."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Ticket:
    """A request that was submitted to the engine.

    Attributes:
        request: the request.
        emit: called with every event, in the engine's thread; must not block.
        canceled: set when the answer is no longer wanted.
    """

    request: Request
    emit: Callable[[Event], None]
    canceled: threading.Event = field(default_factory=threading.Event)


# The engine


@dataclass(frozen=True)
class Limits:
    """Limits of an engine.

    Attributes:
        max_batch: rows that generate at once.
        max_waiting: requests that wait for a row.
        prefill_tokens: tokens of a prompt that are computed between two steps of the batch.
        adapter_bytes: for adapters in memory; None: no limit.
        prompt_cache_bytes: for keys and values of earlier prompts.
    """

    max_batch: int = 16
    max_waiting: int = 64
    prefill_tokens: int = 512
    adapter_bytes: int | None = None
    prompt_cache_bytes: int = 256 * 10**6


@dataclass
class Counts:
    """Counts of what an engine has done since its start; only its own thread writes them."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: int = 0
    canceled: int = 0
    failed: int = 0


@dataclass(eq=False)
class _Work:
    """A ticket that has a row."""

    ticket: Ticket
    resident: Resident | None
    text: TextStream
    cached: int
    made: int = 0


class ModelThread:
    """A thread in which all that uses MLX runs, beginning with the loading of the base.

    Attributes:
        base: set before the constructor returns, and never changed.
        failure: the error that has ended it; None: there was none.
        on_failure: called in the thread after such an error.
    """

    def __init__(self, load: Callable[[], Base], name: str):
        """Start the thread and wait for the base; subclasses have their own attributes before this.

        Args:
            load: loads the base; runs in the thread.
            name: of the thread.

        Raises:
            InputError: raised by `load`, or the model cannot be used.
        """
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._lock, self._ending = threading.Lock(), False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(load, ready), name=name, daemon=True)
        self._thread.start()
        ready.result()

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._ending

    def failed(self) -> RunError:
        """Return what a user reads when it has ended because of an error."""
        why = f" ({first_line(self.failure)})" if self.failure is not None else ""
        return RunError(f"the engine failed{why}; start the command again, and report it if this happens again")

    def close(self, timeout_s: float = 30.0) -> None:
        """Give up what runs and waits, and end the thread."""
        with self._lock:
            self._ending = True
        self._inbox.put(None)
        self._thread.join(timeout_s)

    def _send(self, message: Any) -> None:
        with self._lock:
            if self._ending:
                raise Stopped("the server is ending")
            self._inbox.put(message)

    def _run(self, load: Callable[[], Base], ready: Future[None]) -> None:
        """Load the base, then serve until told to end; an unexpected error ends it too, and all requests."""
        try:
            self.base = load()
            device.set_cache_limit()
            self._prepare(self.base)
        except BaseException as error:
            device.end_thread()
            ready.set_exception(error)
            return
        ready.set_result(None)
        try:
            while self._take_messages():
                self._work()
        except BaseException as error:
            self.failure = error
            self.on_failure()
            raise
        finally:
            with self._lock:
                self._ending = True
            self._give_up()
            device.end_thread()

    def _take_messages(self) -> bool:
        """Take the messages in the inbox, and wait for one if there is nothing else to do; return False to end."""
        idle = self._idle
        while True:
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if message is None:
                return False
            self._take(message)

    @property
    def _idle(self) -> bool:
        """Whether nothing can be done without a message."""
        raise NotImplementedError

    def _prepare(self, base: Base) -> None:
        """Make what serves the base."""

    def _take(self, message: Any) -> None:
        """Take a message from the inbox."""

    def _work(self) -> None:
        """Do a part of what waits."""

    def _give_up(self) -> None:
        """Tell all who wait that nothing comes any more."""


class Engine(ModelThread):
    """Serves many adapters of one base."""

    def __init__(self, load: Callable[[], Base], limits: Limits, ignore_fingerprint: bool = False):
        """Start the thread and wait for the base.

        Args:
            load: loads the base; runs in the engine's thread.
            limits: of the engine.
            ignore_fingerprint: accept adapters of another base of the same shape.

        Raises:
            InputError: raised by `load`, or the base's caches cannot hold several rows.
        """
        self.limits, self.counts = limits, Counts()
        self.ignore_fingerprint = ignore_fingerprint
        self.unfinished = 0  # requests that wait or run
        self._waiting: deque[Ticket] = deque()
        self._prefill: Prefill | None = None
        super().__init__(load, "mlx-lora-engine")

    # --- called from any thread

    def submit(self, request: Request, emit: Callable[[Event], None]) -> Ticket:
        """Queue a request; `emit` is called with its events.

        Raises:
            QueueFull: too many requests are waiting.
            Stopped: the engine is ending, or has failed.
        """
        ticket = Ticket(request, emit)
        with self._lock:
            if self._ending:
                raise Stopped("the server is ending")
            if self.unfinished >= self.limits.max_waiting + self.limits.max_batch:
                raise QueueFull(f"{self.limits.max_waiting} requests are already waiting")
            self.unfinished += 1
            self._inbox.put(ticket)
        return ticket

    def call(self, function: Callable[[AdapterStore], T]) -> Future[T]:
        """Run `function` with the adapter store, between two steps of the engine.

        Raises:
            Stopped: the engine is ending, or has failed.
        """
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.store))
                except Exception as error:
                    future.set_exception(error)
                    if not isinstance(error, (UnknownAdapter, NoRoom, InputError, OSError)):
                        raise

        self._send(run)
        return future

    # --- run in the engine's thread

    def _work(self) -> None:
        self._admit()
        if len(self.batch):
            self._step()
        gone = [row for row in self.batch.rows if row.owner.ticket.canceled.is_set()]
        if gone:
            self.batch.leave(gone)
        if self._prefill is not None and self._prefill.row.owner.ticket.canceled.is_set():
            gone.append(self._prefill.row)
            self._prefill = None
        for row in gone:
            self._close(row.owner.ticket, row.owner, canceled=True)
        for waited in [waited for waited in self._waiting if waited.canceled.is_set()]:
            self._waiting.remove(waited)
            self._close(waited, None, canceled=True)

    def _prepare(self, base: Base) -> None:
        check_rows(base.model, base.model_id, "use mlx-lora generate instead")
        self.weights = hold_weights(base, min(ANSWERS, self.limits.max_batch))
        if self.limits.max_batch > 1 and one_row_because(base.model):
            self.limits = replace(self.limits, max_batch=1)
        logits = base.model(mx.array([[0]]))
        self.vocabulary, self._eos = logits.shape[-1], frozenset(base.tokenizer.eos_token_ids)
        routing = Routing()
        self.prompt_cache = PromptCache(self.limits.prompt_cache_bytes)
        self.store = AdapterStore(
            base, routing, logits.dtype, self.limits.adapter_bytes, self.ignore_fingerprint, self.prompt_cache.drop
        )
        self._model, self._routing, self._tokenizer = TokenSteps(base.model), routing, base.tokenizer
        self.batch = RunningBatch(self._model, routing)

    @property
    def _idle(self) -> bool:
        return not len(self.batch) and self._prefill is None and not self._waiting

    def _take(self, message: Ticket | Callable[[], None]) -> None:
        if isinstance(message, Ticket):
            self._waiting.append(message)
        else:
            message()

    def _admit(self) -> None:
        """Start a waiting prompt if a row is free, or continue the one that was started."""
        if self._prefill is None and self._waiting and len(self.batch) < self.limits.max_batch:
            ticket = self._waiting.popleft()
            if ticket.canceled.is_set():
                self._close(ticket, None, canceled=True)
            else:
                self._begin(ticket)
        if self._prefill is None:
            return
        if not self._prefill.done:
            self._prefill.advance(self.limits.prefill_tokens)
        if self._prefill.done:
            row = self._prefill.row
            self.batch.join(self._prefill)
            if row.kept:
                self.prompt_cache.keep(row.adapter, row.tokens, self._prefill.caches)
            self._prefill = None

    def _begin(self, ticket: Ticket) -> None:
        """Get a ticket's adapter and start its prompt."""
        request = ticket.request
        try:
            resident = self.store.acquire(request.adapter) if request.adapter else None
        except NoRoom:
            self._waiting.appendleft(ticket)  # running rows use all adapters; try again when one has ended
            return
        except (UnknownAdapter, InputError, OSError) as error:
            self.counts.failed += 1
            self._close(ticket, None, Event(Piece(""), error=error))
            return
        number = resident.number if resident else None
        shown = request.pictures
        caches, cached = (None, 0) if shown else self.prompt_cache.find(number, request.tokens)
        words = Continuation(self._tokenizer) if request.continues else self._tokenizer.detokenizer
        work = _Work(ticket, resident, TextStream(words, request.stops), cached)
        row = BatchRow(
            work, number, Sampler(request.sampling, self.vocabulary), request.tokens[:cached], kept=shown is None
        )
        try:
            self._prefill = (
                shown.prefill(self._model, self._routing, row)
                if shown
                else Prefill(self._model, self._routing, row, request.tokens[cached:], caches)
            )
        except InputError as error:  # of the tower, or of a picture's file that has changed
            self.counts.failed += 1
            self._close(ticket, work, Event(Piece(""), error=error))
            return
        self.counts.prompt_tokens += len(request.tokens) - cached

    def _step(self) -> None:
        leaving = []
        for row, token, likelihoods in self.batch.step():
            if row.owner.ticket.canceled.is_set():
                continue
            event = self._event(row.owner, token, likelihoods)
            self.counts.generated_tokens += 1
            if event.last:
                leaving.append((row, event))
            elif event.piece.text or event.piece.reports:
                row.owner.ticket.emit(event)
        for row, event in leaving:
            if row.kept:
                self.prompt_cache.keep(row.adapter, row.tokens, self.batch.extract(row))
            self.counts.finished += 1
            self._close(row.owner.ticket, row.owner, event)
        if leaving:
            self.batch.leave([row for row, _ in leaving])
        self.counts.steps += 1
        if self.counts.steps % STEPS_PER_CLEARING == 0:
            mx.clear_cache()

    def _event(self, work: _Work, token: int, likelihoods: Likelihoods | None) -> Event:
        """Return the event for a new token of a request."""
        request = work.ticket.request
        ended = token in self._eos and not request.ignore_eos
        work.made += not ended
        usage = Usage(len(request.tokens), work.cached, work.made)
        if ended:
            return Event(work.text.finish(), "stop", usage)
        report = None
        if likelihoods is not None:
            spelled = [(*spelling(self._tokenizer, other), value) for other, value in likelihoods.top()]
            top = tuple((other, value, own) for other, own, value in spelled)
            text, data = spelling(self._tokenizer, token)
            report = TokenReport(text, likelihoods.token.item(), top, data)
        piece = work.text.add(token, report)
        if not piece.stopped and work.made < request.max_tokens:
            return Event(piece)
        if not piece.stopped:
            rest = work.text.finish()
            piece = Piece(piece.text + rest.text, piece.reports + rest.reports, rest.stopped)
        return Event(piece, "stop" if piece.stopped else "length", usage)

    def _close(self, ticket: Ticket, work: _Work | None, event: Event | None = None, canceled: bool = False) -> None:
        """End a request, and free its adapter and its position in the queue."""
        if work is not None and work.resident is not None:
            self.store.release(work.resident)
        self.counts.canceled += canceled
        with self._lock:
            self.unfinished -= 1
        if event is not None:
            ticket.emit(event)

    def _give_up(self) -> None:
        """Send an error to all requests that still run or wait."""
        while not self._inbox.empty():
            if (message := self._inbox.get()) is not None:
                self._take(message)
        rows = [*self.batch.rows, *([self._prefill.row] if self._prefill is not None else [])]
        for ticket in [*(row.owner.ticket for row in rows), *self._waiting]:
            ticket.emit(Event(Piece(""), error=Stopped("the server is shutting down")))


@contextmanager
def opened_engine(
    load: Callable[[], Base],
    limits: Limits,
    sources: Mapping[str, AdapterSource],
    ignore_fingerprint: bool = False,
    own: tuple[str, ...] = (),
) -> Iterator[tuple[Engine, list[str]]]:
    """Yield an engine with a base and adapters, and a line about each; it is closed afterwards.

    Args:
        load, limits, ignore_fingerprint: of the engine.
        sources: the adapters by name.
        own: names of the base, in addition to its model's.

    Raises:
        InputError, NoRoom: the base, or an adapter, cannot be used.
    """
    engine = Engine(load, limits, ignore_fingerprint)
    try:
        check_names("--adapter", sources, (*own, base_name(engine.base)))
        cards = engine.call(lambda store: store.add(sources)).result()
        lines = [f"base   {base_name(engine.base)}: {engine.base.describe()}"]
        lines += [f"weights {engine.weights.describe()}"] if engine.weights else []
        yield engine, [*lines, *(f"model  {card.name}: {card.describe()}" for card in cards)]
    finally:
        engine.close()
