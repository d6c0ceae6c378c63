"""The routes of training and runs: settings, cards, plans, start, queue, list, details, events, pause, notes, delete."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_lora.reports.run_report import ANSWERS_FILE, FACTS_FILE
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.metrics_reading import TAIL_BYTES, Tail, parsed
from mlx_lora.studio.places import safe_name
from mlx_lora.studio.run_cards import CARDS, USUAL_CARD, Cards
from mlx_lora.studio.run_commands import Checker, resolved, run_yaml, train_words
from mlx_lora.studio.run_control import RunControl
from mlx_lora.studio.run_listing import METRICS, RunListing, samples_of
from mlx_lora.studio.run_listing import facts_of as run_facts
from mlx_lora.studio.run_plans import Plans, refused_plan, shown_plan
from mlx_lora.studio.run_states import COLOR, LOG_FILE, read_started, state_of
from mlx_lora.studio.setting_groups import setting_groups
from mlx_lora.studio.web import events, json_route, text_of, whole_number
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import command_line

POLL_S = 0.5
MOST_LINES = 200  # of a log, in one event


class TrainRoutes:
    """What is chosen before a run, and its start."""

    def __init__(self, plans: Plans, checker: Checker, control: RunControl, runs: Path):
        self._plans, self._checker, self._control, self._runs = plans, checker, control, runs
        self._cards = Cards(plans)

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            json_route("/api/settings", lambda request, body: {"groups": setting_groups()}),
            json_route("/api/train/rule", self.rule, "POST"),
            json_route("/api/train/plan", self.plan, "POST"),
            json_route("/api/train/start", self.start, "POST"),
        ]

    def rule(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/train/rule: what the rule of defaults says of each card, at once."""
        settings = self._checker.settings(body.get("settings"))
        try:
            return {"cards": self._cards.at_once(settings, body["settings"])}
        except InputError:
            return {"cards": {}}  # the plan says what is wrong

    def plan(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/train/plan: the plan of a card's run, its command, and the settings that the run begins with."""
        settings, card = self._checker.settings(body.get("settings")), card_of(body)
        folder = self._runs / safe_name(body.get("name") or "my-run", "Name of the run")
        words: dict[str, Any] = {"card": card, "own": {}, "task": None, "run_yaml": ""}
        words["command"] = command_line(train_words(settings, folder))
        try:
            resolved(settings, folder)
            if not settings.get("model"):
                raise InputError("choose a model first")
            words["own"], reads = self._cards.own_settings(card, settings, body["settings"])
            settings = {**words["own"], **settings}
            words |= {
                "command": command_line(train_words(settings, folder)),
                "run_yaml": run_yaml(resolved(settings, folder)),
            }
            plan, task = (self._plans.of_config(settings), reads) if reads else self._plans.of_run(settings)
        except InputError as error:
            return {**refused_plan(str(error)), **words}
        words["waits"] = reads is not None
        return {**shown_plan(plan), **words, "task": task.public() if task else None}

    def start(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/train/start."""
        settings, card = self._checker.settings(body.get("settings")), card_of(body)
        missing = [name for name in ("model", "data") if not settings.get(name)]
        if settings.get("objective") == "distill":
            missing = [name for name in missing if name != "data"]
        if missing:
            raise ApiError(400, f"no {' and no '.join(missing)} yet; choose them first", "missing")
        peak = steps = None
        try:
            own, reads = self._cards.own_settings(card, settings, body["settings"])
            if reads:
                raise ApiError(409, f"the data is still being read, and the length of a {card} run depends on it; wait for its card",
                    "data_is_read")  # fmt: skip
            settings = {**own, **settings}
            # A run does not wait for a plan that the page has not shown: it makes its own, and says how many steps it takes.
            if plan := self._plans.known(settings):
                peak, steps = plan["peak_bytes"], plan["steps"]
        except InputError:
            pass  # the command itself says what is wrong, in its log
        return {"run": self._control.start(settings, body.get("name"), bool(body.get("queue")), peak, steps)}


def card_of(body: dict[str, Any]) -> str:
    """Return the card of a request, the usual one if it names none.

    Raises:
        ApiError: 400, there is no such card.
    """
    card = body.get("card") or USUAL_CARD
    if card not in CARDS:
        raise ApiError(400, f"card: must be one of {', '.join(CARDS)}", "invalid_value", "card")
    return card


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
        texts = [_changed(self._folder / name) for name in (FACTS_FILE, ANSWERS_FILE)]
        if texts != self._texts:
            if self._texts is not None:
                samples = samples_of(self._folder, run_facts(self._folder), self._line()["step"])
                found.append({"type": "sample", "samples": samples})
            self._texts = texts
        return found


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size
