"""Check requests before they reach the server's routes: API key, origin, size and speed.

Every program on this machine can reach a server on its local address, and, through the browser, so can every web page.
So requests from pages of other origins are refused, and so are host names other than this machine's (DNS rebinding).
Bodies must be declared as JSON, which a page of another origin cannot send without permission.

Connections whose client does not send a request's head in time are closed. uvicorn closes idle connections, but a client that
sends a byte from time to time could keep one open forever.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
import uvicorn
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_lora.utils import console
from mlx_lora.utils.http import ApiError, is_local, listen

SHUTDOWN_S = 5  # for unfinished answers when the server is asked to end
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
PAGE = "/"
# Paths without an API key: health only tells whether the server works, and monitoring has no key; the page has no
# secrets, and asks the user for the key.
OPEN_PATHS = ("/health", PAGE)
# What a Host header may have: a name or an address, and a port. HTTP/1.0 has none.
HOST = re.compile(r"([a-z0-9._-]*|\[[0-9a-f]*:[0-9a-f:.]*\])(:[0-9]*)?", re.IGNORECASE)


@dataclass(frozen=True)
class GuardLimits:
    """Limits for requests.

    Attributes:
        api_key: the key that clients must send; None: no key is required.
        local: only accept requests to this machine's local names.
        origins: other origins whose pages are allowed.
        max_body_bytes: the largest body.
        read_timeout_s: the time within which a body must arrive.
        open_folder: paths that begin so need no key either, such as a page's files; None: there are none.
        streamed: paths whose body is a file of any size, which their route reads, and limits, itself.
        key_header: another header that may have the key, in lower case; None: there is none.
        binary: paths whose body is a protocol buffer instead of JSON.
        larger: paths whose body may be larger, and how large.
    """

    api_key: str | None
    local: bool
    origins: tuple[str, ...] = ()
    max_body_bytes: int = 10**6
    read_timeout_s: float = 10.0
    open_folder: str | None = None
    streamed: tuple[str, ...] = ()
    key_header: str | None = None
    binary: tuple[str, ...] = ()
    larger: Mapping[str, int] = field(default_factory=dict)


class Guard:
    """ASGI middleware that checks requests and counts answers by path and status."""

    def __init__(self, app: App, limits: GuardLimits, answers: Counter[tuple[str, int]], known: Sequence[str] = ()):
        """Prepare.

        Args:
            app: gets the requests.
            limits: of requests.
            answers: counts them by path and status.
            known: beginnings of paths that are counted as these; all others are "other", so that clients cannot fill memory.
        """
        self._app, self._limits, self._answers, self._known = app, limits, answers, known

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on with its complete body."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = next((known for known in self._known if scope["path"].startswith(known)), "other")
                self._answers[path, message["status"]] += 1
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        try:
            self._check(scope, headers)
            streamed = scope["path"] in self._limits.streamed
            body = None if streamed else await self._body(scope["path"], headers, receive)
        except ApiError as error:
            await error_response(error, close=True)(scope, receive, counted)
            return
        given = body is None

        async def replay() -> Message:
            """Return the body in one message, and then the connection's messages."""
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, counted)

    def _check(self, scope: MutableMapping[str, Any], headers: dict[str, str]) -> None:
        """Check the head of a request.

        Raises:
            ApiError: 403 for another host or origin, 401 for a missing or wrong key, 415 if the body is not JSON.
        """
        host = headers.get("host", "")
        named = HOST.fullmatch(host)
        if named is None or (self._limits.local and not is_local(named[1])):
            raise ApiError(403, f"Host {host!r} is not this machine; use 127.0.0.1 or localhost", "wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}", *self._limits.origins):
            raise ApiError(403, f"pages of {origin} may not use this server; see --allow-origin", "cross_origin")
        # A request for an image or a script has no Origin, but browsers send Sec-Fetch-Site. A link to the chat page is
        # allowed: it opens as a separate document, which the other page cannot read.
        linked = (scope["method"], scope["path"], headers.get("sec-fetch-dest")) == ("GET", PAGE, "document")
        if origin is None and not linked and headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
            raise ApiError(403, "other sites' pages may not use this server; see --allow-origin", "cross_origin")
        folder = self._limits.open_folder
        is_open = scope["path"] in OPEN_PATHS or (folder is not None and scope["path"].startswith(folder))
        if self._limits.api_key and not is_open and scope["method"] != "OPTIONS":
            kind, _, key = headers.get("authorization", "").partition(" ")
            if self._limits.key_header is not None and self._limits.key_header in headers:
                kind, key = "bearer", headers[self._limits.key_header]
            if kind.lower() != "bearer" or not hmac.compare_digest(key.strip().encode(), self._limits.api_key.encode()):
                raise ApiError(401, "missing or wrong API key; send Authorization: Bearer KEY", "invalid_api_key")
        # None of them can be sent by a page of another origin without permission.
        kind = "application/octet-stream" if scope["path"] in self._limits.streamed else "application/json"
        kind = "application/x-protobuf" if scope["path"] in self._limits.binary else kind
        if scope["method"] in ("POST", "PUT") and headers.get("content-type", "").split(";")[0].strip() != kind:
            raise ApiError(415, f"the body's Content-Type must be {kind}", "unsupported_media_type")

    async def _body(self, path: str, headers: dict[str, str], receive: Receive) -> bytes:
        """Return the complete body.

        Raises:
            ApiError: 413 if it is too large, 408 if it is too slow, 400 if the client disconnects.
        """
        most = self._limits.larger.get(path, self._limits.max_body_bytes)
        too_large = ApiError(413, f"the body is larger than {most} bytes; send less", "body_too_large")
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise too_large
        body = bytearray()
        with anyio.move_on_after(self._limits.read_timeout_s) as timer:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the client closed the connection", "disconnected")
                body += message.get("body", b"")
                if len(body) > most:
                    raise too_large
                if not message.get("more_body", False):
                    break
        if timer.cancelled_caught:
            wait = f"{self._limits.read_timeout_s:g}"
            raise ApiError(408, f"the body did not arrive within {wait} s; send it at once", "request_timeout")
        return bytes(body)


def error_response(error: ApiError, close: bool = False) -> Response:
    """Return an error as the whole answer.

    Args:
        error: has the status and body.
        close: end the connection, because the rest of the request's body is not read.
    """
    headers = {"connection": "close"} if close else {}
    headers |= {"www-authenticate": "Bearer"} if error.status == 401 else {}
    headers |= {"retry-after": str(error.retry_after_s)} if error.retry_after_s else {}
    return Response(json.dumps(error.body()), error.status, headers, "application/json")


def not_here(request: Request, error: HTTPException) -> ApiError:
    """Return the error of a request that no route takes."""
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    return ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}", code)


# Connections


def timed_protocol(head_timeout_s: float) -> type[H11Protocol]:
    """Return uvicorn's HTTP protocol with a limit on how long a request's head may take.

    Args:
        head_timeout_s: counted from the connection, or from the first byte after the previous answer.
    """

    class TimedProtocol(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            super().connection_lost(exc)

        def _has_request(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _watch(self) -> None:
            """Let the timer run while there is no request."""
            if self._timer is not None and self._has_request():
                self._timer.cancel()
                self._timer = None
            elif self._timer is None and not self._has_request():
                self._timer = self.loop.call_later(head_timeout_s, self._expire)

        def _expire(self) -> None:
            self._timer = None
            if not self._has_request():
                self.transport.close()

    return TimedProtocol


def serve_engine(
    app: Any, address: tuple[str, int], engine: Any, head_timeout_s: float, connections: int, words: str
) -> None:
    """Serve an application until interrupted, or until what computes its answers fails.

    Args:
        app, address, head_timeout_s, connections: as for `run_app`.
        engine: what computes, a `ModelThread`.
        words: what the address, {address}, is for.

    Raises:
        InputError: the address is not available.
        RunError: the engine has failed.
    """

    def ready(server: uvicorn.Server, address: str) -> None:
        use = words.replace("{address}", address)
        console.echo(f"ready  {address} ({use}; Ctrl-C stops the server)")
        engine.on_failure = lambda: setattr(server, "should_exit", True)

    run_app(app, address, ready, head_timeout_s, SHUTDOWN_S, connections)
    if engine.failure is not None:
        raise engine.failed()
    console.echo("ended")


def run_app(
    app: Any,
    address: tuple[str, int],
    ready: Callable[[uvicorn.Server, str], None],
    head_timeout_s: float,
    shutdown_s: int,
    connections: int,
) -> None:
    """Serve an application until interrupted.

    Args:
        app: the application.
        address: host and port.
        ready: is told the server and its URL before the first request.
        head_timeout_s: seconds for a request's head.
        shutdown_s: seconds for unfinished answers at its end.
        connections: the most at a time.

    Raises:
        InputError: the address is not available.
    """
    config = uvicorn.Config(
        app, http=timed_protocol(head_timeout_s), ws="none", log_level="warning", access_log=False,
        server_header=False, timeout_keep_alive=5, timeout_graceful_shutdown=shutdown_s,
        limit_concurrency=connections,
    )  # fmt: skip
    opened, url = listen(*address)
    server = uvicorn.Server(config)
    # uvicorn raises the signal that ended it again; for a server this is the normal end.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    ready(server, url)
    with opened, contextlib.suppress(KeyboardInterrupt):
        server.run([opened])
