"""Guard a run: save and end at the first signal, on all ranks, and divide batches when they exceed the memory limit.

The first signal asks the loop to save and end, the second ends the process at once.

A run that exceeds its memory limit goes on with its batches in parts. That changes no update: a loss is a sum over trained
tokens and is divided once, after all parts, so two halves give the gradient of the whole. An exception is a loss that sorts
the pairs of a batch (`BoundObjective.sorts`); a run says when it cuts theirs.

An allocation that fails cannot be caught: MLX then ends the process, on every backend. utils/supervise.py restarts it from
the last checkpoint, in smaller parts.
"""

from __future__ import annotations

import logging
import math
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_lora.data.batch import Batch, split_rows
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.files import cache_dir, replacing_file
from mlx_lora.utils.supervise import SUPERVISOR
from mlx_lora.utils.text import words_of

if TYPE_CHECKING:
    from mlx_lora.parallel.ranks import Ranks
    from mlx_lora.trainer.step import StepResult

log = logging.getLogger(__name__)

WORDS = "Stopping after this step, then saving; press Ctrl-C again to quit without saving"
COMPILATION = "C++ shared library"  # part of MLX's error after a compiler was killed: MLX believes that it succeeded


@contextmanager
def interrupt_flag(words: str = WORDS) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT, SIGTERM or SIGHUP (a closed terminal) into a flag that the loop reads, and say these words.

    The second ends the process at once; a third reaches the system's handlers, which need no Python. A signal that the
    parent ignores, as nohup does with SIGHUP, stays ignored. Compilers that MLX starts also ignore these signals:
    otherwise the step that waits for them would fail. Outside of the main thread, where Python allows no handlers, the
    flag is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []
    signals = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            for each in signals:
                signal.signal(each, signal.SIG_DFL)
            raise KeyboardInterrupt
        seen.append(number)
        try:
            # os.write, not print: a handler may run in the middle of another write to the same stream.
            os.write(2, f"\n{words}\n".encode())
        except OSError:
            # The terminal is closed. Printing must not end the run from here on before it has saved.
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)

    # If the user ends the supervisor, this run must end too: nothing else would stop it.
    supervisor = os.environ.get(SUPERVISOR)
    old = {number: signal.signal(number, note) for number in signals}
    try:
        with compiler_spared():
            yield lambda: bool(seen) or (supervisor is not None and str(os.getppid()) != supervisor)
    except RuntimeError as error:
        if seen and COMPILATION in str(error):
            raise KeyboardInterrupt from error  # the signal arrived before the compiler could ignore it
        raise
    finally:
        for number, handler in old.items():
            if signal.getsignal(number) == note:  # not after a second signal
                signal.signal(number, handler)


@contextmanager
def compiler_spared() -> Iterator[None]:
    """Let the g++ that MLX starts for its kernels on a Linux CPU ignore the signals that end this process.

    A terminal sends Ctrl-C to every process of the foreground group. MLX calls g++ by name, through a shell that
    drops a signal mask but keeps ignored signals; so a script that ignores them and calls g++ is put first in PATH.
    """
    compiler = shutil.which("g++") if sys.platform == "linux" else None
    script = cache_dir("bin") / "g++"
    if compiler is None or compiler == str(script):
        yield
        return
    words = f'#!/bin/sh\ntrap "" INT TERM HUP\nexec {shlex.quote(compiler)} "$@"\n'
    try:
        if not script.is_file() or script.read_text() != words:
            with replacing_file(script) as temporary:
                temporary.write_text(words)
                temporary.chmod(0o755)
    except OSError:
        yield  # the cache cannot be written: Ctrl-C during a compilation ends the run without saving
        return
    before = os.environ["PATH"]
    os.environ["PATH"] = f"{script.parent}{os.pathsep}{before}"
    try:
        yield
    finally:
        os.environ["PATH"] = before


class MemoryGuard:
    """Watches a run's memory, and says in how many parts its batches run."""

    def __init__(self, at: Position, limit_bytes: int | None = None, sorts: str = "", ranks: int = 1):
        """Begin to watch.

        Args:
            at: of the run; `at.parts` is kept here, so that a resumed run keeps it.
            limit_bytes: for MLX's buffers in use, None for no limit; buffers that it keeps for reuse have another limit.
            sorts: as of the run's `Objective`.
            ranks: that the rows of a batch are divided among.
        """
        self.at, self.limit_bytes = at, limit_bytes
        self._sorts, self._told_cut = sorts, False
        self._told, self._earlier_peak_bytes = False, 0
        if ranks > 1:
            self._tell_cut("each process sorts its own")

    @property
    def peak_bytes(self) -> int:
        """Peak of MLX's buffers in use since the process began."""
        return max(self._earlier_peak_bytes, mx.get_peak_memory())

    def divide(self, batches: list[Batch]) -> list[Batch]:
        """Return the batches of one optimizer step, in parts."""
        parts = [part for batch in batches for part in split_rows(batch, self.at.parts)]
        if len(parts) > len(batches):
            self._tell_cut("each part of a batch is sorted by itself")
        return parts

    def _tell_cut(self, own: str) -> None:
        """Say once that batches are cut, if that changes the loss."""
        if self._sorts and not self._told_cut:
            self._told_cut = True
            log.info(
                f"--loss-type {self._sorts} compares pairs in sorted order, and {own}: losses and updates are not those of whole "
                "batches in one process"
            )

    def watch(self, rows: int) -> None:
        """Double the parts when the peak since the last change is over the limit.

        Args:
            rows: of the largest batch in parts; a single row cannot be cut.
        """
        peak = mx.get_peak_memory()
        if self.limit_bytes is None or peak <= self.limit_bytes:
            return
        over = f"step {self.at.taken}: {peak / 1e9:.2f} GB were in use, the limit is {self.limit_bytes / 1e9:.2f} GB"
        if rows > 1:
            self.at.parts *= 2
            effect = "" if self._sorts else ", with the same updates"
            log.info(f"{over}; from now on, batches run in {self.at.parts} parts{effect}")
            self._earlier_peak_bytes = self.peak_bytes
            mx.reset_peak_memory()
        elif not self._told:
            log.info(f"{over}, with one row at a time; use --grad-checkpoint block or a smaller --max-seq-length")
            self._told = True


@dataclass
class Agreement:
    """Tells whether the run stops: a single process at once, several processes when all know that one was asked to.

    The request is sent with a step's sums, so all ranks stop after the same step, and no rank waits for an answer.

    Attributes:
        asked: whether this process was asked to stop.
        ranks: the ranks that must agree.
        heard: whether all ranks know that one was asked to stop.
    """

    asked: Callable[[], bool]
    ranks: Ranks
    heard: bool = False

    def __call__(self) -> bool:
        return self.heard or (self.ranks.size == 1 and self.asked())

    def hear(self, result: StepResult | None) -> None:
        """Read from a step's result whether a rank was asked to stop."""
        if result is not None and result.asked is not None:
            self.heard = self.heard or result.asked.item() > 0

    def ask_all(self) -> None:
        """Exchange the requests to stop now, outside of a step."""
        self.heard = self.ranks.any(self.heard or self.asked())


# Where a run stands: its position, which a checkpoint keeps, and how it ends if it diverges

LOSS, TASK = "loss", "task"  # what the best validation may be chosen by; others are numbers of the objective
# This many skipped updates in a row mean that the run has diverged, not that one batch was bad.
MAX_SKIPPED_IN_A_ROW = 10
VALIDATED = "validated_examples"  # in a run's identity: how many rows it validates on


@dataclass
class Position:
    """The position of a run, which the loop keeps up to date.

    Attributes:
        taken: optimizer steps so far.
        consumed: micro-batches of the plan so far.
        skipped, skipped_in_a_row: updates that were not finite.
        val_loss, val_at: the last validation and its step.
        best_loss, best_score, best_at: the best validation so far and its step; its score if it is not chosen by the loss.
        worse: validations since then that were not better by the early stopping threshold.
        parts: the number of parts in which each batch runs.
    """

    taken: int = 0
    consumed: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None
    val_at: int | None = None
    best_loss: float | None = None
    best_score: float | None = None
    best_at: int | None = None
    worse: int = 0
    parts: int = 1

    def validated(self, loss: float, threshold: float = 0.0, metric: str = LOSS, score: float | None = None) -> bool:
        """Record a validation, and return whether it is the best so far.

        Args:
            loss: mean per trained token, or per example of preference training.
            threshold: an improvement up to this does not count for early stopping, as in transformers'
                EarlyStoppingCallback.
            metric: what the best validation is chosen by: the lowest loss, or the highest of another number (of equal
                ones, the one with the lowest loss). Before the first step, an objective's numbers are only rounding,
                because policy and reference are still the same, or the head is new, so this validation is then not a
                candidate. With a task it is one.
            score: the number of that name; None: it was not measured. Of a score that is no number, nothing is better.
        """
        self.val_loss, self.val_at = loss, self.taken
        if metric not in (LOSS, TASK) and not self.taken:
            return False
        less = math.inf if self.best_loss is None else self.best_loss - loss
        gain = less
        if metric != LOSS and score is not None:
            gain = math.inf if self.best_score is None else score - self.best_score
        better = math.isfinite(loss) and not math.isnan(score or 0.0) and (gain > 0 or (gain == 0 and less > 0))
        self.worse = 0 if better and (gain > threshold or not threshold) else self.worse + 1
        if better:
            self.best_loss, self.best_at = loss, self.taken
            self.best_score = score if metric != LOSS else None
        return better

    def diverged(self, applied: bool) -> bool:
        """Count an update that was skipped, and return whether so many came in a row that the run has diverged."""
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1
        self.skipped += self.skipped_in_a_row > 0
        return self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW

    def compare_anew(self) -> None:
        """Forget the validations so far, because those from here on measure something else."""
        self.best_loss = self.best_score = self.best_at = None
        self.worse = 0


def score_words(metric: str) -> str:
    """Return in words what the best validation is chosen by, if it is not the loss."""
    return "score on the task" if metric == TASK else f"held-out {words_of(metric)}"


class Diverged(RunError):
    """Ends a run because many updates in a row were not finite; `at` is the run's position."""

    def __init__(self, at: Position):
        super().__init__(f"step {at.taken}: loss or gradient was not finite {at.skipped_in_a_row} times in a row")
        self.at = at


@dataclass(frozen=True)
class StepsDone:
    """Where a run is when its next steps begin.

    Attributes:
        batches: planned batches that are done; the next one has this number.
        steps: optimizer steps that are done.
        of_steps: steps of the whole run.
        epochs: passes over the data that are done.
    """

    batches: int
    steps: int
    of_steps: int
    epochs: float
