"""The studio's answers: JSON routes whose work runs in a thread, event streams, and the headers of every answer."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlx_lora.serving.guard import App, Message, Receive, Send
from mlx_lora.serving.schema import ApiError, read_json
from mlx_lora.studio.page_words import in_page_words
from mlx_lora.utils.console import printable
from mlx_lora.utils.errors import InputError, RunError

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
ALIVE_S = 15.0  # between signs of life of a stream
Handler = Callable[[Request, dict[str, Any]], Any]


class SafeHeaders:
    """ASGI middleware: every answer, errors of the guard included, tells the browser what its page may do."""

    def __init__(self, app: App):
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = {b"cache-control", *(name for name, _ in HEADERS)}
                kept = [pair for pair in message.get("headers", []) if pair[0].lower() not in own]
                # The page's own files are asked for again each time, and come again only if they changed.
                kept_by = b"no-cache" if scope["path"].startswith("/static/") else b"no-store"
                message = {**message, "headers": [*kept, *HEADERS, (b"cache-control", kept_by)]}
            await send(message)

        await self._app(scope, receive, with_headers)


def json_route(path: str, handler: Handler, method: str = "GET") -> Route:
    """Return a route that answers with JSON.

    Args:
        path: with Starlette's parameters.
        handler: takes the request and its JSON body (empty without one); runs in a thread; returns what is sent.
        method: of HTTP.
    """

    async def endpoint(request: Request) -> Response:
        raw = await request.body()
        body = read_json(raw) if method != "GET" and raw else {}
        return JSONResponse(await anyio.to_thread.run_sync(handler, request, body))

    return Route(path, endpoint, methods=[method])


def events(request: Request, lines: AsyncIterator[dict[str, Any] | None]) -> StreamingResponse:
    """Return server-sent events until the server is asked to end.

    Args:
        request: what is answered.
        lines: the objects; None from time to time where there are none, so that this can end.
    """

    async def encoded() -> AsyncIterator[bytes]:
        told_s = time.monotonic()
        async for line in lines:
            if request.app.state.ending():
                return
            if line is not None:
                yield b"data: " + json.dumps(line).encode() + b"\n\n"
            elif time.monotonic() - told_s < ALIVE_S:
                continue
            else:
                yield b": alive\n\n"  # a lost client is noticed
            told_s = time.monotonic()

    return StreamingResponse(encoded(), media_type="text/event-stream")


async def told(request: Request, error: Any) -> Response:
    """Return an error as JSON: one line that says what was asked, what was found, and what to do."""
    if isinstance(error, InputError):
        error = ApiError(400, str(error), "invalid_request")
    elif isinstance(error, RunError):
        error = ApiError(500, str(error), "failed")
    elif isinstance(error, HTTPException):
        code = "method_not_allowed" if error.status_code == 405 else "not_found"
        error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code)
    body = error.body()
    body["error"]["message"] = in_page_words(printable(str(error)))
    return JSONResponse(body, error.status)


def text_of(body: dict[str, Any], field: str, most: int = 4096) -> str:
    """Return a text of a request's body.

    Raises:
        ApiError: 400, it is missing, or no text, or too long.
    """
    value = body.get(field)
    if not isinstance(value, str) or not value.strip() or len(value) > most or "\0" in value:
        raise ApiError(400, f"{field}: must be text of 1 to {most} characters", "invalid_value", field)
    return value


def whole_number(value: Any, field: str, least: int, most: int, default: int) -> int:
    """Return a whole number of a request.

    Raises:
        ApiError: 400, it is none, or out of range.
    """
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ApiError(400, f"{field}: must be a whole number from {least} to {most}", "invalid_value", field)
    return value
