"""Runs the commands that a benchmark is made of, each in a fresh process with a clean environment."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlx_lora
from mlx_lora.suite.machine_facts import DROPPED_VARIABLES

POLL_S = 0.02


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: exit code; negative when a signal ended it.
        log: all that it printed.
    """

    code: int
    log: str

    @property
    def last_words(self) -> str:
        """Its error, or the last line it printed."""
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("Error: ")]
        return errors[-1].removeprefix("Error: ") if errors else lines[-1] if lines else "it printed nothing"


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables that would tilt OpenBLAS."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED_VARIABLES}
    # A checkout that is not installed must find itself in the child as well.
    root = str(Path(mlx_lora.__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    return {**kept, "TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


def run_process(command: list[str], log: Path, watch: Callable[[subprocess.Popen], None] = lambda child: None) -> Ended:
    """Run a command to its end.

    Args:
        command: program and arguments.
        log: file that takes its standard output and error.
        watch: called every 20 ms with the process, to look at what it wrote or to interrupt it.
    """
    with log.open("w", encoding="utf-8") as output:
        # A session of its own: Ctrl-C reaches it through us, once.
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=clean_environment(), start_new_session=True
        )
        try:
            while child.poll() is None:
                watch(child)
                time.sleep(POLL_S)
        except BaseException:
            child.send_signal(signal.SIGKILL)
            child.wait()
            raise
    return Ended(child.returncode, log.read_text(encoding="utf-8", errors="replace"))
