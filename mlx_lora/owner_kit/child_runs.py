"""Run `mlx-lora train` in a process of its own for the kit, and read what its run folder says."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.artifacts.run_report import FACTS_FILE
from mlx_lora.owner_kit.kit_check import Kit
from mlx_lora.settings.setting_row import flag_of
from mlx_lora.suite.fresh_process import run_process
from mlx_lora.system.errors import RunError

INTERRUPTED = 130
# Nothing is held out, validated, sampled or saved: the steps alone are looked at.
QUIET = {
    "valid_fraction": 0, "val_batches": 0, "steps_per_eval": 0, "save_every": 0, "steps_per_report": 1,
    "sample_tokens": 0, "learning_rate": 1e-4, "seed": 0,
}  # fmt: skip


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended.

    Attributes:
        records: lines of metrics.jsonl with a loss.
        facts: report.json.
    """

    records: list[dict[str, Any]]
    facts: dict[str, Any]


class Interrupter:
    """Interrupts a run some seconds after its first step, as Ctrl-C does."""

    def __init__(self, metrics: Path, seconds: float):
        self._metrics, self._seconds = metrics, seconds
        self._begun: float | None = None
        self._sent = False

    def __call__(self, child: subprocess.Popen) -> None:
        if self._begun is None:
            if self._metrics.exists() and self._metrics.stat().st_size:
                self._begun = time.perf_counter()
        elif not self._sent and time.perf_counter() - self._begun >= self._seconds:
            child.send_signal(signal.SIGINT)
            self._sent = True


def train_child(
    kit: Kit, name: str, model: Path, data: Path, settings: Mapping[str, Any], seconds: float | None = None
) -> TrainedRun:
    """Train in a new process and return its figures.

    Args:
        kit: its work folder takes the run.
        name: of the run.
        model, data: --model and --data.
        settings: further settings by name; True is a flag without a value.
        seconds: interrupt it that long after its first step; None: never.

    Raises:
        RunError: it failed.
    """
    folder = kit.work / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = {"model": model, "data": data, "adapter_path": folder, **QUIET, **settings}
    words = [word for key, value in asked.items() for word in _words(key, value)]
    watch = Interrupter(folder / "metrics.jsonl", seconds) if seconds is not None else lambda child: None
    ended = run_process([sys.executable, "-m", "mlx_lora.train", *words], kit.work / f"{name}.log", watch)
    if ended.code not in (0, INTERRUPTED):
        raise RunError(f"train ended with code {ended.code}: {ended.last_words}")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    facts = json.loads((folder / FACTS_FILE).read_text(encoding="utf-8"))
    return TrainedRun([line for line in lines if line["val_loss"] is None], facts)


def _words(name: str, value: Any) -> list[str]:
    """Return a setting as words of the command line."""
    if isinstance(value, bool):
        return [flag_of(name) if value else f"--no-{flag_of(name).removeprefix('--')}"]
    return [flag_of(name), str(value)]
