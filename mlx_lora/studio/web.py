"""The studio's answers: JSON routes whose work runs in a thread, event streams, the headers of every answer, and the page's words.

What the settings say in the command's words, the page says in its own: labels instead of flags, and all settings in groups. The
command shown on the page keeps its flags, and so does anything between backticks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mlx_lora.config.fields import field_type, flag_of
from mlx_lora.config.settings import FIELDS, ROWS
from mlx_lora.objectives.table import OBJECTIVES
from mlx_lora.utils.console import finite_values, printable
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.guard import App, Message, Receive, Send, not_here
from mlx_lora.utils.http import ApiError, is_number, read_json

# The page's words

# Labels that are not simply the setting's name.
LABELS = {
    "iters": "Steps",
    "epochs": "Passes over the data",
    "lr_schedule": "Learning rate schedule",
    "max_seq_length": "Longest row, in tokens",
    "mask_prompt": "Train on answers only",
    "batch_size": "Rows per micro-batch",
    "batch_tokens": "Tokens per micro-batch",
    "grad_accumulation_steps": "Micro-batches per step",
    "max_grad_norm": "Largest gradient norm",
    "num_layers": "Adapted blocks, from the last",
    "val_batches": "Batches per validation",
    "valid_fraction": "Share of rows held out",
    "ask": "Test questions of your own",
    "prompt_column": "Column of the prompt",
    "completion_column": "Column of the answer",
    "system_column": "Column of a system prompt",
    "chat_column": "Column of a chat",
    "text_column": "Column of plain text",
    "speaker": "Speaker to learn from",
    "temp": "Sampling temperature",
    "resume_adapter_file": "Start from adapter",
    "loraplus_lr_ratio": "LoRA+ learning rate ratio",
    "cpo_alpha": "CPO alpha",
    "simpo_gamma": "SimPO gamma",
    "kl_beta": "KL beta",
    "jsd_beta": "JSD beta",
    "grpo_loss": "GRPO loss",
}
# Help whose own words read badly where there are no flags.
HELP = {
    "iters": "Number of optimizer steps, instead of passes over the data.",
    "mask_prompt": "Train on the assistant's turns. Off: on every token, prompts too.",
    "memory_check": "Refuse a run that does not fit by the plan. Off: try it anyway.",
}
_ONLY_THERE = re.compile(r"[;,]? ?\(?(?:also |as )?the flag without a value\)?(?=[,);])|, as convert --bits does")
_FLAG = re.compile(r"`[^`]*`|(?<![\w-])--(no-)?([a-z][a-z0-9]*(?:-[a-z0-9]+)*)(?![\w-])")
# What the studio decides itself: where a run goes, and whether it continues one.
OWN = frozenset(("adapter_path", "resume", "force", "train", "trust_remote_code"))
TYPES = {str: "text", int: "int", float: "float", bool: "bool"}
UNBOUNDED = 10**12  # the upper bound of a setting without one


def label_of(name: str) -> str:
    """Return what the page calls a setting."""
    return LABELS.get(name) or name.replace("_", " ").capitalize()


def in_page_words(text: str) -> str:
    """Return a message with fields instead of the flags of settings; other flags stay.

    “Steps” and “Passes over the data”: both given; keep one
    """

    def said(found: re.Match[str]) -> str:
        name = (found[2] or "").replace("-", "_")
        if name not in FIELDS:
            return found[0]
        return f"“{label_of(name)}”{' off' if found[1] else ''}"

    return _FLAG.sub(said, text)


def fields_in(text: str) -> list[str]:
    """Return the settings whose flags a message names, each once, in its order."""
    names = [found[2].replace("-", "_") for found in _FLAG.finditer(text) if found[2]]
    return [name for name in dict.fromkeys(names) if name in FIELDS and f"--{name}".replace("_", "-") == flag_of(name)]


def setting_groups() -> list[dict[str, Any]]:
    """Return every setting that the page may offer, in the groups of --help-all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, field in FIELDS.items():
        row = ROWS[name]
        if name in OWN:
            continue
        low = row.more_than if row.at_least is None else row.at_least
        bounds = None if low is None else [low, None if row.at_most >= UNBOUNDED else row.at_most]
        choices = tuple(OBJECTIVES) if name == "objective" else row.choices
        groups.setdefault(row.group, []).append({
            "name": name, "label": label_of(name), "flag": flag_of(name), "type": "choice" if choices else TYPES[field_type(field)],
            "default": field.default, "choices": choices, "range": bounds, "exclusive": row.more_than is not None,
            "help": HELP.get(name) or in_page_words(_ONLY_THERE.sub("", row.help)), "common": row.common, "method": row.method, "objectives": row.only or None,
            "word": row.word,
        })  # fmt: skip
    return [{"name": name, "settings": settings} for name, settings in groups.items()]


# Routes

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
        return JSONResponse(finite_values(await anyio.to_thread.run_sync(handler, request, body)))

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
                yield b"data: " + json.dumps(finite_values(line)).encode() + b"\n\n"
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
        error = not_here(request, error)
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
    if not is_number(value, least, most, whole=True):
        raise ApiError(400, f"{field}: must be a whole number from {least} to {most}", "invalid_value", field)
    return value
