"""Runs a command in this process: same code path as `python -m mlx_lora.X`, without two seconds of imports."""

from __future__ import annotations

import contextlib
import io
from typing import NamedTuple

import mlx_lora.__main__
from mlx_lora.__main__ import load_command
from mlx_lora.utils.supervise import last_given


class Ran(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """The lines of errors and notes, without those that a slow machine adds: how long work has taken so far."""
        return [line for line in self.err.splitlines() if line.strip() and not line.endswith(" so far")]


def run(command: str, *arguments: object, exactly: bool = False) -> Ran:
    """Run a command (or, as `__main__`, `mlx-lora` itself) and return exit code, standard output and standard error.

    Flags at the end beat the same flags before them, unless the arguments are to be given `exactly` so: commands refuse
    an option that is given twice.

    An error nobody foresaw propagates: to a test that is a traceback.
    """
    words = [str(a) for a in arguments]
    main = mlx_lora.__main__.main if command == "__main__" else load_command(command, words)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main.main(words if exactly else last_given(words), prog_name=f"mlx-lora {command}")
        except SystemExit as end:
            code = end.code or 0
    return Ran(code, out.getvalue(), err.getvalue())


def succeeds(command: str, *arguments: object, exactly: bool = False) -> Ran:
    """Run a command as `run` does, and assert that it ended well."""
    ran = run(command, *arguments, exactly=exactly)
    assert ran.code == 0, ran.err
    return ran


def one_line(ran: Ran, *words: str) -> None:
    """Assert that a command refused its input in one line that holds these words."""
    assert ran.code == 2
    assert len(ran.lines) == 1
    holds(ran.err, *words)


def refused(ran: Ran, *words: str) -> None:
    """Assert that a command refused its input, and that the last line it said holds these words; notes may stand before it."""
    assert ran.code == 2, ran.err
    holds(ran.lines[-1], *words)


def passed(ran: Ran) -> Ran:
    """Assert that a command ended well, and return what it said."""
    assert ran.code == 0, ran.err
    return ran


def holds(text: str, *words: str) -> None:
    """Assert that all of these words are in a text."""
    assert not [word for word in words if word not in text], text


def lacks(text: str, *words: str) -> None:
    """Assert that none of these words is in a text."""
    assert not [word for word in words if word in text], text
