"""Train an adapter on a loaded base, from data and settings as Python has them, and hold the results of the run.

`data_source` takes a path or hub id, or records in memory, which become a file in the cache:

    "data.jsonl", "owner/name"                      as the command's --data
    [{"prompt": ..., "completion": ...}, ...]       one set; part of it is held out for validation
    {"train": [...], "validation": [...]}           several sets, as a datasets.DatasetDict has them

The file is named by its content, so run.yaml repeats the run, and equal data is encoded only once.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx

from mlx_lora.api.base import Base, PathLike, as_base, speaks_python
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AUTO, FIELDS, SECTIONS, ModelSettings, TrainSettings
from mlx_lora.data.files import SPLIT_NAMES
from mlx_lora.models.load import Base as LoadedBase
from mlx_lora.parallel.ranks import find_launch
from mlx_lora.reports.run_report import REPORT_FILE, read_records
from mlx_lora.rollouts.rewards import IN_PYTHON, RewardFunction
from mlx_lora.trainer.callbacks import Callback
from mlx_lora.trainer.find_learning_rate import find_learning_rate
from mlx_lora.trainer.progress import curve_html, display_here
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.several_runs import SeveralRuns, failures
from mlx_lora.trainer.trainer import Outcome
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, replacing_folder, sha256_of
from mlx_lora.utils.parsing import parse_yaml
from mlx_lora.utils.text import counted


@speaks_python()
def train(
    base: Base | PathLike,
    data: Any,
    adapter_path: PathLike | None = None,
    *,
    method: str | None = None,
    rank: int | None = None,
    iters: int | None = None,
    epochs: float | None = None,
    learning_rate: float | Literal["auto"] | None = None,
    batch_size: int | None = None,
    max_seq_length: int | None = None,
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    progress: bool = True,
    **settings: Any,
) -> Run:
    """Train an adapter, and return the run's results; the base itself stays as it is, without an adapter.

    Args:
        base: from `load`, or a model's name.
        data: path, hub id, list of dicts, `datasets.Dataset`, or a dict of these by split. Each record has the form of one
            of the data formats, such as {"prompt": ..., "completion": ...} or {"messages": [...]}. With
            `objective="distill"`, None: the model writes prompts itself.
        adapter_path: folder for the adapter and all other results; it must not hold an adapter, unless with `force=True`
            or `resume="auto"`. None: a new folder `runs/DATE-TIME-...` in the cache (~/.cache/mlx_lora), which is kept.
        method: lora, dora, rslora, lora-plus, pissa, adalora, relora or full.
        rank: of the adapter's factors (default 16).
        iters: optimizer steps; default: `epochs` over the data.
        epochs: passes over the data (default: 1, or as many as give a small set about 100 steps).
        learning_rate: at its peak (default: by the model's width and family); "auto": try several in the run's first part.
        batch_size: rows per micro-batch; default: as many as `batch_tokens` holds, which are 4 to 32 rows by the data's size.
        max_seq_length: longest sequence in tokens (default 2048).
        seed: of data order, initial factors and dropout (default 0).
        callbacks: instances of `Callback`, told of steps, reports, validations and saves.
        progress: show a bar and the curve in a notebook, the command's bar or lines elsewhere; False: print nothing.
        settings: every other setting of `mlx-lora train --help-all` that is not about the model, with underscores:
            `target_modules=["q_proj", "v_proj"]`, `mask_prompt=False`, `objective="dpo"`. `reward` and `tools` also take
            functions, and `environment` a class.

    Raises:
        InputError: an argument, the data or the folder cannot be used; unknown names are answered with the right one.
        RunError: the run diverged, could not write its results, or a callback failed.
    """
    named = {
        "method": method, "rank": rank, "iters": iters, "epochs": epochs, "learning_rate": learning_rate,
        "batch_size": batch_size, "max_seq_length": max_seq_length, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None} | settings
    given, functions = named_functions(given)
    if find_launch(dict(os.environ)) is not None:
        raise InputError(
            "train: cannot run in a launcher of several processes; launch the command `mlx-lora train` instead"
        )
    base = as_base(base, "train")
    if adapter_path is None:
        if "resume" in given:
            raise InputError("--resume without --adapter-path: give the folder of the run to continue")
        adapter_path = cache_dir("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"
    resolved = run_settings(
        base.settings,
        {**given, "adapter_path": os.fspath(adapter_path), "data": None if data is None else data_source(data)},
    )
    with lent_for_training(base, progress) as lent:
        show = display_here() if progress else None
        if resolved.optimizer.learning_rate == AUTO:
            resolved, _ = find_learning_rate(resolved, base=lent)
        outcome = train_run(resolved, show=show, base=lent, callbacks=callbacks, functions=functions)
    if outcome.interrupted and not outcome.steps:
        raise KeyboardInterrupt
    return Run.of(Path(adapter_path), outcome)


@contextmanager
def lent_for_training(base: Base, progress: bool) -> Iterator[LoadedBase]:
    """Lend a base to runs, whose lines are shown if `progress` says so."""
    base.release()
    mx.reset_peak_memory()  # an earlier run's peak is not this one's
    try:
        with base.loaded.lent() as lent, console.log_to(console.show if progress else None):
            yield lent
    finally:
        device.compile_for(device.COMPILE_FROM_STEPS)  # a short run turned compiling off


@speaks_python()
def train_several(base: Base | PathLike, runs: Sequence[Mapping[str, Any]], *, progress: bool = True) -> list[Run]:
    """Train several adapters on one base at once, each as if alone, and return their results in the same order.

    The base computes once for the rows of all runs, so small batches take less time than one run after another
    (docs/training.md). The base itself stays as it is.

    Args:
        base: from `load`, or a model's name.
        runs: of each run what `train` takes: `data`, an `adapter_path` of its own, and settings by name.
        progress: show lines of progress, each with the name of its run's folder; False: print nothing.

    Raises:
        InputError: runs that cannot be trained together, or see `train`.
        RunError: some runs failed; the results of the others are in their folders.
    """
    if len(runs) < 2:
        raise InputError(f"train_several: found {counted(len(runs), 'run')}; give two or more, or call train for one")
    base = as_base(base, "train_several")
    settings = []
    for number, given in enumerate(runs):
        missing = [name for name in ("data", "adapter_path") if given.get(name) is None]
        if missing:
            raise InputError(f"train_several, run {number}: no {' and no '.join(missing)}; each run needs its own")
        named = {"data": data_source(given["data"]), "adapter_path": os.fspath(given["adapter_path"])}
        settings.append(run_settings(base.settings, {**given, **named}))
    with lent_for_training(base, progress) as lent:
        members = SeveralRuns.open(settings, base=lent).train()
    if failed := failures(members):
        raise failed
    return [Run.of(Path(member.folder), member.outcome) for member in members if member.outcome is not None]


# Results

DOTS_PER_INCH = 120


def shown_figure(**options: Any) -> Any:
    """Return a matplotlib figure with its picture: notebooks show plain ones only after an import of pyplot and drawing with it.

    Raises:
        InputError: matplotlib, an extra, is not installed.
    """
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports] # an extra
    except ImportError:
        raise InputError("plot: matplotlib is not installed; pip install 'mlx-lora[plots]'") from None

    class ShownFigure(Figure):
        def _repr_png_(self) -> bytes:
            """Return the picture, as IPython asks for it."""
            picture = BytesIO()
            self.savefig(picture, format="png", dpi=DOTS_PER_INCH)
            return picture.getvalue()

    return ShownFigure(**options)


@dataclass(frozen=True)
class Run:
    """The results of a training run.

    Attributes:
        adapter: the run's folder, which `generate`, `evaluate` and `export` take as `adapter`.
        steps: optimizer steps taken.
        val_loss: of the validation at the end; None without one.
        interrupted: whether the run was, with Ctrl-C or the notebook's stop button; the adapter is saved.
        stopped_early: whether the validations no longer got better (`early_stopping_patience`).
    """

    adapter: Path
    steps: int
    val_loss: float | None
    interrupted: bool
    stopped_early: bool

    @classmethod
    def of(cls, adapter: Path, ended: Outcome) -> Run:
        """Return the results of a run that ended in this way."""
        return cls(adapter, ended.steps, ended.val_loss, ended.interrupted, ended.stopped_early)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: one per report, and one per validation, which has a `val_loss` and no `loss`."""
        return read_records(self.adapter / "metrics.jsonl")

    @property
    def losses(self) -> list[float]:
        """The training losses, one per report; `steps_per_report=1` gives one per step."""
        return [_number(line["loss"]) for line in self.metrics if line["val_loss"] is None]

    @property
    def val_losses(self) -> list[float]:
        """The losses on held-out rows, the first before the training."""
        return [line["val_loss"] for line in self.metrics if line["val_loss"] is not None]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings of the run, as in run.yaml."""
        return parse_yaml((self.adapter / "run.yaml").read_text(encoding="utf-8"))

    @property
    def report(self) -> Path:
        """The page with curves, settings and texts before and after."""
        return self.adapter / REPORT_FILE

    @speaks_python()
    def plot(self) -> Any:
        """Return the curves of training and held-out loss as a matplotlib figure, which a notebook shows.

        Raises:
            InputError: matplotlib is not installed.
        """
        figure = shown_figure(figsize=(7, 4), layout="constrained")
        axes = figure.subplots()
        lines, marks = [m for m in self.metrics if m["val_loss"] is None], [m for m in self.metrics if m["val_loss"]]
        axes.plot([m["step"] for m in lines], [_number(m["loss"]) for m in lines], label="training")
        if marks:
            axes.plot([m["step"] for m in marks], [m["val_loss"] for m in marks], "o--", label="held-out")
        axes.set(xlabel="step", ylabel="loss", title=self.adapter.name)
        axes.legend()
        return figure

    def _repr_html_(self) -> str:
        """Show the curves where a notebook shows this object."""
        words = f"{self.steps} steps; adapter and report.html in <code>{escape(str(self.adapter))}</code>"
        return curve_html(self.metrics, f"<div>{words}</div>")


def _number(loss: float | None) -> float:
    """Return a loss of metrics.jsonl, where one that is not finite is null."""
    return math.nan if loss is None else loss


# Settings

MODEL_FIELDS = tuple(field.name for field in fields(ModelSettings))
# Settings that only the command has -> what Python does instead.
ONLY_COMMAND = {
    "train": "call mlx_lora.evaluate to measure only",
    "test": "call mlx_lora.evaluate(base, data, adapter=run.adapter)",
    "test_batches": "call mlx_lora.evaluate(base, data, adapter=run.adapter)",
    "max_restarts": "it restarts the process; use the command `mlx-lora train`",
    "short_buffers": "it restarts the process; use the command `mlx-lora train`",
}


def run_settings(model: ModelSettings, given: Mapping[str, Any], of: Sequence[str] = ()) -> TrainSettings:
    """Return the settings of a run on a loaded model.

    Args:
        model: that the base was loaded with.
        given: settings by name, as the caller wrote them.
        of: the sections whose settings are used (`data`, `objective`); empty: all.

    Raises:
        InputError: unknown names, values that are not allowed, or settings of `load` or of the command.
    """
    problems = [f"{name}: belongs to the model; give it to mlx_lora.load" for name in given if name in MODEL_FIELDS]
    problems += [f"{name}: not available in Python; {advice}" for name, advice in ONLY_COMMAND.items() if name in given]
    used = {field.name for section in of for field in fields(SECTIONS[section])} | {"seed"} if of else set(FIELDS)
    unused = [name for name in given if name in FIELDS and name not in {*used, *MODEL_FIELDS, *ONLY_COMMAND}]
    problems += [f"{name}: a setting of training, which is not used here; leave it out" for name in unused]
    if problems:
        raise InputError("; ".join(problems))
    return replace(train_settings(plain(given)), model=model)


def named_functions(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, RewardFunction]]:
    """Return settings in which names replace functions and classes, and these by their names.

    Args:
        given: settings by name; `reward` and `tools` are a function, or a list of functions and of texts as the command has
            them; `environment` is a class or such a text.
    """
    functions: dict[str, Any] = {}
    found = dict(given)
    for setting in ("reward", "tools", "environment"):
        asked = given.get(setting)
        texts, before = [], len(functions)
        for one in list(asked) if isinstance(asked, list | tuple) else [asked]:
            if callable(one):
                name = str(getattr(one, "__name__", type(one).__name__)).replace(",", " ")
                alike = sum(known.split("#")[0] == IN_PYTHON + name for known in functions)
                text = IN_PYTHON + name + (f"#{alike + 1}" if alike else "")
                functions[text] = one
                one = text
            texts.append(one)
        if len(functions) > before:
            found[setting] = ",".join(map(str, texts))
    return found, functions


def plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with paths as text and sequences as lists, as a settings file has them."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        values[name] = list(value) if isinstance(value, tuple | set | frozenset) else value
    return values


# Data

MOST_KEPT = 20  # sets of records in the cache, those used last


def data_source(data: Any) -> str:
    """Return what --data takes for the same data.

    Args:
        data: path, hub id, records (an iterable of dicts, or what has `to_list()`), or records by split.

    Raises:
        InputError: it is none of these, or has a record that is no dict of JSON values.
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    sets = {"train": data}
    if isinstance(data, Mapping):
        unknown = [str(name) for name in data if SPLIT_NAMES.get(str(name)) is None]
        if unknown or not data:
            raise InputError(
                f"data: a dict with {', '.join(unknown) or 'nothing in it'}; give a list of records, or records by "
                f"split ({', '.join(SPLIT_NAMES)})"
            )
        sets = {SPLIT_NAMES[str(name)]: records for name, records in data.items()}
    texts = {name: "".join(_lines(name, records)) for name, records in sets.items()}
    if empty := [name for name, text in texts.items() if not text]:
        what = "an empty list" if list(texts) == ["train"] else f"no record in {' and '.join(empty)}"
        raise InputError(f'data: {what}; give at least one record, as in {{"prompt": "...", "completion": "..."}}')
    folder = cache_dir("records") / sha256_of(json.dumps(texts, sort_keys=True))[:32]
    if not folder.is_dir():
        with replacing_folder(folder) as temporary:
            for name, text in texts.items():
                (temporary / f"{name}.jsonl").write_text(text, encoding="utf-8")
    os.utime(folder)
    kept = [path for path in folder.parent.iterdir() if not path.name.startswith(".")]
    for path in sorted(kept, key=lambda path: path.stat().st_mtime)[:-MOST_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
    return str(folder / "train.jsonl" if list(texts) == ["train"] else folder)


def _lines(name: str, records: Any) -> Iterator[str]:
    """Yield the records as lines of JSON, so that record n is line n of every report."""
    if callable(getattr(records, "to_list", None)):  # datasets.Dataset: plain values, whatever its format
        records = records.to_list()
    if isinstance(records, bytes) or not isinstance(records, Iterable):
        raise InputError(f"data: found {type(records).__name__}; give a path, a hub id or a list of dicts")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, Mapping):
            hint = "; of a table, give table.to_dict('records')" if hasattr(records, "to_dict") else ""
            raise InputError(
                f"data, {name} record {number}: found {type(record).__name__}; each record is a dict, as in "
                f'{{"prompt": "...", "completion": "..."}}{hint}'
            )
        try:
            yield json.dumps(dict(record), ensure_ascii=False, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise InputError(f"data, {name} record {number}: {error}; keep texts, numbers and lists") from None
