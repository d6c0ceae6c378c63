"""The studio's server: the page, its files, and the routes of all places."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from mlx_lora import __version__
from mlx_lora.reports import charts as page_template
from mlx_lora.serving import app as chat_page
from mlx_lora.serving.guard import Guard, GuardLimits
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.data_routes import DataRoutes
from mlx_lora.studio.evaluation_routes import EvaluationRoutes
from mlx_lora.studio.example_routes import ExampleRoutes
from mlx_lora.studio.forgetting_routes import ForgettingRoutes
from mlx_lora.studio.model_routes import ModelRoutes
from mlx_lora.studio.model_stores import ModelStores
from mlx_lora.studio.places import Places
from mlx_lora.studio.previews import Previews
from mlx_lora.studio.run_commands import Checker
from mlx_lora.studio.run_control import RunControl
from mlx_lora.studio.run_listing import RunListing
from mlx_lora.studio.run_plans import Plans
from mlx_lora.studio.run_routes import RunRoutes, TrainRoutes
from mlx_lora.studio.talk_routes import ExportRoutes, TalkRoutes
from mlx_lora.studio.talking import Talk
from mlx_lora.studio.tasks import Tasks
from mlx_lora.studio.web import SafeHeaders, json_route, told
from mlx_lora.utils.device import current_device
from mlx_lora.utils.errors import InputError, RunError

PAGES = Path(__file__).parent / "pages"
# What other pages have too is served from where they have it.
SHARED = {
    "tokens.css": Path(page_template.__file__).parent / "pages" / "tokens.css",
    "markdown.js": Path(chat_page.__file__).parent / "pages" / "markdown.js",
}


class State:
    """GET /api/state: what the page shows at its top."""

    def __init__(self, places: Places, key_required: bool, tasks: Tasks):
        self._tasks = tasks
        device = current_device()
        self._fixed = {
            "version": __version__,
            "machine": {
                "chip": device.name,
                "memory_bytes": device.memory_bytes,
                "working_set_bytes": device.working_set_bytes,
                "device": device.backend,
            },
            "home": str(places.home),
            "key_required": key_required,
        }

    def routes(self) -> list[BaseRoute]:
        """Return its route."""
        return [json_route("/api/state", self.state)]

    def state(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """Return the state."""
        return {**self._fixed, "tasks_running": self._tasks.running}


def make_studio(places: Places, guard: GuardLimits, max_upload_bytes: int) -> Starlette:
    """Return the studio as an ASGI application.

    Args:
        places: its folders.
        guard: limits for requests.
        max_upload_bytes: of one file.
    """
    logs = places.home / "logs"
    tasks, stores = Tasks(logs), ModelStores(places)
    plans, listing = Plans(tasks), RunListing(places)
    checker = Checker(places, stores.roots(), listing.bases)
    control = RunControl(places, listing)
    talk = Talk(lambda: going_on(listing), current_device().working_set_bytes)
    parts: Sequence[Any] = [
        State(places, guard.api_key is not None, tasks),
        ModelRoutes(places, stores, checker, plans, tasks),
        tasks,
        ExampleRoutes(tasks),
        DataRoutes(places, checker, Previews(tasks, logs), max_upload_bytes),
        TrainRoutes(plans, checker, control, places.runs),
        RunRoutes(listing, control),
        ForgettingRoutes(listing, tasks),
        EvaluationRoutes(listing, checker.data, tasks),
        TalkRoutes(talk, checker),
        ExportRoutes(places, checker, tasks),
    ]

    async def page(request: Request) -> Response:
        return FileResponse(PAGES / "index.html")

    def shared(path: Path) -> Callable[[Request], Awaitable[Response]]:
        async def file(request: Request) -> Response:
            return FileResponse(path)

        return file

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        control.begin()
        yield
        await anyio.to_thread.run_sync(control.close)
        await anyio.to_thread.run_sync(talk.close)
        plans.close()

    app = Starlette(
        routes=[
            Route("/", page),
            Route("/health", health),
            *(Route(f"/static/{name}", shared(path)) for name, path in SHARED.items()),
            Mount("/static", StaticFiles(directory=PAGES, check_dir=False)),
            *(route for part in parts for route in part.routes()),
        ],
        middleware=[Middleware(SafeHeaders), Middleware(Guard, limits=guard, answers=Counter())],
        exception_handlers=dict.fromkeys((ApiError, InputError, RunError, HTTPException), told),
        lifespan=lifespan,
    )
    app.state.ending = lambda: False  # the server's own answer stands here once there is one; streams end by it
    return app


def going_on(listing: RunListing) -> list[dict[str, Any]]:
    """Return the lines of the runs that go on."""
    return [line for line in listing.listed([]) if line["state"] == "running"]
