"""The Runs place: list, details, events, pause, notes, delete, the queue, and what is measured of a finished run."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_lora.config.objectives import ANSWERED
from mlx_lora.reports.run_report import ANSWERS_FILE, FACTS_FILE, read_facts, tick
from mlx_lora.studio.app import Studio
from mlx_lora.studio.folders import stamps
from mlx_lora.studio.runs import (
    FACTS,
    LOG_FILE,
    METRICS,
    TAIL_BYTES,
    Tail,
    parsed,
    plain_line,
    read_started,
    samples_of,
    state_of,
    words_of_asking,
    words_of_measuring,
)
from mlx_lora.studio.web import BackgroundTask, events, json_route, text_of
from mlx_lora.utils.http import ApiError, read_number
from mlx_lora.utils.text import command_line

POLL_S = 0.5
PART, LOG = "studio/forgetting.part", "studio/forgetting.log"  # in a run's folder, while it is measured
MOST_LINES = 200  # of a log, in one event


def routes(studio: Studio) -> list[BaseRoute]:
    """Return the routes of runs, the queue, and what is measured of a run."""
    listing, control = studio.listing, studio.control

    def of_run(path: str, act: Callable[[str, dict[str, Any]], Any], method: str = "POST") -> Route:
        """Return a route of /api/runs/ID; what acts without an answer of its own is answered with the run's line."""

        def handle(request: Request, body: dict[str, Any]) -> dict[str, Any]:
            return act(request.path_params["id"], body) or {"run": line_of(studio, request.path_params["id"])}

        return json_route(f"/api/runs/{{id}}{path}", handle, method)

    def move(request: Request, body: dict[str, Any]) -> dict[str, Any]:
        return control.reorder(text_of(body, "run"), read_number(body, "to", 0, 10**6, 0))

    return [
        json_route("/api/queue", lambda request, body: control.queued()),
        json_route("/api/queue/move", move, "POST"),
        json_route("/api/queue/remove", lambda request, body: control.reorder(text_of(body, "run"), None), "POST"),
        json_route("/api/runs", lambda request, body: {"runs": listing.listed(control.queue)}),
        json_route("/api/adapters", lambda request, body: {"adapters": listing.adapters()}),
        Route("/api/runs/{id}/events", partial(news_events, studio), methods=["GET"]),
        of_run("", lambda number, body: listing.detail(number, number in control.queue), "GET"),
        of_run("", lambda number, body: control.delete(number, body.get("confirm")), "DELETE"),
        of_run("/pause", lambda number, body: control.ask_to_end(number, "pause")),
        of_run("/stop", lambda number, body: control.ask_to_end(number, "stop")),
        of_run("/resume", lambda number, body: control.resume(number, body.get("agreed"))),
        of_run("/notes", lambda number, body: control.note(number, body.get("text")), "PUT"),
        of_run("/forgetting", partial(measure, studio)),
        of_run("/tick", partial(tick_answer, studio)),
        of_run("/evaluation", partial(ask, studio)),
    ]


def line_of(studio: Studio, number: str) -> dict[str, Any]:
    """Return the line of a run in the list."""
    return studio.listing.summary(studio.listing.folder(number), number in studio.control.queue)


async def news_events(studio: Studio, request: Request) -> Response:
    """GET /api/runs/ID/events: new metrics, lines of the log, texts and states, as the run's files grow."""
    folder = await anyio.to_thread.run_sync(studio.listing.folder, request.path_params["id"])
    news = RunNews(folder, lambda: line_of(studio, request.path_params["id"]))
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
        records = [record for text in self._metrics.new_lines() if (record := parsed(text)) is not None]
        found: list[dict[str, Any]] = [{"type": "metrics", "metrics": record} for record in records]
        if said := self._log.new_lines()[-MOST_LINES:]:
            found.append({"type": "log", "lines": [plain_line(one) for one in said]})
        started = read_started(self._folder)
        state = (*state_of(self._folder, started), started.asked if started else None)
        if state != self._state or records:
            found.append({"type": "state", **self._line()})
        texts = [stamps([self._folder / name]) for name in (FACTS_FILE, ANSWERS_FILE)]
        if texts != self._texts and self._texts is not None:
            samples = samples_of(self._folder, read_facts(self._folder), self._line()["step"])
            found.append({"type": "sample", "samples": samples})
        self._state, self._texts = state, texts
        return found


def finished_run(studio: Studio, number: str) -> tuple[dict[str, Any], Path]:
    """Return a run with its adapter, and its folder.

    Raises:
        ApiError: 409, the run has no adapter yet, or goes on.
    """
    run = studio.listing.detail(number, False)
    if not run["adapter"] or run["state"] in ("running", "queued"):
        raise ApiError(409, f"{run['name']}: no finished adapter yet; wait for the run's end", "no_adapter")
    return run, Path(run["path"])


def measure(studio: Studio, number: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/runs/ID/forgetting measures what its adapter forgot, as a task.

    Raises:
        ApiError: 409, as of `finished_run`, or its adapter does not answer texts.
    """
    run, folder = finished_run(studio, number)
    words, cwd = words_of_measuring(folder, run["settings"]), studio.listing.begun_in(folder)
    if words is None:
        raise ApiError(
            409,
            f"{run['name']}: its rows are not questions and answers, so what it forgot cannot be measured on them",
            "no_answers",
        )

    def work(task: BackgroundTask) -> dict[str, str]:
        studio.tasks.run_child(task, words, folder / LOG, output=folder / PART, cwd=cwd)
        os.replace(folder / PART, folder / FACTS)
        return {"path": str(folder / FACTS)}

    task = studio.tasks.begin("forgetting", f"What {run['name']} forgot", work)
    return {"task": task.public(), "command": command_line(words)}


def tick_answer(studio: Studio, number: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/runs/ID/tick: a person says that an answer is right or wrong, or, with null, takes that back; the report is written anew.

    Raises:
        ApiError: 404, there is no such answer; 400, the body says neither; 409, the run goes on.
    """
    _, folder = finished_run(studio, number)
    index, right = read_number({"index": -1, **body}, "index", 0, 10**6, 0), body.get("right")
    if not (right is None or isinstance(right, bool)):
        raise ApiError(400, "right: must be true, false or null", "invalid_value", "right")
    try:
        tick(folder, index, right)
    except IndexError:
        raise ApiError(404, f"index: there is no answer {index}; reload the run", "not_found", "index") from None
    return studio.listing.detail(number, number in studio.control.queue)


def ask(studio: Studio, number: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/runs/ID/evaluation asks base and adapter, as a task, on the data that the request names, or on the rows that the run held out.

    Raises:
        ApiError: 409, as of `finished_run`, or the run imitates nothing; others: the data cannot be read.
    """
    run, folder = finished_run(studio, number)
    if run["objective"] not in ANSWERED:
        raise ApiError(409, f"{run['name']}: its rows have no single right answer; talk to it instead", "no_answers")
    data = None if body.get("data") is None else studio.checker.data(body["data"])
    words = words_of_asking(folder, run["settings"], run["data"], data)
    cwd = None if data else studio.listing.begun_in(folder)
    task = studio.tasks.child("evaluation", f"Questions to {run['name']}", words, {"path": str(folder)}, cwd=cwd)
    return {"task": task.public(), "command": command_line(words)}
