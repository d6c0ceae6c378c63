"""The server's routes: OpenAI's completions, the models, health, metrics and the page.

Guard -> routes -> asking (checks the body) -> prompts (makes tokens) -> engine -> answering -> client
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from mlx_lora.serving.adapter_names import base_name
from mlx_lora.serving.adapter_store import Card
from mlx_lora.serving.answering import Answer, ClientGone, Reply, send_stream, send_whole
from mlx_lora.serving.asking import ApiError, Ask, read_chat, read_completion, read_json
from mlx_lora.serving.chat_page import page_route
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.metrics import metrics_text
from mlx_lora.serving.replies import ChatReply, CompletionReply
from mlx_lora.serving.request_guard import Guard, GuardLimits, send_error
from mlx_lora.serving.request_prompts import prompt_tokens
from mlx_lora.serving.requests import Request


@dataclass(frozen=True)
class AnswerLimits:
    """Limits for an answer.

    Attributes:
        max_tokens: the most new tokens.
        max_context: the most tokens of prompt and answer together.
        timeout_s: seconds until it must be complete.
    """

    max_tokens: int
    max_context: int
    timeout_s: float


class Completions:
    """The endpoints that generate, and those that list models."""

    def __init__(self, engine: Engine, limits: AnswerLimits, started_s: int):
        self._engine, self._limits = engine, limits
        self._base_name, self._started_s = base_name(engine.base), started_s
        self._one_at_a_time = anyio.CapacityLimiter(1)  # tokenizers are not thread-safe

    async def chat(self, request: HttpRequest) -> Answering:
        """POST /v1/chat/completions."""
        return await self._answer(read_chat(read_json(await request.body())), ChatReply)

    async def completion(self, request: HttpRequest) -> Answering:
        """POST /v1/completions."""
        return await self._answer(read_completion(read_json(await request.body())), CompletionReply)

    async def models(self, request: HttpRequest) -> Response:
        """GET /v1/models."""
        cards = self._engine.store.cards.values()
        return JSONResponse({"object": "list", "data": [self._model(None), *(self._model(card) for card in cards)]})

    async def model(self, request: HttpRequest) -> Response:
        """GET /v1/models/ID."""
        return JSONResponse(self._model(self._card(request.path_params["model"])))

    async def _answer(self, ask: Ask, make_reply: Callable[[str], Reply]) -> Answering:
        card = self._card(ask.model)
        tokens = await anyio.to_thread.run_sync(self._tokens, ask, card, limiter=self._one_at_a_time)
        request = Request(
            tokens=tokens,
            adapter=card.name if card else None,
            max_tokens=self._max_tokens(ask, len(tokens)),
            sampling=ask.sampling,
            stops=ask.stops,
            ignore_eos=ask.ignore_eos,
            continues=ask.messages is None,
        )
        return Answering(
            self._engine, request, make_reply(card.name if card else self._base_name), ask, self._limits.timeout_s
        )

    def _tokens(self, ask: Ask, card: Card | None) -> list[int]:
        template = card.chat_template if card else None
        return prompt_tokens(self._engine.base.hf_tokenizer, ask, template, self._engine.vocabulary)

    def _card(self, model: str | None) -> Card | None:
        """Return the adapter that a model id means, None for the base."""
        if model in (None, self._base_name):
            return None
        if model not in self._engine.store.cards:
            raise ApiError(404, f"no model {model!r}; GET /v1/models lists them", "model_not_found", "model")
        return self._engine.store.cards[model]

    def _max_tokens(self, ask: Ask, prompt: int) -> int:
        limits = self._limits
        if ask.max_tokens and ask.max_tokens > limits.max_tokens:
            message = f"max_tokens {ask.max_tokens}: this server allows at most {limits.max_tokens}"
            raise ApiError(400, message, "too_many_tokens", "max_tokens")
        room = limits.max_context - prompt
        if room < (ask.max_tokens or 1):
            message = (
                f"{prompt} tokens in the prompt and {ask.max_tokens or 1} new ones: the limit is {limits.max_context}"
            )
            raise ApiError(400, message, "context_length_exceeded", "messages")
        return ask.max_tokens or min(limits.max_tokens, room)

    def _model(self, card: Card | None) -> dict[str, Any]:
        model = {"id": card.name if card else self._base_name, "object": "model", "owned_by": "mlx_lora"}
        return {
            **model,
            "created": card.created if card else self._started_s,
            "parent": self._base_name if card else None,
        }


class Answering:
    """A response that the engine generates."""

    def __init__(self, engine: Engine, request: Request, reply: Reply, ask: Ask, timeout_s: float):
        self._engine, self._request, self._reply, self._ask = engine, request, reply, ask
        self._timeout_s = timeout_s

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Callable[[Any], Any]) -> None:
        """Answer as an ASGI application; if the client disconnects, its row is freed."""
        with Answer(self._engine, self._request, receive, self._timeout_s) as answer:
            try:
                if self._ask.stream:
                    await send_stream(answer, self._reply, self._ask.include_usage, send)
                else:
                    await send_whole(answer, self._reply, send)
            except ClientGone:
                return


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
        more_routes: routes besides those of this file.
    """
    completions, answers = Completions(engine, limits, started_s), Counter()

    async def health(request: HttpRequest) -> Response:
        alive = engine.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def metrics(request: HttpRequest) -> Response:
        return PlainTextResponse(metrics_text(engine, answers), media_type="text/plain; version=0.0.4")

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
    return Starlette(
        routes=[
            page_route(),
            Route("/v1/chat/completions", completions.chat, methods=["POST"]),
            Route("/v1/completions", completions.completion, methods=["POST"]),
            Route("/v1/models", completions.models),
            Route("/v1/models/{model:path}", completions.model),
            Route("/health", health),
            Route("/metrics", metrics),
            *more_routes,
        ],
        middleware=[*([cors] if guard.origins else []), Middleware(Guard, limits=guard, answers=answers)],
        exception_handlers={ApiError: _as_json, HTTPException: _not_here},
        lifespan=lifespan,
    )


class _ErrorResponse(Response):
    """An ApiError as a response."""

    def __init__(self, error: ApiError):
        super().__init__(status_code=error.status)
        self._error = error

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send_error(send, self._error)


async def _as_json(request: HttpRequest, error: Any) -> Response:
    return _ErrorResponse(error)


async def _not_here(request: HttpRequest, error: Any) -> Response:
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return _ErrorResponse(ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code))
