"""Run a training command, and restart it if its process dies, or its GPU gives up (`--max-restarts N`).

If memory runs out, the process aborts (134), has a segmentation fault on the CPU (139), is killed by the system (137), or, on
a GPU since mlx 0.32, gets an error and exits with OUT_OF_MEMORY. So another process restarts it from the last checkpoint, with
batches in smaller parts, then also with every block checkpointed: both give the same updates (docs/preference.md has an
exception). If macOS ended work that kept the GPU too long (OUT_OF_TIME), it is restarted with short command buffers. A training process that exits by itself with
another code is not restarted.

This file is run as a script, so that only the standard library is in memory beside the training. The training has its
own session, so that Ctrl-C reaches it once, through this process, and not a second time from the terminal.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

# Environment variables: the supervisor's process id; how often it has restarted the run; how often it still can.
SUPERVISOR, RESTARTS, RESTARTS_LEFT = "MLX_LORA_SUPERVISOR", "MLX_LORA_RESTARTS", "MLX_LORA_RESTARTS_LEFT"
REPEATED = (
    "--adapter",
    "--blend",
    "--against",
    "--workload",
    "--tier",
    "--model-folder",
    "--data-folder",
    "--runs-folder",
)  # options that may be given several times
# Exit codes of a run whose GPU failed (utils/errors.py); this file is a script, and so has them itself.
OUT_OF_MEMORY, OUT_OF_TIME = 75, 76
DEATHS = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL)


def smaller(restarts: int) -> list[str]:
    """Return the flags of the n-th restart: 2 parts; 2 parts and checkpointing; 4 parts and checkpointing; 8 ..."""
    parts = 2 ** max(1, restarts - 1)
    return ["--batch-parts", str(parts), *(["--grad-checkpoint", "block"] if restarts > 1 else [])]


def run(command: list[str], max_restarts: int) -> int:
    """Run a training command until it ends by itself, and return its exit code, or 1 if no restart is left."""
    extra: list[str] = []
    of_memory, name = 0, ""
    for restarts in range(max_restarts + 1):
        told = {RESTARTS: str(restarts), RESTARTS_LEFT: str(max_restarts - restarts)}
        code = run_once(last_given([*command, *extra]), told)
        if code == OUT_OF_TIME:
            name, why = "the GPU worked too long at a time", ""
        elif code == OUT_OF_MEMORY:
            name, why = "the GPU ran out of memory", ""
        elif code >= 0:
            return code
        else:
            name, why = signal.Signals(-code).name, ", most likely because memory ran out"
            if -code not in DEATHS:  # someone sent the signal on purpose
                return 128 - code
        of_memory += code != OUT_OF_TIME
        short = ["--short-buffers"] if code == OUT_OF_TIME or "--short-buffers" in extra else []
        extra = ["--resume", *(smaller(of_memory) if of_memory else []), *short]
        if restarts < max_restarts:
            say(f"The training process died ({name}){why}; restarting with {' '.join(extra)}")
    say(
        f"Error: the training process died {max_restarts + 1} times (last: {name}); lower --max-seq-length, use "
        "--bits 4, or close other programs; if the display of this Mac froze before, use --short-buffers"
    )
    return 1


def last_given(words: list[str]) -> list[str]:
    """Return a command's words with the last value of every option: a command refuses one that is given twice.

    Args:
        words: a command of ours and flags that beat its own, at its end. Options that may be repeated stay.
    """
    groups: list[list[str]] = []
    for word in words:
        has_value = (
            bool(groups) and len(groups[-1]) == 1 and groups[-1][0].startswith("--") and "=" not in groups[-1][0]
        )
        if has_value and not word.startswith("--"):
            groups[-1].append(word)
        else:
            groups.append([word])
    names = [group[0].partition("=")[0] for group in groups]
    last = {name: place for place, name in enumerate(names)}
    kept = [
        group
        for place, (name, group) in enumerate(zip(names, groups, strict=True))
        if not name.startswith("--") or name in REPEATED or last[name] == place
    ]
    return [word for group in kept for word in group]


def run_once(command: list[str], told: dict[str, str]) -> int:
    """Run a command until it ends, and return its exit code, or minus the number of the signal that ended it.

    Args:
        command: words.
        told: environment variables for it.
    """
    environment = {**os.environ, SUPERVISOR: str(os.getpid()), **told}
    child = subprocess.Popen(command, env=environment, start_new_session=True)

    def pass_on(number: int, frame: FrameType | None) -> None:
        child.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    return child.wait()


def say(line: str) -> None:
    """Print on standard error, as training does."""
    print(line, file=sys.stderr, flush=True)


def restarts(name: str = RESTARTS) -> int:
    """Return how often a supervisor has restarted this process, or how often it still can (RESTARTS_LEFT); 0 without one."""
    value = os.environ.get(name, "")
    return int(value) if SUPERVISOR in os.environ and value.isdecimal() else 0


def run_supervised(max_restarts: int) -> None:
    """Replace this process by a supervisor that runs the same command; do nothing if it already has one."""
    if SUPERVISOR not in os.environ:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execv(sys.executable, [sys.executable, __file__, str(max_restarts), *command])


if __name__ == "__main__":
    sys.exit(run(sys.argv[2:], int(sys.argv[1])))
