"""Show how far a long piece of work is: a bar on a terminal or in a notebook, a line now and then elsewhere.

Nothing appears for work that is done within two seconds. Work inside other work takes its place on
the screen.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import TypeVar

from mlx_lora.utils.console import in_notebook
from mlx_lora.utils.text import format_duration

log = logging.getLogger(__name__)

QUIET_S = 2.0  # of work, before anything is shown
LINE_EVERY_S = 20.0  # between the lines in a pipe or a log file
FIRST_LINE = 1 / 2  # of that: until the first count, so that quick runs leave short logs

T = TypeVar("T")
_AROUND: ContextVar[LongTask | None] = ContextVar("the work that the present one is a part of", default=None)


def has_live_display() -> bool:
    """Tell whether standard error can show a bar: it is a terminal, or a notebook's cell."""
    return sys.stderr.isatty() or in_notebook()


class LongTask:
    """Takes what is done and shows it; made by `long_task`."""

    def __init__(self, what: str, total: int, unit: str, live: bool):
        """Begin.

        Args:
            what: a name for the work, as in Evaluating.
            total: how much there is; 0: that is not known, so the time spent is shown instead.
            unit: what is counted, in the plural.
            live: whether a bar can be shown; otherwise lines are logged.
        """
        self._what, self._total, self._unit = what, total, unit
        self._done, self._start = 0, time.monotonic()
        self._next_s = self._start + max(QUIET_S, FIRST_LINE * LINE_EVERY_S)
        self._lock, self._bar, self._ended, self._live = threading.Lock(), None, False, live
        self._around, self._covered = _AROUND.get(), 0
        self._timer: threading.Timer | None = None
        if live and total != 1:
            self._after(QUIET_S, self._show)
        elif not live:
            self._after(QUIET_S, self._tell)

    def _after(self, seconds: float, action: Callable[[], None]) -> None:
        self._timer = threading.Timer(seconds, action)
        self._timer.daemon = True
        self._timer.start()

    def advance(self, count: int = 1) -> None:
        """Note that so much more is done."""
        self.reach(self._done + count)

    def reach(self, done: int) -> None:
        """Note how much is done in all."""
        self._done = done
        if self._live:
            with self._lock:
                if self._bar:
                    self._bar.update(self._bar.task_ids[0], completed=done)
        elif time.monotonic() > self._next_s and 0 < done < self._total:
            spent_s = time.monotonic() - self._start
            left = format_duration(spent_s / done * (self._total - done))
            log.info(f"{self._what}: {done:,} of {self._total:,} {self._unit}, about {left} left")
            self._next_s = time.monotonic() + LINE_EVERY_S

    def _tell(self) -> None:
        """Say how long the work has taken so far, while nothing says how much is left, unless a part speaks for itself."""
        with self._lock:
            if self._ended or self._done:  # what is counted is told as it is counted
                return
            if not self._covered:
                log.info(f"{self._what}: {format_duration(time.monotonic() - self._start)} so far")
                self._next_s = time.monotonic() + LINE_EVERY_S
            self._after(LINE_EVERY_S, self._tell)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        with self._lock:
            if self._ended or self._covered:
                return
            text = TextColumn("{task.description}")
            columns = (SpinnerColumn(), text, TimeElapsedColumn())
            if self._total:
                counts = (MofNCompleteColumn(), TextColumn(self._unit))
                columns = (text, BarColumn(bar_width=24), *counts, TimeRemainingColumn())
            # Rarely, because what goes on may be the measuring of kernels.
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, refresh_per_second=4)
            self._bar.add_task(self._what, total=self._total or None, completed=self._done)
            self._bar.start()

    def cover(self) -> None:
        """Leave the screen to a part of this work."""
        if self._around:
            self._around.cover()
        with self._lock:
            self._covered += 1
            if self._bar:
                self._bar.stop()

    def uncover(self) -> None:
        """Return to the screen."""
        with self._lock:
            self._covered -= 1
            if self._covered == 0 and self._live and not self._ended:
                if self._bar:
                    self._bar.start()
                elif self._timer and not self._timer.is_alive():  # the bar was due meanwhile
                    self._after(QUIET_S, self._show)
        if self._around:
            self._around.uncover()

    def end(self) -> None:
        """Take the bar away."""
        if self._timer:
            self._timer.cancel()
        with self._lock:
            self._ended = True
            if self._bar:
                self._bar.stop()


@contextmanager
def long_task(what: str, total: int, unit: str, live: bool | None = None) -> Iterator[LongTask]:
    """Show the progress of the work in the block; see `LongTask`. `live` None: a bar where one can be shown."""
    with covered():
        task = LongTask(what, total, unit, has_live_display() if live is None else live)
        token = _AROUND.set(task)
        try:
            yield task
        finally:
            _AROUND.reset(token)
            task.end()


def waiting(what: str) -> AbstractContextManager[LongTask]:
    """Show that the work in the block goes on, and for how long, because nobody knows when it ends.

    A notebook gets lines, because its cell already has a display for the run.
    """
    return long_task(what, 0, "", live=sys.stderr.isatty())


@contextmanager
def covered() -> Iterator[None]:
    """Let another display, such as the bars of a download, have the screen in this block."""
    around = _AROUND.get()
    if around:
        around.cover()
    try:
        yield
    finally:
        if around:
            around.uncover()


def tracked(items: Iterable[T], what: str, total: int, unit: str) -> Iterator[T]:
    """Yield the items, and show how many are done."""
    with long_task(what, total, unit) as task:
        for item in items:
            yield item
            task.advance()
