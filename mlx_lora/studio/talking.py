"""Answer one conversation in several columns, each with its adapters, over one base in memory."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio.to_thread
import mlx.core as mx

from mlx_lora.config.load import train_settings
from mlx_lora.data.chat_template import own_template
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE
from mlx_lora.models.load import load_base
from mlx_lora.serving.adapter_store import DEFAULT_CONTEXT, AdapterSource, AdapterStore, context_of
from mlx_lora.serving.app import api_error
from mlx_lora.serving.conversation import chat_tokens
from mlx_lora.serving.engine import Engine, Event, Limits, Request, Ticket
from mlx_lora.serving.schema import ApiError, Ask, read_chat
from mlx_lora.utils.text import gigabytes

MOST_COLUMNS, MOST_PARTS = 4, 8
MOST_WEIGHT = 100.0
ADAPTER_BYTES = 4 * 10**9  # of adapters in memory; those used longest ago leave it
WAIT_S = 0.5  # for a piece, before it is seen whether the server ends
ROOM = 1.1  # a loaded base takes about this much of its files' size


@dataclass(frozen=True)
class Column:
    """One column of a conversation: an adapter's name in the engine, None for the base."""

    adapter: str | None


class Talk:
    """The model that the page talks to: one at a time, loaded when first asked."""

    def __init__(self, running: Callable[[], list[dict[str, Any]]], working_set_bytes: int):
        """Prepare to load a model.

        Args:
            running: returns the lines of runs that go on.
            working_set_bytes: the most that this machine should use.
        """
        self._running, self._limit = running, working_set_bytes
        self._engine: Engine | None = None
        self._model: str | None = None
        self._lock = threading.Lock()
        self._one_at_a_time = anyio.CapacityLimiter(1)  # tokenizers are not thread-safe

    def close(self) -> None:
        """Free the model."""
        with self._lock:
            self._free()

    def _free(self) -> None:
        """End the engine, and give its memory back; a module's parts know each other, so they are collected now."""
        if self._engine is None:
            return
        self._engine.close()
        self._engine = self._model = None
        gc.collect()
        mx.clear_cache()

    @property
    def model(self) -> str | None:
        """What is loaded."""
        return self._model

    async def answer(
        self, model: str, columns: list[Any], body: dict[str, Any], own: list[Any]
    ) -> AsyncIterator[dict[str, Any] | None]:
        """Yield the pieces of all columns' answers, as they come.

        Args:
            model: as `--model`, checked.
            columns: lists of (folder, weight), checked.
            body: messages and sampling, as OpenAI's chat has them.
            own: of each column the messages of its own conversation; None: those of the body.
        """
        try:
            asks = [read_chat({**body, "messages": messages} if messages else body) for messages in own]
            if self._model != model:
                warning = self._memory_warning(model)
                if warning:
                    yield {"warning": warning}
                yield {"status": f"Loading {Path(model).name}"}
            engine = await anyio.to_thread.run_sync(self._ready, model)
            names = await asyncio.wrap_future(engine.call(lambda store: _named(store, columns)))
            limit = context_of(engine.base.config) or DEFAULT_CONTEXT
            tokens = [
                await anyio.to_thread.run_sync(_tokens, engine, ask, name, limit, limiter=self._one_at_a_time)
                for ask, name in zip(asks, names, strict=True)
            ]
        except ApiError as error:
            yield {"error": str(error)}
            return
        except Exception as error:
            yield {"error": str(api_error(error))}  # raises what is nobody's input
            return
        async for piece in _pieces(engine, asks[0], names, tokens):
            yield piece

    def _ready(self, model: str) -> Engine:
        """Return the engine of a model; another one is freed first."""
        with self._lock:
            if self._engine is not None and (self._model != model or not self._engine.alive):
                self._free()
            if self._engine is None:
                settings = train_settings({"model": model}).model
                limits = Limits(max_batch=MOST_COLUMNS * 2, max_waiting=16, adapter_bytes=ADAPTER_BYTES)
                self._engine = Engine(lambda: load_base(settings), limits)
                self._model = model
            return self._engine

    def _memory_warning(self, model: str) -> str | None:
        """Return a line if a run that goes on leaves too little memory for the model."""
        runs = self._running()
        if not runs:
            return None
        needed = ROOM * _size(Path(model).expanduser())
        taken = sum(run.get("peak_bytes") or run.get("plan_peak_bytes") or 0 for run in runs)
        if needed + taken <= self._limit:
            return None
        return (
            f"The run {runs[0]['name']} takes {gigabytes(taken)}, this model about {gigabytes(needed)}, and this machine "
            f"should use at most {gigabytes(self._limit)} (predicted): both may become slow, or the run may end."
        )


def _named(store: AdapterStore, columns: list[list[tuple[Path, float]]]) -> list[str | None]:
    """Load what the columns need, in the engine's thread, and return each column's name of adapter or blend."""
    names: list[str | None] = []
    for parts in columns:
        wanted: dict[str, AdapterSource] = {}
        for folder, _ in parts:
            # Trained further, the same folder is another adapter.
            name = f"a-{_hash([str(folder), (folder / WEIGHTS_FILE).stat().st_mtime_ns])}"
            wanted[name] = AdapterSource(folder=folder)
        whole = len(parts) == 1 and parts[0][1] == 1
        new = {name: source for name, source in wanted.items() if name not in store.cards}
        if new:
            store.add(new)
        if not parts or whole:
            names.append(next(iter(wanted), None))
            continue
        weights: dict[str, float] = {}
        for name, (_, weight) in zip(wanted, parts, strict=True):
            weights[name] = weight
        blend = f"b-{_hash(sorted(weights.items()))}"
        if blend not in store.cards:
            store.add({blend: AdapterSource(blend=weights)})
        names.append(blend)
    return names


def _tokens(engine: Engine, ask: Ask, adapter: str | None, limit: int) -> list[int]:
    """Return the conversation's tokens with the column's own template.

    Raises:
        ApiError: the model's context is too short for it.
        InputError: the template refuses it.
    """
    base = engine.base
    card = engine.store.cards[adapter] if adapter else None
    template = (card and card.chat_template) or own_template(base.hf_tokenizer)
    messages = ask.messages or []
    if template:
        tokens = chat_tokens(base.hf_tokenizer, messages, template, engine.vocabulary)
    else:
        tokens = base.hf_tokenizer.encode("\n".join(message["content"] for message in messages))
    if not tokens or len(tokens) + 1 > limit:
        raise ApiError(400, f"messages: {len(tokens):,} tokens, and this model takes {limit:,}; begin a new conversation",
            "context_length_exceeded", "messages")  # fmt: skip
    return tokens


async def _pieces(
    engine: Engine, ask: Ask, names: list[str | None], prompts: list[list[int]]
) -> AsyncIterator[dict[str, Any] | None]:
    """Submit a request for each column, and yield their events in the order in which they come."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()
    tickets: list[Ticket] = []
    limit = context_of(engine.base.config) or DEFAULT_CONTEXT
    begun, first = time.perf_counter(), dict[int, float]()

    def emit_of(column: int) -> Callable[[Event], None]:
        def emit(event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the server ends
                loop.call_soon_threadsafe(events.put_nowait, (column, event))

        return emit

    try:
        for column, (name, tokens) in enumerate(zip(names, prompts, strict=True)):
            most = min(ask.max_tokens or 512, limit - len(tokens))
            request = Request(tokens, name, most, ask.sampling, ask.stops)
            tickets.append(engine.submit(request, emit_of(column)))
        left = len(tickets)
        while left:
            try:
                column, event = await asyncio.wait_for(events.get(), WAIT_S)
            except TimeoutError:
                yield None
                continue
            now = time.perf_counter()
            first.setdefault(column, now - begun)
            if event.piece.text:
                yield {"column": column, "text": event.piece.text}
            if event.error is not None:
                left -= 1
                yield {"column": column, "done": True, "error": " ".join(str(event.error).split())}
            elif event.usage is not None:
                left -= 1
                made, spent = event.usage.completion, now - begun - first[column]
                speed = (made - 1) / spent if made > 1 and spent > 0 else None
                yield {
                    "column": column, "done": True, "tokens": made, "tokens_per_s": speed, "first_token_s": first[column],
                    "prompt_tokens": event.usage.prompt, "finish": event.finish,
                }  # fmt: skip
    except Exception as error:
        yield {"error": str(api_error(error))}
    finally:
        for ticket in tickets:
            ticket.cancel()


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:20]


def _size(path: Path) -> int:
    """Return the bytes of a model's weights."""
    files = [path] if path.is_file() else list(path.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)
