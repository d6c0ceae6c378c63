"""Train an adapter on a loaded base, and hold the results of the run."""

from __future__ import annotations

import math
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.api.base import Base, PathLike, as_base
from mlx_lora.api.display import curve_html, display_here
from mlx_lora.api.given_data import data_source
from mlx_lora.api.given_settings import run_settings
from mlx_lora.api.python_errors import speaks_python
from mlx_lora.artifacts.run_report import REPORT_FILE, read_records
from mlx_lora.runs.training_run import train_run
from mlx_lora.system import device
from mlx_lora.system.cache import cache_dir
from mlx_lora.system.distributed import find_launch
from mlx_lora.system.errors import InputError
from mlx_lora.system.parsing import parse_yaml
from mlx_lora.training.callbacks import Callback


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
        try:
            import matplotlib.figure  # noqa: F401 # pyright: ignore[reportMissingImports] # an extra
        except ImportError:
            raise InputError("plot: matplotlib is not installed; pip install 'mlx-lora[plots]'") from None
        from mlx_lora.api.shown_figure import ShownFigure

        figure = ShownFigure(figsize=(7, 4), layout="constrained")
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
    learning_rate: float | None = None,
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
        learning_rate: at its peak (default: by the model's width and family).
        batch_size: rows per micro-batch; default: as many as `batch_tokens` holds, which are 4 to 32 rows by the data's size.
        max_seq_length: longest sequence in tokens (default 2048).
        seed: of data order, initial factors and dropout (default 0).
        callbacks: instances of `Callback`, told of steps, reports, validations and saves.
        progress: show a bar and the curve in a notebook, the command's bar or lines elsewhere; False: print nothing.
        settings: every other setting of `mlx-lora train --help-all` that is not about the model, with underscores:
            `target_modules=["q_proj", "v_proj"]`, `mask_prompt=False`, `objective="dpo"`.

    Raises:
        InputError: an argument, the data or the folder cannot be used; unknown names are answered with the right one.
        RunError: the run diverged, could not write its results, or a callback failed.
    """
    named = {
        "method": method, "rank": rank, "iters": iters, "epochs": epochs, "learning_rate": learning_rate,
        "batch_size": batch_size, "max_seq_length": max_seq_length, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in named.items() if value is not None} | settings
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
    say, show = display_here() if progress else (lambda line: None, None)
    base.release()
    mx.reset_peak_memory()  # an earlier run's peak is not this one's
    try:
        with base.loaded.lent() as lent:
            outcome = train_run(resolved, say=say, show=show, base=lent, callbacks=callbacks)
    finally:
        device.compile_for(device.COMPILE_FROM_STEPS)  # a short run turned compiling off
    if outcome.interrupted and not outcome.steps:
        raise KeyboardInterrupt
    return Run(Path(adapter_path), outcome.steps, outcome.val_loss, outcome.interrupted, outcome.stopped_early)
