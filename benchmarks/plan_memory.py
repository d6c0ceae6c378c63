"""Measure the peak memory of real training runs, and compare it with the planner's predictions.

    python benchmarks/plan_memory.py measure --model smol=DIR --model smol-4bit=DIR --out measured.jsonl
    python benchmarks/plan_memory.py measure --case "--model DIR --data FILE --batch-size 2 --rank 3" --out measured.jsonl
    python benchmarks/plan_memory.py table --out measured.jsonl

`measure` runs `mlx_lora.train` for each combination of model, length, rank and checkpointing that is not in the file,
each in its own process: --iters steps on generated text that fills every row, with all tokens trained. With --objective
it trains on generated pairs or rated answers, whose rows the answers fill. --case is a run on your own data, by its flags. It takes MLX's peak of the whole process
(load, checks, reference and steps) from the run's last report. `table` runs `mlx-lora plan --json` with the same flags
and prints both as Markdown.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _environment import environment
from _processes import child_environment, run_child

TIMEOUT_S = 3600.0
WORDS = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "student",
    "group",
    "country",
]


def write_text(path: Path, words: int = 60_000) -> None:
    """Write a text of random words, always the same, that is long enough to fill every row."""
    chosen = random.Random(0).choices(WORDS, k=words)
    path.write_text(" ".join(chosen), encoding="utf-8")


def write_answers(path: Path, objective: str, words: int, rows: int = 16) -> None:
    """Write records of an objective, always the same, each of whose answers has `words` random words."""
    random_words = random.Random(0)

    def answer() -> str:
        return " ".join(random_words.choices(WORDS, k=words))

    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            record = {"prompt": "Write down some words.", "chosen": answer(), "rejected": answer()}
            if objective == "kto":
                record = {"prompt": record["prompt"], "completion": answer(), "label": number % 2 == 0}
            file.write(json.dumps(record) + "\n")


def flags_of(case: dict[str, Any]) -> list[str]:
    """Return the common flags of train and plan; a row of n + 1 tokens has n positions."""
    if "flags" in case:
        return [*case["flags"], "--iters", str(case["iters"])]
    flags = [
        "--model", case["folder"], "--rank", str(case["rank"]), "--grad-checkpoint", case["checkpointing"],
        "--max-seq-length", str(case["length"] + 1), "--batch-tokens", str(max(case["length"], case["batch_tokens"])),
        "--method", case["method"],
    ]  # fmt: skip
    objective = objective_of(case)
    return [*flags, *(["--no-mask-prompt"] if objective == "sft" else ["--objective", objective])]


def objective_of(case: dict[str, Any]) -> str:
    """Return a case's objective; results from before there were several have none."""
    return case.get("objective", "sft")


def measure(case: dict[str, Any], iters: int, more: Sequence[str] = ()) -> dict[str, Any]:
    """Train for a few steps in a new process, with further flags, and return its last report."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if "flags" in case:
            return _measured(flags_of(case), folder, more)
        objective = objective_of(case)
        data = folder / ("text.txt" if objective == "sft" else "answers.jsonl")
        if objective == "sft":
            write_text(data)
        else:
            write_answers(data, objective, case["length"])
        return _measured([*flags_of(case), "--data", str(data), "--iters", str(iters)], folder, more)


def _measured(flags: Sequence[str], folder: Path, more: Sequence[str]) -> dict[str, Any]:
    """Train with these flags in a new process, and return what its last report says."""
    command = [sys.executable, "-m", "mlx_lora.train", *flags, "--adapter-path", str(folder / "run")]
    command += ["--valid-fraction", "0", "--val-batches", "0", "--save-every", "0", "--steps-per-report", "1"]
    run_child([*command, "--sample-tokens", "0", *more], folder / "log", timeout_s=TIMEOUT_S)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    report = json.loads(lines[-1])
    return {name: report[name] for name in ("peak_memory_bytes", "process_peak_bytes", "shapes", "supervised_tokens")}


def planned(case: dict[str, Any]) -> dict[str, Any]:
    """Return the plan for this machine."""
    command = [sys.executable, "-m", "mlx_lora", "plan", *flags_of(case), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), check=True)
    return json.loads(done.stdout)


def key_of(case: dict[str, Any]) -> tuple:
    """Return the key of a case, without its results."""
    if "flags" in case:
        return (*case["flags"],)
    names = ("model", "method", "length", "batch_tokens", "rank", "checkpointing")
    return (objective_of(case), *(case[name] for name in names))


def read_measured(path: Path) -> list[dict[str, Any]]:
    """Return the results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure_all(args: argparse.Namespace) -> None:
    """Measure all missing cases, shortest rows first, and append each result to the file at once."""
    known = {key_of(case) for case in read_measured(args.out)}
    models = dict(pair.split("=", 1) for pair in args.model)
    for flags in map(shlex.split, args.case):
        if key_of({"flags": flags}) not in known:
            case = {"flags": flags, "iters": args.iters}
            result = {**case, **measure(case, args.iters), "environment": environment()}
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
            print(f"{shlex.join(flags)}: {result['peak_memory_bytes'] / 1e6:.0f} MB", file=sys.stderr)
    cases = itertools.product(args.lengths, args.ranks, args.checkpointing, args.objective, models)
    for length, rank, mode, objective, name in cases:
        case = {"model": name, "folder": models[name], "objective": objective, "method": args.method, "length": length}
        case |= {"batch_tokens": args.batch_tokens, "rank": rank, "checkpointing": mode}
        if key_of(case) in known:
            continue
        result = {**case, "iters": args.iters, **measure(case, args.iters), "environment": environment()}
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        print(
            f"{name} {objective} {length} rank {rank} {mode}: {result['peak_memory_bytes'] / 1e6:.0f} MB",
            file=sys.stderr,
        )


def table(cases: list[dict[str, Any]]) -> str:
    """Return planned and measured peaks as Markdown, with a summary at the end."""
    lines = [
        "| model | objective | method | row x rows | rank | checkpointing | planned MB | measured MB | planned / measured |"
    ]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    if all("flags" in case for case in cases):
        lines = ["| run | decided by | planned MB | measured MB | planned / measured |", "|---|---|---|---|---|"]
    ratios = []
    for case in cases:
        found, plan = case["peak_memory_bytes"], planned(case)
        ratios.append(plan["peak_bytes"] / found)
        if "flags" in case:
            own = " ".join(name if name.startswith("--") else Path(name).name for name in case["flags"])
            lines.append(
                f"| `{own}` | {plan['phase']} | {plan['peak_bytes'] / 1e6:.0f} | {found / 1e6:.0f} | {ratios[-1]:.3f} |"
            )
            continue
        rows = plan["settings"]["rows"]
        lines.append(
            f"| {case['model']} | {objective_of(case)} | {case['method']} | {case['length']} x {rows} | {case['rank']} | {case['checkpointing']} "
            f"| {plan['peak_bytes'] / 1e6:.0f} | {found / 1e6:.0f} | {ratios[-1]:.3f} |"
        )
    within = sum(0.95 <= ratio <= 1.10 for ratio in ratios)
    lines.append(f"\n{within} of {len(ratios)} within -5% and +10%; from {min(ratios):.3f} to {max(ratios):.3f}")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("action", choices=("measure", "table"))
    parser.add_argument("--out", type=Path, required=True, help="File of results, one JSON object a line.")
    parser.add_argument("--model", action="append", default=[], help="NAME=FOLDER; may be repeated.")
    parser.add_argument("--case", action="append", default=[], help="Flags of a run; may be repeated.")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--checkpointing", nargs="+", default=["none", "block"])
    parser.add_argument("--method", default="lora")
    parser.add_argument("--objective", nargs="+", default=["sft"])
    parser.add_argument("--iters", type=int, default=2)
    args = parser.parse_args(argv)
    if args.action == "measure":
        measure_all(args)
    else:
        print(table(read_measured(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
