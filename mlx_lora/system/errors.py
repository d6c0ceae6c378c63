"""The two ways a command ends early on purpose; everything else is a bug and keeps its traceback."""


class InputError(Exception):
    """Bad usage or bad input: the command prints `Error: <message>` on one line and exits 2.

    The message says what was asked, what was found and what to do, in that order. Where several
    things are wrong they are gathered and raised once.
    """


class RunError(Exception):
    """A failure while running (full disk, divergence): one line, exit code 1, earlier results kept."""


def first_line(error: BaseException) -> str:
    """Return an error's first line of text, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
