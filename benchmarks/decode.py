"""Compare generating text on a CPU: ours, mlx-lm and llama.cpp; four forms of a base; 1, 4 and 8 rows at once.

    python benchmarks/decode.py --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/decode.py --model FILE.gguf --before CHECKOUT     also an earlier checkout of ours
    python benchmarks/decode.py --model FILE.gguf --rounds 1 --seconds 0.5 --clock cpu      on a busy machine

Every side is a process that stays loaded; the sides take turns, and each figure is the median (least-largest) of the
rounds. One row: `generate` and `mlx_lm.stream_generate`; more: our server's batch loop and `mlx_lm.batch_generate`, prompts
excluded, and those are short. End tokens are ignored, all texts are greedy. mlx-lm runs on our BLAS, except for the sides "as installed".
`--clock cpu` gives tokens per second of the process's processor time, prompt included, which other programs disturb less.
Prints a table and ends with one line of JSON. Needs `pip install .[parity]` for llama.cpp.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from _children import Child
from _environment import environment
from _processes import child_environment

CHILD = Path(__file__).parent / "sides" / "decode_side.py"
ROWS = (1, 4, 8)
LEAST_TOKENS, MOST_TOKENS = 6, 96


class Side(NamedTuple):
    """One line of the table: the form of the base, whose program, and how the child is started."""

    form: str
    name: str
    kind: str
    settings: dict[str, Any]
    rows: tuple[int, ...] = ROWS
    checkout: str | None = None


def started(side: Side, folder: Path) -> Child:
    """Return a side's process, whose log lies in the folder."""
    command = [sys.executable, str(CHILD), side.kind, json.dumps(side.settings)]
    log = folder / f"{side.form}, {side.name}.log".replace(" ", "-")
    return Child(f"{side.form}, {side.name}", command, log, side.checkout)


def converted(model: str, folder: Path) -> dict[str, str]:
    """Return the folders of the forms, after converting the GGUF file where they are missing."""
    wanted = {"4-bit": [], "float32": ["--no-quantize"], "8-bit": ["--bits", "8"]}
    for form, flags in wanted.items():
        source = str(folder / "float32") if form == "8-bit" else model
        if not (folder / form / "config.json").is_file():
            command = [sys.executable, "-m", "mlx_lora", "convert", "--model", source, "--out", str(folder / form)]
            subprocess.run([*command, *flags], check=True, env=child_environment(), capture_output=True)
    return {form: str(folder / form) for form in wanted}


def sides_of(model: str, folders: dict[str, str], before: str | None) -> list[Side]:
    """Return the sides; llama.cpp only if it is installed."""
    q4, q8, dense = folders["4-bit"], folders["8-bit"], folders["float32"]
    sides = [
        Side("4-bit", "ours, packed", "ours", {"model": q4, "decode_weights": "packed"}),
        Side("4-bit", "ours, dense copies", "ours", {"model": q4, "decode_weights": "dense"}),
        Side("4-bit", "mlx-lm", "mlx-lm", {"model": q4, "blas": True}),
        Side("8-bit", "ours, packed", "ours", {"model": q8, "decode_weights": "packed"}, (1, 8)),
        Side("8-bit", "mlx-lm", "mlx-lm", {"model": q8, "blas": True}, (1,)),
        Side("float32", "ours", "ours", {"model": dense}),
        Side("float32", "mlx-lm", "mlx-lm", {"model": dense, "blas": True}),
        Side("float32", "mlx-lm as installed", "mlx-lm", {"model": dense, "blas": False}, (1,)),
    ]
    if importlib.util.find_spec("xllamacpp"):
        settings = {"model": model, "threads": os.cpu_count()}
        sides.append(Side("GGUF file", "llama.cpp", "llama.cpp", settings))
    if before:
        for form, folder in (("4-bit", q4), ("float32", dense)):
            sides.append(Side(form, "ours, before", "ours", {"model": folder}, ROWS, before))
    return sides


def measure(
    children: Sequence[tuple[Side, Child]], rounds: int, seconds: float, clock: str
) -> dict[str, dict[str, list[float]]]:
    """Return tokens/s by side and column, one number per round; a first short round warms up and sets the lengths."""
    counts: dict[tuple[int, int], int] = {}
    found: dict[str, dict[str, list[float]]] = {key(side): {} for side, _ in children}
    for turn in range(rounds + 1):
        for number, (side, child) in enumerate(children):
            for rows in side.rows:
                answer = child.ask(rows=rows, tokens=counts.get((number, rows), 4))
                spent = answer["cpu_seconds"] if clock == "cpu" else answer["seconds"]
                per_s = answer["tokens"] / spent
                if not turn:  # the first steps compile and read from disk, so this length is a lower bound
                    wanted = int(seconds * per_s / rows)
                    counts[number, rows] = min(MOST_TOKENS, max(LEAST_TOKENS, wanted))
                    continue
                columns = found[key(side)]
                columns.setdefault(str(rows), []).append(per_s)
                if "prompt_tokens_per_s" in answer:
                    columns.setdefault("prompt", []).append(answer["prompt_tokens_per_s"])
        print(f"round {turn} of {rounds}", file=sys.stderr, flush=True)
    return found


def key(side: Side) -> str:
    """Return a side's name in results."""
    return f"{side.form} | {side.name}"


def render(found: dict[str, dict[str, list[float]]]) -> str:
    """Return the table as Markdown: medians (least-largest), and 8 rows against one."""
    lines = ["| base | side | prompt | 1 row | 4 rows | 8 rows | 8 against 1 |", "|---|---|---|---|---|---|---|"]
    for name, columns in sorted(found.items()):
        cells = [cell(columns.get(column)) for column in ("prompt", "1", "4", "8")]
        gain = f"{statistics.median(columns['8']) / statistics.median(columns['1']):.1f}" if "8" in columns else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def cell(values: list[float] | None) -> str:
    """Return a median with its spread."""
    if not values:
        return ""
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"


def main() -> None:
    """Measure, print the table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="A GGUF file with 4-bit blocks.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="Seconds that one text takes, about.")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--before", metavar="CHECKOUT", help="An earlier checkout of this project, as one more side.")
    parser.add_argument("--only", default="", help="Run only the sides whose name has this text, such as ours.")
    parser.add_argument("--keep", metavar="FOLDER", help="Keep the converted models here (default: a temporary one).")
    args = parser.parse_args()
    model = str(Path(args.model).expanduser())
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        children: list[tuple[Side, Child]] = []
        try:
            sides = sides_of(model, converted(model, folder), args.before)
            children += [(side, started(side, folder)) for side in sides if args.only in key(side)]
            for _, child in children:
                child.wait()
            found = measure(children, args.rounds, args.seconds, args.clock)
        finally:
            for _, child in children:
                child.close()
    print(render(found))
    print(json.dumps({"clock": args.clock, "tokens_per_s": found, "environment": environment()}))


if __name__ == "__main__":
    main()
