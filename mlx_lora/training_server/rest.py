"""The protocol's lists: training runs, checkpoints, sessions and samplers; and the download of an adapter folder.

A download's address has a random token, valid for an hour, instead of the API key, because the client fetches files without it.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from tinker import types

from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE
from mlx_lora.serving.schema import ApiError
from mlx_lora.training_server import protocol
from mlx_lora.training_server.checkpoints import EXTERNAL, KINDS, Place, Stored
from mlx_lora.training_server.models import LoraShape
from mlx_lora.training_server.sessions import Registry, not_found, owner_of

FILES = "/files/"
TOKEN_S = 3600.0
MOST_TOKENS = 1000
# The protocol's names of our kinds.
TYPES: dict[str, Any] = dict(zip(KINDS, ("training", "sampler", "external"), strict=True))
Handler = Callable[[Request], Awaitable[Response]]


def expiry(ttl_seconds: int | None) -> float | None:
    """Return when a checkpoint's time is over, UNIX time; None: never.

    Raises:
        ApiError: it is no time to live.
    """
    if ttl_seconds is None:
        return None
    if not 0 < ttl_seconds < 10**9:
        raise ApiError(422, f"ttl_seconds {ttl_seconds}: must be positive, at most 10 years or so", "invalid_request")
    return time.time() + ttl_seconds


def described(stored: Stored) -> types.Checkpoint:
    """Return a checkpoint as the protocol has it."""
    place = stored.place
    return types.Checkpoint(
        checkpoint_id=f"{place.kind}/{place.name}",
        checkpoint_type=TYPES[place.kind],
        time=datetime.fromtimestamp(stored.created, UTC),
        tinker_path=place.path,
        size_bytes=stored.size_bytes,
        user_metadata=stored.about.get("user_metadata"),
        expires_at=None if stored.expires is None else datetime.fromtimestamp(stored.expires, UTC),
    )


class RestRoutes:
    """The lists."""

    def __init__(self, registry: Registry):
        self._registry, self._worker = registry, registry.worker
        self._tokens: dict[str, tuple[Path, float]] = {}

    def routes(self, api: str) -> list[BaseRoute]:
        """Return the routes below `api`, and those of files."""
        run = f"{api}/training_runs/{{run}}"
        one = f"{run}/checkpoints/{{kind}}/{{name}}"
        rows: list[tuple[str, str, Handler]] = [
            ("GET", f"{api}/training_runs", self.runs), ("GET", run, self.run), ("GET", f"{run}/checkpoints", self.checkpoints_of),
            ("DELETE", one, self.delete), ("PUT", f"{one}/ttl", self.set_ttl), ("GET", f"{one}/external_weights_urls", self.urls),
            ("GET", f"{api}/checkpoints", self.checkpoints), ("POST", f"{api}/weights_info", self.weights_info),
            ("GET", f"{api}/sessions", self.sessions), ("GET", f"{api}/sessions/{{session}}", self.session),
            ("GET", f"{api}/samplers/{{sampler}}", self.sampler), ("GET", f"{FILES}{{token}}/{{name}}", self.file),
        ]  # fmt: skip
        return [Route(path, handler, methods=[method]) for method, path, handler in rows]

    # --- runs and checkpoints

    async def runs(self, request: Request) -> Response:
        """GET training_runs: those that live, and those that left checkpoints."""
        stored = await self._stored()
        live = [record.id for session in self._own_sessions(request) for record in session.models.values()]
        ids = list(dict.fromkeys([*reversed(live), *(one.place.run for one in stored)]))
        part, cursor = protocol.pages(ids, *_page(request))
        runs = [self._run(request, run_id, stored) for run_id in part]
        return _reply(types.TrainingRunsResponse(training_runs=runs, cursor=cursor))

    async def run(self, request: Request) -> Response:
        """GET training_runs/RUN."""
        return _reply(self._run(request, request.path_params["run"], await self._stored()))

    def _run(self, request: Request, run_id: str, stored: list[Stored]) -> types.TrainingRun:
        own = [one for one in stored if one.place.run == run_id]
        record = next((s.models[run_id] for s in self._own_sessions(request) if run_id in s.models), None)
        if record is None and not own:
            raise not_found("training run", run_id)
        shape = record.shape if record is not None else own[0].shape
        last = max([one.created for one in own] + ([record.last_request] if record is not None else []))

        def newest(kind: str) -> types.Checkpoint | None:
            return next((described(one) for one in own if TYPES[one.place.kind] == kind), None)

        return types.TrainingRun(
            training_run_id=run_id, base_model=self._worker.name if record is not None else own[0].base_model,
            model_owner="local", is_lora=True, lora_rank=shape.rank if isinstance(shape, LoraShape) else None,
            last_request_time=datetime.fromtimestamp(last, UTC), last_checkpoint=newest("training"),
            last_sampler_checkpoint=newest("sampler"), user_metadata=record.metadata if record is not None else None,
        )  # fmt: skip

    async def checkpoints_of(self, request: Request) -> Response:
        """GET training_runs/RUN/checkpoints."""
        run_id = request.path_params["run"]
        own = [described(one) for one in await self._stored() if one.place.run == run_id]
        return _reply(types.CheckpointsListResponse(checkpoints=own))

    async def checkpoints(self, request: Request) -> Response:
        """GET checkpoints: of all runs."""
        part, cursor = protocol.pages(await self._stored(), *_page(request))
        return _reply(types.CheckpointsListResponse(checkpoints=[described(one) for one in part], cursor=cursor))

    async def weights_info(self, request: Request) -> Response:
        """POST weights_info: what a client must know to load a checkpoint."""
        asked = protocol.read_json(await request.body())
        stored = await anyio.to_thread.run_sync(
            self._worker.checkpoints.read, Place.parse(str(asked.get("tinker_path")))
        )
        shape = stored.shape
        return _reply(
            types.WeightsInfoResponse(
                base_model=stored.base_model,
                is_lora=True,
                lora_rank=shape.rank,
                train_unembed=shape.unembed,
                train_mlp=shape.mlp,
                train_attn=shape.attention,
            )
        )

    async def delete(self, request: Request) -> Response:
        """DELETE a checkpoint."""
        await anyio.to_thread.run_sync(self._worker.checkpoints.delete, _place(request))
        return JSONResponse({})

    async def set_ttl(self, request: Request) -> Response:
        """PUT a checkpoint's time to live."""
        seconds = protocol.read_json(await request.body()).get("ttl_seconds")
        if not isinstance(seconds, int | None) or isinstance(seconds, bool):
            raise ApiError(422, "ttl_seconds: must be a whole number or null", "invalid_request")
        await anyio.to_thread.run_sync(self._worker.checkpoints.set_expiry, _place(request), expiry(seconds))
        return JSONResponse({})

    async def _stored(self) -> list[Stored]:
        return await anyio.to_thread.run_sync(self._worker.checkpoints.listed)

    # --- downloads

    async def urls(self, request: Request) -> Response:
        """GET the addresses of an adapter folder's files."""
        place = _place(request)
        if place.kind != EXTERNAL:
            raise ApiError(422, "only checkpoints of save_weights_external can be downloaded", "invalid_request")
        stored = await anyio.to_thread.run_sync(self._worker.checkpoints.read, place)
        folder = await anyio.to_thread.run_sync(self._worker.checkpoints.checked, stored)
        now, token = time.monotonic(), secrets.token_urlsafe(32)
        self._tokens = {key: value for key, value in self._tokens.items() if value[1] > now}
        while len(self._tokens) >= MOST_TOKENS:
            del self._tokens[next(iter(self._tokens))]
        self._tokens[token] = folder, now + TOKEN_S
        start = f"{request.url.scheme}://{request.url.netloc}{FILES}{token}"
        urls = {name: f"{start}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)}
        return _reply(
            types.ExternalWeightsUrlsResponse(urls=urls, expires=datetime.now(UTC) + timedelta(seconds=TOKEN_S))
        )

    async def file(self, request: Request) -> Response:
        """GET a file by its token."""
        folder, until = self._tokens.get(request.path_params["token"], (None, 0.0))
        name = request.path_params["name"]
        if folder is None or until <= time.monotonic() or name not in (CONFIG_FILE, WEIGHTS_FILE):
            raise ApiError(404, "no such file, or its hour is over; ask for its address again", "not_found")
        return FileResponse(folder / name)

    # --- sessions

    async def sessions(self, request: Request) -> Response:
        """GET sessions: this client's own."""
        ids = [session.id for session in self._own_sessions(request)]
        part, _ = protocol.pages(ids[::-1], *_page(request))
        return _reply(types.ListSessionsResponse(sessions=list(part)))

    async def session(self, request: Request) -> Response:
        """GET sessions/ID."""
        session = self._registry.session(request.path_params["session"], _owner(request))
        return _reply(
            types.GetSessionResponse(
                training_run_ids=list(session.models),
                sampler_ids=list(session.samplers),
                user_metadata=session.metadata,
                display_name=session.display_name,
            )
        )

    async def sampler(self, request: Request) -> Response:
        """GET samplers/ID."""
        found = self._registry.sampler(request.path_params["sampler"], _owner(request))
        return _reply(
            types.GetSamplerResponse(sampler_id=found.id, base_model=self._worker.name, model_path=found.path)
        )

    def _own_sessions(self, request: Request) -> list[Any]:
        own = _owner(request)
        return [session for session in self._registry.sessions.values() if session.owner == own]


def _owner(request: Request) -> str:
    return owner_of(request.headers.get("x-api-key", ""))


def _reply(message: Any) -> JSONResponse:
    return JSONResponse(message.model_dump(mode="json"))


def _place(request: Request) -> Place:
    return Place.of(*(request.path_params[part] for part in ("run", "kind", "name")))


def _page(request: Request) -> tuple[int, int]:
    """Return offset and limit of a list."""
    asked = [request.query_params.get(name, default) for name, default in (("offset", "0"), ("limit", "20"))]
    if not all(re.fullmatch(r"\d{1,9}", one) for one in asked):
        raise ApiError(422, "limit and offset must be whole numbers", "invalid_request")
    return int(asked[0]), min(int(asked[1]), 1000)
