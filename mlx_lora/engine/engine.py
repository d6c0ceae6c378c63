"""Run a model in one thread, which takes requests, emits tokens, and loads and unloads adapters between steps.

    submit -> waiting -> Prefill (computes a prompt in parts) -> RunningBatch (one token per row and step) -> Event

Each row has its own adapter and random stream (models/generator.py). Everything that uses MLX runs in
this thread, including the loading of the base.

Read the requests of OpenAI's clients, and turn the engine's errors into answers.

Every field is checked, and fields that would be ignored are refused.

Source: OpenAI's API reference: chat/completions and completions.

Turn conversations into the tokens of a prompt, with what a model's tower sees of their pictures.

    messages with marks -> PicturePrompt (tokens, pictures)         any thread, one at a time; no MLX
    PicturePrompt -> Prefill -> keys and values                     the engine's thread, which loads the tower once

After its prompt, a row with pictures is like any other: its caches are mlx-lm's, and the next token's position is the number
of tokens before it. Its keys and values are not kept for later prompts, because the same tokens may stand for another picture.
Nothing of a picture is written to disk.

A prompt is encoded in the same way as for `generate`: same template, same sandbox, same encoding.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.chat_template import encode_chat, own_template
from mlx_lora.data.downloads import is_on_web
from mlx_lora.data.examples import FormatError, Message
from mlx_lora.data.image_tokens import ImageProcessor, ImageReader, ImageTable, encode_messages, family_of
from mlx_lora.data.images import mark
from mlx_lora.engine.adapter_store import (
    AdapterSource,
    AdapterStore,
    NoRoom,
    Resident,
    UnknownAdapter,
    base_name,
    check_names,
)
from mlx_lora.models.draft_folder import FOLDER
from mlx_lora.models.drafts import Drafting, Drafts, load_draft
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
from mlx_lora.models.grammar import THOUGHTS, Grammars, opens_thinking
from mlx_lora.models.head import find_head
from mlx_lora.models.image_inputs import ImageInputSpec, ModelWithImages
from mlx_lora.models.load import Base
from mlx_lora.models.tokenizer import Continuation, spelling
from mlx_lora.models.vision import VisionTower, compute_dtype, image_token, load_tower
from mlx_lora.objectives.vision_encoder import ImageFeatureCache, VisionEncoder, image_template
from mlx_lora.rollouts.tool_calls import JSON_CALLS, NO_CALLS, CallReader, ToolTurns, call_form, call_rules
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError, first_line
from mlx_lora.utils.http import ApiError, bad_value, is_number, read_number, read_typed, shown_value

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
        pictures: a PicturePrompt, with what is needed of its pictures; None: it has none.
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
        resident: the adapter that it holds; None: the base, or it has not begun.
        text: of its answer, once it has begun.
        cached: tokens of its prompt that were in the cache.
        made: new tokens.
    """

    request: Request
    emit: Callable[[Event], None]
    canceled: threading.Event = field(default_factory=threading.Event)
    resident: Resident | None = None
    text: Any = None  # a TextStream
    cached: int = 0
    made: int = 0


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
        drafts: whether heads that draft tokens are used, for a row that is alone.
    """

    max_batch: int = 16
    max_waiting: int = 64
    prefill_tokens: int = 512
    adapter_bytes: int | None = None
    prompt_cache_bytes: int = 256 * 10**6
    drafts: bool = True


@dataclass
class Counts:
    """Counts of what an engine has done since its start; only its own thread writes them."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    finished: int = 0
    canceled: int = 0
    failed: int = 0


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
            while not self._inbox.empty():
                if (message := self._inbox.get()) is not None:
                    self._take(message)
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
        gone = [row for row in self.batch.rows if row.owner.canceled.is_set()]
        if gone:
            self.batch.leave(gone)
        if self._prefill is not None and self._prefill.row.owner.canceled.is_set():
            gone.append(self._prefill.row)
            self._prefill = None
        waited = [ticket for ticket in self._waiting if ticket.canceled.is_set()]
        for ticket in waited:
            self._waiting.remove(ticket)
        for ticket in [*(row.owner for row in gone), *waited]:
            self._close(ticket)

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
            base, routing, logits.dtype, self.limits.adapter_bytes, self.ignore_fingerprint, self._dropped
        )
        self._drafts: dict[int | None, Drafts | None] = {}  # of adapters by number, and the base's own
        self._model, self._routing, self._tokenizer = TokenSteps(base.model), routing, base.tokenizer
        self.batch = RunningBatch(self._model, routing)

    def _dropped(self, number: int) -> None:
        """Free what belongs to an adapter that left memory."""
        self.prompt_cache.drop(number)
        self._drafts.pop(number, None)

    def _drafting(self, ticket: Ticket) -> Drafting | None:
        """Return what drafts a request's tokens; None: nothing does."""
        if (
            not self.limits.drafts
            or ticket.request.pictures
            or isinstance(find_head(self.base.model, self.base.config), str)
        ):
            return None  # a head that some adapter changes is not the one that rows share
        folder = self.store.folder(ticket.request.adapter)
        own = folder is not None and (folder / FOLDER).is_dir()
        number = ticket.resident.number if own and ticket.resident else None
        if number not in self._drafts:
            self._drafts[number] = load_draft(self.base, folder if own else None)
        found = self._drafts[number]
        return Drafting(found) if found and found.count else None

    @cached_property
    def grammars(self) -> Grammars:
        """What makes grammars of answers; prepared when a request first has one.

        Raises:
            InputError: as of `Grammars`.
        """
        return Grammars(self.base.hf_tokenizer, self.vocabulary, sorted(self._eos))

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
                self._close(ticket)
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
            ticket.resident = self.store.acquire(request.adapter) if request.adapter else None
            pictures = request.pictures and request.pictures.seen_by(self._model.model)
        except NoRoom:
            self._waiting.appendleft(ticket)  # running rows use all adapters; try again when one has ended
            return
        except (
            UnknownAdapter,
            InputError,
            OSError,
        ) as error:  # also of the tower, or of a picture's file that has changed
            self.counts.failed += 1
            self._close(ticket, Event(Piece(""), error=error))
            return
        number = ticket.resident.number if ticket.resident else None
        caches, cached = (None, 0) if pictures else self.prompt_cache.find(number, request.tokens)
        text = Continuation(self._tokenizer) if request.continues else self._tokenizer.detokenizer
        ticket.text, ticket.cached = TextStream(text, request.stops), cached
        grammar, kept = request.sampling.grammar, pictures is None
        sampler = Sampler(request.sampling, self.vocabulary, grammar and self.grammars.matcher(grammar))
        row = BatchRow(ticket, number, sampler, request.tokens[:cached], kept=kept, drafting=self._drafting(ticket))
        self._prefill = Prefill(self._model, self._routing, row, request.tokens[cached:], caches, pictures)
        self.counts.prompt_tokens += len(request.tokens) - cached

    def _step(self) -> None:
        leaving = []
        for row, token, likelihoods in self.batch.step():
            if row.owner.canceled.is_set() or any(row is other for other, _ in leaving):  # or of drafts after the end
                continue
            event = self._event(row, token, likelihoods)
            self.counts.generated_tokens += 1
            if event.last:
                leaving.append((row, event))
            elif event.piece.text or event.piece.reports:
                row.owner.emit(event)
        for row, event in leaving:
            if row.kept:
                self.prompt_cache.keep(row.adapter, row.tokens, self.batch.extract(row))
            self.counts.finished += event.error is None
            self.counts.failed += event.error is not None
            self._close(row.owner, event)
        if leaving:
            self.batch.leave([row for row, _ in leaving])
        self.counts.steps += 1
        if self.counts.steps % STEPS_PER_CLEARING == 0:
            mx.clear_cache()

    def _event(self, row: BatchRow, token: int, likelihoods: Likelihoods | None) -> Event:
        """Return the event for a new token of a request."""
        ticket, request = row.owner, row.owner.request
        if failure := row.sampler.failure:
            return Event(
                Piece(""), error=InputError(f"the grammar of this answer is too large ({failure.splitlines()[0]})")
            )
        ended = token in self._eos and not request.ignore_eos
        ticket.made += not ended
        usage = Usage(len(request.tokens), ticket.cached, ticket.made)
        if ended:
            return Event(ticket.text.finish(), "stop", usage)
        report = None
        if likelihoods is not None:
            spelled = [(*spelling(self._tokenizer, other), value) for other, value in likelihoods.top()]
            top = tuple((other, value, own) for other, own, value in spelled)
            text, data = spelling(self._tokenizer, token)
            report = TokenReport(text, likelihoods.token.item(), top, data)
        piece = ticket.text.add(token, report)
        if not piece.stopped and ticket.made < request.max_tokens:
            return Event(piece)
        if not piece.stopped:
            rest = ticket.text.finish()
            piece = Piece(piece.text + rest.text, piece.reports + rest.reports, rest.stopped)
        # What was cut before a stop sequence is no text of the grammar.
        return Event(piece, "stop" if piece.stopped and row.sampler.matcher is None else "length", usage)

    def _close(self, ticket: Ticket, event: Event | None = None) -> None:
        """End a request, and free its adapter and its position in the queue; without a last event, it was canceled."""
        if ticket.resident is not None:
            self.store.release(ticket.resident)
        self.counts.canceled += event is None
        with self._lock:
            self.unfinished -= 1
        if event is not None:
            ticket.emit(event)

    def _give_up(self) -> None:
        """Send an error to all requests that still run or wait."""
        rows = [*self.batch.rows, *([self._prefill.row] if self._prefill is not None else [])]
        for ticket in [*(row.owner for row in rows), *self._waiting]:
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


# Requests of clients

MAX_STOPS, MAX_TOP_LOGPROBS, MAX_CHOICES = 16, 20, 128
ROLES = ("system", "developer", "user", "assistant", "tool")
# Fields that both endpoints, or one of them, read.
_COMMON = {
    "model", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "logprobs",
    "ignore_eos", "n", "frequency_penalty", "presence_penalty", "logit_bias", "response_format", "grammar", "regex",
}  # fmt: skip
_CHAT = _COMMON | {
    "messages", "tools", "tool_choice", "parallel_tool_calls", "max_completion_tokens", "top_logprobs",
}  # fmt: skip
_COMPLETION = _COMMON | {"prompt"}
# Fields that do not change an answer.
_HARMLESS = {
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
}
# Fields that are not supported, except with these values.
_NEUTRAL = {
    "best_of": (1,), "echo": (False,), "suffix": (None, ""),
}  # fmt: skip


@dataclass(frozen=True)
class Ask:
    """A request to either endpoint.

    Attributes:
        model: id of the base or of an adapter; None: the base.
        messages, tools: of a chat; None for a completion.
        tool_choice: `auto`, `required`, or the name of the tool that has to be called.
        parallel: several tools may be called in an answer.
        pictures: what the marks of pictures in the messages stand for: file names or data URLs.
        prompt: text or token ids of a completion; None for a chat.
        max_tokens: None: as many as allowed.
        sampling, stops, ignore_eos: as in the engine's Request.
        n: answers.
        form: of the answer: `schema`, `regex` or `grammar`, with its text or schema, and the field that has it; None: any text.
        stream: send pieces as they come.
        include_usage: end a stream with the token counts.
    """

    model: str | None
    messages: list[dict[str, Any]] | None
    tools: list[dict[str, Any]] | None
    prompt: str | list[int] | None
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    ignore_eos: bool
    n: int
    form: tuple[str, Any, str] | None
    stream: bool
    include_usage: bool
    tool_choice: str = "auto"
    parallel: bool = True
    pictures: Mapping[str, str | bytes] = field(default_factory=dict)


def read_chat(body: dict[str, Any]) -> Ask:
    """Return the request of a chat/completions body.

    Raises:
        ApiError: 400, naming the field.
    """
    _check_fields(body, _CHAT)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_value("messages", messages, "a list with at least one message")
    wanted = read_typed(body, "logprobs", bool, False)
    top = read_number(body, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top is not None and not wanted:
        raise ApiError(
            400, "top_logprobs without logprobs: nothing is reported; set logprobs to true", "invalid", "logprobs"
        )
    most = read_number(body, "max_completion_tokens", 1, 10**9)
    choice, tools = body.get("tool_choice"), read_typed(body, "tools", list, [])
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise bad_value("tools", tool, 'objects such as {"type": "function", "function": {"name": ...}}')
    names = [tool["function"]["name"] for tool in tools]
    if isinstance(choice, dict):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, dict) else None
        if choice not in names:
            raise bad_value(
                "tool_choice", body["tool_choice"], f"a function of tools, which has {', '.join(names) or 'none'}"
            )
    elif choice not in (None, "none", "auto") and not (choice == "required" and tools):
        raise bad_value(
            "tool_choice", choice, 'none, auto, with tools required, or {"type": "function", "function": {"name": ...}}'
        )
    pictures: dict[str, str | bytes] = {}
    return Ask(
        messages=[_message(n, message, pictures) for n, message in enumerate(messages)],
        pictures=pictures,
        tools=(tools or None) if choice != "none" else None,
        tool_choice=choice or "auto",
        parallel=read_typed(body, "parallel_tool_calls", bool, True),
        prompt=None,
        **_common(body, most, (top or 0) if wanted else None),
    )


def read_completion(body: dict[str, Any]) -> Ask:
    """Return the request of a completions body.

    Raises:
        ApiError: 400, naming the field.
    """
    _check_fields(body, _COMPLETION)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not is_number(prompt[0], -math.inf, math.inf, True):
        prompt = prompt[0]
    tokens = isinstance(prompt, list) and prompt and all(is_number(one, -math.inf, math.inf, True) for one in prompt)
    if not (tokens or (isinstance(prompt, str) and prompt)):
        raise bad_value("prompt", prompt, "one string or one list of token ids, not empty")
    top = read_number(body, "logprobs", 0, MAX_TOP_LOGPROBS)
    return Ask(messages=None, tools=None, prompt=prompt, **_common(body, None, top, default_tokens=16))


def _common(
    body: dict[str, Any], most: int | None, top_logprobs: int | None, default_tokens: int | None = None
) -> dict[str, Any]:
    most = most or read_number(body, "max_tokens", 1, 10**9) or default_tokens
    options = read_typed(body, "stream_options", dict, {})
    stream = read_typed(body, "stream", bool, False)
    seed = read_number(body, "seed", -(2**63), 2**63 - 1)
    stops = body.get("stop")
    stops = [] if stops is None else [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise bad_value("stop", body["stop"], f"a string or up to {MAX_STOPS} of them, none empty")
    form = _answer_form(body)
    if form and read_typed(body, "ignore_eos", bool, False):
        raise ApiError(
            400, f"ignore_eos with {form[2]}: its answer has an end; leave one of the two out", "invalid", "ignore_eos"
        )
    bias = read_typed(body, "logit_bias", dict, {})
    if not all(key.isdecimal() and is_number(value, -100, 100) for key, value in bias.items()):
        raise bad_value("logit_bias", bias, 'token ids with numbers from -100 to 100, such as {"50256": -100}')
    return {
        "model": read_typed(body, "model", str, None),
        "max_tokens": most,
        "sampling": Sampling(
            temperature=read_number(body, "temperature", 0, 100, 1.0, whole=False),
            # 0: the smallest nucleus, so greedy, as in llama.cpp
            top_p=read_number(body, "top_p", 0, 1, 1.0, whole=False),
            top_k=read_number(body, "top_k", 0, 10**9, 0),
            seed=None if seed is None else seed % 2**63,
            top_logprobs=top_logprobs,
            frequency_penalty=read_number(body, "frequency_penalty", -2, 2, 0.0, whole=False),
            presence_penalty=read_number(body, "presence_penalty", -2, 2, 0.0, whole=False),
            logit_bias=tuple((int(key), float(value)) for key, value in bias.items()),
        ),
        "n": read_number(body, "n", 1, MAX_CHOICES, 1),
        "form": form,
        "stops": tuple(stops),
        "ignore_eos": read_typed(body, "ignore_eos", bool, False),
        "stream": stream,
        "include_usage": stream and bool(read_typed(options, "include_usage", bool, False)),
    }


def _answer_form(body: dict[str, Any]) -> tuple[str, Any, str] | None:
    """Return the form that an answer is asked in, with what says it, and the field's name."""
    asked, found = read_typed(body, "response_format", dict, {"type": "text"}), []
    kind, name = asked.get("type"), "response_format"
    if kind == "json_object":
        found.append(("schema", asked.get("schema", {"type": "object"}), f"{name}.schema"))
    elif kind == "json_schema":
        inner = asked.get("json_schema")
        if not isinstance(inner, dict) or "schema" not in inner:
            raise bad_value(f"{name}.json_schema", inner, 'an object with "name" and "schema"')
        found.append(("schema", inner["schema"], f"{name}.json_schema.schema"))
    elif kind != "text":
        raise bad_value(f"{name}.type", kind, "text, json_object or json_schema")
    for name in ("grammar", "regex"):
        if text := read_typed(body, name, str, ""):
            found.append((name, text, name))
    if len(found) > 1:
        raise ApiError(400, f"{' and '.join(form[2] for form in found)}: give only one of them", "invalid", found[1][2])
    return found[0] if found else None


def _check_fields(body: dict[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in known or name in _HARMLESS or value is None:
            continue
        if name not in _NEUTRAL:
            raise ApiError(400, f"{name}: not a field of this endpoint; leave it out", "unknown_parameter", name)
        if value not in _NEUTRAL[name]:
            raise ApiError(
                400,
                f"{name} {shown_value(value)}: this server does not support that; leave it out",
                "unsupported_parameter",
                name,
            )


def _message(index: int, message: Any, pictures: dict[str, str | bytes]) -> dict[str, Any]:
    """Return a message in the format of templates: content as one text, arguments of calls as objects.

    A user's pictures become marks in the text; what they stand for is put into `pictures`.
    """
    name = f"messages[{index}]"
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise bad_value(name, message, f"an object with a role of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        sees, texts = message["role"] == "user", []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            image = part.get("image_url") if kind in ("image_url", "input_image") and sees else None
            text = part.get("text") if kind == "text" else image.get("url") if isinstance(image, dict) else image
            if not isinstance(text, str) or not (text or kind == "text"):
                kinds = "text, and of a user image_url with a url" if sees else "text"
                raise bad_value(f"{name}.content", content, f"a string or parts of type {kinds}")
            texts.append(text if kind == "text" else mark(text, pictures))
        content = "".join(texts)
    calls = message.get("tool_calls")
    if not isinstance(content, str) and not (content is None and calls):
        raise bad_value(f"{name}.content", content, "a string or parts of type text")
    role = "system" if message["role"] == "developer" else message["role"]
    plain = {**message, "role": role, "content": content or ""}
    if calls is None:
        return plain
    try:
        functions = [call["function"] for call in calls]
        read = [{**one, "arguments": json.loads(one.get("arguments") or "{}")} for one in functions]
        return {**plain, "tool_calls": [{**call, "function": one} for call, one in zip(calls, read, strict=True)]}
    except (TypeError, KeyError, AttributeError, ValueError):
        raise bad_value(f"{name}.tool_calls", calls, "calls with a function's name and JSON arguments") from None


# The form of an answer


class AnswerForms:
    """Says how the answer of a request is read, and what it has to be; one request at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._readers: dict[str, CallReader] = {}  # by chat template

    def of(self, ask: Ask, template: str | None, tokens: list[int]) -> tuple[CallReader | None, str | None]:
        """Return what reads an answer, None if it is text alone, and its grammar, None if it may be any text.

        Args:
            ask: the request.
            template: the adapter's own chat template; None: the model's.
            tokens: of the prompt.

        Raises:
            ApiError: 400: a schema or grammar is invalid, with its place.
        """
        template = template or own_template(self._engine.base.hf_tokenizer) or ""
        reader = None if ask.messages is None else self._reader(ask, template, tokens)
        tools, answer, calls, chosen = ask.tools or [], None, "", []
        strict = any(tool["function"].get("strict") for tool in tools)
        if ask.form is None and ask.tool_choice == "auto" and not strict:
            return reader, None
        try:
            grammars = self._engine.grammars
            if ask.form is not None:
                kind, given, place = ask.form
                answer = grammars.of_schema(given, place) if kind == "schema" else grammars.of_text(kind, given, place)
            if ask.messages is None:
                return None, answer
            for number, tool in enumerate(tools):
                function = tool["function"]
                if ask.tool_choice in ("auto", "required", function["name"]):
                    grammars.of_schema(function.get("parameters") or {}, f"tools[{number}].function.parameters")
                    chosen.append(tool)
            answer = answer if ask.tool_choice == "auto" else None
            free = bool(chosen) and ask.tool_choice == "auto" and answer is None
            if reader is not None and chosen:
                form, calls = call_rules(reader, chosen, grammars.literal, ask.parallel, free)
                reader = replace(reader, form=form)
            grammar = grammars.whole(answer, calls, reader is not None and reader.opened, free)
            grammars.matcher(grammar)  # compiled here, and not between two steps of the engine
        except (InputError, RecursionError) as error:
            raise ApiError(400, str(error), "invalid_grammar") from None
        return reader, grammar

    def _reader(self, ask: Ask, template: str, tokens: list[int]) -> CallReader | None:
        """Return what reads thinking and calls of tools in a chat's answer; None: all of it is text."""
        base, tools = self._engine.base, tuple(ask.tools or ())
        opened = opens_thinking(base.hf_tokenizer, tokens)
        marks = {token.content for token in base.hf_tokenizer.added_tokens_decoder.values()}
        if not tools and not opened and marks.isdisjoint(["<|channel|>", *(end for _, end in THOUGHTS)]):
            return None
        if template not in self._readers:
            turns = ToolTurns(base.hf_tokenizer, template, frozenset(base.tokenizer.eos_token_ids))
            form = JSON_CALLS
            with suppress(InputError):  # the template shows no calls; a model may still write them
                form = call_form(turns)
            self._readers[template] = CallReader(turns, form, False)
        form = self._readers[template].form if tools or "<|channel|>" in marks else NO_CALLS
        return replace(self._readers[template], form=form, opened=opened, tools=tools)


RETRY_AFTER_S = 1


def api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for an error of the engine."""
    if isinstance(error, UnknownAdapter):
        words = f"no model or adapter {str(error)!r}; GET /v1/models lists them"
        return ApiError(404, words, "model_not_found", "model")
    if isinstance(error, QueueFull | NoRoom):
        status, code = (429, "queue_full") if isinstance(error, QueueFull) else (503, "no_room")
        return ApiError(status, f"{error}; try again later", code, retry_after_s=RETRY_AFTER_S)
    if isinstance(error, Stopped):
        return ApiError(503, f"{error}", "shutting_down")
    if isinstance(error, (InputError, OSError)):
        return ApiError(400, " ".join(str(error).split()), "invalid_adapter")
    raise error


# Prompts


class PictureReader:
    """Reads the pictures of conversations for one base."""

    def __init__(self, base: Base, folders: Sequence[Path] = ()):
        """Prepare; nothing is loaded yet.

        Args:
            base: that is served.
            folders: that files may be read from; data URLs need none.
        """
        self.base, self.folders = base, folders
        self._processors: dict[int | None, ImageProcessor] = {}
        self.tower: VisionTower | None = None

    def check(self) -> None:
        """Check that the model can be shown pictures, before one is read.

        Raises:
            InputError: it cannot.
        """
        kind = self.base.config.get("model_type")
        if family_of(self.base.config) is None:
            raise InputError(f"a {kind} model sees no pictures; leave them out")
        if ImageInputSpec.of(self.base.config).prompt:
            raise InputError(f"a {kind} model is not served with pictures; use mlx-lora generate --image")

    def prompt(
        self,
        messages: list[Message],
        sources: Mapping[str, str | bytes],
        template: str | None,
        folders: Sequence[Path] = (),
        max_pixels: int | None = None,
    ) -> PicturePrompt:
        """Return a conversation as a prompt.

        Args:
            messages: pictures are marks in their content (data/images.py).
            sources: what the marks stand for: file names, data URLs.
            template: the adapter's own; None: the model's.
            folders: further ones that files may be read from.
            max_pixels: to which larger pictures are shrunk; None: only the model's own limits.

        Raises:
            InputError: the model sees no pictures, or one cannot be used.
        """
        self.check()
        base = self.base
        if max_pixels not in self._processors:
            self._processors[max_pixels] = ImageProcessor(base.folder, base.config, max_pixels)
        processor = self._processors[max_pixels]
        template = template or image_template(base.hf_tokenizer, base.folder, processor.family)
        if template is None:
            raise InputError("the model has no chat template, so it cannot be asked about pictures")
        table = ImageTable.empty()
        reader = ImageReader(processor, [*self.folders, *folders], table, image_token(base.config))
        try:
            tokens, digests = encode_messages(reader, base.hf_tokenizer, template, messages, sources)
        except FormatError as error:
            raise InputError(str(error)) from None
        return PicturePrompt(self, tokens, digests, table, processor)


@dataclass(frozen=True)
class PicturePrompt:
    """A prompt with pictures.

    Attributes:
        reader: that read it.
        tokens: up to where the model answers.
        digests: of its pictures, in order.
        table: that has them.
        processor: that made their pixels.
    """

    reader: PictureReader
    tokens: list[int]
    digests: tuple[str, ...]
    table: ImageTable
    processor: ImageProcessor

    def seen_by(self, model: nn.Module) -> ModelWithImages:
        """Return a model with what the tower sees of the pictures, which is computed here, in the engine's thread.

        Raises:
            InputError: the tower cannot be loaded, or fails.
        """
        base = self.reader.base
        if self.reader.tower is None:
            self.reader.tower = load_tower(base.folder, compute_dtype(base))
        seen = ImageFeatureCache(self.reader.tower, self.processor, self.table, writes=False)
        spec = ImageInputSpec.of(base.config)
        vision = VisionEncoder(self.reader.tower, self.processor, spec, self.table, seen)
        return ModelWithImages(model, spec, vision.prompt_arrays(self.tokens, self.digests))


def picture_prompt(
    reader: PictureReader, ask: Ask, template: str | None, max_pixels: int | None = None
) -> PicturePrompt:
    """Return the prompt of a chat with pictures.

    Args:
        reader: of the base.
        ask: the request.
        template: the adapter's own; None: the model's.
        max_pixels: of the pictures in the adapter's run; None: it had no limit of its own.

    Raises:
        ApiError: 400: a picture cannot be used, a web address or a file that is not below the server's folder among them, or
            the model sees none.
    """
    if ask.tools:
        raise ApiError(
            400, "tools with pictures: not supported; leave one of the two out", "unsupported_parameter", "tools"
        )
    try:
        reader.check()
        for source in ask.pictures.values():
            if is_on_web(source):
                raise InputError(
                    "a picture on the web, and this server downloads none; send it as a data URL "
                    "(data:image/png;base64,...), or name a file of serve --images-from"
                )
            if not reader.folders and isinstance(source, str) and source[:5].lower() != "data:":
                raise InputError(
                    "a picture as a file, and this server reads none (serve --images-from FOLDER); send it as a data URL "
                    "(data:image/png;base64,...)"
                )
        return reader.prompt(ask.messages or [], ask.pictures, template, max_pixels=max_pixels)
    except InputError as error:
        raise ApiError(400, f"messages: {error}", "invalid_image", "messages") from None


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    vocabulary: int,
    tools: list[dict[str, Any]] | None = None,
) -> list[int]:
    """Return a conversation's tokens, up to where the model answers.

    Args:
        tokenizer: the base's tokenizer.
        messages, tools: plain data, which may be untrusted.
        template: Jinja text.
        vocabulary: the number of token ids.

    Raises:
        InputError: the template refuses the conversation or renders no text, or the model has no row for a token.
    """
    tokens = encode_chat(tokenizer, messages, template, tools)
    if not tokens:
        raise InputError("the chat template renders no text for this conversation; give some text")
    if max(tokens) >= vocabulary:
        raise InputError(
            f"the conversation has token {max(tokens)}, but the model has only {vocabulary} tokens; the tokenizer belongs "
            "to another model"
        )
    return tokens
