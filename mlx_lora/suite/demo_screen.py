"""What the demo shows: its stages as they go, and then the answers side by side.

A terminal gets one table that is kept up to date. A pipe or a log file gets plain lines.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mlx_lora.system.console import perplexity
from mlx_lora.system.long_task import screen_taken
from mlx_lora.system.parsing import parse_json
from mlx_lora.system.units import format_duration

MOST_COLUMNS = 104
SIDE_BY_SIDE_COLUMNS = 80  # narrower terminals get the answers one below the other
BAR_COLUMNS = 12
WORDS_COLUMNS = 44  # of what a stage says; always as wide, so that the table stays still
OTHER_COLUMNS = 62  # of mark, name and times, at most
PLAIN_REPORTS = 4  # lines about the training in a log file
INTRO = "A small language model learns to answer everyday questions in verse."


@dataclass(frozen=True)
class Stage:
    """A stage's name, and how many seconds it usually takes on two CPU cores."""

    name: str
    usual_s: int


@dataclass(frozen=True)
class Answers:
    """What a model says: the loss on held-out rows, the number of those rows, and one text per question."""

    loss: float
    rows: int
    texts: tuple[str, ...]


@dataclass
class _Row:
    """A stage's line in the table."""

    stage: Stage
    started: float | None = None
    spent: float | None = None
    failed: bool = False
    words: str = ""


class DemoScreen:
    """Shows the stages on standard error and the results on standard output."""

    def __init__(self, log: Console | None = None, out: Console | None = None) -> None:
        """Make a screen.

        Args:
            log: for the stages; None: standard error.
            out: for the results; None: standard output.
        """
        self._log, self._out = log or Console(stderr=True, highlight=False), out or Console(highlight=False)
        room = self._columns() > OTHER_COLUMNS
        self._terminal = self._log.is_terminal and not self._log.is_dumb_terminal and room
        self._rows: list[_Row] = []
        self._follow: Callable[[], tuple[Text, str] | None] = lambda: None
        self._spinner = Spinner("dots", style="cyan")
        self._notice = ""

    def _note(self, line: str) -> None:
        """Show a line below the stages; a signal handler may call this."""
        self._notice = line

    @contextmanager
    def stages(self, stages: Sequence[Stage], out: Path) -> Iterator[None]:
        """Introduce the stages, and show them until the block ends."""
        self._rows = [_Row(stage) for stage in stages]
        minutes = round(sum(stage.usual_s for stage in stages) / 60)
        self._log.print(f"\n{INTRO}", style="bold" if self._terminal else None)
        self._line(
            f"{len(stages)} stages, about {minutes} minutes on two CPU cores. Everything is written to {shlex.quote(str(out))}.\n"
        )
        live = Live(get_renderable=self._table, console=self._log, refresh_per_second=8) if self._terminal else None
        with live or nullcontext(), screen_taken(self._note) if live else nullcontext():
            yield

    @contextmanager
    def stage(self, number: int) -> Iterator[Callable[[str], None]]:
        """Show that a stage is under way; yield a function that takes words on what came of it, which end it."""
        row = self._rows[number]
        place = f"{number + 1}/{len(self._rows)}"
        row.started = time.perf_counter()
        if not self._terminal:
            self._line(f"{place} {row.stage.name} (about {format_duration(row.stage.usual_s)})")

        def done(words: str) -> None:
            row.spent, row.words = time.perf_counter() - (row.started or 0), words
            if not self._terminal:
                self._line(f"{place} done in {format_duration(row.spent)}: {words}")

        try:
            yield done
        finally:
            row.failed = row.spent is None
            self._notice = ""
            self._follow = lambda: None

    def doing(self, line: str) -> None:
        """Say what the current stage is doing."""
        if self._terminal:
            next(row for row in self._rows if row.spent is None).words = line
        else:
            self._line(line)

    def say(self, line: str) -> None:
        """Print a line whole, because it may end with a command to copy."""
        self._line(line)

    def training(self, run_folder: Path, total_steps: int, taken: int = 0) -> Callable[[str], None]:
        """Follow a run by its metrics.jsonl; return a function that takes the run's own lines, which are not shown.

        Args:
            run_folder: of the run.
            total_steps: of the whole run.
            taken: steps that an earlier part of the run took.
        """
        started, told = time.time(), 0
        path = run_folder / "metrics.jsonl"

        def newest() -> dict[str, Any] | None:
            # With --force, an earlier run's file is there until this run takes its first step.
            return newest_report(path) if path.is_file() and path.stat().st_mtime >= started else None

        def follow() -> tuple[Text, str] | None:
            record = newest()
            return None if record is None else (_bar(record, total_steps), _left(record, total_steps, taken))

        def lines(_: str) -> None:
            nonlocal told
            record = None if self._terminal else newest()
            if record and record["step"] * PLAIN_REPORTS // total_steps > told:
                told = record["step"] * PLAIN_REPORTS // total_steps
                ending = _left(record, total_steps, taken)
                self._line(f"    {_progress_words(record, total_steps)}{ending and ', '}{ending}")

        self._follow = follow
        return lines

    def result(self, questions: Sequence[str], before: Answers, after: Answers) -> None:
        """Print each question with its answers, and the losses."""
        wide = self._out.is_terminal and self._out.width >= SIDE_BY_SIDE_COLUMNS
        for question, *texts in zip(questions, before.texts, after.texts, strict=True):
            self._out.print()
            self._out.print(Text(question, style="bold"))
            self._out.print(_side_by_side(*texts) if wide else _one_below_the_other(*texts), width=self._columns())
        change = after.loss / before.loss - 1
        self._out.print()
        self._out.print(
            f"Held-out loss {before.loss:.2f} -> {after.loss:.2f}, {abs(change):.0%} "
            f"{'lower' if change < 0 else 'higher'} (perplexity {perplexity(before.loss):.1f} -> "
            f"{perplexity(after.loss):.1f}), on {after.rows} questions that were not trained on.",
            width=self._columns(),
            soft_wrap=not self._out.is_terminal,
        )

    def next_steps(self, model: str, adapter: str, report: Path) -> None:
        """Print what to do next: commands whole, so that they can be copied."""
        program = called_as()
        ours = f"--model {shlex.quote(model)}"
        for label, words in (
            ("Talk to it", f"{program} chat {ours} --adapter {shlex.quote(adapter)}"),
            ("Read the report", str(report)),
            ("Train on your data", f"{program} train {ours} --data my-data.jsonl --adapter-path my-adapter"),
        ):
            self._out.print()
            self._out.print(Text(f"{label}:", style="bold"))
            self._out.print(Text(f"  {words}", style="cyan"), soft_wrap=True)

    def _columns(self) -> int:
        return min(self._log.width, self._out.width, MOST_COLUMNS)

    def _line(self, text: str) -> None:
        """Print a plain line whole, however long."""
        self._log.print(Text(text), soft_wrap=True)

    def _table(self) -> RenderableType:
        """Return the stages as they stand."""
        words = min(WORDS_COLUMNS, self._columns() - OTHER_COLUMNS)
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", width=words)
        table.add_column(justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(*self._cells(row))
        notice = [Text(self._notice, "yellow")] if self._notice else []
        # Not as wide as the terminal: the ^C that it echoes would begin a new line, and the table would move down.
        return Padding(Group(table, *notice), (0, 0, 0, 2), expand=False)

    def _cells(self, row: _Row) -> tuple[RenderableType, ...]:
        name = row.stage.name
        if row.started is None:
            return Text("·", "dim"), Text(name, "dim"), "", Text(f"about {format_duration(row.stage.usual_s)}", "dim")
        if row.spent is not None:
            return Text("✓", "green"), name, Text(row.words, "dim"), Text(format_duration(row.spent), "dim")
        if row.failed:
            return Text("×", "red"), name, "", ""
        spent = format_duration(time.perf_counter() - row.started)
        usual = f"{spent} of about {format_duration(row.stage.usual_s)}"
        doing, times = self._follow() or (Text(row.words, "dim"), usual)
        return self._spinner, Text(name, "bold"), doing, Text(times or spent, "dim")


def newest_report(metrics: Path) -> dict[str, Any] | None:
    """Return the last complete record of a metrics.jsonl that has a training loss, None if there is none."""
    try:
        lines = metrics.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            record = parse_json(line)
        except ValueError:  # being written
            continue
        if isinstance(record, dict) and record.get("loss") is not None:
            return record
    return None


def called_as() -> str:
    """Return how the user can call `mlx-lora` again."""
    started = Path(sys.argv[0])
    if os.environ.get("UV") and any(part.startswith("archive-v") for part in Path(sys.prefix).parts):
        return "uvx mlx-lora"  # in uvx's own environment, which the user's shell does not search
    if started.name == "mlx-lora":
        found = shutil.which("mlx-lora")
        same = found is not None and Path(found).resolve() == started.resolve()
        return "mlx-lora" if same else shlex.quote(str(started))
    python = shutil.which("python")
    same = python is not None and Path(python).absolute() == Path(sys.executable).absolute()
    return f"{'python' if same else shlex.quote(sys.executable)} -m mlx_lora"


def _bar(record: dict[str, Any], total_steps: int) -> Text:
    filled = BAR_COLUMNS * record["step"] // total_steps
    return Text.assemble(
        ("━" * filled, "cyan"), ("━" * (BAR_COLUMNS - filled), "dim"), f"  {_progress_words(record, total_steps)}"
    )


def _progress_words(record: dict[str, Any], total_steps: int) -> str:
    return f"step {record['step']} of {total_steps}, loss {record['loss']:.2f}"


def _left(record: dict[str, Any], total_steps: int, taken: int) -> str:
    """Return words on the time that the run still takes, none after its last step and before this part's first one."""
    step = record["step"]
    if not taken < step < total_steps:
        return ""
    return f"{format_duration(record['elapsed_s'] / (step - taken) * (total_steps - step))} left"


def _side_by_side(before: str, after: str) -> Table:
    table = Table.grid(padding=(0, 4, 0, 0), expand=True)
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    table.add_row(Text("before", "dim"), Text("after", "cyan"))
    table.add_row(Text(_shown(before), "dim"), Text(_shown(after)))
    return table


def _one_below_the_other(before: str, after: str) -> Text:
    pieces = [("before: ", before, "dim"), ("after:  ", after, "")]
    texts = [Text(name + _shown(words).replace("\n", "\n" + " " * len(name)), style) for name, words, style in pieces]
    return Text("\n").join(texts)


def _shown(text: str) -> str:
    """Return a model's text without blank lines and control characters; three dots say that it goes on."""
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.splitlines()]
    whole = "\n".join(line for line in lines if line.strip()) or "(nothing)"
    return whole if whole[-1] in ".!?\"'”’)" else f"{whole} ..."
