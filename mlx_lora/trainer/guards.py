"""Guard a run: save and end at the first signal, on all ranks, and divide batches when they exceed the memory limit.

The first signal asks the loop to save and end, the second ends the process at once.

A run that exceeds its memory limit goes on with its batches in parts. That changes no update: a loss is a sum over trained
tokens and is divided once, after all parts, so two halves give the gradient of the whole. An exception is a loss that sorts
the pairs of a batch (`Objective.sorts`); a run says when it cuts theirs.

An allocation that fails cannot be caught: MLX then ends the process, on every backend. utils/supervise.py restarts it from
the last checkpoint, in smaller parts.
"""

from __future__ import annotations

import logging
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
from mlx_lora.utils.files import cache_dir, replacing_file
from mlx_lora.utils.progress import told_display
from mlx_lora.utils.supervise import SUPERVISOR

if TYPE_CHECKING:
    from mlx_lora.parallel.ranks import Ranks
    from mlx_lora.trainer.state import Position
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
        if told_display(words):
            return
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
