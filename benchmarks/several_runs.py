"""Measure N runs in one pass (`train --runs`) against N runs one after another: time of a step of all, and peak memory.

    python benchmarks/several_runs.py --model MODEL --runs 1 2 4 8 16 --widths 30 200 --out several-runs.json

All runs have rows of one width, and text, seed, rate and rank of their own. One process holds all of them. Right before each step of the
first N together, a step of one run is measured; N runs one after another take N times as long, and side by side they take N times its
memory. Then mlx-lm's own loop takes steps on rows of the same width, in a process of its own, with rank 16 in all layers. Processor seconds
are those of all threads: on a busy machine they say more than the wall clock. All runs' factors and optimizers are in this process's memory;
those of runs that a measured step is not of are subtracted. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from pathlib import Path
from typing import Any

from _harness import cell, environment, options, paired_ratio, record, run_side, say, spread, table

OPTIONS = (
    ("--model", ..., "Folder, hub id or GGUF file of the base."),
    ("--runs", [1, 2, 4, 8, 16], "Numbers of runs in one pass."),
    ("--widths", [30, 200], "Tokens of a row."),
    ("--rows", 4, "Rows of a run's step."),
    ("--mlx-lm", 3, "Steps of mlx-lm's loop that are timed; 0: none."),
    ("--rounds", 3, "Rounds, besides a first one that is not counted."),
    ("--timeout", 3600.0, "Seconds allowed for each process."),
    ("--out", str, "JSON file of everything."),
)
HEAD = (
    "runs", "a step of all, cpu s", "one after another", "times as fast", "by the clock", "peak GB", "N times one, GB",
    "N times mlx-lm, cpu s", "N times mlx-lm, GB",
)  # fmt: skip
STEPS = 4
FURTHER = 200  # rows of a text, so that its last one, which is shorter, is hardly ever drawn
WORDS = [
    "the", "a", "sea", "king", "asks", "why", "morning", "stones", "travel", "slowly", "over", "green", "hills", "and", "nobody",
    "knows", "which", "lamp", "was", "first",
]  # fmt: skip


def write_run(folder: Path, number: int, width: int, args: argparse.Namespace) -> Path:
    """Write a run's text and settings, and return its settings file."""
    chosen = random.Random(number)
    text = " ".join(chosen.choice(WORDS) for _ in range((args.rows * STEPS + FURTHER) * (width + 1)))
    (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    settings = {
        "model": args.model, "data": folder / f"{number}.txt", "adapter_path": folder / f"run-{number}", "iters": STEPS,
        "batch_size": args.rows, "max_seq_length": width + 1, "learning_rate": 1e-4 * (1 + number % 5), "rank": (8, 16, 32)[number % 3],
        "seed": number, "steps_per_report": 1, "val_batches": 0, "save_every": 0, "sample_tokens": 0, "force": "true",
    }  # fmt: skip
    file = folder / f"{number}.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()), encoding="utf-8")
    return file


def summary(side: dict[str, Any], count: int) -> dict[str, Any]:
    """Return the figures of N runs in one pass, against N times one run."""
    together = side["found"][str(count)]
    alone = [one for one in side["found"]["alone"] if one["beside"] == count]
    states = side["state_bytes"]  # the first run is the one that is measured alone
    pairs = {
        name: ([count * one[name] for one in alone], [one[name] for one in together]) for name in ("wall_s", "cpu_s")
    }
    return {
        "runs": count,
        "cpu_s": spread(one["cpu_s"] for one in together),
        "one_after_another_cpu_s": spread(pairs["cpu_s"][0]),
        "times_as_fast": paired_ratio(*pairs["cpu_s"]),
        "times_as_fast_by_the_clock": paired_ratio(*pairs["wall_s"]),
        "peak_bytes": spread(one["peak_bytes"] - sum(states[count:]) for one in together),
        "peak_of_one_bytes": spread(one["peak_bytes"] - sum(states[1:]) for one in alone),
    }


def mlx_lm(args: argparse.Namespace, width: int, folder: Path) -> dict[str, Any]:
    """Return the seconds of each step of mlx-lm's loop, and its peak memory."""
    job = {"model": args.model, "rows": args.rows, "width": width, "rank": 16, "steps": args.mlx_lm}
    found, _ = run_side("several_mlx_lm_side.py", job, folder, "mlx-lm", timeout_s=args.timeout)
    return found


def main() -> None:
    args = options(__doc__, *OPTIONS).parse_args()
    result: dict[str, Any] = {"environment": environment(), "settings": vars(args), "widths": {}}
    with tempfile.TemporaryDirectory() as place:
        for width in args.widths:
            folder = Path(place) / str(width)
            folder.mkdir()
            files = [str(write_run(folder, run, width, args)) for run in range(max(args.runs))]
            job = {"files": files, "runs": args.runs, "rounds": args.rounds}
            side, _ = run_side("several_runs_side.py", job, folder, "several", timeout_s=args.timeout)
            found = [summary(side, count) for count in args.runs]
            other = mlx_lm(args, width, folder) if args.mlx_lm else {"found": [], "peak_bytes": None}
            result["widths"][width] = {**side, "summary": found, "mlx_lm": other}
            say(f"\nRows of {width} tokens, {args.rows} to a run's step\n")
            rows = [
                (
                    one["runs"], cell(one["cpu_s"], digits=2), cell(one["one_after_another_cpu_s"], digits=2),
                    cell(one["times_as_fast"], digits=2), cell(one["times_as_fast_by_the_clock"], digits=2),
                    cell(one["peak_bytes"], 1e-9, 2), cell(one["peak_of_one_bytes"], one["runs"] * 1e-9, 2),
                    cell(spread(step["cpu_s"] for step in other["found"]), one["runs"], 2),
                    cell(spread([other["peak_bytes"]]), one["runs"] * 1e-9, 2),
                )
                for one in found
            ]  # fmt: skip
            say(table(HEAD, rows))
    record(result, args.out, ("settings", "widths"))


if __name__ == "__main__":
    main()
