"""The Model place: what is on this disk, the hub's search, plans, downloads and conversions."""

from __future__ import annotations

import contextlib
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session
from starlette.requests import Request
from starlette.routing import BaseRoute

from mlx_lora.studio.app import Studio
from mlx_lora.studio.folders import is_hub_model, safe_name
from mlx_lora.studio.plans import refused_plan, shown_plan
from mlx_lora.studio.web import BackgroundTask, json_route, text_of
from mlx_lora.utils.errors import InputError, first_line
from mlx_lora.utils.http import ApiError, read_number
from mlx_lora.utils.hub import REQUEST_ERRORS
from mlx_lora.utils.text import command_line

MOST_RESULTS = 30
REACH_S = 4.0
KEPT_S = 10.0  # the list of models is searched again after this
BITS = (2, 3, 4, 5, 6, 8)


def routes(studio: Studio) -> list[BaseRoute]:
    """Return the routes of models."""
    kept: dict[str, Any] = {"at": -KEPT_S}

    def listed() -> list[dict[str, Any]]:
        """Return the models on this disk, which are searched again after some seconds."""
        ended = studio.tasks.ended  # a download or a conversion may have brought a model
        if time.monotonic() - kept["at"] > KEPT_S or ended != kept["ended"]:
            kept.update(at=time.monotonic(), ended=ended, models=studio.stores.listed())
        return kept["models"]

    return [
        json_route("/api/models", lambda request, body: {"models": listed(), "stores": studio.stores.stores()}),
        json_route("/api/models/search", lambda request, body: search(request, listed())),
        json_route("/api/models/plan", partial(plan, studio), "POST"),
        json_route("/api/models/download", partial(download, studio), "POST"),
        json_route("/api/models/convert", partial(convert, studio), "POST"),
    ]


def search(request: Request, listed: list[dict[str, Any]]) -> dict[str, Any]:
    """GET /api/models/search?q=."""
    query = request.query_params.get("q", "")[:200]
    here = {model["id"].split(":")[0] for model in listed if model["kind"] == "hub"}
    try:
        # Asked once with a short wait: the client would try again for half a minute.
        get_session().get(f"{ENDPOINT}/api/models", params={"limit": 1}, timeout=REACH_S)
        found = list(HfApi().list_models(search=query, filter="text-generation", sort="downloads", limit=MOST_RESULTS))
    except OfflineModeIsEnabled:
        return {"results": [], "offline": "HF_HUB_OFFLINE is set; unset it to search the hub."}
    except REQUEST_ERRORS as error:
        return {"results": [], "offline": f"The hub is unreachable ({first_line(error)}); check the connection."}
    results = [{"id": one.id, "downloads": one.downloads, "likes": one.likes, "here": one.id in here} for one in found]
    return {"results": results, "offline": None}


def plan(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/models/plan: from the config alone."""
    given = body.get("settings") or {}
    settings = studio.checker.settings({**given, "model": body.get("model")} if isinstance(given, dict) else given)
    try:
        return shown_plan(studio.plans.of_config(settings))
    except InputError as error:
        return refused_plan(str(error))


def download(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/models/download: a child process, so that it can be cancelled; started again, it goes on."""
    model = text_of(body, "model", 200)
    if not is_hub_model(model):
        raise ApiError(400, f"model {model!r}: not a hub id; give owner/name", "invalid_value", "model")
    room = Path(HF_HUB_CACHE) / f"models--{model.split(':')[0].replace('/', '--')}" / "blobs"

    def watch(task: BackgroundTask) -> None:
        if task.total is None and task.message.startswith("Bytes: "):
            studio.tasks.change(task, total=int(task.message.removeprefix("Bytes: ")), unit="bytes")
        done = 0
        with contextlib.suppress(OSError), os.scandir(room) as entries:  # not begun, or a file was renamed meanwhile
            for entry in entries:
                done += entry.stat().st_blocks * 512 if entry.name.endswith(".incomplete") else entry.stat().st_size
        if done != task.done:
            studio.tasks.change(task, done=done)

    words = ["studio.model_stores", model]
    return {"task": studio.tasks.child("download", f"Download {model}", words, {"model": model}, watch).public()}


def convert(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/models/convert."""
    model, name = studio.checker.model(body.get("model")), safe_name(body.get("name"))
    bits = read_number(body, "bits", 2, 8, 4)
    if bits not in BITS:
        raise ApiError(400, f"bits: must be one of {', '.join(map(str, BITS))}", "invalid_value", "bits")
    out = studio.folders.models / name
    if out.exists():
        raise ApiError(409, f"name: there is {name} already; choose another name", "name_taken", "name")
    words = ["convert", "--model", model, "--out", str(out), "--bits", str(bits)]
    task = studio.tasks.child("convert", f"Convert {Path(model).name} to {bits} bits", words, {"model": str(out)})
    return {"task": task.public(), "command": command_line(words)}
