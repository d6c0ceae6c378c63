"""A side's process that stays loaded: it answers one line of JSON after another, so that sides can take turns."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _processes import ChildFailed, child_environment, last_lines


class Child:
    """A process whose lines on standard output that begin with @ are its answers; the others go unread."""

    def __init__(self, name: str, command: Sequence[str], log: Path, checkout: str | None = None):
        """Start it.

        Args:
            name: for messages.
            command: program and arguments.
            log: file that takes its standard error.
            checkout: whose `mlx_lora` it imports; None: the installed one.
        """
        self.name, self._log = name, log
        environment = child_environment() | ({"PYTHONPATH": checkout} if checkout else {})
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                list(command), text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
            )  # fmt: skip

    def wait(self) -> dict[str, Any]:
        """Return its first answer, which it gives when the model is loaded."""
        return self._read()

    def ask(self, **question: Any) -> dict[str, Any]:
        """Return its answer to one line."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; what it left is read below
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise ChildFailed(f"{self.name} ended with {self._process.wait()}:\n{last_lines(self._log)}")

    def close(self) -> None:
        """End the process; it holds nothing that it would have to write."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
