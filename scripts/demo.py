"""The whole path on a real model: get, convert, train on Shakespeare, and show the text before and after.

make demo        (or: .venv/bin/python scripts/demo.py --iters 200)

All commands run in this one process: each start of Python would load the model and prepare MLX again.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

PROMPTS = ("ROMEO:\n", "First Citizen:\nWhat news", "The sea was calm and")
HELD_OUT = 0.1
VALID_CHARACTERS, TEST_CHARACTERS = 6_000, 12_000
SAMPLE_TOKENS = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the model, data and adapter")
    parser.add_argument("--iters", type=int, default=60, help="optimizer steps")
    arguments = parser.parse_args()
    out, started = arguments.out, time.perf_counter()
    gguf = run([sys.executable, "scripts/get_models.py"]).strip().splitlines()[-1]
    text = run([sys.executable, "data/get_tiny_shakespeare.py"]).strip().splitlines()[-1]
    model, adapter = out / "SmolLM2-135M-Instruct", out / "bard"
    mlx_lora("convert", "--model", gguf, "--out", model, "--force")
    test_file = split_text(Path(text), out / "shakespeare")
    with stage("Measure the held-out loss, and write three texts with the base model"):
        before, texts = evaluate(model, test_file), samples(model)
    mlx_lora(
        "train", "--model", model, "--data", out / "shakespeare", "--adapter-path", adapter, "--force",
        "--iters", arguments.iters, "--max-seq-length", 256, "--batch-tokens", 512, "--learning-rate", "3e-3",
        "--val-batches", 2, "--steps-per-eval", 0, "--sample-tokens", 0,
    )  # fmt: skip
    with stage("Measure again, and write the same three texts with the adapter"):
        after, tuned = evaluate(model, test_file, "--adapter-path", adapter), samples(model, "--adapter-path", adapter)
    show(texts, tuned)
    fall = 1 - after["loss"] / before["loss"]
    print(
        f"Held-out loss {before['loss']:.4f} -> {after['loss']:.4f} ({fall:.1%} lower), perplexity "
        f"{before['perplexity']:.1f} -> {after['perplexity']:.1f}, over {after['supervised_tokens']} tokens; "
        f"{time.perf_counter() - started:.0f} s in all\n"
        f"The report: {adapter / 'report.html'}\n"
        f"Talk to it:  .venv/bin/python -m mlx_lora.chat --model {model} --adapter bard={adapter}"
    )


@contextlib.contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is done, and how long it took."""
    started = time.perf_counter()
    print(f"\n{what} ...", flush=True)
    yield
    print(f"{what}: {time.perf_counter() - started:.0f} s", flush=True)


def mlx_lora(command: str, *arguments: object, quiet: bool = False) -> str:
    """Run one of our commands in this process, shown as a user would type it, and return its standard output."""
    words = [str(a) for a in arguments]
    if not quiet:
        print(f"\n$ python -m mlx_lora.{command} {' '.join(words)}", flush=True)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            code = importlib.import_module(f"mlx_lora.{command}").main.main(words)
        except SystemExit as end:
            code = end.code
    if code:
        sys.exit(code)
    return output.getvalue()


def run(words: list[str]) -> str:
    """Run a script, its progress shown, and return its standard output; stop with its exit code if it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def split_text(text_file: Path, folder: Path) -> Path:
    """Write train.txt, valid.txt and test.txt: the last tenth of the text is never trained on."""
    text = text_file.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    end = cut + VALID_CHARACTERS
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "valid.txt").write_text(text[cut:end], encoding="utf-8")
    (folder / "test.txt").write_text(text[end : end + TEST_CHARACTERS], encoding="utf-8")
    return folder / "test.txt"


def evaluate(model: Path, data: Path, *more: object) -> dict:
    """Return evaluate's JSON object."""
    options = ("--model", model, "--data", data, "--max-seq-length", 256, *more, "--json")
    return json.loads(mlx_lora("evaluate", *options, quiet=True))


def samples(model: Path, *more: object) -> list[str]:
    """Return the model's continuation of each prompt."""
    options = ("--ignore-chat-template", "--max-tokens", SAMPLE_TOKENS, "--temp", 0.8, "--seed", 1, "--json")
    return [
        json.loads(mlx_lora("generate", "--model", model, "--prompt", prompt, *options, *more, quiet=True))["text"]
        for prompt in PROMPTS
    ]


def show(before: list[str], after: list[str]) -> None:
    """Print the texts before and after side by side, or one below the other in a narrow terminal."""
    console = Console()
    width = min(console.width, max(30, console.width // 2 - 2))
    for prompt, *texts in zip(PROMPTS, before, after, strict=True):
        titled = zip(("before", "after"), texts, strict=True)
        panels = [Panel((prompt + text).strip(), title=title, width=width) for title, text in titled]
        console.print(Columns(panels))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the command that was running has said so, and saved what it had
        sys.exit(130)
