"""The places of the studio. Each is one Python file in this folder, its routes, and one JavaScript file beside it, its page.

A new place changes no other file. All of a place for notes would be notes.py

    from mlx_lora.studio.web import json_route

    def routes(studio):
        return [json_route("/api/notes", lambda request, body: {"notes": ["Try rank 32"]})]

and notes.js

    import { get } from "../pages/api.js";
    import { Heading, html } from "../pages/parts.js";
    import { useAsked } from "../pages/state.js";

    export const title = "Notes"; // in the sidebar
    export const order = 60; // there, after Talk & ship
    export const icon = "M5 3h14v18H5z"; // a path of 24 x 24, or the name of one in parts.js

    export function Place({ path }) { // of #/notes/a/b, path is ["a", "b"]
      const [answer] = useAsked((signal) => get("notes", signal), []);
      return html`<${Heading} title="Notes">${answer?.notes.join(", ")}<//>`;
    }
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from starlette.routing import BaseRoute

from mlx_lora.studio.control import RunControl
from mlx_lora.studio.folders import Checker, Folders
from mlx_lora.studio.model_stores import ModelStores
from mlx_lora.studio.plans import Plans
from mlx_lora.studio.run_folders import RunListing
from mlx_lora.studio.tasks import Tasks
from mlx_lora.utils.errors import RunError


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
    """Return the places in this package's folders, by name.

    Raises:
        RunError: a place has only one of its two files.
    """
    modules = {one.name for one in pkgutil.iter_modules(__path__)}
    scripts = {script.stem: script for folder in __path__ for script in Path(folder).glob("*.js")}
    if halves := sorted(modules ^ set(scripts)):
        raise RunError(f"places: {', '.join(halves)}: a place requires a .py and a .js file; add the other one")
    found = {name: importlib.import_module(f"{__name__}.{name}") for name in sorted(modules)}
    return [
        StudioPlace(name, module.routes, scripts[name], f"/static/places/{name}.js") for name, module in found.items()
    ]
