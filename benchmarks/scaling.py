"""Measure a step's time and memory against tokens per step, sequence length, vocabulary, rank and data size.

    python benchmarks/scaling.py --out scaling.json --plot scaling.png
    python benchmarks/scaling.py --vary sequence,vocabulary --ours "--grad-checkpoint"

One quantity varies at a time, the others stay at the base point. Every point is a new `python -m mlx_lora.train` on
a random llama model, whose cost depends only on shapes; all tokens of its text rows are trained. The first
step, which compiles, is not counted. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _figures import run_figures
from _harness import ChildFailed, as_words, environment, options, record, run_side, say, table
from _ours import train_command, train_timed

BASE = {"tokens": 1024, "sequence": 512, "vocabulary": 8_000, "rank": 8, "rows": 64}
VALUES = {
    "tokens": (512, 1024, 2048, 4096),
    "sequence": (512, 1024, 2048, 4096, 8192),
    "vocabulary": (8_000, 32_000, 128_000, 256_000),
    "rank": (4, 8, 32, 128),
    "rows": (64, 1000, 10_000),
}
UNITS = {"tokens": "tokens per step", "sequence": "sequence length, one row per step", "rows": "rows of data"}
OPTIONS = (
    ("--vary", ",".join(VALUES), "Curves to measure, separated by commas (default: all)."),
    ("--hidden", 256, "Hidden size; a multiple of 128."),
    ("--layers", 2, "Blocks."),
    ("--steps", 3, "Steps per point, the first not counted."),
    ("--ours", "", "Extra flags of `python -m mlx_lora.train`, in one string."),
    ("--timeout", 1800.0, "Seconds allowed for each process."),
    ("--out", str, "JSON file of everything."),
    ("--plot", str, "PNG of peak memory against sequence length and vocabulary."),
)


def points(what: str) -> list[dict[str, int]]:
    """Return the points of one curve: tokens per step and per row, vocabulary, rank, rows of data."""
    if what == "sequence":  # one row per step, so that only the length grows
        return [{**BASE, "sequence": n, "tokens": n, "rows": 8} for n in VALUES[what]]
    return [{**BASE, what: n} for n in VALUES[what]]


def measure(point: dict[str, int], args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the point's model and data, train a few steps in a new process, and return its figures."""
    job = {**point, "hidden": args.hidden, "layers": args.layers, "folder": str(folder)}
    facts, _ = run_side("synthetic.py", job, folder, "synthetic", timeout_s=args.timeout)
    flags = {
        "--model": folder / "model", "--data": folder / "train.jsonl", "--adapter-path": folder / "run",
        "--rank": point["rank"], "--max-seq-length": point["sequence"], "--batch-tokens": point["tokens"],
        "--iters": args.steps,
    }  # fmt: skip
    command = train_command(*as_words(flags), last=shlex.split(args.ours))
    run, ended = train_timed(command, folder / "run", folder / "train.log", timeout_s=args.timeout)
    figures = run_figures(run["steps"], run["first_step_unix_s"] - ended.started_unix_s)
    spent_s = run["steps"][-1]["end_s"] - run["steps"][0]["end_s"]
    peaks = {"peak_allocator_bytes": run["peak_allocator_bytes"], "peak_process_bytes": ended.peak_process_bytes}
    kept = {name: figures[name] for name in ("supervised_tokens_per_s", "first_step_s")}
    return {**point, "step_s": spent_s / (len(run["steps"]) - 1), **kept, **peaks, **facts}


def show(what: str, rows: list[dict[str, Any]]) -> str:
    """Return one curve as a table."""
    head = [UNITS.get(what, what), "s/step", "supervised tokens/s", "peak MB", "above weights MB", "first step s"]
    cells = []
    for row in rows:
        peak = row["peak_allocator_bytes"]
        sizes = f"{peak / 1e6:.0f}", f"{(peak - row['weights_bytes']) / 1e6:.0f}"
        speed = f"{row['step_s']:.3f}", f"{row['supervised_tokens_per_s']:.0f}"
        cells.append([row[what], *speed, *sizes, f"{row['first_step_s']:.1f}"])
    return "\n" + table(head, cells)


def plot(curves: dict[str, list[dict[str, Any]]], file: str) -> None:
    """Draw peak memory against sequence length and vocabulary."""
    from matplotlib.figure import Figure

    drawn = [what for what in ("sequence", "vocabulary") if what in curves]
    figure = Figure(figsize=(5 * len(drawn), 4), layout="constrained")
    for axis, what in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        for label, without in (("peak", 0), ("peak above the weights", 1)):
            y = [(row["peak_allocator_bytes"] - without * row["weights_bytes"]) / 1e6 for row in curves[what]]
            axis.plot([row[what] for row in curves[what]], y, marker="o", label=label)
        axis.set(xlabel=UNITS.get(what, what), ylabel="MLX allocator, MB")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=120)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = options(__doc__, *OPTIONS)
    args = parser.parse_args(argv)
    args.vary = [what.strip() for what in args.vary.split(",")]
    if unknown := [what for what in args.vary if what not in VALUES]:
        parser.error(f"--vary {', '.join(unknown)}: not one of {', '.join(VALUES)}")
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: the first step is not counted; give 2 or more")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot: matplotlib is not installed; pip install 'mlx-lora[plots]', or leave the flag out")
    if args.plot and not {"sequence", "vocabulary"} & set(args.vary):
        parser.error("--plot draws sequence and vocabulary; --vary has neither")
    return args


def main(argv: Sequence[str]) -> int:
    """Measure every curve; return 0, or 1 if a run failed."""
    args = arguments(argv)
    curves: dict[str, list[dict[str, Any]]] = {}
    measured: dict[tuple[int, ...], dict[str, Any]] = {}  # the base point is on most curves
    for what in args.vary:
        for point in points(what):
            key = tuple(point.values())
            with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
                try:
                    measured[key] = measured.get(key) or measure(point, args, Path(folder))
                except ChildFailed as error:
                    say(f"Error: {error}")
                    return 1
            say(f"{what} {point[what]}: {measured[key]['step_s']:.3f} s")
        curves[what] = [measured[tuple(point.values())] for point in points(what)]
        print(show(what, curves[what]), flush=True)
    if args.plot:
        plot(curves, args.plot)
    result = {**environment(), "arguments": vars(args), "base": BASE, "curves": curves}
    record(result, args.out, ("date", "commit", "versions", "curves"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
