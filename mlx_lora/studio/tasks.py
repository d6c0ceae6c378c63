"""Work that takes longer than an answer: downloads, conversions, exports, and data that is being read."""

from __future__ import annotations

import contextlib
import itertools
import os
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
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_lora.studio.run_folders import tail_lines
from mlx_lora.studio.web import events, in_page_words, json_route
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.http import ApiError
from mlx_lora.utils.text import MODULE

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
