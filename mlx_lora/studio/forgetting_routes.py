"""What a run's adapter made the model forget: measured by the `evaluate` command when the page asks, and kept in the run's folder."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Protocol

from starlette.requests import Request
from starlette.routing import BaseRoute

from mlx_lora.api.forgetting import badges
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.child_processes import ended_words, start_child
from mlx_lora.studio.tasks import Cancelled, Task, Tasks, last_line
from mlx_lora.studio.web import json_route
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import command_line

FACTS, PART, LOG = "studio/forgetting.json", "studio/forgetting.part", "studio/forgetting.log"
POLL_S = 0.3


class Listing(Protocol):
    """What is needed of the list of runs."""

    def folder(self, number: str) -> Path:
        """Return a run's folder."""
        ...

    def detail(self, number: str, queued: bool) -> dict[str, Any]:
        """Return all about a run."""
        ...


class ForgettingRoutes:
    """POST /api/runs/ID/forgetting measures it, as a task."""

    def __init__(self, listing: Listing, tasks: Tasks):
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

    def _work(self, task: Task, folder: Path, words: list[str]) -> dict[str, str]:
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


def words_of_measuring(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Return the words of the command that measures what a run's adapter forgot."""
    given = [word for name in ("model", "data") if settings.get(name) for word in (f"--{name}", str(settings[name]))]
    return ["evaluate", *given, "--adapter-path", str(folder), "--forgetting", "--json"]


def what_was_forgotten(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Return `forgetting`, as the page shows it, or None; and the command that measures it."""
    command = command_line(words_of_measuring(folder, settings))
    try:
        facts = read_json(folder / FACTS, "measure it again")
        [about] = badges(facts)
        drifts = [(name, *one["adapters"].values()) for name, one in facts["sets"].items()]
    except (InputError, OSError, KeyError, TypeError, ValueError):
        return {"forgetting": None, "forgetting_command": command}
    rows = [
        {
            "set": name,
            "base": one["base_loss"],
            "adapter": one["loss"],
            "change": one["change"],
            "verdict": one["verdict"],
        }
        for name, one in drifts
    ]
    right = facts["probes"]["right"]
    probes = {"right": right[about["adapter"]], "base_right": right["base"], "of": facts["probes"]["questions"]}
    found = {"sentence": f"It {about['sentence']}.", "rows": rows, "probes": probes}
    return {"forgetting": found, "forgetting_command": command}
