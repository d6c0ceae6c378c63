"""Tell what a run is doing from its folder alone, so that a new server, or a run of a terminal, needs nothing else.

RUN/run.yaml, metrics.jsonl, report.json ...   as every run leaves them
    .lock                                      held while the run writes; left over if it was killed
    studio/started.json                        of a run that the page started: command, process, what was asked of it
           output.log                          what the command said
           notes.txt
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora.reports.run_report import FACTS_FILE, has_ended
from mlx_lora.studio.metrics_reading import tail_lines
from mlx_lora.trainer.checkpoint import LOCK_FILE, lock_holder, numbered
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.utils.files import replacing_file
from mlx_lora.utils.text import start_mark

SIDE = "studio"
STARTED_FILE, LOG_FILE, NOTES_FILE = f"{SIDE}/started.json", f"{SIDE}/output.log", f"{SIDE}/notes.txt"
LOG_BYTES, LOG_LINES = 64 << 10, 200
SIGNALED = (-2, -15, 130, 143)  # exit codes of a run that was asked to end
COLOR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass
class Started:
    """What the page knows of a run that it started.

    Attributes:
        name: of the run.
        settings: as the page gave them, checked.
        words: of the command, without --resume.
        created: UNIX time.
        plan_peak_bytes, steps: of the plan at the start.
        pid, mark: the process, and when it began (see `start_mark`); None: it was not started yet.
        asked: pause or stop, if the page asked for it.
        code: of the process, if this server or an earlier one was there when it ended.
        at: UNIX time of the last start.
    """

    name: str
    settings: dict[str, Any]
    words: list[str]
    created: float
    plan_peak_bytes: int | None = None
    steps: int | None = None
    pid: int | None = None
    mark: str | None = None
    asked: str | None = None
    code: int | None = None
    at: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it beside the run."""
        with replacing_file(folder / STARTED_FILE) as temporary:
            temporary.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @property
    def alive(self) -> bool:
        """Whether its process is still there, and not another one with the same number."""
        return self.pid is not None and self.mark is not None and start_mark(self.pid) == self.mark


def read_started(folder: Path) -> Started | None:
    """Return what the page knows of a run; None of one that was started elsewhere."""
    try:
        return Started(**json.loads((folder / STARTED_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def run_id(folder: Path) -> str:
    """Return a run's id, which is not a path."""
    return hashlib.sha256(str(folder).encode()).hexdigest()[:12]


def process_of(folder: Path, started: Started | None) -> int | None:
    """Return the process of a run that goes on; None: it does not. 0: it goes on, but its number is not known."""
    holder = lock_holder(folder)
    if holder is None and started is not None and started.alive:
        return started.pid  # before it locks its folder, and after it released it
    return holder


def state_of(folder: Path, started: Started | None) -> tuple[str, str | None]:
    """Return a run's state, and the reason if it did not end well.

    Args:
        folder: of the run.
        started: as `read_started` returns it.

    Returns:
        running, done, paused, stopped, failed, killed, or waiting if its command was never started.
    """
    if process_of(folder, started) is not None:
        return "running", None
    if started is not None and started.pid is None:
        return "waiting", None
    if _ended(folder, started):
        return "done", None
    code, last = (started.code, last_words(folder)) if started else (None, "")
    if started is not None and started.asked and (code is None or code in (*SIGNALED, 0)):
        return ("paused" if started.asked == "pause" else "stopped"), None
    if code == 0:
        return "done", None
    if code in SIGNALED or last.startswith("Interrupted after"):
        return "stopped", None
    if (code is not None and code > 0) or last.startswith("Error"):
        return "failed", last.removeprefix("Error: ") or f"it ended with code {code}"
    if code is not None or (folder / LOCK_FILE).exists() or started is not None:
        return (
            "killed",
            "The process ended without a message: it was killed, or the machine ran out of memory or lost power.",
        )
    return "stopped", None


def _ended(folder: Path, started: Started | None) -> bool:
    """Return whether the run took all its steps, in its last start."""
    if not has_ended(folder):
        return False
    return started is None or started.at is None or (folder / FACTS_FILE).stat().st_mtime >= started.at


def last_words(folder: Path) -> str:
    """Return the last line of what a run's command said."""
    lines = [line for line in log_lines(folder) if line.strip()]
    return lines[-1].strip() if lines else ""


def log_lines(folder: Path) -> list[str]:
    """Return the last lines of what a run's command said, without colors."""
    lines = tail_lines(folder / LOG_FILE, LOG_BYTES, LOG_LINES)
    return [COLOR.sub("", line.rpartition("\r")[2])[:2000] for line in lines]


def last_checkpoint(folder: Path) -> int | None:
    """Return the step of the newest checkpoint; None: there is none."""
    return next((step for step, _ in numbered(folder / CHECKPOINTS)), None)
