"""Measure N runs in one pass (`train --runs`) against N runs one after another: time of a step of all, and peak memory.

    python benchmarks/several_runs.py --model MODEL --runs 1 2 4 8 16 --widths 30 200 --out several-runs.json

All runs have rows of one width, and text, seed, rate and rank of their own. Each round trains a run by itself, in a process of its own,
and then N runs in one process, for every N. N runs one after another take N times the steps of the one that was measured in the same
round, and the memory of one; side by side they take the memory of N. Steps are timed from the end of the first one. `seconds` is the
whole command, with loading and planning. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from _harness import cell, environment, options, paired_ratio, record, run_child, say, spread, table
from _ours import read_metrics

OPTIONS = (
    ("--model", ..., "Folder, hub id or GGUF file of the base."),
    ("--runs", [1, 2, 4, 8, 16], "Numbers of runs in one pass."),
    ("--widths", [30, 200], "Tokens of a row."),
    ("--rows", 4, "Rows of a run's step."),
    ("--steps", 4, "Steps of each run, the first not counted."),
    ("--rounds", 3, "Rounds."),
    ("--timeout", 3600.0, "Seconds allowed for each process."),
    ("--out", str, "JSON file of everything."),
)
WORDS = [
    "the",
    "a",
    "sea",
    "king",
    "asks",
    "why",
    "morning",
    "stones",
    "travel",
    "slowly",
    "over",
    "green",
    "hills",
    "and",
    "nobody",
    "knows",
    "which",
    "lamp",
    "was",
    "first",
]


def write_run(folder: Path, number: int, width: int, args: argparse.Namespace) -> Path:
    """Write a run's text and settings, and return its settings file."""
    chosen = random.Random(number)
    text = " ".join(chosen.choice(WORDS) for _ in range((args.rows * args.steps + 4) * (width + 1)))
    (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    settings = {
        "model": args.model, "data": folder / f"{number}.txt", "adapter_path": folder / f"run-{number}", "iters": args.steps,
        "batch_size": args.rows, "max_seq_length": width + 1, "learning_rate": 1e-4 * (1 + number % 5), "rank": (8, 16, 32)[number % 3],
        "seed": number, "steps_per_report": 1, "val_batches": 0, "save_every": 0, "sample_tokens": 0, "force": "true",
    }  # fmt: skip
    file = folder / f"{number}.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()), encoding="utf-8")
    return file


def measure(command: list[str], folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run the train command, and return the seconds of a step of all its runs and the peak memory, as its first run reports them."""
    ended = run_child(
        [sys.executable, "-m", "mlx_lora.train", *command], folder / "log.txt", timeout_s=args.timeout, good_codes=(0,)
    )
    lines = [line for line in read_metrics(folder / "run-0") if line["loss"] is not None]
    ends = [line["elapsed_s"] for line in lines]
    return {
        "step_s": statistics.median(after - before for before, after in pairwise(ends)),
        "peak_bytes": max(line["peak_memory_bytes"] for line in lines),
        "positions": lines[-1]["positions"],
        "seconds": ended.wall_s,
    }


def round_of(width: int, folder: Path, args: argparse.Namespace, number: int) -> dict[str, dict[str, Any]]:
    """Measure one run, and N runs together for every N."""
    files = [write_run(folder, run, width, args) for run in range(max(args.runs))]
    found = {"alone": measure(["--config", str(files[0])], folder, args)}
    for count in [count for count in args.runs if count > 1]:
        found[str(count)] = measure(["--runs", *map(str, files[:count])], folder, args)
        say(f"round {number}, {width} tokens, {count} runs: {found[str(count)]}; alone {found['alone']}")
    return found


def summary(rounds: list[dict[str, dict[str, Any]]], count: int) -> dict[str, Any]:
    """Return the figures of N runs in one pass, against N times one run."""
    alone, together = ([one[name] for one in rounds] for name in ("alone", str(count) if count > 1 else "alone"))
    return {
        "runs": count,
        "step_s": spread(one["step_s"] for one in together),
        "one_after_another_s": spread(count * one["step_s"] for one in alone),
        "times_as_fast": paired_ratio([count * one["step_s"] for one in alone], [one["step_s"] for one in together]),
        "peak_bytes": spread(one["peak_bytes"] for one in together),
        "peak_of_one_bytes": spread(one["peak_bytes"] for one in alone),
        "seconds": spread(one["seconds"] for one in together),
        "one_after_another_seconds": spread(count * one["seconds"] for one in alone),
    }


def main() -> None:
    args = options(__doc__, *OPTIONS).parse_args()
    result: dict[str, Any] = {"environment": environment(), "settings": vars(args), "widths": {}}
    with tempfile.TemporaryDirectory() as place:
        for width in args.widths:
            folder = Path(place) / str(width)
            folder.mkdir()
            rounds = [round_of(width, folder, args, number) for number in range(1, args.rounds + 1)]
            found = [summary(rounds, count) for count in args.runs]
            result["widths"][width] = {"rounds": rounds, "found": found}
            say(f"\nRows of {width} tokens, {args.rows} to a run's step\n")
            head = (
                "runs",
                "a step of all, s",
                "one after another, s",
                "times as fast",
                "peak GB",
                "side by side GB",
                "whole command, s",
                "N commands, s",
            )
            say(
                table(
                    head,
                    [
                        (
                            one["runs"], cell(one["step_s"], digits=2), cell(one["one_after_another_s"], digits=2),
                            cell(one["times_as_fast"], digits=2), cell(one["peak_bytes"], 1e-9, 2),
                            cell(one["peak_of_one_bytes"], one["runs"] * 1e-9, 2), cell(one["seconds"]),
                            cell(one["one_after_another_seconds"]),
                        )
                        for one in found
                    ],
                )
            )  # fmt: skip
    record(result, args.out, ("settings", "widths"))


if __name__ == "__main__":
    main()
