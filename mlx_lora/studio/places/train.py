"""The Train place: settings, cards, plans, a run's start; and the example that needs neither a hub nor a file."""

from __future__ import annotations

import contextlib
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from starlette.requests import Request
from starlette.routing import BaseRoute

from mlx_lora.api.demo import ITERS as STEPS
from mlx_lora.api.demo import QUESTIONS, RECIPE, SHORT_STEPS
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import TAUGHT
from mlx_lora.config.settings import FIELDS
from mlx_lora.config.sweep import PAGE_FILE, SET_BY_SWEEP, SWEEP_FILE
from mlx_lora.reports.sweep_page import LOSS, advice
from mlx_lora.studio.app import Studio
from mlx_lora.studio.folders import free_path, safe_name
from mlx_lora.studio.plans import CARDS, USUAL_CARD, cards_at_once, local_files, own_settings, refused_plan, shown_plan
from mlx_lora.studio.runs import train_words
from mlx_lora.studio.web import SWEEP, json_route, setting_groups
from mlx_lora.trainer.sweep import SweepState, results_of
from mlx_lora.utils.console import finite_values
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir
from mlx_lora.utils.http import ApiError
from mlx_lora.utils.hub import SMOLLM2_GGUF
from mlx_lora.utils.text import command_line

SWEEPS = "sweeps"  # the folder of all sweeps, in the studio's own
TEXT_TOKENS = 32  # of the texts before and after, some lines of verse


def routes(studio: Studio) -> list[BaseRoute]:
    """Return the routes of what is chosen before a run, of its start, and of the example."""
    return [
        json_route("/api/settings", lambda request, body: {"groups": setting_groups()}),
        json_route("/api/train/rule", partial(rule, studio), "POST"),
        json_route("/api/train/plan", partial(plan, studio), "POST"),
        json_route("/api/train/start", partial(start, studio), "POST"),
        json_route("/api/train/sweep", partial(sweep, studio), "POST"),
        json_route("/api/train/sweep/{name}", partial(swept, studio)),
        json_route("/api/example", about_example),
        json_route("/api/example", partial(fetch_example, studio), "POST"),
    ]


def rule(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/train/rule: what the rule of defaults says of each card, at once."""
    settings = studio.checker.settings(body.get("settings"))
    try:
        return {"cards": cards_at_once(settings, body["settings"])}
    except InputError:
        return {"cards": {}}  # the plan says what is wrong


def plan(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/train/plan: the plan of a card's run, its command, and the settings that the run begins with."""
    settings, card = studio.checker.settings(body.get("settings")), card_of(body)
    folder = studio.folders.runs / safe_name(body.get("name") or "my-run", "Name of the run")
    command = command_line(train_words(settings, folder))
    words: dict[str, Any] = {"card": card, "own": {}, "task": None, "run_yaml": "", "command": command}
    try:
        train_settings({**settings, "adapter_path": str(folder)})  # what the command would refuse
        if not settings.get("model"):
            raise InputError("choose a model first")
        words["own"], reads = own_settings(studio.plans, card, settings, body["settings"])
        settings = {**words["own"], **settings}
        words["command"] = command_line(train_words(settings, folder))
        # As the run will write it, before it chooses what is left to it (a date, shared prompts).
        written = train_settings({**settings, "adapter_path": str(folder)}).to_flat() | {"resume": None, "force": False}
        words["run_yaml"] = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
        plan, task = (studio.plans.of_config(settings), reads) if reads else studio.plans.of_run(settings)
    except InputError as error:
        return {**refused_plan(str(error)), **words}
    words["waits"] = reads is not None
    return {**shown_plan(plan), **words, "task": task.public() if task else None}


def start(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/train/start."""
    settings, peak, steps = settings_with(studio, body, without_data=TAUGHT), None, None
    with contextlib.suppress(InputError):  # the command itself says what is wrong, in its log
        settings = with_card(studio, body, settings)
        # A run does not wait for a plan that the page has not shown: it makes its own, and says how many steps it takes.
        if plan := studio.plans.known(settings):
            peak, steps = plan["peak_bytes"], plan["steps"]
    return {"run": studio.control.start(settings, body.get("name"), bool(body.get("queue")), peak, steps)}


def settings_with(studio: Studio, body: dict[str, Any], without_data: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings of a request, checked; the objectives `without_data` need none.

    Raises:
        ApiError: 400, model or data are missing, or a setting is wrong.
    """
    settings = studio.checker.settings(body.get("settings"))
    needed = ("model",) if settings.get("objective") in without_data else ("model", "data")
    if missing := [name for name in needed if not settings.get(name)]:
        raise ApiError(400, f"no {' and no '.join(missing)} yet; choose them first", "missing")
    return settings


def with_card(studio: Studio, body: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with those of the request's card.

    Raises:
        ApiError: 409, the run's length is not known yet.
        InputError: the settings or the data cannot be used.
    """
    card = card_of(body)
    own, reads = own_settings(studio.plans, card, settings, body["settings"])
    if reads:
        words = f"the data is still being read, and the length of a {card} run depends on it; wait for its card"
        raise ApiError(409, words, "data_is_read")
    return {**own, **settings}


def sweep(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/train/sweep: search the learning rate for these settings, as a task; a search with the same settings goes on.

    Raises:
        ApiError: 409, something else trains.
    """
    settings = settings_with(studio, body)
    name = safe_name(body.get("name") or "rates", "Name of the run")
    settings = with_card(studio, body, settings)
    if busy := studio.control.going_on():
        raise ApiError(409, f"{busy} is still running; wait for it, or stop it first", "busy")
    settings = {key: value for key, value in settings.items() if key not in (*SET_BY_SWEEP, "learning_rate")}
    out = sweep_folder(studio.folders.home / SWEEPS / name, settings)
    words = ["sweep", *train_words(settings, out)[1:-2], "--out", str(out), *(["--resume"] if out.exists() else [])]
    task = studio.tasks.child(SWEEP, f"Learning rates for {out.name}", words, {"name": out.name, "path": str(out)})
    return {"task": task.public(), "command": command_line(words), "name": out.name}


def sweep_folder(wanted: Path, settings: dict[str, Any]) -> Path:
    """Return the folder of the sweep with these settings, to go on with it, or one that is not there yet: NAME, NAME-2 ..."""
    asked = finite_values(train_settings(settings).to_flat())

    def goes_on(folder: Path) -> bool:
        """Tell whether a folder holds a sweep with these settings and the data as it is now."""
        try:
            before, written = SweepState.read(folder).asked["settings"], (folder / SWEEP_FILE).stat().st_mtime
            changed = any(file.path.stat().st_mtime > written for file in local_files(settings["data"]))
        except (InputError, OSError, KeyError, TypeError):
            return False
        compared = {name: value for name, value in asked.items() if name not in SET_BY_SWEEP}
        return not changed and all(before.get(name, FIELDS[name].default) == one for name, one in compared.items())

    return free_path(wanted, goes_on)


def swept(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """GET /api/train/sweep/NAME: what a sweep has found so far."""
    folder = studio.folders.home / SWEEPS / safe_name(request.path_params["name"], "Name of the run")
    if not (folder / SWEEP_FILE).is_file():
        raise ApiError(404, "there is no such sweep; start it again", "not_found")
    state = SweepState.read(folder)
    found = results_of(state, state.asked.get("settings", {}).get("metric_for_best_model", LOSS), {})
    rate = None if state.winner is None else state.candidates[state.winner]["learning_rate"]
    return {
        "advice": advice(found), "rows": found.table(), "metric": found.metric, "learning_rate": rate,
        "page": str(folder / PAGE_FILE),
    }  # fmt: skip


def card_of(body: dict[str, Any]) -> str:
    """Return the card of a request, the usual one if it names none.

    Raises:
        ApiError: 400, there is no such card.
    """
    card = body.get("card") or USUAL_CARD
    if card not in CARDS:
        raise ApiError(400, f"card: must be one of {', '.join(CARDS)}", "invalid_value", "card")
    return card


def about_example(request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """GET /api/example: what it is made of, and whether its model is on this disk."""
    model = cache_dir("models") / SMOLLM2_GGUF.file_name
    settings = {"iters": STEPS, "steps_per_report": 1, "sample_tokens": TEXT_TOKENS, **SHORT_STEPS}
    return {
        "model": str(model), "here": model.is_file(), "mb": SMOLLM2_GGUF.size_mb, "data": RECIPE, "settings": settings,
        "questions": QUESTIONS,
    }  # fmt: skip


def fetch_example(studio: Studio, request: Request, body: dict[str, Any]) -> dict[str, Any]:
    """POST /api/example: get its model, or check the one that is here, as a task."""
    result = {"model": str(cache_dir("models") / SMOLLM2_GGUF.file_name)}
    task = studio.tasks.child("download", "Get the example's model", ["studio.model_stores", "--example"], result)
    return {"task": task.public()}
