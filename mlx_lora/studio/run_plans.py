"""Plan runs for the page with the planner's own function, in processes of their own, and keep the plans.

A plan reads the graph of a step, and while it does, some of MLX's functions are replaced for the whole process. A model that
answers in the same process would run into them.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from mlx_lora.api.plan import PlanParts, plan_run
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.files import find_sets, is_local, named_sets
from mlx_lora.kernels.choose import KernelChoice
from mlx_lora.models.meta import Outline
from mlx_lora.planner.shapes import Machine, ModelShape
from mlx_lora.planner.speed import Ceilings
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.model_stores import local_model
from mlx_lora.studio.page_words import fields_in, in_page_words
from mlx_lora.studio.tasks import Task, Tasks
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import format_duration, gigabytes

KEPT = 256  # plans
PROCESSES = 2  # one may read large data while the other answers the page
SHAPES = 12  # of models with adapters; an outline holds no weights
AT_ONCE_BYTES = 2_000_000  # data up to here is read while the page waits
# Settings that change neither memory nor speed; plans with others of these are the same.
NOT_PLANNED = frozenset(
    ("adapter_path", "project_name", "report_to", "verbose", "seed", "keep", "sample_tokens", "force")
)


class KeptParts(PlanParts):
    """Keeps the machine, and the shapes of the last models and adapters: a change of length, batch or steps is quick then."""

    def __init__(self):
        self._machines: dict[str, tuple[Machine, Ceilings]] = {}
        self._shapes: OrderedDict[str, tuple[Outline, ModelShape]] = OrderedDict()

    def machine(self, settings: TrainSettings, chip: str | None, memory_gb: int | None) -> tuple[Machine, Ceilings]:
        """Return this machine, measured once for each dtype; there is no other in the studio."""
        dtype = settings.model.dtype
        if dtype not in self._machines:
            self._machines[dtype] = super().machine(settings, chip, memory_gb)
        return self._machines[dtype]

    def shape(self, settings: TrainSettings, dtype: str, kernels: KernelChoice | None) -> tuple[Outline, ModelShape]:
        """Return outline and shape, kept for all settings that do not change them."""
        loop = settings.loop
        depends = [settings.model, settings.adapter, settings.objective, settings.optimizer, loop.kernels, loop.seed]
        key = repr([*depends, dtype, kernels, _version(settings.model.model)])
        if key not in self._shapes:
            self._shapes[key] = super().shape(settings, dtype, kernels)
        self._shapes.move_to_end(key)
        while len(self._shapes) > SHAPES:
            self._shapes.popitem(last=False)
        return self._shapes[key]


class Plans:
    """Plans by (model, settings, data), the most recently asked ones."""

    def __init__(self, tasks: Tasks):
        self._processes, self._wanted = _new_processes()
        self._kept: OrderedDict[str, dict[str, Any] | str] = OrderedDict()
        self._lock, self._tasks = threading.Lock(), tasks
        self._reading: dict[str, Task] = {}

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
        """Return the plan of a run if it was made before; None: it was not, and is not made now."""
        try:
            found = self._kept.get(_key(settings))
        except InputError:
            return None
        return found if isinstance(found, dict) else None

    def of_run(self, settings: Mapping[str, Any]) -> tuple[dict[str, Any], Task | None]:
        """Return the plan of a run, and the task that reads its data if that takes long; until then the data counts nothing.

        Raises:
            InputError: the planner refuses the settings or the data.
        """
        data = settings.get("data")
        if not data or not all(is_local(name) for name, _ in named_sets(data)):
            return self.of_config(settings), None
        key = _key(settings)
        if key in self._kept or _data_bytes(data) <= AT_ONCE_BYTES:
            return self._planned(settings), None
        with self._lock:
            if key not in self._reading or self._reading[key].state != "running":
                self._reading = {other: one for other, one in self._reading.items() if one.state == "running"}
                self._reading[key] = self._tasks.begin(
                    "plan", "Reading the data for the plan", lambda _: self._read(settings)
                )
            task = self._reading[key]
        return self.of_config(settings), task

    def _read(self, settings: Mapping[str, Any]) -> None:
        self._keep(_key(settings), self._made(settings))

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


@lru_cache(maxsize=1)
def _kept_parts() -> KeptParts:
    """Return what this process keeps between plans."""
    return KeptParts()


def _plan(settings: Mapping[str, Any]) -> dict[str, Any]:
    return plan_run(_readable(settings), parts=_kept_parts())


def _readable(settings: Mapping[str, Any]) -> TrainSettings:
    """Return settings whose model is the file itself, if it is one of the hub's cache."""
    model = settings.get("model")
    return train_settings({**settings, **({"model": local_model(model)} if model else {})})


def shown_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page shows of a plan."""
    predicted = plan["predicted"]
    line = f"Peak {gigabytes(plan['peak_bytes'])} of {gigabytes(plan['budget_bytes'])}"
    if plan["not_known"]:
        line = f"Memory is not known for this model ({', '.join(plan['not_known'])})"
    elif not plan["fits"]:
        line = f"Does not fit: needs {gigabytes(plan['needed_bytes'])} of {gigabytes(plan['budget_bytes'])}; {plan['advice']}"
    rows = "the data's rows" if plan["data"] else f"full rows of {plan['settings']['max_seq_length']:,} tokens"
    speed = f"about {predicted['tokens_per_s']:,.0f} tokens/s with {rows}"
    seconds = None if predicted["hours"] is None else predicted["hours"] * 3600
    lasting = f", {format_duration(seconds)}" if seconds is not None else ""
    return {
        "fits": plan["fits"], "peak_bytes": plan["peak_bytes"], "needed_bytes": plan["needed_bytes"],
        "limit_bytes": plan["budget_bytes"],
        "parts": [{"name": name, "bytes": size} for name, size in plan["parts"].items()],
        "tokens_per_s": predicted["tokens_per_s"], "seconds": seconds, "predicted": True,
        "line": in_page_words(f"{line}; {speed}{lasting} (predicted)."), "problems": [], "said": {},
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
    versions = [_version(settings.get("model"))]
    if settings.get("data"):
        versions += [_version(str(file.path)) for file in _files(settings["data"])]
    return json.dumps([sorted(counted.items()), versions], default=str)


def _version(path: str | None) -> list[Any]:
    file = Path(path or "").expanduser()
    file = file / "config.json" if file.is_dir() else file
    try:
        stat = file.stat()
    except OSError:
        return [path]
    return [str(file), stat.st_size, stat.st_mtime_ns]


def _files(data: str) -> list[Any]:
    if not all(is_local(name) for name, _ in named_sets(data)):
        return []
    return [file for one in find_sets(data) for files in one.splits.values() for file in files]


def _data_bytes(data: str) -> int:
    return sum(file.path.stat().st_size for file in _files(data))
