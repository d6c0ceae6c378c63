"""Run one child process of a benchmark at a time, and measure its time and memory.

Neither this file nor the parent may import numpy or mlx: Linux includes a parent's resident size at the fork in its
child's peak, so the parent must stay small.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_lora.utils.supervise import last_given

POLL_S = 0.02
REPOSITORY = Path(__file__).parents[1]

# Both change OpenBLAS's kernels or block sizes; figures must not depend on them.
DROPPED_ENVIRONMENT = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


class ChildFailed(RuntimeError):
    """A child ended with an error; the message has the end of its log."""


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        code: exit code; negative if a signal ended it.
        started_unix_s: wall clock when it was started.
        wall_s: seconds until it ended.
        peak_process_bytes: its peak resident size by the operating system.
    """

    code: int
    started_unix_s: float
    wall_s: float
    peak_process_bytes: int


def child_environment() -> dict[str, str]:
    """Return this process's environment without the variables that change OpenBLAS."""
    kept = {name: value for name, value in os.environ.items() if name not in DROPPED_ENVIRONMENT}
    # Another side's interpreter has no mlx_lora installed, but needs its BLAS loader.
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [kept.get("PYTHONPATH"), str(REPOSITORY)]))
    return {**kept, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def run_child(
    command: list[str],
    log: Path,
    *,
    timeout_s: float,
    watch: Callable[[subprocess.Popen], None] | None = None,
    good_codes: tuple[int, ...] = (0,),
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run a command to its end, with its output in `log`.

    Args:
        command: program and arguments.
        log: file that takes standard output and error.
        timeout_s: the child is killed after this time.
        watch: called every 20 ms with the process, to read its results or interrupt it.
        good_codes: exit codes that are not failures.
        environment: variables to set beside `child_environment`.

    Raises:
        ChildFailed: the exit code is another one, or the time ran out.
    """
    variables = {**child_environment(), **(environment or {})}
    with log.open("w", encoding="utf-8") as output:
        started_unix_s, start = time.time(), time.perf_counter()
        # Flags for one side come after the common ones, and beat them.
        child = subprocess.Popen(last_given(command), stdout=output, stderr=subprocess.STDOUT, env=variables)
        try:
            ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            while not ended:
                if time.perf_counter() - start > timeout_s:
                    raise ChildFailed(f"{command[1:4]} took longer than {timeout_s:.0f} s (--timeout)")
                if watch is not None:
                    watch(child)
                time.sleep(POLL_S)
                ended, status, usage = os.wait4(child.pid, os.WNOHANG)
            child.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if child.returncode is None:
                child.send_signal(signal.SIGKILL)
                child.wait()
    if child.returncode not in good_codes:
        raise ChildFailed(f"{' '.join(command[:4])} ended with code {child.returncode}:\n{last_lines(log)}")
    peak = usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024
    return Ended(child.returncode, started_unix_s, time.perf_counter() - start, peak)


def cpu_seconds(pid: int) -> float | None:
    """Return the processor seconds that a running process has used, None where /proc does not tell."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    user, system = facts.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def last_lines(log: Path, count: int = 15) -> str:
    """Return the end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-count:])
