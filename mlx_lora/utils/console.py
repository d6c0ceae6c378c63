"""What all commands share: one-line errors, exit codes, and where text is printed."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlx_lora.utils.errors import InputError, RunError, describe_gpu_failure
from mlx_lora.utils.text import did_you_mean

HELP_COLUMNS = 100
SHOW_ALL = "mlx_lora.show_all"  # the key in a click context that says that the user gave --help-all
MOST_CHARACTERS = 880  # the longest error message that is printed
LEAST_COLUMNS = 40  # a narrower terminal wraps by itself
LONGEST_WORD = 40  # a longer word may be cut in its middle
HELP_FLAGS = ["-h", "--help"]
LOGGER = logging.getLogger("mlx_lora")


def echo(text: str = "") -> None:
    """Print progress and reports on standard error, so that standard output only has results.

    On a terminal, lines that are too long for it continue on the next, after a whole word.
    """
    if sys.stderr.isatty():
        text = wrapped(text, shutil.get_terminal_size().columns)
    click.echo(text, err=True)


def show(text: str) -> None:
    """Print a line of progress where Python code runs: in a notebook's cell, or on standard error."""
    if in_notebook():
        print(text)  # what goes to standard error has a red background in notebooks
    else:
        echo(text)


class LineHandler(logging.Handler):
    """Gives each log line to a function."""

    def __init__(self, write: Callable[[str], None]):
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record.getMessage())


def drop(line: str) -> None:
    """Take a log line and show nothing, for `log_to`."""


@contextmanager
def log_to(write: Callable[[str], None] | None) -> Iterator[None]:
    """Give the package's log lines to `write` in this block, instead of to an outer block's function.

    Args:
        write: called with each line of level INFO and above; None: logging stays as it is.
    """
    if write is None:
        yield
        return
    before, level = LOGGER.handlers, LOGGER.level
    LOGGER.handlers = [LineHandler(write)]
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.handlers = before
        LOGGER.setLevel(level)


def wrapped(text: str, columns: int) -> str:
    """Return text whose lines are broken at words to fit into columns; continued lines are indented.

    Colors take no room. Indented lines (commands to copy, data) are left to the terminal.
    """
    lines = []
    for line in text.split("\n"):
        if len(click.unstyle(line)) <= columns or columns < LEAST_COLUMNS or line.startswith(" "):
            lines.append(line)
            continue
        room, words = 0, []
        for word in line.split(" "):
            size = len(click.unstyle(word))
            if words and room + 1 + size > columns:
                lines.append(" ".join(words))
                words, room = [" ", word], 2 + size
            else:
                words, room = [*words, word], room + size + (1 if words else 0)
        lines.append(" ".join(words))
    return "\n".join(lines)


def print_json(value: dict[str, Any]) -> None:
    """Print the JSON object of a `--json` command on standard output, with null for NaN and infinity."""
    click.echo(json.dumps(finite_values(value), ensure_ascii=False))


def finite_values(value: Any) -> Any:
    """Return a value with NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, dict):
        return {key: finite_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_values(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def agreed(question: str, usual: bool = True) -> bool:
    """Ask a question that one key answers; False without a terminal, where nobody can answer.

    Args:
        question: to which `y` means yes.
        usual: what the return key means.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    click.echo(
        f"{wrapped(question, shutil.get_terminal_size().columns)} {'[Y/n]' if usual else '[y/N]'} ", nl=False, err=True
    )
    yes = click.getchar() in (*"yY", *("\r\n" if usual else ""))
    click.echo("yes" if yes else "no", err=True)
    return yes


def perplexity(loss: float) -> float:
    """Return exp(loss), or infinity if a float cannot hold it (a diverged adapter)."""
    return math.inf if loss > 700 else math.exp(loss)


def wants_color() -> bool:
    """Return whether to color reports: only on a terminal, unless NO_COLOR (no-color.org) or TERM=dumb is set."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def in_notebook() -> bool:
    """Tell whether this is a notebook's process, and not IPython on a terminal."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class OneLineErrors(click.Command):
    """A click command that reports an error on one line: what was asked, what was found, what to do.

    Exit codes: 0 done; 1 a failure while running; 2 bad usage or input; 130 interrupted.
    """

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return HELP_FLAGS  # whatever the context says: click keeps those of the first one

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> Any:
        """Run click's `main`; in standalone mode, report errors on one line and exit with their code."""
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **kwargs)
        # Suppress libraries' notes ("PyTorch was not found"), but not their errors.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        try:
            result = super().main(*args, standalone_mode=False, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            try:
                code = report_error(error)
            except KeyboardInterrupt as interrupt:
                # Ctrl-C also ended a compiler that MLX had started: its error arrives first, and the interrupt right after.
                code = report_error(interrupt)
            sys.exit(code)
        sys.exit(result if isinstance(result, int) else 0)


class Command(OneLineErrors):
    """A command with log lines on the screen, which refuses an option that is given twice."""

    def invoke(self, ctx: click.Context) -> Any:
        with log_to(echo):
            return super().invoke(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Refuse an option that takes one value and is given several times: click would take the last without a word."""
        parsed = self.make_parser(ctx).parse_args(list(args))[2]  # in the order of the command line
        for param in parsed:
            if not isinstance(param, click.Option) or param.multiple or param.is_flag or param.count:
                continue
            if (times := sum(other is param for other in parsed)) > 1:
                used = dict.fromkeys(flag for arg in args if (flag := arg.partition("=")[0]) in param.opts)
                advice = getattr(param, "repeated", None) or "keep one of them"
                flags = ", ".join(used) or param.opts[0]
                raise InputError(f"{flags}: given {times} times, and takes one value; {advice}")
        return super().parse_args(ctx, args)


class Option(click.Option):
    """An option that knows its heading in the help, and whether the short help shows it."""

    def __init__(self, *args: Any, group: str, common: bool = True, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.group, self.common = group, common

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        return (f"--[no-]{self.opts[0][2:]}", record[1]) if record and self.secondary_opts else record


class LongCommand(Command):
    """A command with many options: `--help` shows the common ones and `--help-all` shows all, under headings."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.context_settings = {"max_content_width": HELP_COLUMNS, **self.context_settings}
        eager = {"is_flag": True, "is_eager": True, "expose_value": False}
        self.params.append(
            click.Option(["--help-all"], **eager, callback=_show_all, help="Show every option and exit.")
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        params, everything = self.get_params(ctx), ctx.meta.get(SHOW_ALL, False)
        sections: dict[str, list[Any]] = {}
        for param in params:
            if isinstance(param, Option) and (param.common or everything):
                sections.setdefault(param.group, []).append(param.get_help_record(ctx))
        sections["Options"] = [param.get_help_record(ctx) for param in params if not isinstance(param, Option)]
        width = 4 + max(len(name) for records in sections.values() for name, _ in records)
        # Unlike click's write_dl, this gives all sections the same columns, and does not break flags at their hyphens.
        wrap = textwrap.TextWrapper(formatter.width, subsequent_indent=" " * width, break_on_hyphens=False)
        for heading, records in sections.items():
            with formatter.section(heading):
                for name, text in records:
                    wrap.initial_indent = f"  {name}".ljust(width)
                    formatter.write(wrap.fill(text.replace("default: ", "default:\xa0")).replace("\xa0", " ") + "\n")
        if not everything:
            formatter.write_paragraph()
            formatter.write_text(f"--help-all lists all {len(params)} options.")


def _show_all(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        ctx.meta[SHOW_ALL] = True
        click.echo(ctx.get_help())
        ctx.exit()


class Group(OneLineErrors, click.Group):
    """The `mlx-lora` command, which reports its own usage errors on one line too."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            flags = [flag for param in self.get_params(ctx) for flag in param.opts]
            hint = did_you_mean(error.option_name, flags) or "; options of a command stand after its name"
            raise InputError(f"{error.option_name}: no such option here{hint}") from None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        commands = self.list_commands(ctx)
        if args[0] not in commands:
            hint = did_you_mean(args[0], commands) or f"; there are {', '.join(commands)}"
            raise InputError(f"{args[0]}: no such command{hint}")
        return super().resolve_command(ctx, args)


def report_error(error: BaseException) -> int:
    """Print one line for an expected error, and return its exit code.

    Raises:
        BaseException: `error` itself if it is not expected: that is a bug, and it keeps its traceback.
    """
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message())
        return 2
    if isinstance(error, BrokenPipeError):
        # The reader (`| head`) has closed the pipe: print nothing more, not even when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    described = describe_error(error)
    if described is None:
        raise error
    message, code = described
    click.echo("Error: " + printable(message), err=True)
    return code


def describe_error(error: BaseException) -> tuple[str, int] | None:
    """Return message and exit code of an expected error, None for an unexpected one."""
    if isinstance(error, InputError):
        return str(error), 2
    if isinstance(error, click.ClickException):
        long = isinstance(error, click.UsageError) and error.ctx and isinstance(error.ctx.command, LongCommand)
        return f"{error.format_message()} ({'--help-all' if long else '--help'} lists the options)", 2
    if isinstance(error, RunError):
        return str(error), 1
    if isinstance(error, OSError) and error.errno is not None:
        # Full disk, missing permission, missing file: use the operating system's message.
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{error.strerror}", 1
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return "interrupted", 130
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of pathlib's expanduser
        return "a path begins with ~ and the name of no user of this machine; write the whole path", 2
    return describe_gpu_failure(error)


def printable(text: str, limit: int = MOST_CHARACTERS) -> str:
    """Return text on one line of limited length, without control characters, which names in files may have."""
    line = " ".join(text.split())
    if len(line) > limit:
        # Cut out the middle, at words if possible; the end of an error says what to do.
        start, end = limit * 3 // 4, len(line) - limit // 4
        space = line.rfind(" ", start - LONGEST_WORD, start + 1)
        start = space if space > 0 else start
        end = line.find(" ", end - 1, end + LONGEST_WORD) + 1 or end
        line = f"{line[:start]} ... {line[end:]}"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
