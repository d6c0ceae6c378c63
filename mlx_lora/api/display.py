"""Where a run in Python shows its progress: a bar and a curve in a notebook, a bar on a terminal, or plain lines."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import Any, TypeVar

from mlx_lora.artifacts.plots import Series, line_chart
from mlx_lora.system import console
from mlx_lora.system.long_task import QUIET_S
from mlx_lora.system.units import format_duration
from mlx_lora.training.progress import LiveProgress, Metrics, Progress, format_metrics

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


def display_here() -> tuple[Callable[[str], None], Callable[[int], Progress] | None]:
    """Return what takes lines, and what makes a live display here (None: a line for each report)."""
    if console.in_notebook():
        return print, NotebookProgress  # what goes to standard error has a red background in notebooks
    return console.echo, LiveProgress if sys.stderr.isatty() else None


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


class NotebookProgress:
    """Shows a bar, the last report and the curve below a notebook's cell, and updates them in place."""

    def __init__(self, total_steps: int):
        """Show the bar."""
        from IPython.display import HTML, display  # pyright: ignore[reportMissingImports] # only in a notebook

        self._html, self._total, self._step, self._line = HTML, total_steps, 0, "first step"
        self._records: list[dict[str, Any]] = []
        self._start = self._shown = time.perf_counter()
        self._handle: Any = display(HTML(self._text()), display_id=True)

    def step(self, step: int) -> None:
        self._step = step
        if time.perf_counter() - self._shown > EVERY_S:
            self._update()

    def report(self, metrics: Metrics) -> None:
        left_s = (time.perf_counter() - self._start) / max(metrics.step, 1) * (self._total - metrics.step)
        self._step, self._line = metrics.step, format_metrics(metrics, self._total, left_s)
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
        self._line += f", {format_duration(time.perf_counter() - self._start)} in all"
        self._update()

    def _update(self) -> None:
        self._shown = time.perf_counter()
        self._handle.update(self._html(self._text()))

    def _text(self) -> str:
        bar = f'<progress value="{self._step}" max="{self._total}"></progress>'
        return curve_html(self._records, f"{bar}<div>{escape(self._line)}</div>")
