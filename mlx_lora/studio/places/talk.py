"""The Talk place: answers in columns, and exports."""

from __future__ import annotations

import importlib.util
import math
import shutil
from pathlib import Path
from typing import Any

import anyio.to_thread
from huggingface_hub import get_token
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from mlx_lora.api.export import FORMATS, ExportSettings
from mlx_lora.gguf.write import TYPES
from mlx_lora.serving.schema import ApiError, read_json
from mlx_lora.studio.folders import Checker, Folders, safe_name
from mlx_lora.studio.places import Studio
from mlx_lora.studio.talking import MOST_COLUMNS, MOST_PARTS, MOST_WEIGHT, Talk
from mlx_lora.studio.tasks import Tasks
from mlx_lora.studio.web import events, json_route
from mlx_lora.utils.device import current_device
from mlx_lora.utils.text import command_line

FIELDS = ("messages", "max_tokens", "temperature", "seed", "top_p", "top_k", "stop")
HUB = "hub"
OPTIONS = {"gguf_type": "--gguf-type", "base_id": "--base-id", "ollama_base": "--ollama-base"}


def routes(studio: Studio) -> list[BaseRoute]:
    """Return the routes of talk and of export."""
    talk = Talk(studio.listing.going_on, current_device().working_set_bytes)
    studio.closing.callback(talk.close)
    exports = ExportRoutes(studio.folders, studio.checker, studio.tasks)
    return [*TalkRoutes(talk, studio.checker).routes(), *exports.routes()]


class TalkRoutes:
    """Talk with several adapters."""

    def __init__(self, talk: Talk, checker: Checker):
        self._talk, self._checker = talk, checker

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            Route("/api/talk", self.answer, methods=["POST"]),
            json_route("/api/talk/close", self.close, "POST"),
        ]

    async def answer(self, request: Request) -> Response:
        """POST /api/talk: server-sent events of all columns."""
        body = read_json(await request.body())
        model = await anyio.to_thread.run_sync(self._checker.model, body.get("model"))
        columns = await anyio.to_thread.run_sync(self._columns, body.get("columns"))
        asked = {name: body[name] for name in FIELDS if body.get(name) is not None}
        own = [column.get("messages") for column in body["columns"]]
        if system := body.get("system"):
            first = {"role": "system", "content": system}
            asked["messages"] = [first, *_list(asked.get("messages"))]
            own = [messages and [first, *_list(messages)] for messages in own]
        return events(request, self._talk.answer(model, columns, asked, own))

    def _columns(self, given: Any) -> list[list[tuple[Path, float]]]:
        """Return the columns of a request, each a list of adapters with weights.

        Raises:
            ApiError: they are malformed, or a folder is not one of this studio's.
        """
        if not isinstance(given, list) or not 1 <= len(given) <= MOST_COLUMNS:
            raise ApiError(400, f"columns: must be a list of 1 to {MOST_COLUMNS}", "invalid_value", "columns")
        columns = []
        for column in given:
            parts = column.get("adapters", []) if isinstance(column, dict) else None
            if not isinstance(parts, list) or len(parts) > MOST_PARTS or not all(isinstance(p, dict) for p in parts):
                raise ApiError(
                    400,
                    f"columns: each must be {{adapters: [{{path, weight}}]}}, {MOST_PARTS} at most",
                    "invalid_value",
                )
            found: dict[Path, float] = {}
            for part in parts:
                found[self._checker.adapter(part.get("path"))] = _weight(part.get("weight", 1.0))
            columns.append(list(found.items()))
        return columns

    def close(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/talk/close."""
        self._talk.close()
        return {"closed": True}


class ExportRoutes:
    """Exports, each a child process of the export command."""

    def __init__(self, folders: Folders, checker: Checker, tasks: Tasks):
        self._folders, self._checker, self._tasks = folders, checker, tasks

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [
            json_route("/api/export", self.export, "POST"),
            json_route("/api/export/needs", lambda request, body: needs()),
        ]

    def export(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/export."""
        model, to, name = self._checker.model(body.get("model")), body.get("to"), safe_name(body.get("out"), "out")
        adapter = self._checker.adapter(body["adapter"]) if body.get("adapter") else None
        options = body.get("options") or {}
        if not isinstance(options, dict) or not all(isinstance(value, (str, bool)) for value in options.values()):
            raise ApiError(400, "options: must be an object of texts", "invalid_value", "options")
        kind = "peft" if to == HUB else to
        if kind not in FORMATS:
            raise ApiError(400, f"to: must be one of {', '.join((*FORMATS, HUB))}", "invalid_value", "to")
        repo = options.get("repo") if to == HUB else None
        if to == HUB and not repo:
            raise ApiError(400, "options.repo: must be the hub id to upload to, owner/name", "invalid_value", "options")
        if kind in ("gguf", "gguf-adapter") and not name.endswith(".gguf"):
            name += ".gguf"
        out = self._folders.exports / name
        force = bool(options.get("force"))
        if out.exists() and not force:
            raise ApiError(409, f"out: there is {name} already; choose another name", "name_taken", "out")
        words = ["export", "--model", model, *(["--adapter-path", str(adapter)] if adapter else []), "--to", kind]
        words += ["--out", str(out), *(["--force"] if force else [])]
        given = {name: str(options[name]) for name in OPTIONS if options.get(name)}
        for option, value in given.items():
            words.append(f"{OPTIONS[option]}={value}" if value.startswith("-") else OPTIONS[option])
            words += [] if value.startswith("-") else [value]
        if repo:
            words += [f"--push-to-hub={repo}", *(["--private"] if options.get("private") else [])]
        asked = {key: given.get(key) for key in OPTIONS}
        settings = ExportSettings(kind, out, asked["base_id"], asked["gguf_type"], asked["ollama_base"], force,
            str(repo) if repo else None, bool(options.get("private")) and bool(repo))  # fmt: skip
        settings.check(adapter is not None)
        if given.get("ollama_base", "").endswith(".gguf"):
            self._checker.model(given["ollama_base"])
        title = f"Export {adapter.name if adapter else Path(model).name} for {to}"
        result = {"path": str(out), "to": to, "next": FORMATS[kind].reader.format(out=out)}
        return {"task": self._tasks.child("export", title, words, result).public(), "command": command_line(words)}


def needs() -> dict[str, Any]:
    """Return what each kind of export needs, and whether it is here."""
    ollama, token = shutil.which("ollama"), get_token()
    peft = importlib.util.find_spec("peft") is not None
    return {
        "peft": {"needs": "An adapter. PEFT can load the result, and need not be installed here.", "ok": True, "installed": peft},
        "mlx-lm": {"needs": "An adapter. Stock mlx-lm reads it.", "ok": True},
        "hf": {"needs": "Disk space for the whole model in its stored dtype.", "ok": True},
        "gguf-adapter": {"needs": "An adapter, and for llama.cpp the base as GGUF.", "ok": True},
        "gguf": {
            "needs": "Disk space for the whole model; llama.cpp and LM Studio read it.", "ok": True, "types": list(TYPES),
        },
        "ollama": {
            "needs": "Ollama, to create the model from the folder"
            + ("." if ollama else "; it is not installed here, the folder is written anyway."),
            "ok": ollama is not None,
        },
        "hub": {
            "needs": "A token with write access" + ("." if token else ": run `hf auth login` first."),
            "ok": token is not None,
        },
    }  # fmt: skip


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _weight(value: Any) -> float:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or abs(value) > MOST_WEIGHT:
        raise ApiError(
            400, f"weight: must be a number from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}", "invalid_value", "weight"
        )
    return float(value)
