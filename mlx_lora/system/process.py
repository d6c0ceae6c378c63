"""What the operating system says of this process; no mlx, so that every stage may ask."""

from __future__ import annotations

import resource
import sys


def peak_bytes() -> int:
    """Return the process's largest resident size so far, beside which MLX has a count of its own buffers."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB
