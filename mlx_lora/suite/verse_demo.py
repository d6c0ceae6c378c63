"""The demo's stages: a small model, its answers, a training run of the bard recipe, and its answers again.

    model -> loss and answers -> train -> loss and answers with the adapter

All stages run in one process, through the same functions as the commands.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_lora.artifacts.adapter import CONFIG_FILE
from mlx_lora.artifacts.checkpoint import numbered
from mlx_lora.artifacts.run_folder import CHECKPOINTS
from mlx_lora.artifacts.run_report import REPORT_FILE, has_ended
from mlx_lora.data.loading import load_eval_set
from mlx_lora.data.prompts import encode_prompt
from mlx_lora.data.templates import own_template
from mlx_lora.models.converting import convert_model
from mlx_lora.models.load import Base, check_token_ids, load_base
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.runs.adapting import put_adapter
from mlx_lora.runs.training_run import train_run
from mlx_lora.settings.config import TrainSettings
from mlx_lora.settings.resolve import train_settings
from mlx_lora.settings.settings_file import read_settings
from mlx_lora.sources.embedded_models import SMOLLM2_GGUF, embedded_model
from mlx_lora.sources.hub import model_file, resolve_model
from mlx_lora.suite.demo_screen import Answers, DemoScreen, Stage, called_as
from mlx_lora.system import device
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import check_writable
from mlx_lora.system.units import counted
from mlx_lora.training.samples import greedy_text
from mlx_lora.training.trainer import held_out_loss

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
            outcome = train_run(settings, say=lines)
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
        gguf = embedded_model(SMOLLM2_GGUF, say=screen.doing, hub=model_file)
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
    settings = train_settings(flags, read_settings(RECIPE, flags, lambda line: None))
    return replace(settings, loop=replace(settings.loop, test_batches=-1))


def ask(settings: TrainSettings, adapter: Path | None) -> Answers:
    """Return the loss on the recipe's test rows and the answers to the questions, with or without an adapter."""
    base, objective = load_base(settings.model), objective_of(settings.objective)
    rows = load_eval_set(settings.data.data or "", settings.data, base.hf_tokenizer)
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {settings.data.data}")
    if adapter:
        put_adapter(base, adapter, settings.data, objective)
    loss = held_out_loss(base, objective.targets_of(rows), settings.loop, objective).loss
    return Answers(loss, rows.examples, tuple(answer(base, question) for question in QUESTIONS))


def answer(base: Base, question: str) -> str:
    """Return the beginning of the model's most likely answer."""
    prompt = encode_prompt(base.hf_tokenizer, question, own_template(base.hf_tokenizer))
    check_token_ids(base, max(prompt), "the demo's question")
    return greedy_text(base, prompt, ANSWER_TOKENS).strip()
