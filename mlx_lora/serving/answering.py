"""Send an answer from the engine's thread to one client, complete or as a stream, until either ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from mlx_lora.serving.adapter_store import NoRoom, UnknownAdapter
from mlx_lora.serving.asking import ApiError
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.replies import ChatReply, CompletionReply
from mlx_lora.serving.requests import Event, QueueFull, Request, Stopped
from mlx_lora.system.errors import InputError

Reply = ChatReply | CompletionReply
RETRY_AFTER_S = 1


class ClientGone(Exception):
    """The client has closed the connection."""


def api_error(error: Exception) -> ApiError:
    """Return the error that a client gets for an error of the engine."""
    if isinstance(error, UnknownAdapter):
        return ApiError(
            404, f"no model or adapter {str(error)!r}; GET /v1/models lists them", "model_not_found", "model"
        )
    if isinstance(error, QueueFull):
        return ApiError(429, f"{error}; try again later", "queue_full", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, NoRoom):
        return ApiError(503, f"{error}; try again later", "no_room", retry_after_s=RETRY_AFTER_S)
    if isinstance(error, Stopped):
        return ApiError(503, f"{error}", "shutting_down")
    if isinstance(error, (InputError, OSError)):
        return ApiError(400, " ".join(str(error).split()), "invalid_adapter")
    raise error


class Answer:
    """One request's events in the server's event loop; leaving it as a context frees the request's row."""

    def __init__(self, engine: Engine, request: Request, receive: Callable[[], Awaitable[Any]], timeout_s: float):
        """Submit the request.

        Args:
            engine: answers the request.
            request: the request.
            receive: ASGI's function; after the body it only tells when the client disconnects.
            timeout_s: for the whole answer.

        Raises:
            ApiError: 429 if the queue is full, 503 if the engine has stopped.
        """
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + timeout_s
        self._timeout_s = timeout_s
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        try:
            self._ticket = engine.submit(request, self._emit)
        except (QueueFull, Stopped) as error:
            raise api_error(error) from None
        self._gone = self._loop.create_task(_until_gone(receive))

    def _emit(self, event: Event) -> None:
        # The loop is already closed if the process ends while requests are running.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self._ticket.cancel()
        self._gone.cancel()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """Yield the events up to the last one.

        Raises:
            ClientGone: the client disconnected.
            ApiError: the answer is an error, or is not done in time.
        """
        while True:
            event = await self._within_time(self._events.get())
            if event.error is not None:
                raise api_error(event.error)
            yield event
            if event.last:
                return

    async def send(self, sending: Awaitable[None]) -> None:
        """Await a send within the answer's time limit, since a client can delay it by not reading."""
        await self._within_time(sending)

    async def _within_time(self, doing: Awaitable[Any]) -> Any:
        task = asyncio.ensure_future(doing)
        left = self._deadline - self._loop.time()
        try:
            await asyncio.wait({task, self._gone}, timeout=max(left, 0), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
        finally:
            task.cancel()
        if self._gone.done():
            raise ClientGone
        raise ApiError(504, f"the answer took longer than {self._timeout_s:g} s; ask for fewer tokens", "timeout")


async def _until_gone(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_whole(answer: Answer, reply: Reply, send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
    """Send the complete answer at once."""
    pieces, reports = [], []
    event: Any = None  # the last event, of which there is one at least
    async for event in answer:
        pieces.append(event.piece.text)
        reports += event.piece.reports
    content = json.dumps(reply.whole("".join(pieces), reports, event)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await answer.send(send({"type": "http.response.start", "status": 200, "headers": headers}))
    await answer.send(send({"type": "http.response.body", "body": content}))


async def send_stream(
    answer: Answer, reply: Reply, include_usage: bool, send: Callable[[dict[str, Any]], Awaitable[None]]
) -> None:
    """Send the answer as server-sent events; an error before the first event is sent as an ordinary error."""
    opened = False
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]

    async def send_event(content: str, more: bool = True) -> None:
        await answer.send(
            send({"type": "http.response.body", "body": f"data: {content}\n\n".encode(), "more_body": more})
        )

    try:
        async for event in answer:
            if not opened:
                await answer.send(send({"type": "http.response.start", "status": 200, "headers": headers}))
                opened = True
            await send_event(json.dumps(reply.chunk(event)))
            if event.usage and include_usage:
                await send_event(json.dumps(reply.usage_chunk(event.usage)))
    except ApiError as error:
        if not opened:
            raise
        # The status was already sent, so send the error as an event, unless the client does not read.
        content = f"data: {json.dumps(error.body())}\n\n".encode()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(send({"type": "http.response.body", "body": content}), timeout=1)
        return
    await send_event("[DONE]", more=False)
