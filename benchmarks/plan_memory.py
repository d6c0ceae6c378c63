"""Measure the peak memory of real training runs, and compare it with the planner's predictions.

    python benchmarks/plan_memory.py measure --model smol=DIR --model smol-4bit=DIR --out measured.jsonl
    python benchmarks/plan_memory.py measure --case "--model DIR --data FILE --batch-size 2 --rank 3" --out measured.jsonl
    python benchmarks/plan_memory.py table --out measured.jsonl

`measure` runs `mlx_lora.train` for each combination of model, length, rank and checkpointing that is not in the file,
each in its own process: --iters steps on generated text that fills every row, with all tokens trained. With
--objective it trains on generated pairs or rated answers, whose rows the answers fill. --case is a run on your own
data, by its flags. It takes MLX's peak of the whole process (load, checks, reference and steps) from the run's last
report. `table` runs `mlx-lora plan --json` with the same flags and prints both as Markdown.
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

from _harness import child_environment, environment, options, say
from _harness import table as markdown
from _ours import last_report, train_command

TIMEOUT_S = 3600.0
WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state", "family",
    "student", "group", "country",
]  # fmt: skip
OPTIONS = (
    ("action", ..., "What to do.", ("measure", "table")),
    ("--out", ..., "File of results, one JSON object a line."),
    ("--model", (), "NAME=FOLDER; may be repeated."),
    ("--case", (), "Flags of a run; may be repeated."),
    ("--lengths", [128, 512, 2048], "Of rows."),
    ("--batch-tokens", 1024, "Positions of a step."),
    ("--ranks", [8, 64], "Of adapters."),
    ("--checkpointing", ["none", "block"], "As in --grad-checkpoint."),
    ("--method", "lora", "As of train."),
    ("--objective", ["sft"], "One or several."),
    ("--iters", 2, "Steps of a run."),
)


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
        folder, flags, objective = Path(temporary), flags_of(case), objective_of(case)
        if "flags" not in case:
            data = folder / ("text.txt" if objective == "sft" else "answers.jsonl")
            flags += ["--data", str(data), "--iters", str(iters)]
            if objective == "sft":
                write_text(data, max(60_000, 2 * case["length"]))  # a word has at least one token
            else:
                write_answers(data, objective, case["length"])
        command = train_command(*flags, last=["--sample-tokens", "0", *more])
        report = last_report(command, folder / "run", folder / "log", TIMEOUT_S)
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


def append(path: Path, result: dict[str, Any], name: str) -> None:
    """Add a result to the file at once, and print its peak as progress."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**result, "environment": environment()}) + "\n")
    say(f"{name}: {result['peak_memory_bytes'] / 1e6:.1f} MB")


def measure_all(args: argparse.Namespace) -> None:
    """Measure all cases that are not in the file, shortest rows first."""
    models = dict(pair.split("=", 1) for pair in args.model)
    cases = [{"flags": shlex.split(flags), "iters": args.iters} for flags in args.case]
    product = itertools.product(args.lengths, args.ranks, args.checkpointing, args.objective, models)
    for length, rank, mode, objective, name in product:
        case = {"model": name, "folder": models[name], "objective": objective, "method": args.method, "length": length}
        case |= {"batch_tokens": args.batch_tokens, "rank": rank, "checkpointing": mode, "iters": args.iters}
        cases.append(case)
    known = {key_of(case) for case in read_measured(args.out)}
    for case in cases:
        if key_of(case) not in known:
            append(args.out, {**case, **measure(case, args.iters)}, " ".join(map(str, key_of(case))))


def table(cases: list[dict[str, Any]]) -> str:
    """Return planned and measured peaks as Markdown, with a summary at the end."""
    own = all("flags" in case for case in cases)
    head, rows, ratios = ["model", "objective", "method", "row x rows", "rank", "checkpointing"], [], []
    for case in cases:
        found, plan = case["peak_memory_bytes"], planned(case)
        ratios.append(plan["peak_bytes"] / found)
        figures = [f"{plan['peak_bytes'] / 1e6:.0f}", f"{found / 1e6:.0f}", f"{ratios[-1]:.3f}"]
        if "flags" in case:
            flags = " ".join(name if name.startswith("--") else Path(name).name for name in case["flags"])
            rows.append([f"`{flags}`", plan["phase"], *([] if own else [""] * 4), *figures])
            continue
        shape = f"{case['length']} x {plan['settings']['rows']}"
        what = [case["model"], objective_of(case), case["method"], shape, case["rank"], case["checkpointing"]]
        rows.append([*what, *figures])
    within = sum(0.95 <= ratio <= 1.10 for ratio in ratios)
    head = ["run", "decided by"] if own else head
    whole = markdown([*head, "planned MB", "measured MB", "planned / measured"], rows)
    return f"{whole}\n\n{within} of {len(ratios)} within -5% and +10%; from {min(ratios):.3f} to {max(ratios):.3f}"


def main(argv: Sequence[str]) -> int:
    """Measure, or print the table."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    args.out = Path(args.out)
    if args.action == "measure":
        measure_all(args)
    else:
        print(table(read_measured(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
