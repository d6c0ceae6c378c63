"""Compare our methods after equal training time on the same base and data, for docs/methods.md.

    python benchmarks/methods.py --model DIR --data shakespeare=FILE.txt --data alpaca=FILE.json --seconds 75
    python benchmarks/methods.py --model DIR --data alpaca=FILE.json --methods lora,dora --rates lora=1e-3

Each row is a new run of `python -m mlx_lora.train`. A short run of each method on the first data measures the time of
its steps; the row's run takes as many steps as fit into the time, so that schedules, rank budgets and restarts end
with it. The figures come from metrics.jsonl, the adapter file and the process's peak. The time is from the first step's
start to the last step's end, with compiling, without validation.
Ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from _environment import environment
from _ours import read_metrics
from _processes import ChildFailed, run_child

# Chosen by hand for each method's scale, without a sweep.
RATES = {
    "lora": 1e-3,
    "rslora": 5e-4,
    "lora-plus": 2e-4,
    "dora": 1e-3,
    "pissa": 3e-4,
    "adalora": 2e-2,
    "relora": 1e-3,
    "full": 1e-4,
}
CALIBRATION_STEPS = 8
MB = 1e6


def command(arguments: argparse.Namespace, data: str, method: str, steps: int, folder: Path) -> list[str]:
    """Return a train command for one row."""
    own = {
        "--model": arguments.model,
        "--data": data,
        "--adapter-path": folder,
        "--method": method,
        "--rank": arguments.rank,
        "--alpha": 2 * arguments.rank,
        "--learning-rate": arguments.rates[method],
        "--iters": steps,
        "--batch-tokens": arguments.batch_tokens,
        "--max-seq-length": arguments.max_seq_length,
        "--steps-per-report": 1,
        "--steps-per-eval": 0,
        "--val-batches": arguments.val_batches,
        "--save-every": 0,
        "--seed": arguments.seed,
    }
    return [sys.executable, "-m", "mlx_lora.train", *(str(word) for pair in own.items() for word in pair)]


def step_seconds(records: list[dict[str, Any]]) -> list[float]:
    """Return the time of each step, from its tokens and its tokens per second."""
    steps = [record for record in records if record["loss"] is not None and record["supervised_tokens"]]
    return [record["supervised_tokens"] / record["supervised_tokens_per_s"] for record in steps]


def step_costs(arguments: argparse.Namespace, data: str, method: str, folder: Path) -> tuple[float, float]:
    """Return the seconds of compiling, and of a later step, by a short run."""
    run_child(
        command(arguments, data, method, CALIBRATION_STEPS, folder / "short"),
        folder / "short.log",
        timeout_s=arguments.timeout,
    )
    costs = step_seconds(read_metrics(folder / "short"))
    later = statistics.median(costs[len(costs) // 2 :])
    return sum(costs) - len(costs) * later, later


def measure(
    arguments: argparse.Namespace, data: str, method: str, folder: Path, costs: tuple[float, float]
) -> dict[str, Any]:
    """Return one row, a run of a method on a data file for the given time."""
    once, later = costs
    steps = max(CALIBRATION_STEPS, round((arguments.seconds - once) / later))
    long = command(arguments, data, method, steps, folder / "long")
    ended = run_child(long, folder / "long.log", timeout_s=arguments.timeout)
    records = read_metrics(folder / "long")
    taken = step_seconds(records)
    losses = [record["val_loss"] for record in records if record["val_loss"] is not None]
    trained = next(
        line for line in (folder / "long.log").read_text(encoding="utf-8").splitlines() if "trainable" in line
    )
    return {
        "method": method,
        "rate": arguments.rates[method],
        "steps": len(taken),
        "seconds": sum(taken),
        "trainable": int(trained.split(" trainable")[0].rsplit(" ", 1)[1].replace(",", "")),
        "adapter_bytes": (folder / "long" / "adapters.safetensors").stat().st_size,
        "tokens_per_s": sum(record["real_tokens"] for record in records) / sum(taken),
        "peak_memory_bytes": records[-1]["peak_memory_bytes"],
        "peak_process_bytes": ended.peak_process_bytes,
        "start_loss": losses[0],
        "held_out_loss": losses[-1],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return one data file's rows as Markdown."""
    lines = [
        "| method | rate | trained parameters | adapter MB | tokens/s | peak GB | steps in s | held-out loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["held_out_loss"]):
        lines.append(
            f"| {row['method']} | {row['rate']:g} | {row['trainable']:,} | {row['adapter_bytes'] / MB:.1f} "
            f"| {row['tokens_per_s']:.0f} | {row['peak_memory_bytes'] / 1e9:.2f} "
            f"| {row['steps']} in {row['seconds']:.0f} | {row['held_out_loss']:.4f} |"
        )
    return "\n".join(lines)


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="base model folder")
    parser.add_argument("--data", action="append", required=True, metavar="NAME=FILE", help="may be repeated")
    parser.add_argument("--methods", default=",".join(RATES), help="separated by commas")
    parser.add_argument("--rates", default="", help="METHOD=LEARNING-RATE, separated by commas, instead of the table's")
    parser.add_argument("--seconds", type=float, default=75, help="training time of each row")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--max-seq-length", type=int, default=256)
    parser.add_argument("--val-batches", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=1800, help="seconds until a run is killed")
    arguments = parser.parse_args(words)
    own = dict(part.split("=", 1) for part in arguments.rates.split(",") if part)
    arguments.rates = {**RATES, **{method: float(rate) for method, rate in own.items()}}
    arguments.methods = arguments.methods.split(",")
    unknown = [method for method in arguments.methods if method not in RATES]
    if unknown:
        parser.error(f"--methods {', '.join(unknown)}: there are {', '.join(RATES)}")
    arguments.data = [part.split("=", 1) for part in arguments.data]
    return arguments


def main(words: list[str]) -> int:
    """Run all rows and print the tables."""
    arguments = parse(words)
    results: dict[str, list[dict[str, Any]]] = {}
    costs: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name, file in arguments.data:
            results[name] = []
            for method in arguments.methods:
                folder = Path(temporary) / name / method
                folder.mkdir(parents=True)
                try:
                    if method not in costs:
                        costs[method] = step_costs(arguments, file, method, folder)
                    row = measure(arguments, file, method, folder, costs[method])
                except ChildFailed as error:
                    print(f"{name}, {method}: {error}", file=sys.stderr)
                    continue
                results[name].append(row)
                print(f"{name}: {json.dumps(row)}", file=sys.stderr)
    for name, rows in results.items():
        print(
            f"\n{name}, held-out loss before: {rows[0]['start_loss']:.4f}\n\n{table(rows)}"
            if rows
            else f"\n{name}: no row"
        )
    settings = {key: value for key, value in vars(arguments).items() if key != "rates"}
    print(json.dumps({**environment(), "settings": settings, "results": results}))
    return 0 if all(len(rows) == len(arguments.methods) for rows in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
