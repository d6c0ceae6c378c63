"""The two errors with which a command ends early on purpose; any other is a bug and keeps its traceback."""


class InputError(Exception):
    """Bad usage or bad input: the command prints `Error: <message>` on one line and exits 2.

    The message says what was asked, what was found and what to do, in that order. If several things are wrong, they are
    collected and raised once.
    """


class RunError(Exception):
    """A failure while running (full disk, divergence): one line and exit code 1; earlier results are kept."""


def first_line(error: BaseException) -> str:
    """Return an error's first line of text, or its type if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
