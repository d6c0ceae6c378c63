"""Train an adapter on a loaded base, from data and settings as Python has them, and hold the results of the run.

`data_source` takes a path or hub id, or records in memory, which become a file in the cache:

    "data.jsonl", "owner/name"                      as the command's --data
    [{"prompt": ..., "completion": ...}, ...]       one set; part of it is held out for validation
    {"train": [...], "validation": [...]}           several sets, as a datasets.DatasetDict has them

The file is named by its content, so run.yaml repeats the run, and equal data is encoded only once.

`sweep` finds good settings by many short runs at once, trains the best ones in full, and leaves a page that compares them.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import mlx.core as mx

from mlx_lora.api.base import Base, PathLike, as_base, speaks_python
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import AUTO, FIELDS, ROWS, SECTIONS, ModelSettings, TrainSettings
from mlx_lora.config.sweep import (
    BUDGET,
    PAGE_FILE,
    SWEEP_FILE,
    TRIALS,
    WINNER,
    Candidate,
    candidates,
    check_varied,
    read_budget,
    read_vary,
    rungs,
    with_candidate,
    words,
)
from mlx_lora.data.data_sets import SPLIT_NAMES
from mlx_lora.models.load import Base as LoadedBase
from mlx_lora.models.load import load_base
from mlx_lora.parallel.ranks import ALONE, find_launch
from mlx_lora.reports.run_report import REPORT_FILE, read_records
from mlx_lora.reports.sweep_page import LOSS, SweepResults, advice, write_page
from mlx_lora.rollouts.rewards import IN_PYTHON, RewardFunction
from mlx_lora.trainer.callbacks import Callback
from mlx_lora.trainer.progress import curve_html, display_here
from mlx_lora.trainer.run import check_request, train_run
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.trainer.several_runs import SeveralRuns, check_trials, failures
from mlx_lora.trainer.sweep import (
    Sweep,
    SweepState,
    Trial,
    check_validates,
    find_learning_rate,
    held_out_curve,
    rates_around,
    score_of,
    trials_of,
)
from mlx_lora.trainer.trainer import Outcome
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir, check_writable, replacing_folder, sha256_of
from mlx_lora.utils.parsing import parse_yaml
from mlx_lora.utils.progress import waiting
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.models.load import Base as Loaded
    from mlx_lora.trainer.progress import Progress
    from mlx_lora.trainer.trainer import Outcome


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


# Sweeps

log = logging.getLogger(__name__)

AROUND_DEFAULT = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # times the default rate, without --vary


class SweepJob:
    """A sweep from its settings to its results.

    Attributes:
        settings: of the runs, before anything is varied.
        sweep: its rounds.
    """

    def __init__(
        self,
        settings: TrainSettings,
        out: Path,
        vary: Sequence[str] | Mapping[str, Any] = (),
        seeds: int = 1,
        budget: float = BUDGET,
        resume: bool = False,
        force: bool = False,
    ):
        """Check what is asked, and read what an earlier start has done.

        Args:
            settings: of the runs.
            out: the folder that it writes.
            vary: as `read_vary` takes it; empty: learning rates around the default.
            seeds: runs of each candidate.
            budget: runs of work.
            resume: whether to go on with a sweep that is there.
            force: whether to replace it.

        Raises:
            InputError: it cannot be done.
        """
        if not 1 <= seeds <= 100:
            raise InputError(f"--seeds {seeds}: from 1 to 100 are allowed")
        budget = read_budget(budget)
        placed = replace(settings.loop, adapter_path=str(out / WINNER), resume=None, force=True)
        check_request(replace(settings, loop=placed), ALONE)
        check_validates(settings)
        vary = read_vary(vary) if vary else {"learning_rate": rates_around(settings, AROUND_DEFAULT)}
        found = candidates(vary)
        check_varied(found, settings.to_flat())
        if len(found) < 2:
            raise InputError(
                f"--vary {', '.join(vary)}: has one value only, so there is nothing to compare; give several"
            )
        self.settings = replace(settings, loop=replace(placed, force=False))
        steps = rungs(len(found), seeds, budget)
        trials = trials_of(self.settings, found, seeds, out / TRIALS)
        check_trials([trial.settings for trial in trials])
        asked = {"vary": vary, "seeds": seeds, "budget": budget}
        state = self._state(out, asked, found, resume, force)
        check_writable(out, "--out", 1_000_000)
        self.sweep = Sweep(out, state, trials, steps, may_shorten=True)

    def _state(self, out: Path, asked: dict[str, Any], found: list[Candidate], resume: bool, force: bool) -> SweepState:
        """Return what an earlier start left, or an empty state."""
        flat = {name: value for name, value in self.settings.to_flat().items() if name not in ("resume", "force")}
        facts = console.finite_values({**asked, "settings": flat})
        if (out / SWEEP_FILE).exists() and resume:
            state = SweepState.read(out)
            changed = [name for name in ("vary", "seeds", "budget") if state.asked.get(name) != facts[name]]
            before = state.asked.get("settings", {})
            changed += [
                name for name in flat if not ROWS[name].may_change and before.get(name) != facts["settings"][name]
            ]
            if changed:
                raise InputError(
                    f"--resume: the sweep in {out} has another {', '.join(changed)}; give the same as before, or another --out"
                )
            state.candidates = found  # of --vary; the file may be a stranger's, and a candidate is a run's settings
            return state
        if (out / SWEEP_FILE).exists() and not force:
            raise InputError(
                f"--out {out}: already holds a sweep; choose another folder, --resume to continue, or --force to overwrite it"
            )
        # Without sweep.json, they may be anything of the user's.
        there = [f"{name}/" for name in (TRIALS, WINNER) if (out / name).exists()]
        if there and not force:
            raise InputError(
                f"--out {out}: has {' and '.join(there)}, which a sweep would replace, and no {SWEEP_FILE} to go on from; choose "
                "another folder, or --force to delete that"
            )
        for name in (TRIALS, WINNER):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (SWEEP_FILE, PAGE_FILE):
            (out / name).unlink(missing_ok=True)
        return SweepState(facts, found)

    def run(self, base: Loaded | None = None, show: Callable[[int], Progress] | None = None) -> Outcome:
        """Train what is left to train, and return how the winner's own run ended.

        Args:
            base: that the settings name, if it is already loaded; it stays as it is. None: it is loaded here.
            show: see `train_run`.

        Raises:
            Interrupted: a signal ended a round.
            InputError, RunError: see `Sweep.choose` and `train_run`.
        """
        if base is None:
            with waiting("Loading the model"):
                base = load_base(self.settings.model)
        sweep, state = self.sweep, self.sweep.state
        if not state.rounds:
            state.write(sweep.folder)  # not before the model is there, so that a wrong name leaves nothing behind
            of = len(sweep.trials) // len(state.candidates)
            rounds = ", ".join(f"{rung.candidates} to {rung.share:.0%}" for rung in sweep.rungs)
            seeds = f", {of} seeds each" if of > 1 else ""
            log.info(
                f"Sweep: {counted(len(state.candidates), 'candidate')}{seeds}; rounds: {rounds} of a run; then the best one's "
                "whole run"
            )
        sweep.choose(base, self._after_round)
        settings = self.winner_settings()
        log.info(f"Best: {words(state.candidates[state.winner or 0])}. Its whole run, alone:")
        # Copies modules, not their arrays.
        outcome = train_run(settings, show=show, base=replace(base, model=copy.deepcopy(base.model)))
        if not outcome.interrupted:
            curve = held_out_curve(sweep.folder / WINNER)
            state.val_loss = outcome.val_loss if outcome.val_loss is not None else curve[-1][1] if curve else None
            if settings.loop.metric_for_best_model != LOSS:
                error = score_of(Trial(WINNER, state.winner or 0, "", settings), outcome.steps).error
                state.val_score = 1 - error if math.isfinite(error) else None
            state.write(sweep.folder)
            self._after_round()
        return outcome

    def winner_settings(self) -> TrainSettings:
        """Return the settings of the winner's own run."""
        state, folder = self.sweep.state, self.sweep.folder / WINNER
        if state.winner is None:
            raise ValueError("the sweep has no winner yet")
        begun = (folder / CHECKPOINTS).is_dir()
        own = {"adapter_path": str(folder), "resume": "auto" if begun else None, "force": not begun}
        return train_settings({**with_candidate(self.settings.to_flat(), state.candidates[state.winner]), **own})

    def _after_round(self) -> None:
        """Say what a round has shown, and write the page."""
        state, compared = self.sweep.state, self.sweep.compared()
        number = len(state.rounds)
        if state.val_loss is None:
            at = state.rounds[-1][0]["step"]
            said = "; ".join(list(compared.round_words(number - 1))[:3])
            log.info(f"Round {number} of {len(self.sweep.rungs)}, {compared.measure} at step {at}: {said}")
        else:
            log.info(advice(compared))
        write_page(self.sweep.folder / PAGE_FILE, compared)


# Python


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep.

    Attributes:
        folder: with `sweep.html`, `sweep.json`, the trials, and the winner's run.
        best: the winner's settings that were varied.
        run: the winner's own run, over all its steps.
        table: a row for each candidate: its settings, `step` and `loss` (mean over seeds) where it was last measured, and what
            decides if it is not the loss, such as `accuracy`; best first.
        advice: one sentence.
        compared: what the page is made of.
    """

    folder: Path
    best: dict[str, Any]
    run: Run
    table: list[dict[str, Any]]
    advice: str
    compared: SweepResults = field(repr=False)

    @speaks_python()
    def plot(self) -> Any:
        """Return what decides against the first setting that varied, one line for each round, as a figure that a notebook shows.

        Raises:
            InputError: matplotlib is not installed.
        """
        figure = shown_figure(figsize=(7, 4), layout="constrained")
        axes, name = figure.subplots(), next(iter(self.best))
        tried = {candidate[name] for candidate in self.compared.candidates}
        for number, trials in enumerate(self.compared.rounds):
            best: dict[Any, float] = {}  # of several candidates with a value
            for of, measured in self.compared.values(number).items():  # the best first
                best.setdefault(self.compared.candidates[of][name], sum(measured) / len(measured))
            values = sorted(best, key=str if isinstance(self.best[name], str) else None)
            lines = axes.plot(values, [best[value] for value in values], label=f"step {trials[0]['step']}")
            seeds = [
                (self.compared.candidates[of][name], one)
                for of, measured in self.compared.values(number).items()
                for one in measured
            ]
            axes.plot(*zip(*seeds, strict=True), "o", color=lines[0].get_color(), markersize=3)
        if isinstance(self.best[name], (int, float)) and self.best[name] > 0:
            axes.set_xscale("log")
            axes.set_xticks(sorted(tried), [f"{value:g}" for value in sorted(tried)], rotation=45)
            axes.set_xticks([], minor=True)
        axes.axvline(self.best[name], color="gray", linestyle=":")
        axes.set(xlabel=name.replace("_", " "), ylabel=self.compared.measure)
        axes.legend()
        return figure


@speaks_python()
def sweep(
    base: Base | PathLike,
    data: Any,
    out: PathLike,
    vary: Mapping[str, Any] | Sequence[str] = (),
    *,
    seeds: int = 1,
    budget: float = BUDGET,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    **settings: Any,
) -> SweepResult:
    """Find good settings by successive halving, and train the best ones in full; the base stays as it is.

    Args:
        base: from `load`, or a model's name.
        data: as for `train`.
        out: folder to write.
        vary: setting -> values, as in `{"learning_rate": "5e-5..2e-3", "rank": [8, 16]}`; default: learning rates around the
            default one.
        seeds: runs of each candidate.
        budget: all work, in runs.
        resume, force: go on with, or replace, a sweep in this folder.
        progress: show what happens; False: print nothing.
        settings: every other setting, as for `train`.

    Raises:
        InputError: settings, data or folder that cannot be used.
        RunError: the winner's run failed.
        KeyboardInterrupt: a signal ended it; `resume=True` goes on.
    """
    base = as_base(base, "sweep")
    job = SweepJob(
        run_settings(base.settings, {**settings, "data": data_source(data)}),
        Path(os.fspath(out)),
        vary,
        seeds,
        budget,
        resume,
        force,
    )
    with lent_for_training(base, progress) as lent:
        outcome = job.run(lent)
    if outcome.interrupted:
        raise KeyboardInterrupt
    compared, folder = job.sweep.compared(), job.sweep.folder
    run = Run(folder / WINNER, outcome.steps, outcome.val_loss, False, outcome.stopped_early)
    return SweepResult(
        folder, job.sweep.state.candidates[compared.winner or 0], run, compared.table(), advice(compared), compared
    )
