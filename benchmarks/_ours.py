"""Run `python -m mlx_lora.train` as a child process of a benchmark, and read its results."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _figures import steps_from_metrics
from _harness import ChildFailed, Ended, as_words, cpu_seconds, run_child

MIN_STEPS = 2
# A report of every step, and nothing else that takes time.
STEPS_ALONE = {"--steps-per-report": 1, "--valid-fraction": 0, "--val-batches": 0, "--save-every": 0}


class Watch:
    """Follows our metrics.jsonl to note the first step's end, and to interrupt the run."""

    def __init__(self, metrics: Path, seconds: float | None, examples: int | None = None):
        """Follow a file; interrupt after these seconds from its first step, or after these examples; None: never."""
        self._metrics, self._seconds, self._examples = metrics, seconds, examples
        self._interrupted, self._seen = False, 0
        self.first_step_unix_s: float | None = None
        self.cpu_s: list[float | None] = []  # the child's processor seconds at the end of each step

    def __call__(self, child: subprocess.Popen) -> None:
        size = self._metrics.stat().st_size if self._metrics.exists() else 0
        if self._interrupted or not size:
            return
        if self.first_step_unix_s is None:
            self.first_step_unix_s = time.time()
        grown, self._seen = size != self._seen, size  # the file is read only when it has grown
        lines = self._metrics.read_bytes().splitlines(keepends=True) if grown else []
        if grown:  # for each step that was reported since the last look, 20 ms ago
            done = sum(line.endswith(b"\n") for line in lines)
            self.cpu_s += [cpu_seconds(child.pid)] * (done - len(self.cpu_s))
        if self._is_over(lines):
            child.send_signal(signal.SIGINT)  # it ends its step, saves, and exits with 130
            self._interrupted = True

    def _is_over(self, lines: list[bytes]) -> bool:
        if self._seconds is not None:
            return time.time() - (self.first_step_unix_s or 0) >= self._seconds and len(self.cpu_s) >= MIN_STEPS
        if self._examples is None or not lines:
            return False
        records = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return len(records) >= MIN_STEPS and sum(record["examples"] for record in records) >= self._examples


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of a run folder's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def train_command(*flags: str, last: Sequence[str] = ()) -> list[str]:
    """Return our command that trains and only reports its steps, whatever these flags say; `last` flags beat that."""
    return [sys.executable, "-m", "mlx_lora.train", *flags, *as_words(STEPS_ALONE), *last]


def last_report(
    command: list[str], folder: Path, log: Path, timeout_s: float, environment: dict[str, str] | None = None
) -> dict[str, Any]:
    """Run a command that trains into `folder`, and return the last line of its metrics."""
    run_child([*command, "--adapter-path", str(folder)], log, timeout_s=timeout_s, environment=environment)
    return read_metrics(folder)[-1]


def train_timed(
    command: list[str],
    folder: Path,
    log: Path,
    *,
    timeout_s: float,
    seconds: float | None = None,
    examples: int | None = None,
    environment: dict[str, str] | None = None,
) -> tuple[dict[str, Any], Ended]:
    """Run our complete command, which reports every step into the new `folder`, its --adapter-path.

    It is interrupted some seconds after its first step or after some examples, if they are given, and killed after
    `timeout_s`. Returns the steps, the wall clock at the end of the first, MLX's peak memory, and how the process ended.
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
    kept = {"first_step_unix_s": watch.first_step_unix_s, "peak_allocator_bytes": records[-1]["peak_memory_bytes"]}
    return {"steps": steps, **kept, "facts": {}}, ended
