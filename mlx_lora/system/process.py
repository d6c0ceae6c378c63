"""Read what the operating system knows about processes; without mlx, so that every stage may use it."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path


def peak_bytes() -> int:
    """Return the process's largest resident size so far, in bytes; MLX only counts its own buffers."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def start_mark(number: int) -> str | None:
    """Return what tells a process from a later one with the same number: when it started; None if it is not there.

    A process that has ended, and whose parent has not asked for its result yet, counts as not there.
    """
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    asked = subprocess.run(
        ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(number)], capture_output=True, text=True, check=False
    )
    state, _, started = asked.stdout.strip().partition(" ")
    return None if asked.returncode or state.startswith("Z") else " ".join(started.split())
