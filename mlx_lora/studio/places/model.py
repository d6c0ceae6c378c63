"""The Model place: what is on this disk, the hub's search, plans, downloads and conversions."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from starlette.requests import Request
from starlette.routing import BaseRoute

from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.folders import Checker, Folders, is_hub_model, safe_name
from mlx_lora.studio.model_stores import ModelStores
from mlx_lora.studio.places import Studio
from mlx_lora.studio.plans import Plans, refused_plan, shown_plan
from mlx_lora.studio.tasks import BackgroundTask, Tasks
from mlx_lora.studio.web import json_route, text_of, whole_number
from mlx_lora.utils.errors import InputError, first_line
from mlx_lora.utils.hub import REQUEST_ERRORS
from mlx_lora.utils.text import command_line

MOST_RESULTS = 30
REACH_S = 4.0
KEPT_S = 10.0  # the list of models is searched again after this
BITS = (2, 3, 4, 5, 6, 8)


def routes(studio: Studio) -> list[BaseRoute]:
    """Return the routes of models."""
    return ModelRoutes(studio.folders, studio.stores, studio.checker, studio.plans, studio.tasks).routes()


class ModelRoutes:
    """Models of a studio."""

    def __init__(self, folders: Folders, stores: ModelStores, checker: Checker, plans: Plans, tasks: Tasks):
        self._folders, self._stores, self._checker = folders, stores, checker
        self._plans, self._tasks = plans, tasks
        self._listed: tuple[float, int, list[dict[str, Any]]] = (-KEPT_S, 0, [])

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            json_route("/api/models", self.models),
            json_route("/api/models/search", self.search),
            json_route("/api/models/plan", self.plan, "POST"),
            json_route("/api/models/download", self.download, "POST"),
            json_route("/api/models/convert", self.convert, "POST"),
        ]

    def models(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """GET /api/models."""
        return {"models": self._here(), "stores": self._stores.stores()}

    def _here(self) -> list[dict[str, Any]]:
        ended = self._tasks.ended  # a download or a conversion may have brought a model
        if time.monotonic() - self._listed[0] > KEPT_S or ended != self._listed[1]:
            self._listed = (time.monotonic(), ended, self._stores.listed())
        return self._listed[2]

    def search(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """GET /api/models/search?q=."""
        query = request.query_params.get("q", "")[:200]
        here = {model["id"].split(":")[0] for model in self._here() if model["kind"] == "hub"}
        try:
            # Asked once with a short wait: the client would try again for half a minute.
            get_session().get(f"{ENDPOINT}/api/models", params={"limit": 1}, timeout=REACH_S)
            found = list(
                HfApi().list_models(search=query, filter="text-generation", sort="downloads", limit=MOST_RESULTS)
            )
        except OfflineModeIsEnabled:
            return {"results": [], "offline": "HF_HUB_OFFLINE is set; unset it to search the hub."}
        except REQUEST_ERRORS as error:
            return {"results": [], "offline": f"The hub is unreachable ({first_line(error)}); check the connection."}
        results = [
            {"id": one.id, "downloads": one.downloads, "likes": one.likes, "here": one.id in here} for one in found
        ]
        return {"results": results, "offline": None}

    def plan(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/models/plan: from the config alone."""
        settings = self._checker.settings({**_object(body.get("settings")), "model": body.get("model")})
        try:
            return shown_plan(self._plans.of_config(settings))
        except InputError as error:
            return refused_plan(str(error))

    def download(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/models/download: a child process, so that it can be cancelled; started again, it goes on."""
        model = text_of(body, "model", 200)
        if not is_hub_model(model):
            raise ApiError(400, f"model {model!r}: not a hub id; give owner/name", "invalid_value", "model")
        room = Path(HF_HUB_CACHE) / f"models--{model.split(':')[0].replace('/', '--')}" / "blobs"

        def watch(task: BackgroundTask) -> None:
            if task.total is None and task.message.startswith("Bytes: "):
                self._tasks.change(task, total=int(task.message.removeprefix("Bytes: ")), unit="bytes")
            done = _bytes_in(room)
            if done != task.done:
                self._tasks.change(task, done=done)

        words = ["studio.model_stores", model]
        return {"task": self._tasks.child("download", f"Download {model}", words, {"model": model}, watch).public()}

    def convert(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/models/convert."""
        model, name = self._checker.model(body.get("model")), safe_name(body.get("name"))
        bits = whole_number(body.get("bits"), "bits", 2, 8, 4)
        if bits not in BITS:
            raise ApiError(400, f"bits: must be one of {', '.join(map(str, BITS))}", "invalid_value", "bits")
        out = self._folders.models / name
        if out.exists():
            raise ApiError(409, f"name: there is {name} already; choose another name", "name_taken", "name")
        words = ["convert", "--model", model, "--out", str(out), "--bits", str(bits)]
        task = self._tasks.child("convert", f"Convert {Path(model).name} to {bits} bits", words, {"model": str(out)})
        return {"task": task.public(), "command": command_line(words)}


def _object(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise ApiError(400, "settings: must be an object of setting names and values", "invalid_value", "settings")
    return value or {}


def _bytes_in(folder: Path) -> int:
    """Return the bytes of a repository's files so far, unfinished ones included."""
    total = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                total += entry.stat().st_blocks * 512 if entry.name.endswith(".incomplete") else entry.stat().st_size
    except OSError:
        pass  # not begun, or a file was renamed meanwhile
    return total
