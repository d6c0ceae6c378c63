"""Report a run's progress: one record per report, to metrics.jsonl and to a display.

The display is a bar and a curve in a notebook, a bar on a terminal, or plain lines.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

from mlx_lora.config.objectives import SHOWN_METRICS
from mlx_lora.parallel.strategy import DISK_WAIT
from mlx_lora.reports.charts import Series, line_chart
from mlx_lora.utils import console
from mlx_lora.utils.parsing import parse_json
from mlx_lora.utils.progress import QUIET_S, LongTask, long_task
from mlx_lora.utils.text import counted, format_duration, words_of

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.trainer.evaluate import RowLosses
    from mlx_lora.trainer.step import StepResult

log = logging.getLogger(__name__)

# Records


@dataclass(frozen=True)
class Metrics:
    """One line of metrics.jsonl: means since the last report, or a validation.

    Attributes:
        step: optimizer steps taken.
        epoch: passes over the data so far, with a fraction.
        loss: mean over the trained tokens since the last report; None in a line for a validation only.
        val_loss: of the validation, if this line has one.
        learning_rate: of the last step.
        grad_norm: of the last step, before clipping.
        supervised_tokens_per_s, tokens_per_s: trained tokens and all real tokens per wall-clock second, with data
            and host work, without validation and saving.
        examples: rows, pairs or rated answers since the last report.
        supervised_tokens, real_tokens, positions: trained tokens, tokens that are not padding and batch positions
            (with padding) since the last report; sums over the lines are the run's totals.
        shapes: distinct micro-batch shapes since the last report, `ROWSxWIDTH`.
        padding_fraction: the fraction of those positions that is padding.
        skipped_steps: updates since the start that were skipped because loss or gradient was not finite.
        peak_memory_bytes: MLX's allocator; process_peak_bytes: the operating system's figure.
        elapsed_s: since the first step.
        reports: the numbers that the objective reports besides the loss, as means over its examples; in metrics.jsonl
            each has a key of its own.
        rows: the loss of each held-out row, which a file of its own takes (reports/run_report.py); None: no such validation.
    """

    step: int
    epoch: float
    loss: float | None
    val_loss: float | None
    learning_rate: float
    grad_norm: float
    supervised_tokens_per_s: float
    tokens_per_s: float
    examples: int
    supervised_tokens: int
    real_tokens: int
    positions: int
    shapes: list[str]
    padding_fraction: float
    skipped_steps: int
    peak_memory_bytes: int
    process_peak_bytes: int
    elapsed_s: float
    reports: dict[str, float] = field(default_factory=dict)
    rows: RowLosses | None = None

    def to_flat(self) -> dict[str, Any]:
        """Return all names and numbers, the objective's among them."""
        flat = asdict(replace(self, rows=None))
        del flat["rows"]
        return flat | flat.pop("reports")


@dataclass
class Window:
    """The results since the last report; the scalars stay on the device until they are read."""

    results: list[StepResult] = field(default_factory=list)
    examples: int = 0
    real_tokens: int = 0
    supervised_tokens: int = 0
    positions: int = 0
    shapes: set[tuple[int, int]] = field(default_factory=set)
    paused_s: float = 0.0
    started_s: float = field(default_factory=time.perf_counter)

    def add(self, batches: list[Batch], result: StepResult) -> None:
        self.results.append(result)
        self.examples += sum(b.examples for b in batches)
        self.real_tokens += sum(b.real_tokens for b in batches)
        self.supervised_tokens += sum(b.supervised_tokens for b in batches)
        self.positions += sum(b.inputs.size for b in batches)
        self.shapes |= {b.inputs.shape for b in batches}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent inside this context (validation, saving) in the window's throughput."""
        start = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - start

    def spent_s(self) -> float:
        return max(time.perf_counter() - self.started_s - self.paused_s, 1e-9)


class MetricsFile:
    """Appends records to metrics.jsonl, one flushed line each, so that a killed run keeps its history."""

    def __init__(self, path: Path, resumed_at: int | None = None):
        """Open the file.

        Args:
            path: metrics.jsonl.
            resumed_at: keep the lines up to this step and append to them; None: start an empty file.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if resumed_at is None or not path.exists() else _lines_until(path, resumed_at)
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(kept)

    def __call__(self, metrics: Metrics) -> None:
        # JSON has no NaN, so a loss that is not finite is written as null.
        flat = metrics.to_flat().items()
        record = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _lines_until(path: Path, step: int) -> list[str]:
    """Return the lines of steps up to `step`, without an incomplete line."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if not line.endswith("\n") or not isinstance(record, dict) or type(record.get("step")) is not int:
            continue
        numbers = all(
            value is None or type(value) in (int, float) for name, value in record.items() if name != "shapes"
        )
        if numbers and {"loss", "val_loss"} <= record.keys() and record["step"] <= step:
            kept.append(line)
    return kept


# The numbers reported by an objective that each line shows.
SHOWN = ("reward", "task", *SHOWN_METRICS, "pearson", "margin")
WORTH_TELLING = 0.01  # of a step's time
BOLD, RESET = "\x1b[1m", "\x1b[0m"


def format_metrics(metrics: Metrics, total_steps: int, seconds_left: float | None) -> str:
    """Return one line of a run's history; the columns of a run's lines stand under each other.

    Args:
        metrics: the record.
        total_steps: of the run.
        seconds_left: until its end; None for a terminal, where a bar shows it: losses are bold (ANSI), and the line is
            short.
    """
    on, off = (BOLD, RESET) if seconds_left is None else ("", "")
    position = f"step {metrics.step}/{total_steps},".ljust(len(f"step {total_steps}/{total_steps},"))
    parts = []
    if metrics.loss is not None:
        parts.append(f"loss {on}{metrics.loss:6.4f}{off}")
    if metrics.val_loss is not None and "reward" not in metrics.reports:  # there it is minus the reward
        parts.append(f"val loss {on}{metrics.val_loss:.4f}{off}")
    held_out = "held-out " if metrics.loss is None and "reward" in metrics.reports else ""
    shown = {name: metrics.reports[name] for name in SHOWN if name in metrics.reports}
    parts += [f"{held_out}{words_of(name)} {value:5.3f}" for name, value in shown.items() if not math.isnan(value)]
    if metrics.loss is not None:
        speed = f"{metrics.tokens_per_s:5.0f} tok/s"
        peak = f"peak {metrics.peak_memory_bytes / 1e9:.2f} GB"
        parts.append(f"lr {metrics.learning_rate:.2e}")
        if seconds_left is None:
            parts += [speed, peak]
        else:
            parts += [f"grad norm {metrics.grad_norm:6.3f}", speed, peak]
            parts.append(f"{format_duration(seconds_left)} left")
    if metrics.reports.get(DISK_WAIT, 0) >= WORTH_TELLING:
        parts.append(f"{metrics.reports[DISK_WAIT]:.0%} of the time waiting for the disk")
    if metrics.skipped_steps:
        parts.append(f"{counted(metrics.skipped_steps, 'step')} skipped (not finite)")
    return f"{position} {', '.join(parts)}"


# Displays

T = TypeVar("T")
EVERY_S = 0.5  # between updates of a notebook's bar
# The pages' own style sheet is made for whole pages; these are its colors, in a notebook's light or dark theme.
STYLE = """<style>
.mlx-lora { max-width: 40rem; } .mlx-lora progress { width: 100%; } .mlx-lora .chart { width: 100%; height: auto; }
.mlx-lora .chart text { fill: currentColor; font-size: 13px; opacity: .7; }
.mlx-lora .chart .grid { stroke: currentColor; opacity: .15; } .mlx-lora .line { fill: none; stroke-width: 2; }
.mlx-lora .s0 { stroke: #2a6fdb; color: #2a6fdb; } .mlx-lora .s1 { stroke: #d9730d; color: #d9730d; }
.mlx-lora .dot.s0 { fill: #2a6fdb; } .mlx-lora .dot.s1 { fill: #d9730d; } .mlx-lora span { margin-right: 1em; }
</style>"""


class Progress(Protocol):
    """Shows a run while it goes on."""

    def step(self, step: int) -> None:
        """Take the number of a step that was taken."""

    def report(self, metrics: Metrics) -> None:
        """Take a record."""

    def validating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """Yield a validation's batches, and show how many of them are measured if it takes more than two seconds."""
        ...

    def close(self) -> None:
        """End."""


def display_here() -> Callable[[int], Progress] | None:
    """Return what makes a live display here from the number of steps; None: there is a line for each report."""
    if console.in_notebook():
        return NotebookProgress
    return LiveProgress if sys.stderr.isatty() else None


class Pace:
    """Tells how long a run still takes, by the steps of this process alone: a resumed run begins with others behind it."""

    def __init__(self, total_steps: int):
        self._total, self._start, self._before = total_steps, time.perf_counter(), 0

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._start

    def step(self, step: int) -> None:
        """Take the number of a step that was taken."""
        self._before = self._before or step - 1

    def left_s(self, step: int) -> float:
        """Return about how many seconds the steps after this one take."""
        return self.spent_s / max(step - self._before, 1) * (self._total - step)


class PlainProgress:
    """Prints one line per report on standard error."""

    def __init__(self, total_steps: int):
        self._total, self._pace = total_steps, Pace(total_steps)
        self._reported = False
        self._first = LongTask("First step, with everything that MLX compiles for it", 0, "", live=False)

    def step(self, step: int) -> None:
        """Say once how long a step takes, because the first report may come many slow steps later."""
        self._first.end()
        self._pace.step(step)
        # The second step is under way, so the first is done.
        if step == 2 and self._total > 2 and not self._reported:
            log.info(f"step 1/{self._total} done {format_duration(self._pace.spent_s)} after the start")

    def report(self, metrics: Metrics) -> None:
        self._reported = self._reported or metrics.loss is not None
        if self._reported:
            self._first.end()
        log.info(format_metrics(metrics, self._total, self._pace.left_s(metrics.step)))

    def validating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """Yield a validation's batches, and say now and then how many of them are measured."""
        self._first.cover()  # it speaks for itself
        with long_task("Validating", count, "batches", live=False) as task:
            for batch in batches:
                yield batch
                task.advance()
        self._first.uncover()

    def close(self) -> None:
        """End; no file is open."""
        self._first.end()


class LiveProgress:
    """Shows a live bar on a terminal, and above it a line per report, which stays in the scrollback."""

    def __init__(self, total_steps: int, console: Console | None = None):
        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
        )
        self._total = total_steps
        self._bar = Bars(*columns, console=console or Console(stderr=True))
        self._task = self._bar.add_task("first step", total=total_steps)
        self._loss = self._val = ""
        self._bar.start()

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def report(self, metrics: Metrics) -> None:
        line = Text.from_ansi(format_metrics(metrics, self._total, None))
        self._bar.console.print(line, highlight=False)
        if metrics.val_loss is not None:
            reward = metrics.reports.get("reward")  # of sampled answers, whose loss is minus that
            self._val = f"val {metrics.val_loss:.4f}" if reward is None else f"held-out reward {reward:.3f}"
        if metrics.loss is not None:
            self._loss = f"loss {metrics.loss:.4f}"
        if self._loss:
            text = " · ".join(filter(None, (self._loss, self._val)))
            self._bar.update(self._task, description=text, completed=metrics.step)

    def validating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """Yield a validation's batches; after two seconds, the bar says how many of them are measured."""
        before, start = self._bar.tasks[0].description, time.perf_counter()
        for done, batch in enumerate(batches):
            if time.perf_counter() - start > QUIET_S:
                self._bar.update(self._task, description=f"validating {done}/{count}")
            yield batch
        self._bar.update(self._task, description=before)

    def close(self) -> None:
        self._bar.stop()


class NotebookProgress:
    """Shows a bar, the last report and the curve below a notebook's cell, and updates them in place."""

    def __init__(self, total_steps: int):
        """Show the bar."""
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports] # only in a notebook

        self._html, self._total, self._step, self._line = HTML, total_steps, 0, "first step"
        self._records: list[dict[str, Any]] = []
        self._pace, self._shown = Pace(total_steps), time.perf_counter()
        self._handle: Any = display(HTML(self._text()), display_id=True)

    def step(self, step: int) -> None:
        self._step = step
        self._pace.step(step)
        if time.perf_counter() - self._shown > EVERY_S:
            self._update()

    def report(self, metrics: Metrics) -> None:
        self._step, self._line = metrics.step, format_metrics(metrics, self._total, self._pace.left_s(metrics.step))
        self._records.append(metrics.to_flat())
        self._update()

    def validating(self, batches: Iterable[T], count: int) -> Iterator[T]:
        """Yield a validation's batches; after two seconds, the line says how many of them are measured."""
        before, start = self._line, time.perf_counter()
        for done, batch in enumerate(batches):
            if time.perf_counter() - start > QUIET_S:
                self._line = f"validating {done}/{count}"
                self._update()
            yield batch
        self._line = before

    def close(self) -> None:
        self._line += f", {format_duration(self._pace.spent_s)} in all"
        self._update()

    def _update(self) -> None:
        self._shown = time.perf_counter()
        self._handle.update(self._html(self._text()))

    def _text(self) -> str:
        bar = f'<progress value="{self._step}" max="{self._total}"></progress>'
        return curve_html(self._records, f"{bar}<div>{escape(self._line)}</div>")


def curve_html(records: list[dict[str, Any]], heading: str) -> str:
    """Return the curves of training and held-out loss as HTML, for a notebook.

    Args:
        records: lines of metrics.jsonl.
        heading: HTML above the curves.
    """
    trained = [(r["step"], math.nan if r["loss"] is None else r["loss"]) for r in records if r["val_loss"] is None]
    held_out = [(r["step"], r["val_loss"]) for r in records if r["val_loss"] is not None]
    legend = '<span class="s0">— training loss</span><span class="s1">— held-out loss</span>'
    chart = line_chart("Loss", [Series("training", trained), Series("held out", held_out)])
    return f'{STYLE}<div class="mlx-lora">{heading}{legend + chart if trained or held_out else ""}</div>'
