"""Runs a training and starts it anew when its process dies: `--max-restarts N`.

Where memory runs out MLX cannot raise an error: the process aborts on Metal (134), has a segmentation fault on the
CPU (139), or is killed by the system (137). So a process outside it goes on from the last checkpoint, with batches in
smaller parts, then also with every block checkpointed: both give the same updates. An end with an exit code, right or
wrong, is the run's own and stays.

Run as a file, so that only the standard library is in memory beside the training. The training has a session
of its own: a Ctrl-C reaches it once, through here, and not a second time from the terminal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

# Its value is the supervisor's process number.
SUPERVISOR = "MLX_LORA_SUPERVISOR"
DEATHS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL)


def smaller(restarts: int) -> list[str]:
    """Return what the n-th restart adds: 2 parts; 2 parts and checkpointing; 4 and 8 parts and checkpointing ..."""
    parts = 2 ** max(1, restarts - 1)
    return ["--resume", "--batch-parts", str(parts), *(["--grad-checkpoint", "block"] if restarts > 1 else [])]


def run(command: list[str], max_restarts: int) -> int:
    """Run a training command until it ends by itself, and return its exit code, or 1 when no restart is left."""
    for restarts in range(max_restarts + 1):
        extra = smaller(restarts) if restarts else []
        code = run_once([*command, *extra])
        if code >= 0:
            return code
        name = signal.Signals(-code).name
        if -code not in DEATHS:  # somebody's wish
            return 128 - code
        if restarts < max_restarts:
            more = " ".join(smaller(restarts + 1))
            say(f"The training process died ({name}), most often because memory ran out; going on with {more}")
    say(
        f"Error: the training process died {max_restarts + 1} times (last: {name}); shorten --max-seq-length, take a "
        "4-bit base, or close other programs; on a Mac whose display froze before: --short-buffers"
    )
    return 1


def run_once(command: list[str]) -> int:
    """Run a command to its end and return its exit code, minus the signal's number if it died of one."""
    child = subprocess.Popen(command, env={**os.environ, SUPERVISOR: str(os.getpid())}, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    return child.wait()


def say(line: str) -> None:
    """Print on standard error, as all of a training's words are."""
    print(line, file=sys.stderr, flush=True)


def run_supervised(max_restarts: int) -> None:
    """Become the supervisor of this very command; does nothing in a process that has one."""
    if SUPERVISOR not in os.environ:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execv(sys.executable, [sys.executable, __file__, str(max_restarts), *command])


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:], int(sys.argv[1])))
