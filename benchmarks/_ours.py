"""Run `python -m mlx_lora.train` as a child process of a benchmark, and read its results."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from _figures import steps_from_metrics
from _processes import ChildFailed, Ended, cpu_seconds, run_child

MIN_STEPS = 2


class Watch:
    """Follows our metrics.jsonl to note the first step's end, and to interrupt the run."""

    def __init__(self, metrics: Path, seconds: float | None, examples: int | None = None):
        """Follow a file; interrupt after these seconds from its first step, or after these examples; None: never."""
        self._metrics, self._seconds, self._examples, self._size = metrics, seconds, examples, 0
        self._interrupted, self._seen = False, 0
        self.first_step_unix_s: float | None = None
        self.cpu_s: list[float | None] = []  # the child's processor seconds at the end of each step

    def __call__(self, child: subprocess.Popen) -> None:
        if self._interrupted or not self._metrics.exists():
            return
        if self.first_step_unix_s is None and self._metrics.stat().st_size:
            self.first_step_unix_s = time.time()
        self._note_cpu(child.pid)
        if self.first_step_unix_s is not None and self._is_over():
            child.send_signal(signal.SIGINT)  # it ends its step, saves, and exits with 130
            self._interrupted = True

    def _note_cpu(self, pid: int) -> None:
        """Note the child's processor time for each step that was reported since the last look, 20 ms ago."""
        if (size := self._metrics.stat().st_size) == self._seen:
            return
        self._seen = size
        count = self._metrics.read_bytes().count(b"\n")
        self.cpu_s += [cpu_seconds(pid)] * (count - len(self.cpu_s))

    def _is_over(self) -> bool:
        if self._seconds is not None:
            over = time.time() - self.first_step_unix_s >= self._seconds
            return over and len(self._metrics.read_text().splitlines()) >= MIN_STEPS
        size = self._metrics.stat().st_size
        if self._examples is None or size == self._size:  # the file is read only when it has grown
            return False
        self._size = size
        lines = self._metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return len(records) >= MIN_STEPS and sum(record["examples"] for record in records) >= self._examples


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train_timed(
    command: list[str],
    folder: Path,
    log: Path,
    seconds: float | None,
    timeout_s: float,
    examples: int | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[dict[str, Any], Ended]:
    """Run a train command that reports every step into the new `folder`.

    Args:
        command: our complete command.
        folder: its --adapter-path.
        log: file for its output.
        seconds: interrupt it this long after its first step; None: let it end by itself.
        timeout_s: it is killed after this time.
        examples: interrupt it after this many; None: never.
        environment: variables to set.

    Returns:
        The steps, the wall clock at the end of the first, MLX's peak memory, and how the process ended.
    """
    (folder / "metrics.jsonl").unlink(missing_ok=True)  # from an earlier comparison in the same folder
    watch = Watch(folder / "metrics.jsonl", seconds, examples)
    ended = run_child(command, log, timeout_s=timeout_s, watch=watch, good_codes=(0, 130), environment=environment)
    if watch.first_step_unix_s is None:
        raise ChildFailed(f"{' '.join(command[:3])} ended without a step in {folder / 'metrics.jsonl'}")
    records = read_metrics(folder)
    steps = steps_from_metrics(records)
    if len(watch.cpu_s) == len(steps) == len(records):  # the last one may have come after the last look
        steps = [{**step, "cpu_s": cpu_s} for step, cpu_s in zip(steps, watch.cpu_s, strict=True)]
    return {
        "steps": steps,
        "first_step_unix_s": watch.first_step_unix_s,
        "peak_allocator_bytes": records[-1]["peak_memory_bytes"],
        "facts": {},
    }, ended
