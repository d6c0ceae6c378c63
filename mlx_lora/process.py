"""What the operating system says of this process; no mlx, so that every stage may ask."""

from __future__ import annotations

import resource
import sys
import threading
import time
from pathlib import Path

# The system takes a moment to end a thread that Python is done with, where it cannot be asked whether it has.
THREAD_END_S = 0.2


def peak_bytes() -> int:
    """Return the process's largest resident size so far, beside which MLX has a count of its own buffers."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def join_thread(thread: threading.Thread, timeout_s: float) -> None:
    """Wait for a thread, and then for the system's thread behind it.

    Before Python 3.13 `join` returns while the system still takes a thread down, and MLX lets its compiled functions go
    only then: an interpreter that ends meanwhile aborts ("terminate called without an active exception").

    Args:
        thread: started; one that has used MLX.
        timeout_s: for each of the two.
    """
    thread.join(timeout_s)
    task = Path(f"/proc/self/task/{thread.native_id}")
    if not task.parent.is_dir():
        time.sleep(THREAD_END_S)
        return
    deadline = time.monotonic() + timeout_s
    while task.exists() and time.monotonic() < deadline:
        time.sleep(0.002)
