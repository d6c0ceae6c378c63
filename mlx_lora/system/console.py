"""What all commands share: options made from the settings, one-line errors, exit codes, where text goes."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from mlx_lora.system.errors import InputError, RunError

MOST_CHARACTERS = 880  # of an error's one line
LONGEST_WORD = 40  # that is not cut there


def echo(text: str = "") -> None:
    """Print progress and reports on standard error, so that standard output stays the result's."""
    click.echo(text, err=True)


def print_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of a `--json` command on standard output; a NaN or infinity is null there."""
    click.echo(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    """Replace what JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def perplexity(loss: float) -> float:
    """Return exp(loss), infinity where a float cannot hold it (a diverged adapter)."""
    return math.inf if loss > 700 else math.exp(loss)


def wants_color() -> bool:
    """Color reports on a terminal only, and not where NO_COLOR (no-color.org) or TERM=dumb asks for none."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class Command(click.Command):
    """A click command whose errors are one line `Error: asked, found, do this`.

    Exit codes: 0 done; 1 a failure while running; 2 bad usage or input; 130 interrupted.
    """

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        return _run(super().main, standalone_mode, *args, **kwargs)


class Group(click.Group):
    """`mlx-lora X`: the group's own usage errors are one line as well; the commands report theirs."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        return _run(super().main, standalone_mode, *args, **kwargs)


def _run(main: Callable[..., Any], standalone_mode: bool, *args: Any, **kwargs: Any) -> Any:
    """Run click's `main`; as a program of its own, report errors our way and end with their exit code."""
    if not standalone_mode:
        return main(*args, standalone_mode=False, **kwargs)
    _quiet_libraries()
    try:
        result = main(*args, standalone_mode=False, **kwargs)
    except (Exception, KeyboardInterrupt) as error:
        try:
            code = report_error(error)
        except KeyboardInterrupt as interrupt:
            # Ctrl-C ended a compiler that MLX had started: its failure is here first, the interruption right after.
            code = report_error(interrupt)
        sys.exit(code)
    sys.exit(result if isinstance(result, int) else 0)


def report_error(error: BaseException) -> int:
    """Print the one line for an error we foresaw and return its exit code.

    Raises:
        BaseException: `error` itself when nobody foresaw it: that is a bug, and it keeps its traceback.
    """
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message())
        return 2
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has what it wants: no message, and no second one when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    described = describe_error(error)
    if described is None:
        raise error
    message, code = described
    click.echo("Error: " + printable(message), err=True)
    return code


def describe_error(error: BaseException) -> tuple[str, int] | None:
    """Return message and exit code of an error we foresaw, None for one that nobody did."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, click.ClickException):
        return f"{error.format_message()} (--help lists the options)", 2
    if isinstance(error, RunError):
        return str(error), 1
    if isinstance(error, OSError) and error.errno is not None:
        # Disk full, permission, vanished file: the operating system's own words are the plain ones.
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}", 1
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted", 130
    return None


def printable(text: str, limit: int = MOST_CHARACTERS) -> str:
    """Return text on one line that no terminal obeys: names from files may hold its commands, and be endless."""
    line = " ".join(text.split())
    if len(line) > limit:
        # The middle goes, from word to word where words are near; the end says what to do.
        start, end = limit * 3 // 4, len(line) - limit // 4
        space = line.rfind(" ", start - LONGEST_WORD, start + 1)
        start = space if space > 0 else start
        end = line.find(" ", end - 1, end + LONGEST_WORD) + 1 or end
        line = f"{line[:start]} ... {line[end:]}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)


def _quiet_libraries() -> None:
    """Keep libraries' notes ("PyTorch was not found") out of our output; their errors still reach us."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
