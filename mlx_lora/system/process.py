"""Read what the operating system knows about this process; without mlx, so that every stage may use it."""

from __future__ import annotations

import resource
import sys


def peak_bytes() -> int:
    """Return the process's largest resident size so far, in bytes; MLX only counts its own buffers."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
