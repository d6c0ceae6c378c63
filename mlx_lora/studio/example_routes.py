"""The example that needs neither a hub nor a file: the embedded model and the bard's verse, offered on an empty page."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute

from mlx_lora.api.demo import ITERS as STEPS
from mlx_lora.api.demo import QUESTIONS, RECIPE, SHORT_STEPS
from mlx_lora.studio.tasks import Tasks
from mlx_lora.studio.web import json_route
from mlx_lora.utils.cache import cache_dir
from mlx_lora.utils.downloads import SMOLLM2_GGUF

TEXT_TOKENS = 32  # of the texts before and after, some lines of verse


class ExampleRoutes:
    """The example's routes."""

    def __init__(self, tasks: Tasks):
        self._tasks = tasks

    def routes(self) -> list[BaseRoute]:
        """Return the routes."""
        return [json_route("/api/example", self.about), json_route("/api/example", self.fetch, "POST")]

    def about(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """GET /api/example: what it is made of, and whether its model is on this disk."""
        model = cache_dir("models") / SMOLLM2_GGUF.file_name
        settings = {"iters": STEPS, "steps_per_report": 1, "sample_tokens": TEXT_TOKENS, **SHORT_STEPS}
        return {
            "model": str(model), "here": model.is_file(), "mb": SMOLLM2_GGUF.size_mb, "data": RECIPE, "settings": settings,
            "questions": QUESTIONS,
        }  # fmt: skip

    def fetch(self, request: Request, body: dict[str, Any]) -> dict[str, Any]:
        """POST /api/example: get its model, or check the one that is here, as a task."""
        result = {"model": str(cache_dir("models") / SMOLLM2_GGUF.file_name)}
        task = self._tasks.child("download", "Get the example's model", ["workbench.example_model"], result)
        return {"task": task.public()}
