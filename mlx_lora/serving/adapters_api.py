"""The endpoints under /v1/adapters, which list, load and unload adapters.

A name is never a path. A path is only looked up below one folder that the operator chose, after following links.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mlx_lora.serving.adapter_store import NAME, AdapterSource, Card, NoRoom, UnknownAdapter
from mlx_lora.serving.app import api_error
from mlx_lora.serving.engine import Engine, Stopped
from mlx_lora.serving.schema import ApiError, read_json
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.hub import resolve_adapter

FIELDS = {"name", "path", "hub", "revision", "blend"}


class Adapters:
    """The endpoints."""

    def __init__(self, engine: Engine, base_name: str, folder: Path | None, allow_hub: bool):
        """Prepare the endpoints.

        Args:
            engine: holds the adapters.
            base_name: the base's model id, which no adapter may have as its name.
            folder: its subfolders may be loaded; None: no folder may.
            allow_hub: whether adapters may be loaded from the hub.
        """
        self._engine, self._base_name, self._folder, self._allow_hub = engine, base_name, folder, allow_hub

    def routes(self) -> list[Route]:
        """Return their routes."""
        return [
            Route("/v1/adapters", self.listing, methods=["GET"]),
            Route("/v1/adapters", self.load, methods=["POST"]),
            Route("/v1/adapters/{name}", self.unload, methods=["DELETE"]),
        ]

    async def listing(self, request: HttpRequest) -> Response:
        """GET /v1/adapters."""
        store = self._engine.store
        data = [_described(card) for card in store.cards.values()]
        sizes = {"resident_bytes": store.nbytes, "budget_bytes": store.budget_bytes}
        return JSONResponse({"object": "list", "data": data, **sizes})

    async def load(self, request: HttpRequest) -> Response:
        """POST /v1/adapters: load a new adapter, or reload a known one."""
        body = read_json(await request.body())
        strange = body.keys() - FIELDS
        if strange:
            raise ApiError(400, f"{', '.join(sorted(strange))}: not a field of this endpoint", "unknown_parameter")
        name = body.get("name")
        if not isinstance(name, str) or not NAME.fullmatch(name) or name == self._base_name:
            raise ApiError(
                400,
                "name: must be at most 64 letters, digits, . _ or -, and not the base's name",
                "invalid_value",
                "name",
            )
        given = [key for key in ("path", "hub", "blend") if body.get(key) is not None]
        if len(given) > 1:
            raise ApiError(400, f"{' and '.join(given)}: give only one of them", "invalid_value")
        if not given:
            card = await self._run(lambda store: store.reload(name))
        else:
            source = await self._source(body, given[0])
            card = (await self._run(lambda store: store.add({name: source}), source.folder))[0]
        return JSONResponse(_described(card))

    async def unload(self, request: HttpRequest) -> Response:
        """DELETE /v1/adapters/NAME."""
        name = request.path_params["name"]
        await self._run(lambda store: store.remove(name))
        return JSONResponse({"name": name, "object": "adapter", "deleted": True})

    async def _run(self, function: Any, folder: Path | None = None) -> Any:
        """Run a function on the adapter store in the engine's thread."""
        try:
            return await asyncio.wrap_future(self._engine.call(function))
        except (UnknownAdapter, NoRoom, Stopped, InputError, OSError) as error:
            told = api_error(error)
            if folder is not None:  # do not tell clients the path on this machine
                told.args = (str(told).replace(str(folder), folder.name),)
            raise told from None

    async def _source(self, body: dict[str, Any], kind: str) -> AdapterSource:
        if kind == "blend":
            return AdapterSource(blend=_weights(body["blend"]))
        if kind == "path":
            return AdapterSource(folder=self._folder_of(body["path"]))
        if not self._allow_hub:
            raise ApiError(403, "hub: loading from the hub is off; start the server with --allow-hub", "hub_off", "hub")
        hub, revision = body["hub"], body.get("revision")
        if not isinstance(hub, str) or Path(hub).expanduser().exists() or not isinstance(revision, (str, type(None))):
            raise ApiError(400, "hub: must be an id such as owner/name", "invalid_value", "hub")
        try:
            return AdapterSource(folder=await anyio.to_thread.run_sync(resolve_adapter, hub, revision))
        except (InputError, RunError) as error:
            raise ApiError(400, str(error), "invalid_adapter", "hub") from None

    def _folder_of(self, path: Any) -> Path:
        """Return the folder that a client asks for, if it is allowed."""
        if self._folder is None:
            raise ApiError(
                403, "path: loading from this disk is off; start the server with --adapters-from", "path_off", "path"
            )
        if not isinstance(path, str) or not path or "\0" in path:
            raise ApiError(400, "path: must be a folder below the server's --adapters-from", "invalid_value", "path")
        root = self._folder.resolve()
        folder = (root / path).resolve()
        if folder == root or not folder.is_relative_to(root):
            raise ApiError(403, "path: outside the server's --adapters-from", "path_outside", "path")
        if not folder.is_dir():
            raise ApiError(404, "path: no such folder", "not_found", "path")
        return folder


def _weights(blend: Any) -> dict[str, float]:
    """Return the weights of a blend, {"name": weight}, after checking them."""
    fits = isinstance(blend, dict) and 0 < len(blend) <= 16
    fits = fits and all(
        isinstance(weight, (int, float))
        and not isinstance(weight, bool)
        and math.isfinite(weight)
        and abs(weight) <= 100
        for weight in blend.values()
    )
    if not fits:
        raise ApiError(
            400,
            'blend: must be an object with 1 to 16 adapters, such as {"bard": 0.7, "tutor": 0.3}',
            "invalid_value",
            "blend",
        )
    return {name: float(weight) for name, weight in blend.items()}


def _described(card: Card) -> dict[str, Any]:
    return {
        "name": card.name,
        "object": "adapter",
        "source": card.source,
        "method": card.method,
        "rank": card.rank,
        "bytes": card.nbytes,
        "resident": card.resident,
        "created": card.created,
        "own_chat_template": card.chat_template is not None,
    }
