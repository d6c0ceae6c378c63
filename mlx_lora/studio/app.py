"""The studio's server: the page, its files, and the routes of all places."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
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
from mlx_lora.studio import places
from mlx_lora.studio.folders import Checker, Folders
from mlx_lora.studio.model_stores import ModelStores
from mlx_lora.studio.plans import Plans
from mlx_lora.studio.runs import RunControl, RunListing
from mlx_lora.studio.web import SafeHeaders, Tasks, json_route, told
from mlx_lora.utils.device import current_device
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.guard import Guard, GuardLimits
from mlx_lora.utils.http import ApiError

PAGES = Path(__file__).parent / "pages"
# What other pages have too is served from where they have it.
SHARED = {name: page_template.COMMON / name for name in ("tokens.css", "markdown.js")}


@dataclass(frozen=True)
class Studio:
    """What the places of a studio share.

    Attributes:
        folders: that it may read and write.
        checker: of the models and files that requests name.
        stores: of models.
        listing: of runs.
        control: of runs and their queue.
        plans: of runs, kept.
        tasks: what takes longer than an answer.
        max_upload_bytes: of one file.
        closing: what is done when the server ends; a place adds its own.
    """

    folders: Folders
    checker: Checker
    stores: ModelStores
    listing: RunListing
    control: RunControl
    plans: Plans
    tasks: Tasks
    max_upload_bytes: int
    closing: ExitStack = field(default_factory=ExitStack)


@dataclass(frozen=True)
class StudioPlace:
    """A place: its name, its routes, and the script of its page with the address that the page loads it from."""

    name: str
    routes: Callable[[Studio], list[BaseRoute]]
    script: Path
    address: str


def find_places() -> list[StudioPlace]:
    """Return the places in the folders of their package, by name.

    Raises:
        RunError: a place has only one of its two files.
    """
    modules = {one.name for one in pkgutil.iter_modules(places.__path__)}
    scripts = {script.stem: script for folder in places.__path__ for script in Path(folder).glob("*.js")}
    if halves := sorted(modules ^ set(scripts)):
        raise RunError(f"places: {', '.join(halves)}: a place requires a .py and a .js file; add the other one")
    found = {name: importlib.import_module(f"{places.__name__}.{name}") for name in sorted(modules)}
    return [
        StudioPlace(name, module.routes, scripts[name], f"/static/places/{name}.js") for name, module in found.items()
    ]


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
    found, here = find_places(), current_device()
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
            *page_routes(found),
            Route("/health", health),
            json_route("/api/state", lambda request, body: {**fixed, "tasks_running": tasks.running}),
            *tasks.routes(),
            *(route for place in found for route in place.routes(studio)),
        ],
        middleware=[Middleware(SafeHeaders), Middleware(Guard, limits=guard, answers=Counter())],
        exception_handlers=dict.fromkeys((ApiError, InputError, RunError, HTTPException), told),
        lifespan=lifespan,
    )
    app.state.ending = lambda: False  # the server's own answer stands here once there is one; streams end by it
    return app


def page_routes(shown: Sequence[StudioPlace]) -> list[BaseRoute]:
    """Return the routes of the page and of its files, which lie under /static as they lie in this folder.

    Args:
        shown: places, whose scripts the page loads; studio.js reads their names from the page.
    """

    async def page(request: Request) -> Response:
        text = (PAGES / "index.html").read_text(encoding="utf-8")
        links = [f'<link rel="modulepreload" href="{one.address}" data-place="{one.name}">' for one in shown]
        return HTMLResponse(text.replace("<!-- places -->", "\n".join(links)))

    async def file(path: Path, request: Request) -> Response:
        return FileResponse(path)

    return [
        Route("/", page),
        *(Route(f"/static/{name}", partial(file, path)) for name, path in SHARED.items()),
        *(Route(place.address, partial(file, place.script)) for place in shown),
        Mount("/static/pages", StaticFiles(directory=PAGES, check_dir=False)),
    ]
