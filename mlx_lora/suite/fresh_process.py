"""Run a benchmark's commands, each in a fresh process with a clean environment."""

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
        code: exit code; negative if a signal ended it.
        log: everything that it printed.
    """

    code: int
    log: str

    @property
    def last_words(self) -> str:
        """The error that it printed, or its last line."""
        lines = [line.strip() for line in self.log.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("Error: ")]
        return errors[-1].removeprefix("Error: ") if errors else lines[-1] if lines else "it printed nothing"


def clean_environment() -> dict[str, str]:
    """Return this process's environment without the variables that would change OpenBLAS."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED_VARIABLES}
    # The child must find this package, even if it is a checkout that is not installed.
    root = str(Path(mlx_lora.__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    return {**kept, "TOKENIZERS_PARALLELISM": "true", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"}


def run_process(command: list[str], log: Path, watch: Callable[[subprocess.Popen], None] = lambda child: None) -> Ended:
    """Run a command until it ends.

    Args:
        command: program and arguments.
        log: the file for its standard output and error.
        watch: called every 20 ms with the process, to check what it wrote or to interrupt it.
    """
    with log.open("w", encoding="utf-8") as output:
        # A new session, so that Ctrl-C does not reach the child directly as well.
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
