"""What the programs share that the kit compares speeds with: their job, and the end of each step."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


class StepEnds:
    """Writes the seconds since the start at the end of each step, a line each, so that a process may be ended at any time."""

    def __init__(self, path: str):
        self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 # open as long as the process
        self._begun = time.perf_counter()

    def __call__(self) -> None:
        """Note the end of a step."""
        self._file.write(f"{time.perf_counter() - self._begun}\n")
        self._file.flush()


def read_job() -> dict[str, Any]:
    """Return the job whose file the command line names: `model`, `data`, `batch_size`, `steps`, `rank`, `ends`."""
    return json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
