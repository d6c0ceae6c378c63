"""Base and adapter side by side: asked by the `evaluate` command when the page wants it, which keeps the answers in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.routing import BaseRoute

from mlx_lora.reports.evaluation import read_evaluation, shown_evaluation
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.tasks import Tasks
from mlx_lora.studio.web import json_route
from mlx_lora.utils.text import command_line

ASKED = 20  # questions
MOST_TEXT = 2000  # characters of one
OF_MODEL = ("model", "revision", "bits")


class Listing(Protocol):
    """What is needed of the list of runs."""

    def folder(self, number: str) -> Path:
        """Return a run's folder."""
        ...

    def detail(self, number: str, queued: bool) -> dict[str, Any]:
        """Return all about a run."""
        ...

    def begun_in(self, folder: Path) -> str | None:
        """Return the folder that the names in a run's settings start from; None: they are whole."""
        ...


class EvaluationRoutes:
    """POST /api/runs/ID/evaluation asks base and adapter, as a task."""

    def __init__(self, listing: Listing, data: Callable[[Any], str], tasks: Tasks):
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


def words_of_asking(
    folder: Path, settings: dict[str, Any], report: dict[str, Any] | None, data: str | None = None
) -> list[str]:
    """Return the words of the command that puts base and adapter side by side.

    Args:
        folder: of the run.
        settings: of the run.
        report: of its data, as in report.json.
        data: to measure; None: what the run held out.
    """
    given = [word for name in OF_MODEL if settings.get(name) for word in (f"--{name}", str(settings[name]))]
    words = ["evaluate", *given, *(("--data", data) if data else ()), "--adapter-path", str(folder)]
    return words if data is None and not _has_questions(report) else [*words, "--show", str(ASKED)]


def _has_questions(report: dict[str, Any] | None) -> bool:
    """Tell whether rows have prompts: of plain text, every token but the first is trained."""
    train = ((report or {}).get("splits") or {}).get("train") or {}
    return train.get("supervised_tokens", 0) < train.get("tokens", 1) - train.get("rows", 0)


def side_by_side(folder: Path, settings: dict[str, Any], report: dict[str, Any] | None) -> dict[str, Any]:
    """Return `evaluation`, as the page shows it, or None; and the command that measures it on held-out rows."""
    facts = read_evaluation(folder)
    found = None if facts is None else shown_evaluation(facts)
    for row in found["rows"] if found else ():
        row["said"] = [{"text": text[:MOST_TEXT], "right": right} for text, right in row["said"]]
        row |= {name: row[name][:MOST_TEXT] for name in ("question", "expected")}
    return {"evaluation": found, "evaluation_command": command_line(words_of_asking(folder, settings, report))}
