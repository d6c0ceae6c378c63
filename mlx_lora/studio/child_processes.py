"""Start this program's commands as processes of their own, which neither the page's end nor the server's ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from mlx_lora.utils.text import MODULE


def start_child(
    words: list[str], log: Path, append: bool = False, result: Path | None = None, cwd: str | None = None
) -> subprocess.Popen:
    """Start a command in a session of its own, with its output in a file.

    Args:
        words: the command's name and arguments.
        log: where its output goes.
        append: keep what the file has.
        result: where its standard output goes, apart from the rest; None: into the log too.
        cwd: the folder that its relative names start from, if it is still there; None: the studio's own.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        output = files.enter_context(log.open("ab" if append else "wb"))
        return subprocess.Popen(
            [sys.executable, "-m", MODULE, *words],
            stdin=subprocess.DEVNULL,
            stdout=files.enter_context(result.open("wb")) if result else output,
            stderr=output,
            start_new_session=True,
            cwd=cwd if cwd and os.path.isdir(cwd) else None,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def ended_words(code: int, line: str) -> str:
    """Return why a command failed: its own last line, or the signal that ended it."""
    if code < 0:
        return f"ended by {signal.Signals(-code).name}; start it again"
    return line.removeprefix("Error: ") or f"ended with code {code}; run the command in a terminal to see why"
