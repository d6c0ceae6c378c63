"""Where a run in Python shows its progress: a notebook, a terminal, or plain lines."""

from __future__ import annotations

import sys
from collections.abc import Callable

from mlx_lora.system import console
from mlx_lora.training.progress import LiveProgress, Progress


def display_here() -> tuple[Callable[[str], None], Callable[[int], Progress] | None]:
    """Return what takes lines, and what makes a live display here (None: lines for reports as well)."""
    return console.echo, LiveProgress if sys.stderr.isatty() else None
