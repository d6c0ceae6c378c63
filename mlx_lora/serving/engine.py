"""Run the model in one thread, which takes requests, emits tokens, and loads and unloads adapters between steps.

    submit -> waiting -> Prefill (computes a prompt in parts) -> Batch (one token per row and step) -> Event

Everything that uses MLX runs in this thread, including the loading of the base.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import mlx.core as mx

from mlx_lora.models.load import Base
from mlx_lora.models.tokenizer import Continuation, spelling
from mlx_lora.rollouts.decode import ANSWERS, TokenSteps, hold_weights
from mlx_lora.rollouts.row_batches import check_rows, one_row_because
from mlx_lora.serving.adapter_store import AdapterStore, NoRoom, Resident, UnknownAdapter
from mlx_lora.serving.batch import (
    BatchRow,
    Likelihoods,
    Piece,
    Prefill,
    PromptCache,
    RunningBatch,
    Sampler,
    Sampling,
    TextStream,
    TokenReport,
)
from mlx_lora.serving.pools import Routing
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, first_line

if TYPE_CHECKING:
    from mlx_lora.serving.pictures import PicturePrompt

T = TypeVar("T")
# Steps after which unused buffers are freed, as in mlx-lm.
STEPS_PER_CLEARING = 512


# Requests and answers


class QueueFull(Exception):
    """The queue of waiting requests is full."""


class Stopped(Exception):
    """The engine takes no more requests."""


def failed_words(failure: BaseException | None) -> str:
    """Return what a user reads when the engine has ended because of an error."""
    why = f" ({first_line(failure)})" if failure is not None else ""
    return f"the engine failed{why}; start the command again, and report it if this happens again"


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
        pictures: the prompt with what is needed of its pictures; None: it has none.
    """

    tokens: list[int]
    adapter: str | None
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    continues: bool = False
    pictures: PicturePrompt | None = None


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

    def cancel(self) -> None:
        """Ask the engine to free the row at its next step; ignore events that still come."""
        self.canceled.set()


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
    ended: bool = field(default=False)


class Engine:
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
        self._inbox: queue.SimpleQueue[Ticket | Callable[[], None] | None] = queue.SimpleQueue()
        self.ignore_fingerprint = ignore_fingerprint
        self._pending = 0
        self._lock = threading.Lock()
        self._stopping = False
        self.failure: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._waiting: deque[Ticket] = deque()
        self._prefill: Prefill | None = None
        ready: Future[Base] = Future()
        self._thread = threading.Thread(target=self._run, args=(load, ready), name="mlx-lora-engine", daemon=True)
        self._thread.start()
        self.base = ready.result()

    # --- called from any thread

    def submit(self, request: Request, emit: Callable[[Event], None]) -> Ticket:
        """Queue a request; `emit` is called with its events.

        Raises:
            QueueFull: too many requests are waiting.
            Stopped: the engine is ending, or has failed.
        """
        with self._lock:
            if self._stopping:
                raise Stopped("the engine has stopped")
            if self._pending >= self.limits.max_waiting + self.limits.max_batch:
                raise QueueFull(f"{self.limits.max_waiting} requests are already waiting")
            self._pending += 1
        ticket = Ticket(request, emit)
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

        with self._lock:
            if self._stopping:
                raise Stopped("the engine has stopped")
            self._inbox.put(run)
        return future

    def close(self, timeout_s: float = 30.0) -> None:
        """Stop running and waiting requests, and end the thread."""
        with self._lock:
            self._stopping = True
        self._inbox.put(None)
        self._thread.join(timeout_s)

    @property
    def alive(self) -> bool:
        """Whether requests are served."""
        return self._thread.is_alive() and not self._stopping

    @property
    def unfinished(self) -> int:
        """The number of requests that wait or run."""
        return self._pending

    @property
    def running(self) -> int:
        """The number of rows that generate now."""
        return len(self.batch)

    # --- run in the engine's thread

    def _run(self, load: Callable[[], Base], ready: Future[Base]) -> None:
        """Load the base, then serve until told to end; an unexpected error ends it too, and all requests."""
        try:
            base = load()
            self._prepare(base)
        except BaseException as error:
            device.end_thread()
            ready.set_exception(error)
            return
        ready.set_result(base)
        try:
            while self._take_messages():
                self._admit()
                if len(self.batch):
                    self._step()
                self._drop_canceled()
        except BaseException as error:
            self.failure = error
            self.on_failure()
            raise
        finally:
            with self._lock:
                self._stopping = True
            self._give_up()
            device.end_thread()

    def _prepare(self, base: Base) -> None:
        device.set_cache_limit()
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

    def _take_messages(self) -> bool:
        """Handle the messages in the inbox, and wait for one if there is nothing else to do; return False to end."""
        idle = not len(self.batch) and self._prefill is None and not self._waiting
        while True:
            try:
                message = self._inbox.get(block=idle)
            except queue.Empty:
                return True
            idle = False
            if message is None:
                return False
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
        if token in self._eos and not request.ignore_eos:
            return Event(work.text.finish(), "stop", self._usage(work))
        work.made += 1
        piece = work.text.add(token, self._report(token, likelihoods))
        if not piece.stopped and work.made < request.max_tokens:
            return Event(piece)
        if not piece.stopped:
            rest = work.text.finish()
            piece = Piece(piece.text + rest.text, piece.reports + rest.reports, rest.stopped)
        return Event(piece, "stop" if piece.stopped else "length", self._usage(work))

    def _report(self, token: int, likelihoods: Likelihoods | None) -> TokenReport | None:
        if likelihoods is None:
            return None
        spelled = [(*spelling(self._tokenizer, other), value) for other, value in likelihoods.top()]
        text, data = spelling(self._tokenizer, token)
        top = tuple((other, value, own) for other, own, value in spelled)
        return TokenReport(text, likelihoods.token.item(), top, data)

    def _usage(self, work: _Work) -> Usage:
        return Usage(len(work.ticket.request.tokens), work.cached, work.made)

    def _drop_canceled(self) -> None:
        """Free the rows of canceled requests."""
        gone = [row for row in self.batch.rows if row.owner.ticket.canceled.is_set()]
        if gone:
            self.batch.leave(gone)
        if self._prefill is not None and self._prefill.row.owner.ticket.canceled.is_set():
            gone.append(self._prefill.row)
            self._prefill = None
        for row in gone:
            self._close(row.owner.ticket, row.owner, canceled=True)
        for ticket in [ticket for ticket in self._waiting if ticket.canceled.is_set()]:
            self._waiting.remove(ticket)
            self._close(ticket, None, canceled=True)

    def _close(self, ticket: Ticket, work: _Work | None, event: Event | None = None, canceled: bool = False) -> None:
        """End a request, and free its adapter and its position in the queue."""
        if work is not None and work.resident is not None:
            self.store.release(work.resident)
        self.counts.canceled += canceled
        with self._lock:
            self._pending -= 1
        if event is not None:
            ticket.emit(event)

    def _give_up(self) -> None:
        """Send an error to all requests that still run or wait."""
        works: list[Any] = [row.owner for row in self.batch.rows]
        works += [self._prefill.row.owner] if self._prefill is not None else []
        tickets = [work.ticket for work in works] + list(self._waiting)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, Ticket):
                tickets.append(message)
            elif message is not None:
                message()
        for ticket in tickets:
            ticket.emit(Event(Piece(""), error=Stopped("the server is shutting down")))
