"""The studio's answers: JSON routes whose work runs in a thread, event streams, the headers of every answer, and the page's words.

What the settings say in the command's words, the page says in its own: labels instead of flags, and all settings in groups. The
command shown on the page keeps its flags, and so does anything between backticks.

Work that takes longer than an answer: downloads, conversions, exports, and data that is being read.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import BaseRoute, Route

from mlx_lora.config.fields import field_type, flag_of
from mlx_lora.config.objectives import OBJECTIVES
from mlx_lora.config.settings import FIELDS, ROWS
from mlx_lora.utils.console import finite_values, printable
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.guard import App, Message, Receive, Send, not_here
from mlx_lora.utils.http import ApiError, read_json
from mlx_lora.utils.text import MODULE

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
    for name, of in FIELDS.items():
        row = ROWS[name]
        if name in OWN:
            continue
        low = row.more_than if row.at_least is None else row.at_least
        bounds = None if low is None else [low, None if row.at_most >= UNBOUNDED else row.at_most]
        choices = tuple(OBJECTIVES) if name == "objective" else row.choices
        groups.setdefault(row.group, []).append({
            "name": name, "label": label_of(name), "flag": flag_of(name), "type": "choice" if choices else TYPES[field_type(of)],
            "default": of.default, "choices": choices, "range": bounds, "exclusive": row.more_than is not None,
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


def tail_lines(path: Path, size: int, most: int | None = None, end: int | None = None) -> list[str]:
    """Return the last whole lines of a text file, from at most `size` bytes before position `end`; none without a file."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, 2) if end is None else end
            start = max(0, end - size)
            file.seek(start)
            text = file.read(end - start).decode("utf-8", "replace")
    except OSError:
        return []
    lines = text.splitlines()
    lines = lines[1:] if start and len(lines) > 1 else lines
    return lines[-most:] if most else lines


KEPT = 50  # finished tasks that are still listed
POLL_S = 0.3
TERMINATE_S = 5.0
SWEEP = "sweep"  # the kind of a task that trains
PUBLIC = ("id", "kind", "title", "state", "done", "total", "unit", "message", "result")


class Cancelled(Exception):
    """The task is no longer wanted."""


@dataclass(eq=False)
class BackgroundTask:
    """A piece of work.

    Attributes:
        kind: download, convert, export, data, plan, forgetting, evaluation or sweep.
        title: what the page shows.
        state: running, done, failed or cancelled.
        done, total, unit: how far it is; None: not known.
        message: the last line about it.
        result: what the work found, for the page.
        key: what tells this work from other work; see `Tasks.begin`.
        wanted: cleared when it is cancelled.
    """

    id: str
    kind: str
    title: str
    state: str = "running"
    done: float = 0
    total: float | None = None
    unit: str = ""
    message: str = ""
    result: Any = None
    started: float = field(default_factory=time.monotonic)
    version: int = 0
    key: str | None = None
    wanted: threading.Event = field(default_factory=threading.Event)

    def public(self) -> dict[str, Any]:
        """Return what the page sees, with about how long it still takes, by its speed so far."""
        spent, left = time.monotonic() - self.started, None
        if self.state == "running" and self.total and self.done and spent >= 1:
            left = spent / self.done * max(0.0, self.total - self.done)
        shown = {name: getattr(self, name) for name in PUBLIC}
        return {**shown, "seconds_left": left, "message": in_page_words(self.message)}


class Tasks:
    """All tasks of a studio, and their routes."""

    def __init__(self, logs: Path):
        """Take the folder for the output of child processes."""
        self._tasks: dict[str, BackgroundTask] = {}
        self._lock, self._versions, self._logs = threading.Lock(), itertools.count(1), logs
        self.ended = 0  # tasks since the server began

    def routes(self) -> list[BaseRoute]:
        """Return their routes."""
        return [
            json_route("/api/tasks", lambda request, body: {"tasks": self.listed()}),
            Route("/api/tasks/events", self.events, methods=["GET"]),
            json_route("/api/tasks/{id}/cancel", self.cancel, "POST"),
        ]

    @property
    def running(self) -> int:
        """How many go on."""
        return sum(task.state == "running" for task in list(self._tasks.values()))

    def listed(self) -> list[dict[str, Any]]:
        """Return all tasks, the newest first."""
        return [task.public() for task in reversed(list(self._tasks.values()))]

    async def events(self, request: Request) -> Response:
        """GET /api/tasks/events: the state of each task now, and after every change."""

        async def lines() -> AsyncIterator[dict[str, Any] | None]:
            seen = 0
            while True:
                changed = [task for task in list(self._tasks.values()) if task.version > seen]
                seen = max([seen, *(task.version for task in changed)])
                for task in changed:
                    yield task.public()
                yield None
                await anyio.sleep(POLL_S)

        return events(request, lines())

    def cancel(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/tasks/ID/cancel."""
        task = self._tasks.get(request.path_params["id"])
        if task is None:
            raise ApiError(404, "no such task; reload the list", "not_found")
        task.wanted.clear()
        return {"task": task.public()}

    def change(self, task: BackgroundTask, **values: Any) -> None:
        """Change a task, so that its listeners hear of it."""
        with self._lock:
            for name, value in values.items():
                setattr(task, name, value)
            task.version = next(self._versions)

    def begin(
        self, kind: str, title: str, work: Callable[[BackgroundTask], Any], unit: str = "", key: str | None = None
    ) -> BackgroundTask:
        """Do work in a thread.

        Args:
            kind, title, unit: of the task.
            work: takes the task, and returns its result; raises Cancelled when the task is no longer wanted.
            key: of the work; while a task of the same key runs, it is returned and no other begins.
        """
        task = BackgroundTask(secrets.token_hex(6), kind, title, unit=unit, key=key)
        task.wanted.set()
        with self._lock:
            same = [one for one in self._tasks.values() if key and one.key == key and one.state == "running"]
            if same:
                return same[0]
            finished = [one.id for one in self._tasks.values() if one.state != "running"]
            for number in finished[: max(0, len(finished) - KEPT)]:
                del self._tasks[number]
            self._tasks[task.id] = task
            task.version = next(self._versions)

        def run() -> None:
            try:
                result = work(task)
                with self._lock:
                    self.ended += 1
                self.change(task, result=result, state="done")
            except Cancelled:
                self.change(task, state="cancelled", message="Cancelled.")
            except (InputError, RunError, ApiError, OSError) as error:
                self.change(task, state="failed", message=" ".join(str(error).split()))
            except BaseException as error:
                self.change(task, state="failed", message=f"{type(error).__name__}: {error}")
                raise

        threading.Thread(target=run, name=f"mlx-lora-{kind}", daemon=True).start()
        return task

    def child(
        self,
        kind: str,
        title: str,
        words: list[str],
        result: Any,
        watch: Callable[[BackgroundTask], None] = lambda task: None,
        cwd: str | None = None,
    ) -> BackgroundTask:
        """Run one of this program's commands as a child process, whose last line of output is the task's message.

        Args:
            kind, title: of the task.
            words: the command's name, or a module below this package (`studio.model_stores`), and its arguments.
            result: of the task, if the command succeeds.
            watch: called from time to time, to tell how far it is.
            cwd: the folder that relative names start from; None: the studio's own.
        """

        def work(task: BackgroundTask) -> Any:
            log = self._logs / f"{kind}-{task.id}.log"
            self.run_child(task, words, log, watch, cwd=cwd)
            log.unlink(missing_ok=True)
            return result

        return self.begin(kind, title, work)

    def run_child(
        self,
        task: BackgroundTask,
        words: list[str],
        log: Path,
        watch: Callable[[BackgroundTask], None] = lambda task: None,
        output: Path | None = None,
        cwd: str | None = None,
    ) -> None:
        """Run a command for a task until it ends; `log`, `output` and `cwd` are those of `start_child`.

        Raises:
            Cancelled: the task is no longer wanted.
            RunError: the command failed.
        """
        child = start_child(words, log, result=output, cwd=cwd)
        while child.poll() is None:
            if not task.wanted.is_set():
                child.send_signal(signal.SIGTERM)
                try:
                    child.wait(TERMINATE_S)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
                raise Cancelled
            watch(task)
            line = last_line(log)
            if line and line != task.message:
                self.change(task, message=line)
            time.sleep(POLL_S)
        line, code = last_line(log), child.returncode
        if code < 0:
            raise RunError(f"ended by {signal.Signals(-code).name}; start it again")
        if code:
            raise RunError(
                line.removeprefix("Error: ") or f"ended with code {code}; run the command in a terminal to see why"
            )
        self.change(task, message=line)


def last_line(log: Path) -> str:
    """Return the last line of a text file that is not empty."""
    return next((line.strip() for line in reversed(tail_lines(log, 4096)) if line.strip()), "")


def start_child(
    words: list[str], log: Path, append: bool = False, result: Path | None = None, cwd: str | None = None
) -> subprocess.Popen:
    """Start a command in a session of its own, with its output in a file.

    Args:
        words: the command's name, or a module below this package (`studio.model_stores`), and its arguments.
        log: where its output goes.
        append: keep what the file has.
        result: where its standard output goes, apart from the rest; None: into the log too.
        cwd: the folder that its relative names start from, if it is still there; None: the studio's own.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    first, *rest = words
    with contextlib.ExitStack() as files:
        output = files.enter_context(log.open("ab" if append else "wb"))
        return subprocess.Popen(
            [sys.executable, "-m", *([f"{MODULE}.{first}"] if "." in first else [MODULE, first]), *rest],
            stdin=subprocess.DEVNULL,
            stdout=files.enter_context(result.open("wb")) if result else output,
            stderr=output,
            start_new_session=True,
            cwd=cwd if cwd and os.path.isdir(cwd) else None,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
