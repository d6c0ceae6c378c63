"""Run a model in one thread, which takes requests, emits tokens, and loads and unloads adapters between steps.

    submit -> waiting -> Prefill (computes a prompt in parts) -> RunningBatch (one token per row and step) -> Event

Each row has its own adapter and random stream (models/generator.py). Everything that uses MLX runs in this thread, including the
loading of the base.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import mlx.core as mx

from mlx_lora.engine.adapter_store import (
    AdapterSource,
    AdapterStore,
    NoRoom,
    Resident,
    UnknownAdapter,
    base_name,
    check_names,
)
from mlx_lora.models.generator import (
    ANSWERS,
    BatchRow,
    Likelihoods,
    Piece,
    Prefill,
    PromptCache,
    Routing,
    RunningBatch,
    Sampler,
    Sampling,
    TextStream,
    TokenReport,
    TokenSteps,
    check_rows,
    hold_weights,
    one_row_because,
)
from mlx_lora.models.load import Base
from mlx_lora.models.tokenizer import Continuation, spelling
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError, first_line

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
        caches, cached = (None, 0) if request.pictures else self.prompt_cache.find(number, request.tokens)
        text = Continuation(self._tokenizer) if request.continues else self._tokenizer.detokenizer
        work = _Work(ticket, resident, TextStream(text, request.stops), cached)
        sampler, kept = Sampler(request.sampling, self.vocabulary), request.pictures is None
        row = BatchRow(work, number, sampler, request.tokens[:cached], kept=kept)
        try:
            pictures = request.pictures and request.pictures.seen_by(self._model.model)
        except InputError as error:  # of the tower, or of a picture's file that has changed
            self.counts.failed += 1
            self._close(ticket, work, Event(Piece(""), error=error))
            return
        self._prefill = Prefill(self._model, self._routing, row, request.tokens[cached:], caches, pictures)
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
