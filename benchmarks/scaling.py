"""Measure a step's time and memory against tokens per step, sequence length, vocabulary, rank and data size.

    python benchmarks/scaling.py --out scaling.json --plot scaling.png
    python benchmarks/scaling.py --vary sequence,vocabulary --ours "--grad-checkpoint"

One quantity varies at a time, the others stay at the base point. Every point is a new `python -m mlx_lora.train` on
a random llama model, whose cost depends only on shapes; all tokens of its text rows are trained. The first
step, which compiles, is not counted. Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _environment import environment
from _figures import run_figures
from _ours import train_timed
from _processes import ChildFailed, run_child

SYNTHETIC = Path(__file__).parent / "sides" / "synthetic.py"


@dataclass(frozen=True)
class Point:
    """One measurement: tokens per step and per row, vocabulary, rank, rows of data."""

    tokens: int = 1024
    sequence: int = 512
    vocabulary: int = 8_000
    rank: int = 8
    rows: int = 64


BASE = Point()
VALUES = {
    "tokens": (512, 1024, 2048, 4096),
    "sequence": (512, 1024, 2048, 4096, 8192),
    "vocabulary": (8_000, 32_000, 128_000, 256_000),
    "rank": (4, 8, 32, 128),
    "rows": (64, 1000, 10_000),
}
UNITS = {
    "tokens": "tokens per step",
    "sequence": "sequence length, one row per step",
    "vocabulary": "vocabulary",
    "rank": "rank",
    "rows": "rows of data",
}


def points(what: str) -> list[Point]:
    """Return the points of one curve."""
    if what == "sequence":  # one row per step, so that only the length grows
        return [dataclasses.replace(BASE, sequence=n, tokens=n, rows=8) for n in VALUES[what]]
    return [dataclasses.replace(BASE, **{what: n}) for n in VALUES[what]]


def measure(point: Point, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the point's model and data, train a few steps in a new process, and return its figures."""
    folder.mkdir(parents=True)
    job = {**dataclasses.asdict(point), "hidden": args.hidden, "layers": args.layers}
    job |= {"folder": str(folder), "result": str(folder / "result.json")}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    make = [sys.executable, str(SYNTHETIC), str(folder / "job.json")]
    run_child(make, folder / "synthetic.log", timeout_s=args.timeout)
    facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    run = folder / "run"
    command = [sys.executable, "-m", "mlx_lora.train", "--model", str(folder / "model")]
    command += ["--data", str(folder / "train.jsonl"), "--adapter-path", str(run), "--rank", str(point.rank)]
    command += ["--max-seq-length", str(point.sequence), "--batch-tokens", str(point.tokens)]
    command += ["--iters", str(args.steps), "--steps-per-report", "1", "--save-every", "0"]
    command += ["--valid-fraction", "0", "--val-batches", "0", *shlex.split(args.ours)]
    result, ended = train_timed(command, run, folder / "train.log", None, args.timeout)
    figures = run_figures(result["steps"], result["first_step_unix_s"] - ended.started_unix_s)
    spent_s = result["steps"][-1]["end_s"] - result["steps"][0]["end_s"]
    return {
        **dataclasses.asdict(point),
        "step_s": spent_s / figures["counted_steps"],
        "supervised_tokens_per_s": figures["supervised_tokens_per_s"],
        "first_step_s": figures["first_step_s"],
        "peak_allocator_bytes": result["peak_allocator_bytes"],
        "peak_process_bytes": ended.peak_process_bytes,
        **facts,
    }


def show(what: str, rows: list[dict[str, Any]]) -> str:
    """Return one curve as a table."""
    lines = [f"\n| {UNITS[what]} | s/step | supervised tokens/s | peak MB | above weights MB | first step s |"]
    lines.append("|---|---|---|---|---|---|")
    for row in rows:
        peak, above = row["peak_allocator_bytes"], row["peak_allocator_bytes"] - row["weights_bytes"]
        lines.append(
            f"| {row[what]} | {row['step_s']:.3f} | {row['supervised_tokens_per_s']:.0f} | {peak / 1e6:.0f} "
            f"| {above / 1e6:.0f} | {row['first_step_s']:.1f} |"
        )
    return "\n".join(lines)


def plot(curves: dict[str, list[dict[str, Any]]], file: str) -> None:
    """Draw peak memory against sequence length and vocabulary."""
    from matplotlib.figure import Figure

    drawn = [what for what in ("sequence", "vocabulary") if what in curves]
    figure = Figure(figsize=(5 * len(drawn), 4), layout="constrained")
    for axis, what in zip(figure.subplots(1, len(drawn), squeeze=False)[0], drawn, strict=True):
        x = [row[what] for row in curves[what]]
        peak = [row["peak_allocator_bytes"] / 1e6 for row in curves[what]]
        above = [(row["peak_allocator_bytes"] - row["weights_bytes"]) / 1e6 for row in curves[what]]
        axis.plot(x, peak, marker="o", label="peak")
        axis.plot(x, above, marker="o", label="peak above the weights")
        axis.set_xlabel(UNITS[what])
        axis.set_ylabel("MLX allocator, MB")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=120)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--vary", default=",".join(VALUES), help="Curves to measure, separated by commas (default: all)."
    )
    parser.add_argument("--hidden", type=int, default=256, help="Hidden size; a multiple of 128.")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="Steps per point, the first not counted.")
    parser.add_argument("--ours", default="", help="Extra flags of `python -m mlx_lora.train`, in one string.")
    parser.add_argument("--timeout", type=float, default=1800, help="Seconds allowed for each process.")
    parser.add_argument("--out", help="JSON file of everything.")
    parser.add_argument("--plot", help="PNG of peak memory against sequence length and vocabulary.")
    args = parser.parse_args(argv)
    args.vary = [what.strip() for what in args.vary.split(",")]
    unknown = [what for what in args.vary if what not in VALUES]
    if unknown:
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
    measured: dict[Point, dict[str, Any]] = {}  # the base point is on most curves
    for what in args.vary:
        for point in points(what):
            with tempfile.TemporaryDirectory(prefix="scaling-") as temporary:
                try:
                    measured[point] = measured.get(point) or measure(point, args, Path(temporary) / "point")
                    print(f"{UNITS[what]} {getattr(point, what)}: {measured[point]['step_s']:.3f} s", file=sys.stderr)
                except ChildFailed as error:
                    print(f"Error: {error}", file=sys.stderr)
                    return 1
        curves[what] = [measured[point] for point in points(what)]
        print(show(what, curves[what]), flush=True)
    result = {**environment(), "arguments": vars(args), "base": dataclasses.asdict(BASE), "curves": curves}
    if args.out:
        Path(args.out).write_text(json.dumps(result, indent=1), encoding="utf-8")
    if args.plot:
        plot(curves, args.plot)
    print(json.dumps({key: result[key] for key in ("date", "commit", "versions", "curves")}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
