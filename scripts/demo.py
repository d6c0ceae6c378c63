"""Run all steps on a real model: download, convert, train on Shakespeare, and show the text before and after.

make demo        (or: .venv/bin/python scripts/demo.py --iters 200)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel

PROMPTS = ("ROMEO:\n", "First Citizen:\nWhat news", "The sea was calm and")
HELD_OUT = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the model, data and adapter")
    parser.add_argument("--iters", type=int, default=100, help="optimizer steps")
    arguments = parser.parse_args()
    out, started = arguments.out, time.perf_counter()
    gguf = run([sys.executable, "scripts/get_models.py"]).strip().splitlines()[-1]
    model, adapter = out / "SmolLM2-135M-Instruct", out / "bard"
    mlx_lora("convert", "--model", gguf, "--out", model, "--force")
    text = run([sys.executable, "data/get_tiny_shakespeare.py"]).strip().splitlines()[-1]
    test_file = split_text(Path(text), out / "shakespeare")
    before = evaluate(model, test_file)
    mlx_lora(
        "train", "--model", model, "--data", out / "shakespeare", "--adapter-path", adapter, "--force",
        "--iters", arguments.iters, "--max-seq-length", 256, "--batch-tokens", 512, "--learning-rate", "2e-3",
        "--val-batches", 4, "--steps-per-eval", 0,
    )  # fmt: skip
    after = evaluate(model, test_file, "--adapter-path", adapter)
    show_samples(model, adapter)
    fall = 1 - after["loss"] / before["loss"]
    print(
        f"Held-out loss {before['loss']:.4f} -> {after['loss']:.4f} ({fall:.1%} lower), perplexity "
        f"{before['perplexity']:.1f} -> {after['perplexity']:.1f}, over {after['supervised_tokens']} tokens; "
        f"{time.perf_counter() - started:.0f} s in all"
    )


def mlx_lora(command: str, *arguments: object, quiet: bool = False) -> str:
    """Run one of our commands, and print it as a user would type it."""
    words = [str(a) for a in arguments]
    if not quiet:
        print(f"\n$ python -m mlx_lora.{command} {' '.join(words)}", flush=True)
    return run([sys.executable, "-m", f"mlx_lora.{command}", *words])


def run(words: list[str]) -> str:
    """Run a command, show its progress, and return its standard output; exit with its code if it fails."""
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def split_text(text_file: Path, folder: Path) -> Path:
    """Write train.txt, valid.txt and test.txt: the last tenth of the text is never trained on."""
    text = text_file.read_text(encoding="utf-8")
    cut = int(len(text) * (1 - HELD_OUT))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text(text[:cut], encoding="utf-8")
    (folder / "valid.txt").write_text(text[cut : cut + 12_000], encoding="utf-8")
    (folder / "test.txt").write_text(text[cut + 12_000 : cut + 42_000], encoding="utf-8")
    return folder / "test.txt"


def evaluate(model: Path, data: Path, *more: object) -> dict:
    """Return evaluate's JSON object."""
    return json.loads(mlx_lora("evaluate", "--model", model, "--data", data, "--max-seq-length", 256, *more, "--json"))


def show_samples(model: Path, adapter: Path) -> None:
    """Print the base's and the tuned model's continuation of each prompt, side by side."""
    console = Console()
    for prompt in PROMPTS:
        options = (
            "--model",
            model,
            "--prompt",
            prompt,
            "--ignore-chat-template",
            "--max-tokens",
            60,
            "--temp",
            0.8,
            "--seed",
            1,
            "--json",
        )
        texts = [
            json.loads(mlx_lora("generate", *options, *extra, quiet=True))["text"]
            for extra in ((), ("--adapter-path", adapter))
        ]
        width = max(30, console.width // 2 - 2)
        panels = [
            Panel((prompt + text).strip(), title=title, width=width)
            for title, text in zip(("before", "after"), texts, strict=True)
        ]
        console.print(Columns(panels))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # the running command has printed it, and saved its results
        sys.exit(130)
