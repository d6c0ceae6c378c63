"""Plan runs for the page with the planner's own function, in processes of their own, and keep the plans.

A plan reads the graph of a step, and while it does, some of MLX's functions are replaced for the whole process. A model that
answers in the same process would run into them.

The three cards of the Train place are plans, too: each of the run that it starts, and before that what the rule says at once.

    Quick -> half the updates, Balanced -> the defaults, Thorough -> twice the updates (config/defaults.py)

What the user sets beats a card. A card's own settings depend on the number of examples, so they follow the data.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mlx_lora.api.plan import adapted_outline, plan_run
from mlx_lora.config.defaults import DataFacts, learning_rate_for, preset_settings, rows_per_step, with_length
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AUTO, TrainSettings
from mlx_lora.data.data_sets import DataFile, DataSet, find_sets, is_local, named_sets
from mlx_lora.data.file_formats import read_records
from mlx_lora.gguf.arch import model_config
from mlx_lora.gguf.reader import is_gguf, read_gguf
from mlx_lora.kernels.choose import KernelChoice
from mlx_lora.models.config import PARTS as INNER_CONFIGS
from mlx_lora.models.meta import Outline
from mlx_lora.planner.memory import ModelShape
from mlx_lora.studio.folders import stamps, stamps_at, stamps_of_settings
from mlx_lora.studio.model_stores import local_model
from mlx_lora.studio.web import BackgroundTask, Tasks, fields_in, in_page_words
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.http import ApiError
from mlx_lora.utils.parsing import parse_json
from mlx_lora.utils.text import format_duration, gigabytes

KEPT = 256  # plans
PROCESSES = 2  # one may read large data while the other answers the page
SHAPES = 12  # of models with adapters; an outline holds no weights
AT_ONCE_BYTES = 2_000_000  # data up to here is read while the page waits
# Settings that change neither memory nor speed; plans with others of these are the same.
NOT_PLANNED = frozenset(
    ("adapter_path", "project_name", "report_to", "verbose", "seed", "keep", "sample_tokens", "force")
)
CARDS = ("quick", "balanced", "thorough")
USUAL_CARD = "balanced"
ABOUT_TOKENS = 100  # of a row that was not read yet; only the ratio of rows to a batch counts here


KEPT_SHAPES: OrderedDict[str, tuple[Outline, ModelShape]] = OrderedDict()


def kept_outline(settings: TrainSettings, dtype: str, kernels: KernelChoice | None) -> tuple[Outline, ModelShape]:
    """Return what `adapted_outline` returns, kept for all settings that do not change it.

    A change of length, batch or steps is quick then.
    """
    loop = settings.loop
    depends = [settings.model, settings.adapter, settings.objective, settings.optimizer]
    depends += [loop.kernels, loop.seed, loop.offload_base]
    key = repr([*depends, dtype, kernels, stamps_at(Path(settings.model.model or "").expanduser())])
    if key not in KEPT_SHAPES:
        KEPT_SHAPES[key] = adapted_outline(settings, dtype, kernels)
    KEPT_SHAPES.move_to_end(key)
    while len(KEPT_SHAPES) > SHAPES:
        KEPT_SHAPES.popitem(last=False)
    return KEPT_SHAPES[key]


class Plans:
    """Plans by (model, settings, data), the most recently asked ones."""

    def __init__(self, tasks: Tasks):
        self._processes, self._wanted = _new_processes()
        self._kept: OrderedDict[str, dict[str, Any] | str] = OrderedDict()
        self._lock, self._tasks = threading.Lock(), tasks

    def close(self) -> None:
        """End the processes, whatever they are planning."""
        self._wanted.close()
        self._processes.shutdown(wait=False, cancel_futures=True)

    def of_config(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the plan of settings without their data: every row has `max_seq_length` tokens.

        Raises:
            InputError: the planner refuses them.
        """
        return self._planned({name: value for name, value in settings.items() if name != "data"})

    def known(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the plan of a run if it was made before; None: it was not, and is not made now.

        Raises:
            InputError: the data cannot be used.
        """
        found = self._kept.get(_key(settings))
        return found if isinstance(found, dict) else None

    def of_run(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], BackgroundTask | None]:
        """Return the plan of a run, and the task that reads its data if that takes long; until then the data counts nothing.

        Raises:
            InputError: the planner refuses the settings or the data.
        """
        files = local_files(settings.get("data"))
        if not files:
            return self.of_config(settings), None
        key = _key(settings)
        if key in self._kept or sum(file.path.stat().st_size for file in files) <= AT_ONCE_BYTES:
            return self._planned(settings), None

        def read(task: BackgroundTask) -> None:
            self._keep(key, self._made(settings))

        task = self._tasks.begin("plan", "Reading the data for the plan", read, key=key)
        return self.of_config(settings), task

    def _made(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        processes = self._processes
        try:
            return processes.submit(_plan, dict(settings)).result()
        except BrokenProcessPool:
            with self._lock:
                if self._processes is processes:
                    self._processes, self._wanted = _new_processes()
            raise ApiError(
                503,
                "the planner's process was ended, perhaps for lack of memory; close other programs and ask again",
                "no_plan",
            ) from None

    def _planned(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        key = _key(settings)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        if isinstance(found, str):
            raise InputError(found)
        if found is not None:
            return found
        try:
            return self._keep(key, self._made(settings))
        except InputError as error:
            if Path(str(settings.get("model"))).exists():  # the hub may be reached the next time
                self._keep(key, str(error))
            raise

    def _keep(self, key: str, result: Any) -> Any:
        with self._lock:
            self._kept[key] = result
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return result


def _new_processes() -> tuple[ProcessPoolExecutor, Connection]:
    """Return the processes, and the end of a pipe: when it is closed, they end."""
    context = multiprocessing.get_context("spawn")
    wanted, held = context.Pipe(duplex=False)
    return ProcessPoolExecutor(PROCESSES, context, _begin_process, (wanted,)), held


def _begin_process(wanted: Connection) -> None:
    """Set up a process: it leaves Ctrl-C to the server, and ends with it, or when it is no longer wanted."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = multiprocessing.parent_process()

    def end_when_told() -> None:
        wait([wanted, *([server.sentinel] if server is not None else [])])
        os._exit(0)

    threading.Thread(target=end_when_told, daemon=True).start()


def _plan(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan, of the file itself for a model of the hub's cache."""
    model = settings.get("model")
    return plan_run(
        train_settings({**settings, **({"model": local_model(model)} if model else {})}), outlined=kept_outline
    )


def shown_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a plan."""
    predicted, hours = plan["predicted"], plan["predicted"]["hours"]
    line = f"Peak {gigabytes(plan['peak_bytes'])} of {gigabytes(plan['budget_bytes'])}"
    if plan["not_known"]:
        line = f"Memory is not known for this model ({', '.join(plan['not_known'])})"
    elif not plan["fits"]:
        line = f"Does not fit: needs {gigabytes(plan['needed_bytes'])} of {gigabytes(plan['budget_bytes'])}; {plan['advice']}"
    rows = "the data's rows" if plan["data"] else f"full rows of {plan['settings']['max_seq_length']:,} tokens"
    line += f"; about {predicted['tokens_per_s']:,.0f} tokens/s with {rows}"
    line += "" if hours is None else f", {format_duration(hours * 3600)}"
    return {
        "fits": plan["fits"], "peak_bytes": plan["peak_bytes"], "needed_bytes": plan["needed_bytes"],
        "limit_bytes": plan["budget_bytes"],
        "parts": [{"name": name, "bytes": size} for name, size in plan["parts"].items()],
        "tokens_per_s": predicted["tokens_per_s"], "seconds": None if hours is None else hours * 3600, "predicted": True,
        "line": in_page_words(f"{line} (predicted)."), "problems": [], "said": {},
        "chosen": plan["settings"], "model": plan["model"], "data": plan["data"], "steps": plan["steps"],
        "warnings": [in_page_words(warning) for warning in plan["warnings"]],
        "warned": {name: in_page_words(warning) for warning in plan["warnings"] for name in fields_in(warning)[:1]},
    }  # fmt: skip


def refused_plan(problem: str) -> dict[str, Any]:
    """Return a plan's answer for settings that cannot be planned, with what is wrong at each field that it names."""
    words = in_page_words(problem)
    return {
        "fits": False, "peak_bytes": None, "needed_bytes": None, "limit_bytes": None, "parts": [], "tokens_per_s": None,
        "seconds": None, "predicted": True, "line": words, "problems": [words],
        "said": dict.fromkeys(fields_in(problem), words), "chosen": None, "model": None, "data": None, "steps": None,
        "warnings": [], "warned": {},
    }  # fmt: skip


def _key(settings: Mapping[str, Any]) -> str:
    """Return a text that changes with all that a plan depends on, the versions of files among it."""
    counted = {name: value for name, value in settings.items() if name not in NOT_PLANNED}
    model = stamps_at(Path(settings["model"]).expanduser()) if settings.get("model") else None
    data = stamps(file.path for file in local_files(settings.get("data")))
    return json.dumps([sorted(counted.items()), stamps_of_settings(settings), model, data], default=str)


def local_files(data: str | None) -> list[DataFile]:
    """Return the files that `--data` names; none if a set of it is on the hub."""
    return [file for one in local_sets(data) for files in one.splits.values() for file in files]


def local_sets(data: str | None) -> list[DataSet]:
    """Return the sets that `--data` names; none if one of them is on the hub."""
    return find_sets(data) if data and all(is_local(name) for name, _ in named_sets(data)) else []


def own_settings(
    plans: Plans, card: str, settings: Mapping[str, Any], given: Mapping[str, Any]
) -> tuple[dict[str, Any], BackgroundTask | None]:
    """Return what a card adds to the settings, and the task that reads the data if the card's length waits for it.

    Args:
        plans: that are kept.
        card: one of CARDS.
        settings: of the page, checked.
        given: those that the user set, which win, as they came: a value that is the default counts here.

    Raises:
        InputError: the settings or the data cannot be used.
    """
    if card == USUAL_CARD:
        return {}, None
    plan, task = plans.of_run(settings)
    data, rows = plan["data"], plan["objective"]["rows_per_example"]
    facts = DataFacts(data["rows"] // rows, data["tokens"]) if data else None
    return without(preset_settings(card, facts), given), task


def cards_at_once(settings: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what the rule says of each card, without the tokenizer and without planning.

    Returns:
        By card, `learning_rate`, `epochs`, `rank` and `steps`, which are about right; None where nothing is known.
    """
    kind, examples = kind_of_model(settings.get("model")), count_examples(settings)
    facts = DataFacts(examples, examples * ABOUT_TOKENS) if examples else None
    found = {}
    for card in CARDS:
        asked = train_settings({**without(preset_settings(card, facts), given), **settings})
        rate = asked.optimizer.learning_rate
        if rate in (None, AUTO) and kind is not None:
            rate = learning_rate_for(*kind, asked)
        loop = asked.loop
        epochs, steps = (loop.epochs, None) if loop.iters is None else (None, loop.iters)
        if facts is not None and loop.iters is None:
            rows = loop.batch_size or rows_per_step(facts.examples)
            tokens = loop.batch_tokens or math.ceil(1.25 * rows * ABOUT_TOKENS)
            epochs = with_length(asked, tokens, facts).loop.epochs or 1.0
            steps = max(1, round(epochs * facts.examples / rows / loop.grad_accumulation_steps))
        found[card] = {"learning_rate": rate, "rank": asked.adapter.rank, "epochs": epochs, "steps": steps}
    return found


def without(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card's settings without those that the user has set; steps and passes are two names of one."""
    said = {name for name, value in given.items() if value is not None and value != ""}
    said |= {"epochs"} if "iters" in said else set()
    return {name: value for name, value in own.items() if name not in said}


def kind_of_model(model: Any) -> tuple[str, int] | None:
    """Return a model's type and width from its configuration on this disk; None: it is elsewhere, or not readable."""
    path = Path(local_model(str(model or ""))).expanduser()
    try:
        if path.is_file() and is_gguf(path):
            config = model_config(read_gguf(path))
        else:
            config = parse_json((path / "config.json" if path.is_dir() else path).read_bytes())
    except (OSError, ValueError, InputError):
        return None
    if not isinstance(config, dict):
        return None
    inner = next((config[part] for part in INNER_CONFIGS if isinstance(config.get(part), dict)), config)
    width = inner.get("hidden_size") or config.get("hidden_size") or 0
    return str(config.get("model_type", "")), width if isinstance(width, int) else 0


def count_examples(settings: Mapping[str, Any]) -> int | None:
    """Return how many records small data on this disk has to train on; None: it is elsewhere, large, or not readable."""
    count = 0.0
    try:
        sets = local_sets(settings.get("data"))
        if sum(file.path.stat().st_size for one in sets for file in one.splits.get("train", ())) > AT_ONCE_BYTES:
            return None
        for one in sets:
            records = sum(1 for file in one.splits.get("train", ()) for _ in read_records(file.path, file.sheet))
            held_out = 0.0 if "valid" in one.splits else train_settings(dict(settings)).data.valid_fraction
            count += one.weight * (records - (held_out if held_out >= 1 else records * held_out))
    except (OSError, ValueError, InputError):
        return None  # the plan says what is wrong
    return round(count) or None
