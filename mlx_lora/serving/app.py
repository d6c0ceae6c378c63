"""Serve OpenAI's completions, the models and adapters, health, metrics and the chat page over HTTP.

    Guard -> routes -> read_chat, read_completion (check the body) -> prompt_tokens -> engine -> EngineResponse -> client

Under /v1/adapters, adapters are listed, loaded and unloaded. A name is never a path. A path is only looked up below one folder that
the operator chose, after following links.

The chat page shows two models side by side in a browser and uses the same endpoints as other clients. It is `pages/chat.html`,
served as a single file, with its scripts `pages/chat.js` and reports/pages/markdown.js and the common tokens.css inside. Its policy
only allows its own script and style to run, whatever a model writes. It has no secrets, so it is served without an API key;
its requests to the server need the key.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import mlx.core as mx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_lora.engine.adapter_store import NAME, AdapterSource, Card, NoRoom, UnknownAdapter, base_name
from mlx_lora.engine.engine import Engine, Event, QueueFull, Request, Stopped
from mlx_lora.engine.prompts import PicturePrompt, PictureReader, picture_prompt
from mlx_lora.engine.requests import Ask, read_chat, read_completion
from mlx_lora.models.encoder import is_encoder
from mlx_lora.reports import charts
from mlx_lora.serving.schema import (
    AnswerLimits,
    ChatReply,
    CompletionReply,
    client_error,
    prompt_tokens,
    without_paths,
)
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.guard import Guard, GuardLimits, error_response, not_here
from mlx_lora.utils.http import ApiError, is_number, read_fields, read_json
from mlx_lora.utils.hub import HUB_ID, resolve_adapter


def make_app(
    engine: Engine,
    guard: GuardLimits,
    limits: AnswerLimits,
    started_s: int,
    more_routes: Sequence[BaseRoute] = (),
) -> Starlette:
    """Return the server as an ASGI application, which closes the engine when it ends.

    Args:
        engine: a running engine.
        guard: limits for requests.
        limits: limits for answers.
        started_s: UNIX time.
        more_routes: routes in addition to the common ones.
    """
    completions, answers = Completions(engine, limits, started_s), Counter()

    async def health(request: HttpRequest) -> Response:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(request: HttpRequest) -> Response:
        store, prompts = engine.store, engine.prompt_cache
        lines = ["# TYPE mlx_lora_answers_total counter"]
        lines += [
            f'mlx_lora_answers_total{{path="{path}",status="{status}"}} {count}'
            for (path, status), count in sorted(answers.items())
        ]
        totals = {
            **asdict(engine.counts),
            "reused_prompt_tokens": prompts.reused_tokens,
            "adapter_loads": store.loads,
            "adapter_evictions": store.evictions,
        }
        now = {
            "running": len(engine.batch),
            "unfinished": engine.unfinished,
            "adapters_known": len(store.cards),
            "adapters_resident": sum(card.resident for card in store.cards.values()),
            "adapter_bytes": store.nbytes,
            "prompt_cache_bytes": prompts.nbytes,
            "prompt_cache_entries": len(prompts),
            "memory_bytes": mx.get_active_memory(),
            "peak_memory_bytes": mx.get_peak_memory(),
        }
        for name, value in totals.items():
            lines += [f"# TYPE mlx_lora_{name}_total counter", f"mlx_lora_{name}_total {value}"]
        for name, value in now.items():
            lines += [f"# TYPE mlx_lora_{name} gauge", f"mlx_lora_{name} {value}"]
        return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await anyio.to_thread.run_sync(engine.close)

    cors = Middleware(
        CORSMiddleware,
        allow_origins=guard.origins,
        allow_methods=["GET", "POST", "DELETE"],
        allow_headers=["Authorization", "Content-Type"],
    )
    text = (FOLDER / "chat.html").read_text(encoding="utf-8").replace("/* tokens.css */\n", charts.tokens_css())
    for script in SCRIPTS:
        text = text.replace(f"// {script.name}\n", script.read_text(encoding="utf-8"))
    headers = {
        "Content-Security-Policy": policy(text),
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",  # frame-ancestors, for old browsers
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }

    async def page(request: HttpRequest) -> HTMLResponse:
        return HTMLResponse(text, headers=headers)

    return Starlette(
        routes=[
            Route("/", page, methods=["GET"]),
            Route("/v1/chat/completions", completions.chat, methods=["POST"]),
            Route("/v1/completions", completions.completion, methods=["POST"]),
            Route("/v1/models", completions.models),
            Route("/v1/models/{model:path}", completions.model),
            Route("/health", health),
            Route("/metrics", metrics),
            *more_routes,
        ],
        middleware=[*([cors] if guard.origins else []), Middleware(Guard, limits=guard, answers=answers, known=KNOWN)],
        exception_handlers={ApiError: _as_json, HTTPException: _as_json},
        lifespan=lifespan,
    )


Reply = ChatReply | CompletionReply


class Completions:
    """The endpoints that generate, and those that list models."""

    def __init__(self, engine: Engine, limits: AnswerLimits, started_s: int):
        self._engine, self._limits = engine, limits
        self._pictures = PictureReader(engine.base, [limits.images_from] if limits.images_from else [])
        self._base_name, self._started_s = base_name(engine.base), started_s
        self._one_at_a_time = anyio.CapacityLimiter(1)  # tokenizers are not thread-safe

    async def chat(self, request: HttpRequest) -> EngineResponse:
        """POST /v1/chat/completions."""
        return await self._answer(read_chat(read_json(await request.body())), ChatReply)

    async def completion(self, request: HttpRequest) -> EngineResponse:
        """POST /v1/completions."""
        return await self._answer(read_completion(read_json(await request.body())), CompletionReply)

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models."""
        return JSONResponse(
            {"object": "list", "data": [self._model(card) for card in (None, *self._engine.store.cards.values())]}
        )

    async def model(self, request: HttpRequest) -> Response:
        """GET /v1/models/ID."""
        return JSONResponse(self._model(self._card(request.path_params["model"])))

    async def _answer(self, ask: Ask, make_reply: Callable[[str], Reply]) -> EngineResponse:
        if is_encoder(self._engine.base.model):
            message = f"{self._base_name} is an encoder, which writes no text; POST /v1/embeddings has its vectors"
            raise ApiError(400, message, "model_not_supported", "model")
        card = self._card(ask.model)
        tokens, pictures = await anyio.to_thread.run_sync(self._tokens, ask, card, limiter=self._one_at_a_time)
        limits, asked = self._limits, ask.max_tokens or 1
        if asked > limits.max_tokens:
            message = f"max_tokens {asked}: this server allows at most {limits.max_tokens}"
            raise ApiError(400, message, "too_many_tokens", "max_tokens")
        room = limits.max_context - len(tokens)
        if room < asked:
            message = f"{len(tokens)} tokens in the prompt and {asked} new ones: the limit is {limits.max_context}"
            raise ApiError(400, message, "context_length_exceeded", "messages")
        most = ask.max_tokens or min(limits.max_tokens, room)
        request = Request(
            tokens=tokens,
            adapter=card.name if card else None,
            max_tokens=most,
            sampling=ask.sampling,
            stops=ask.stops,
            ignore_eos=ask.ignore_eos,
            continues=ask.messages is None,
            pictures=pictures,
        )
        return EngineResponse(
            self._engine, request, make_reply(card.name if card else self._base_name), ask, self._limits.timeout_s
        )

    def _tokens(self, ask: Ask, card: Card | None) -> tuple[list[int], PicturePrompt | None]:
        template = card.chat_template if card else None
        try:
            if not ask.pictures:
                return prompt_tokens(self._engine.base.hf_tokenizer, ask, template, self._engine.vocabulary), None
            prompt = picture_prompt(self._pictures, ask, template, card.max_pixels if card else None)
        except ApiError as error:
            raise client_error(self._engine, error, self._pictures.folders) from None
        return prompt.tokens, prompt

    def _model(self, card: Card | None) -> dict[str, Any]:
        return {
            "id": card.name if card else self._base_name,
            "object": "model",
            "owned_by": "mlx_lora",
            "created": card.created if card else self._started_s,
            "parent": self._base_name if card else None,
        }

    def _card(self, model: str | None) -> Card | None:
        """Return the adapter that a model id means, None for the base."""
        if model in (None, self._base_name):
            return None
        if model not in self._engine.store.cards:
            raise ApiError(404, f"no model {model!r}; GET /v1/models lists them", "model_not_found", "model")
        return self._engine.store.cards[model]


class ClientGone(Exception):
    """The client has closed the connection."""


class EngineResponse:
    """A response that the engine generates, as an ASGI application; its row is freed when it ends in any way."""

    def __init__(self, engine: Engine, request: Request, reply: Reply, ask: Ask, timeout_s: float):
        self._engine, self._request, self._reply, self._ask = engine, request, reply, ask
        self._timeout_s = timeout_s
        folders = request.pictures.reader.folders if request.pictures else ()
        self._told = partial(client_error, engine, folders=folders)

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Any]) -> None:
        """Answer, all at once or as server-sent events.

        Raises:
            ApiError: 429 if the queue is full, 503 if the engine has stopped; or the answer is an error, or is not done in time.
        """
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        self._deadline = loop.time() + self._timeout_s

        def emit(event: Event) -> None:
            # The loop is already closed if the process ends while requests are running.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        async def until_gone() -> None:  # after the body, `receive` only tells when the client disconnects
            while (await receive())["type"] != "http.disconnect":
                pass

        try:
            ticket = self._engine.submit(self._request, emit)
        except (QueueFull, Stopped) as error:
            raise self._told(error) from None
        self._gone = loop.create_task(until_gone())
        try:
            await (self._stream(send) if self._ask.stream else self._whole(send))
        except ClientGone:
            return
        finally:
            ticket.canceled.set()
            self._gone.cancel()

    async def _answer(self) -> AsyncIterator[Event]:
        """Yield the events up to the last one."""
        while True:
            event = await self._within_time(self._events.get())
            if event.error is not None:
                raise self._told(event.error)
            yield event
            if event.last:
                return

    async def _within_time(self, doing: Awaitable[Any]) -> Any:
        """Await an event, or a send, which a client can delay by not reading."""
        task = asyncio.ensure_future(doing)
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            await asyncio.wait({task, self._gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        if self._gone.done():
            raise ClientGone
        message = f"the answer took longer than {self._timeout_s:g} s; ask for fewer tokens"
        raise ApiError(504, message, "timeout")

    async def _whole(self, send: Callable[[Any], Any]) -> None:
        """Send the complete answer at once."""
        pieces, reports = [], []
        event: Any = None  # the last event, of which there is one at least
        async for event in self._answer():
            pieces.append(event.piece.text)
            reports += event.piece.reports
        content = json.dumps(self._reply.whole("".join(pieces), reports, event)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await self._within_time(send({"type": "http.response.start", "status": 200, "headers": headers}))
        await self._within_time(send({"type": "http.response.body", "body": content}))

    async def _stream(self, send: Callable[[Any], Any]) -> None:
        """Send the answer as server-sent events; an error before the first event is sent as an ordinary error."""
        opened = False
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]

        def body(content: str, more: bool = True) -> Any:
            return send({"type": "http.response.body", "body": f"data: {content}\n\n".encode(), "more_body": more})

        try:
            async for event in self._answer():
                if not opened:
                    await self._within_time(send({"type": "http.response.start", "status": 200, "headers": headers}))
                    opened = True
                await self._within_time(body(json.dumps(self._reply.chunk(event))))
                if event.usage and self._ask.include_usage:
                    await self._within_time(body(json.dumps(self._reply.usage_chunk(event.usage))))
        except ApiError as error:
            if not opened:
                raise
            # The status was already sent, so send the error as an event, unless the client does not read.
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(body(json.dumps(error.body()), more=False), timeout=1)
            return
        await self._within_time(body("[DONE]", more=False))


async def _as_json(request: HttpRequest, error: Any) -> Response:
    return error_response(error if isinstance(error, ApiError) else not_here(request, error))


# The chat page

FOLDER = Path(__file__).parent / "pages"
# Each stands in the page where a line names it.
SCRIPTS = (charts.COMMON / "markdown.js", FOLDER / "chat.js")


def policy(text: str) -> str:
    """Return a Content-Security-Policy that allows the page's own inline script and style, and nothing else."""
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(_hashes(text, "script")),
        "style-src": " ".join(_hashes(text, "style")),
        "connect-src": "'self'",
        "img-src": "data:",  # for the empty icon, without which browsers request one
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        # If the page ever used a model's text as markup, the browser would raise an error instead of running it.
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _hashes(text: str, tag: str) -> list[str]:
    inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in inside]


# Counters

# Paths with ids are counted under their prefix, so that clients cannot create new series.
KNOWN = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/adapters", "/health", "/metrics")


# Adapters

FIELDS = {"name", "path", "hub", "revision", "blend"}
MOST_OF_ID = 200  # characters of a hub id: its two names have at most 96 each


class Adapters:
    """The endpoints."""

    def __init__(self, engine: Engine, base_name: str, folder: Path | None, allow_hub: bool):
        """Prepare the endpoints.

        Args:
            engine: holds the adapters.
            base_name: the base's model id, which no adapter may have as its name.
            folder: its subfolders may be loaded; None: no folder may.
            allow_hub: whether adapters may be loaded from the hub.
        """
        self._engine, self._base_name, self._folder, self._allow_hub = engine, base_name, folder, allow_hub

    def routes(self) -> list[Route]:
        """Return their routes."""
        return [
            Route("/v1/adapters", self.listing, methods=["GET"]),
            Route("/v1/adapters", self.load, methods=["POST"]),
            Route("/v1/adapters/{name}", self.unload, methods=["DELETE"]),
        ]

    async def listing(self, request: HttpRequest) -> Response:
        """GET /v1/adapters."""
        store = self._engine.store
        data = [_described(card) for card in store.cards.values()]
        sizes = {"resident_bytes": store.nbytes, "budget_bytes": store.budget_bytes}
        return JSONResponse({"object": "list", "data": data, **sizes})

    async def load(self, request: HttpRequest) -> Response:
        """POST /v1/adapters: load a new adapter, or reload a known one."""
        body = read_fields(await request.body(), FIELDS)
        name = body.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == self._base_name:
            message = "name: must be at most 64 letters, digits, . _ or -, and not the base's name"
            raise ApiError(400, message, "invalid_value", "name")
        given = [key for key in ("path", "hub", "blend") if body.get(key) is not None]
        if len(given) > 1:
            raise ApiError(400, f"{' and '.join(given)}: give only one of them", "invalid_value")
        if not given:
            card = await self._run(lambda store: store.reload(name))
        else:
            source = await self._source(body, given[0])
            card = (await self._run(lambda store: store.add({name: source}), source.folder))[0]
        return JSONResponse(_described(card))

    async def unload(self, request: HttpRequest) -> Response:
        """DELETE /v1/adapters/NAME."""
        name = request.path_params["name"]
        await self._run(lambda store: store.remove(name))
        return JSONResponse({"name": name, "object": "adapter", "deleted": True})

    async def _run(self, function: Any, folder: Path | None = None) -> Any:
        """Run a function on the adapter store in the engine's thread."""
        try:
            return await asyncio.wrap_future(self._engine.call(function))
        except (UnknownAdapter, NoRoom, Stopped, InputError, OSError) as error:
            raise client_error(self._engine, error, [] if folder is None else [folder]) from None

    async def _source(self, body: dict[str, Any], kind: str) -> AdapterSource:
        if kind == "blend":
            blend = body["blend"]
            fits = isinstance(blend, dict) and 0 < len(blend) <= 16
            if not fits or not all(is_number(weight, -100, 100) for weight in blend.values()):
                message = 'blend: must be an object with 1 to 16 adapters, such as {"bard": 0.7, "tutor": 0.3}'
                raise ApiError(400, message, "invalid_value", "blend")
            return AdapterSource(blend={name: float(weight) for name, weight in blend.items()})
        if kind == "path":
            path, flag = body["path"], "--adapters-from"
            if self._folder is None:
                message = f"path: loading from this disk is off; start the server with {flag}"
                raise ApiError(403, message, "path_off", "path")
            if not isinstance(path, str) or not path or "\0" in path:
                raise ApiError(400, f"path: must be a folder below the server's {flag}", "invalid_value", "path")
            root = self._folder.resolve()
            try:
                folder = (root / path).resolve()
                found = folder.is_dir()
            except (OSError, RuntimeError):  # a name that is too long, or a circle of links
                folder, found = root / "missing", False
            if folder == root or not folder.is_relative_to(root):
                raise ApiError(403, f"path: outside the server's {flag}", "path_outside", "path")
            if not found:
                raise ApiError(404, "path: no such folder", "not_found", "path")
            return AdapterSource(folder=folder)
        if not self._allow_hub:
            raise ApiError(403, "hub: loading from the hub is off; start the server with --allow-hub", "hub_off", "hub")
        hub, revision = body["hub"], body.get("revision")
        is_id = isinstance(hub, str) and HUB_ID.fullmatch(hub) and len(hub) <= MOST_OF_ID and not Path(hub).exists()
        if not is_id or not isinstance(revision, (str, type(None))):
            raise ApiError(400, "hub: must be an id such as owner/name", "invalid_value", "hub")
        try:
            return AdapterSource(folder=await anyio.to_thread.run_sync(resolve_adapter, hub, revision))
        except (InputError, RunError, OSError) as error:
            raise ApiError(400, without_paths(str(error), self._engine), "invalid_adapter", "hub") from None


def _described(card: Card) -> dict[str, Any]:
    facts = {name: getattr(card, name) for name in ("name", "source", "method", "rank", "resident", "created")}
    own_template = card.chat_template is not None
    return {**facts, "object": "adapter", "bytes": card.nbytes, "own_chat_template": own_template}
