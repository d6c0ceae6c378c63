"""The studio's server: the page, its files, and the routes of all places."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio.to_thread
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from mlx_lora import __version__
from mlx_lora.reports import charts as page_template
from mlx_lora.serving import app as chat_page
from mlx_lora.serving.guard import Guard, GuardLimits
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.control import RunControl
from mlx_lora.studio.folders import Checker, Folders
from mlx_lora.studio.model_stores import ModelStores
from mlx_lora.studio.places import Studio, StudioPlace, find_places
from mlx_lora.studio.plans import Plans
from mlx_lora.studio.run_folders import RunListing
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


def make_studio(folders: Folders, guard: GuardLimits, max_upload_bytes: int) -> Starlette:
    """Return the studio as an ASGI application.

    Args:
        folders: its folders.
        guard: limits for requests.
        max_upload_bytes: of one file.

    Raises:
        RunError: a place lacks one of its files.
    """
    tasks, stores, listing = Tasks(folders.logs), ModelStores(folders), RunListing(folders)
    checker = Checker(folders, stores.roots(), listing.bases)
    control, plans = RunControl(folders, listing, tasks, checker), Plans(tasks)
    studio = Studio(folders, checker, stores, listing, control, plans, tasks, max_upload_bytes)
    places, here = find_places(), current_device()
    machine = {
        "chip": here.name, "memory_bytes": here.memory_bytes, "working_set_bytes": here.working_set_bytes, "device": here.backend,
    }  # fmt: skip
    # What the page shows at its top and does not change.
    fixed = {
        "version": __version__,
        "machine": machine,
        "home": str(folders.home),
        "key_required": guard.api_key is not None,
    }

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        control.begin()
        yield
        await anyio.to_thread.run_sync(control.close)
        await anyio.to_thread.run_sync(studio.closing.close)
        plans.close()

    app = Starlette(
        routes=[
            *page_routes(places),
            Route("/health", health),
            json_route("/api/state", lambda request, body: {**fixed, "tasks_running": tasks.running}),
            *tasks.routes(),
            *(route for place in places for route in place.routes(studio)),
        ],
        middleware=[Middleware(SafeHeaders), Middleware(Guard, limits=guard, answers=Counter())],
        exception_handlers=dict.fromkeys((ApiError, InputError, RunError, HTTPException), told),
        lifespan=lifespan,
    )
    app.state.ending = lambda: False  # the server's own answer stands here once there is one; streams end by it
    return app


def page_routes(places: Sequence[StudioPlace]) -> list[BaseRoute]:
    """Return the routes of the page and of its files, which lie under /static as they lie in this folder.

    Args:
        places: whose scripts the page loads; studio.js reads their names from the page.
    """

    async def page(request: Request) -> Response:
        text = (PAGES / "index.html").read_text(encoding="utf-8")
        links = [f'<link rel="modulepreload" href="{one.address}" data-place="{one.name}">' for one in places]
        return HTMLResponse(text.replace("<!-- places -->", "\n".join(links)))

    async def file(path: Path, request: Request) -> Response:
        return FileResponse(path)

    return [
        Route("/", page),
        *(Route(f"/static/{name}", partial(file, path)) for name, path in SHARED.items()),
        *(Route(place.address, partial(file, place.script)) for place in places),
        Mount("/static/pages", StaticFiles(directory=PAGES, check_dir=False)),
    ]
