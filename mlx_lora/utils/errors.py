"""The two errors with which a command ends early on purpose, and the errors with which mlx reports that a GPU gave up.

Since mlx 0.32.0, a Metal command buffer that fails no longer aborts the process: whoever waits for its result gets a
RuntimeError (mlx#3523). The texts after the colon are macOS's own, as in
`Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)`. Any other error is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlx_lora.utils.supervise import OUT_OF_MEMORY, OUT_OF_TIME


class InputError(Exception):
    """Bad usage or bad input: the command prints `Error: <message>` on one line and exits 2.

    The message says what was asked, what was found and what to do, in that order. If several things are wrong, they are
    collected and raised once.
    """


def refuse(problems: Mapping[str, object]) -> None:
    """Raise one InputError with all the messages whose values are true.

    Raises:
        InputError: there are some.
    """
    if found := [message for message, holds in problems.items() if holds]:
        raise InputError("; ".join(found))


class DoesNotFitError(InputError):
    """A run needs more memory than it may use."""


class RunError(Exception):
    """A failure while running (full disk, divergence): one line and exit code 1; earlier results are kept."""


def first_line(error: BaseException) -> str:
    """Return an error's first line of text, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# A GPU that gives up
SOURCES = ("[METAL]", "[metal::malloc]", "[malloc]", "cudaMalloc", "CUDA")
MEMORY = (
    "insufficient memory",
    "outofmemory",
    "out of memory",
    "unable to allocate",
    "attempting to allocate",
    "resource limit",
)
TIME = (
    "timeout",
    "impacting interactivity",
    "impactinginteractivity",
    "gpu hang",
    "submissionsignored",
    "ignored (for causing",
)


def describe_gpu_failure(error: BaseException) -> tuple[str, int] | None:
    """Return message and exit code of an error that reports a GPU's failure, None for any other error."""
    text = str(error)
    if not isinstance(error, RuntimeError) or not any(source in text for source in SOURCES):
        return None
    told, lower = first_line(error), text.lower()
    if any(word in lower for word in MEMORY):
        return (
            f"memory ran out on the GPU; for training, use --grad-checkpoint block, a smaller --batch-tokens or --max-seq-length, or --bits 4. "
            f"Checkpoints are kept: --resume goes on from the last, and --max-restarts 2 does so by itself ({told})",
            OUT_OF_MEMORY,
        )
    if any(word in lower for word in TIME):
        return (
            f"macOS ended GPU work that took too long; for training, use --short-buffers or a smaller --batch-tokens. Checkpoints are kept: "
            f"--resume goes on from the last, and --max-restarts 2 does so by itself ({told})",
            OUT_OF_TIME,
        )
    return None


class Problems(list[str]):
    """What is wrong, a few words each, gathered so that one message has all of it."""

    def note_if(self, wrong: Any, problem: str) -> None:
        """Add a problem if there is one."""
        if wrong:
            self.append(problem)


def first_of(problems: list[str], most: int = 5, between: str = "; ") -> str:
    """Return the first problems, and how many more there are."""
    more = f"{between}and {len(problems) - most} more" if len(problems) > most else ""
    return between.join(problems[:most]) + more
