"""Run the demo: a small model, its answers, a training run of the bard recipe, and its answers again.

    model -> loss and answers -> train -> loss and answers with the adapter

All stages run in one process, through the same functions as the commands. A terminal shows one table of the stages that is
kept up to date, then the answers side by side; a pipe or a log file gets plain lines.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.chat_template import encode_prompt, own_template
from mlx_lora.data.load import load_eval_set
from mlx_lora.exporters.adapter_folder import CONFIG_FILE
from mlx_lora.models.convert import convert_model
from mlx_lora.models.load import Base, check_token_ids, load_base
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.table import objective_of
from mlx_lora.reports.run_report import REPORT_FILE, has_ended, read_records
from mlx_lora.trainer.adapter import put_adapter
from mlx_lora.trainer.checkpoint import numbered
from mlx_lora.trainer.held_out import held_out_loss
from mlx_lora.trainer.report_callback import greedy_text
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.utils import console, device
from mlx_lora.utils.console import perplexity
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.hub import SMOLLM2_GGUF, embedded_model, resolve_model
from mlx_lora.utils.progress import screen_taken
from mlx_lora.utils.text import counted, format_duration


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


# The run

RECIPE = "bard"
OUT = Path("demo")
# Few small steps, for a first-time user who waits: nearly the held-out loss of 44 of the recipe's own steps, with
# a fifth of the tokens (docs/measurements.md).
ITERS = 24
SHORT_STEPS = {"batch_tokens": 256}
ANSWER_TOKENS = 40  # some four lines of verse
REPORT_TOKENS = 16  # of each text in report.html, which shows three of them twice
# Of the recipe's test rows, which are never trained on.
QUESTIONS = (
    "How do I keep cut flowers alive for longer?",
    "What makes the wind blow?",
    "How do I write my first poem?",
)
NEEDED_BYTES = 300_000_000  # the converted model, the adapter and a checkpoint with the optimizer's state
# About the times of a quiet machine with two CPU cores (docs/measurements.md); the first one depends on the network.
STAGES = (
    Stage("Get the model", 10),
    Stage("Ask it three questions", 25),
    Stage("Train an adapter on verse", 85),
    Stage("Ask the same questions again", 25),
)


@dataclass(frozen=True)
class Demo:
    """What the user asked for.

    Attributes:
        out: folder for the model and the run.
        model: hub id, folder or .gguf file; None: SmolLM2-135M-Instruct.
        iters: optimizer steps.
        force: train again although the folder holds a run.
    """

    out: Path
    model: str | None = None
    iters: int = ITERS
    force: bool = False

    @property
    def run_folder(self) -> Path:
        """The run's own folder, below `out`."""
        return self.out / RECIPE

    def steps_taken(self) -> int:
        """Return the steps that an interrupted demo took and saved; 0 if there is none, or if `force` starts again."""
        saved = numbered(self.run_folder / CHECKPOINTS)
        return saved[0][0] if saved and not self.force and not has_ended(self.run_folder) else 0

    def command(self) -> str:
        """Return the words after `mlx-lora` that start this demo again."""
        words = ["demo", *(["--out", str(self.out)] if self.out != OUT else [])]
        words += ["--model", self.model] if self.model else []
        return shlex.join([*words, *(["--iters", str(self.iters)] if self.iters != ITERS else [])])


def run_demo(demo: Demo, screen: DemoScreen) -> int:
    """Take all stages, and return the exit code: 0, or 130 after Ctrl-C.

    Raises:
        InputError: the folder holds a run already, or a model that cannot be had or trained.
        RunError: the disk is full, or the run diverged.
    """
    with console.log_to(console.drop):  # the stages show what is done
        return _run_stages(demo, screen)


def _run_stages(demo: Demo, screen: DemoScreen) -> int:
    check_folder(demo)
    taken = demo.steps_taken()
    if taken:
        screen.say(
            f"Continuing the demo in {demo.run_folder}, which was interrupted after {counted(taken, 'step')} of "
            f"{demo.iters}; --force starts again"
        )
    device.compile_for(demo.iters)  # on a CPU, compiling kernels would take longer than it saves
    with screen.stages(STAGES, demo.out):
        with screen.stage(0) as done:
            model, words = get_model(demo, screen)
            done(words)
        settings = demo_settings(demo, model)
        with screen.stage(1) as done:
            before = ask(settings, None)
            done(f"held-out loss {before.loss:.2f}")
        with screen.stage(2) as done:
            lines = screen.training(demo.run_folder, demo.iters, taken)
            screen.doing("preparing the first step")
            with console.log_to(lines):
                outcome = train_run(settings)
            if not outcome.interrupted:
                done(f"{outcome.steps} steps, {demo.run_folder}")
        after = None
        if not outcome.interrupted:
            with screen.stage(3) as done:
                after = ask(settings, demo.run_folder)
                done(f"held-out loss {after.loss:.2f}")
    if after is None:
        screen.say(interrupted_words(demo, outcome.steps))
        return 130
    screen.result(QUESTIONS, before, after)
    screen.next_steps(model, f"{RECIPE}={demo.run_folder}", demo.run_folder / REPORT_FILE)
    return 0


def interrupted_words(demo: Demo, steps: int) -> str:
    """Return what an interrupted demo leaves, and how to go on."""
    again = f"{called_as()} {demo.command()}"
    if not demo.steps_taken():
        return f"Interrupted before anything was saved. To start again: {again}"
    return f"Interrupted after {counted(steps, 'step')}, which are saved. To continue: {again}"


def check_folder(demo: Demo) -> None:
    """Refuse a folder that holds a run, or cannot be written, before anything is fetched."""
    if (demo.run_folder / CONFIG_FILE).exists() and not demo.force and not demo.steps_taken():
        raise InputError(
            f"--out {demo.out}: already holds the demo's run in {demo.run_folder}; give --force to train it again, "
            "or another --out"
        )
    check_writable(demo.out, "--out", NEEDED_BYTES)


def get_model(demo: Demo, screen: DemoScreen) -> tuple[str, str]:
    """Return what --model is to be for the stages that follow, and words on it; fetch and convert the small model."""
    if demo.model:
        return demo.model, demo.model
    folder = demo.out / SMOLLM2_GGUF.file_name.split(".")[0]
    if not (folder / "config.json").is_file():  # it is written whole or not at all
        with console.log_to(screen.doing):
            gguf = embedded_model(SMOLLM2_GGUF)
        convert_model(resolve_model(str(gguf)), folder, target=None, dtype=device.compute_dtype("auto"))
    return str(folder), f"{folder.name}, 4-bit"


def demo_settings(demo: Demo, model: str) -> TrainSettings:
    """Return the recipe's settings, with a report after each step, and as few and as small steps as the demo takes."""
    flags = {
        "model": model,
        "adapter_path": str(demo.run_folder),
        "iters": demo.iters,
        "steps_per_report": 1,
        "steps_per_eval": 0,
        "keep_best": False,
        "sample_tokens": REPORT_TOKENS,
        "force": demo.force,
        **SHORT_STEPS,
        "resume": "auto" if demo.steps_taken() else None,
    }
    flags = {name: value for name, value in flags.items() if value is not None}
    settings = train_settings(flags, read_settings(RECIPE, flags))
    return replace(settings, loop=replace(settings.loop, test_batches=-1))


def ask(settings: TrainSettings, adapter: Path | None) -> Answers:
    """Return the loss on the recipe's test rows and the answers to the questions, with or without an adapter."""
    base, objective = load_base(settings.model), objective_of(settings.objective)
    rows = load_eval_set(settings.data.data or "", settings.data, base.hf_tokenizer)
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {settings.data.data}")
    if adapter:
        put_adapter(base, adapter, settings.data, objective)
    ctx = RunContext(settings, objective, base, trains=False)
    loss = held_out_loss(ctx, objective.targets_of(rows)).loss
    return Answers(loss, rows.examples, tuple(answer(base, question) for question in QUESTIONS))


def answer(base: Base, question: str) -> str:
    """Return the beginning of the model's most likely answer."""
    prompt = encode_prompt(base.hf_tokenizer, question, own_template(base.hf_tokenizer))
    check_token_ids(base, max(prompt), "the demo's question")
    return greedy_text(base, prompt, ANSWER_TOKENS).strip()


# The screen

MOST_COLUMNS = 104
SIDE_BY_SIDE_COLUMNS = 80  # narrower terminals get the answers one below the other
BAR_COLUMNS = 12
WORDS_COLUMNS = 44  # of what a stage says; always as wide, so that the table stays still
OTHER_COLUMNS = 62  # of mark, name and times, at most
PLAIN_REPORTS = 4  # lines about the training in a log file
INTRO = "A small language model learns to answer everyday questions in verse."


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

    @contextmanager
    def stages(self, stages: Sequence[Stage], out: Path) -> Iterator[None]:
        """Introduce the stages, and show them until the block ends."""
        self._rows = [_Row(stage) for stage in stages]
        self._log.print(f"\n{INTRO}", style="bold" if self._terminal else None)
        self.say(
            f"{len(stages)} stages, two to six minutes on two CPU cores. Everything is written to {shlex.quote(str(out))}.\n"
        )
        if not self._terminal:
            yield
            return
        live = Live(get_renderable=self._table, console=self._log, refresh_per_second=8)
        # A signal handler may show a line below the stages.
        with live, screen_taken(lambda line: setattr(self, "_notice", line)):
            yield

    @contextmanager
    def stage(self, number: int) -> Iterator[Callable[[str], None]]:
        """Show that a stage is under way; yield a function that takes words on what came of it, which end it."""
        row = self._rows[number]
        place = f"{number + 1}/{len(self._rows)}"
        row.started = time.perf_counter()
        if not self._terminal:
            self.say(f"{place} {row.stage.name} (about {format_duration(row.stage.usual_s)})")

        def done(words: str) -> None:
            row.spent, row.words = time.perf_counter() - (row.started or 0), words
            if not self._terminal:
                self.say(f"{place} done in {format_duration(row.spent)}: {words}")

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
            self.say(line)

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
                self.say(f"    {_progress_words(record, total_steps)}{ending and ', '}{ending}")

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

    def say(self, text: str) -> None:
        """Print a plain line whole, however long: it may end with a command to copy."""
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
    return next((one for one in reversed(read_records(metrics)) if one.get("loss") is not None), None)


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
