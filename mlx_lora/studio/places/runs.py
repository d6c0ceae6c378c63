"""The Runs place: list, details, events, pause, notes, delete, the queue, and what is measured of a finished run."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_lora.reports.run_report import ANSWERS_FILE, FACTS_FILE, read_facts
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.control import RunControl
from mlx_lora.studio.places import Studio
from mlx_lora.studio.run_folders import (
    COLOR,
    FACTS,
    LOG_FILE,
    METRICS,
    TAIL_BYTES,
    RunListing,
    Tail,
    parsed,
    read_started,
    samples_of,
    stamp,
    state_of,
    words_of_asking,
    words_of_measuring,
)
from mlx_lora.studio.tasks import BackgroundTask, Cancelled, Tasks, ended_words, last_line, start_child
from mlx_lora.studio.web import events, json_route, text_of, whole_number
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.text import command_line

POLL_S = 0.5
PART, LOG = "studio/forgetting.part", "studio/forgetting.log"  # in a run's folder, while it is measured
MOST_LINES = 200  # of a log, in one event


def routes(studio: Studio) -> list[BaseRoute]:
    """Return the routes of runs, the queue, and what is measured of a run."""
    listing, control, tasks = studio.listing, studio.control, studio.tasks
    return [
        *RunRoutes(listing, control).routes(),
        *ForgettingRoutes(listing, tasks).routes(),
        *EvaluationRoutes(listing, studio.checker.data, tasks).routes(),
    ]


class RunRoutes:
    """The runs and the queue."""

    def __init__(self, listing: RunListing, control: RunControl):
        self._listing, self._control = listing, control

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        control = self._control
        return [
            json_route("/api/queue", lambda request, body: {"queue": control.queued()}),
            json_route("/api/queue/move", self.move, "POST"),
            json_route("/api/queue/remove", self.remove, "POST"),
            json_route("/api/runs", lambda request, body: {"runs": self._listing.listed(control.queue)}),
            json_route("/api/runs/{id}", self.detail),
            Route("/api/runs/{id}/events", self.events, methods=["GET"]),
            json_route("/api/runs/{id}/pause", partial(self.end, "pause"), "POST"),
            json_route("/api/runs/{id}/stop", partial(self.end, "stop"), "POST"),
            json_route("/api/runs/{id}/resume", self.resume, "POST"),
            json_route("/api/runs/{id}/notes", self.note, "PUT"),
            json_route("/api/runs/{id}", self.delete, "DELETE"),
            json_route("/api/adapters", lambda request, body: {"adapters": self._listing.adapters()}),
        ]

    def _line(self, number: str) -> dict[str, Any]:
        queued = number in self._control.queue
        return {"run": self._listing.summary(self._listing.folder(number), queued)}

    def move(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/queue/move."""
        self._control.move(text_of(body, "run"), whole_number(body.get("to"), "to", 0, 10**6, 0))
        return {"queue": self._control.queued()}

    def remove(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/queue/remove."""
        self._control.remove(text_of(body, "run"))
        return {"queue": self._control.queued()}

    def detail(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """GET /api/runs/ID."""
        number = request.path_params["id"]
        return self._listing.detail(number, number in self._control.queue)

    def end(self, how: str, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/runs/ID/pause or stop."""
        self._control.ask_to_end(request.path_params["id"], how)
        return self._line(request.path_params["id"])

    def resume(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/runs/ID/resume."""
        self._control.resume(request.path_params["id"])
        return self._line(request.path_params["id"])

    def note(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """PUT /api/runs/ID/notes."""
        self._control.note(request.path_params["id"], body.get("text"))
        return {"saved": True}

    def delete(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """DELETE /api/runs/ID."""
        self._control.delete(request.path_params["id"], body.get("confirm"))
        return {"deleted": True}

    async def events(self, request: Request) -> Response:
        """GET /api/runs/ID/events: new metrics, lines of the log, texts and states, as the run's files grow."""
        folder = await anyio.to_thread.run_sync(self._listing.folder, request.path_params["id"])
        news = RunNews(folder, lambda: self._line(request.path_params["id"])["run"])
        after = request.query_params.get("after", "")
        earlier = news.since(int(after)) if after.isdecimal() and len(after) < 16 else []

        async def lines() -> AsyncIterator[dict[str, Any] | None]:
            for one in earlier:
                yield one
            while True:
                try:
                    found = await anyio.to_thread.run_sync(news.read)
                except ApiError:
                    yield {"type": "gone"}
                    return
                for one in found:
                    yield one
                yield None
                await anyio.sleep(POLL_S)

        return events(request, lines())


class RunNews:
    """What is new about a run since the last look; holds positions in files, and no content."""

    def __init__(self, folder: Path, line: Any):
        self._folder, self._line = folder, line
        self._metrics, self._log = Tail(folder / METRICS), Tail(folder / LOG_FILE)
        self._state: Any = None
        self._texts: Any = None

    def since(self, step: int) -> list[dict[str, Any]]:
        """Return the metrics from a step on that were there before this object, for who has read those up to it.

        Rows of the step itself are among them: a validation comes as a second row of a step. The page joins rows of a step.
        """
        found = [parsed(text) for text in self._metrics.earlier_lines(TAIL_BYTES)]
        return [{"type": "metrics", "metrics": one} for one in found if one is not None and one["step"] >= step]

    def read(self) -> list[dict[str, Any]]:
        """Return the news.

        Raises:
            ApiError: the run was removed.
        """
        found: list[dict[str, Any]] = []
        for text in self._metrics.new_lines():
            if (record := parsed(text)) is not None:
                found.append({"type": "metrics", "metrics": record})
        said = self._log.new_lines()[-MOST_LINES:]
        if said:
            found.append({"type": "log", "lines": [COLOR.sub("", one.rpartition("\r")[2])[:2000] for one in said]})
        started = read_started(self._folder)
        state = (*state_of(self._folder, started), started.asked if started else None)
        if state != self._state or any(one["type"] == "metrics" for one in found):
            found.append({"type": "state", **self._line()})
            self._state = state
        texts = [stamp(self._folder / name) for name in (FACTS_FILE, ANSWERS_FILE)]
        if texts != self._texts:
            if self._texts is not None:
                samples = samples_of(self._folder, read_facts(self._folder), self._line()["step"])
                found.append({"type": "sample", "samples": samples})
            self._texts = texts
        return found


class ForgettingRoutes:
    """POST /api/runs/ID/forgetting measures it, as a task."""

    def __init__(self, listing: RunListing, tasks: Tasks):
        self._listing, self._tasks = listing, tasks

    def routes(self) -> list[BaseRoute]:
        """Return the route."""
        return [json_route("/api/runs/{id}/forgetting", self.measure, "POST")]

    def measure(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Start the measurement.

        Raises:
            ApiError: 409, the run has no adapter yet, or goes on.
        """
        run = self._listing.detail(request.path_params["id"], False)
        if not run["adapter"] or run["state"] in ("running", "queued"):
            raise ApiError(409, f"{run['name']}: no finished adapter yet; wait for the run's end", "no_adapter")
        folder = Path(run["path"])
        words = words_of_measuring(folder, run["settings"])
        task = self._tasks.begin(
            "forgetting", f"What {run['name']} forgot", lambda task: self._work(task, folder, words)
        )
        return {"task": task.public(), "command": command_line(words)}

    def _work(self, task: BackgroundTask, folder: Path, words: list[str]) -> dict[str, str]:
        (folder / FACTS).parent.mkdir(exist_ok=True)
        child = start_child(words, folder / LOG, result=folder / PART)
        while child.poll() is None:
            if not task.wanted.is_set():
                child.kill()
                child.wait()
                raise Cancelled
            line = last_line(folder / LOG)
            if line != task.message:
                self._tasks.change(task, message=line)
            time.sleep(POLL_S)
        if child.returncode:
            raise RunError(ended_words(child.returncode, last_line(folder / LOG)))
        os.replace(folder / PART, folder / FACTS)
        return {"path": str(folder / FACTS)}


class EvaluationRoutes:
    """POST /api/runs/ID/evaluation asks base and adapter, as a task."""

    def __init__(self, listing: RunListing, data: Callable[[Any], str], tasks: Tasks):
        """Take the runs, what checks the name of data in a request, and the tasks."""
        self._listing, self._data, self._tasks = listing, data, tasks

    def routes(self) -> list[BaseRoute]:
        """Return the route."""
        return [json_route("/api/runs/{id}/evaluation", self.ask, "POST")]

    def ask(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Start the evaluation, on the data that the request names, or on the rows that the run held out.

        Raises:
            ApiError: 409, the run has no adapter yet, or goes on, or imitates nothing; others: the data cannot be read.
        """
        run = self._listing.detail(request.path_params["id"], False)
        if not run["adapter"] or run["state"] in ("running", "queued"):
            raise ApiError(409, f"{run['name']}: no finished adapter yet; wait for the run's end", "no_adapter")
        if run["objective"] != "sft":
            raise ApiError(
                409, f"{run['name']}: its rows have no single right answer; talk to it instead", "no_answers"
            )
        folder = Path(run["path"])
        data = None if body.get("data") is None else self._data(body["data"])
        words = words_of_asking(folder, run["settings"], run["data"], data)
        cwd = None if data else self._listing.begun_in(folder)
        task = self._tasks.child("evaluation", f"Questions to {run['name']}", words, {"path": str(folder)}, cwd=cwd)
        return {"task": task.public(), "command": command_line(words)}
