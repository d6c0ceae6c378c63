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

import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from _harness import SIDES_FOLDER, Child, cell, converted, environment, options, record, say, spread, table, take_turns

ROWS = (1, 4, 8)
LEAST_TOKENS, MOST_TOKENS = 6, 96
OPTIONS = (
    ("--model", ..., "A GGUF file with 4-bit blocks."),
    ("--rounds", 3, "Of every side."),
    ("--seconds", 2.0, "Seconds that one text takes, about."),
    ("--clock", "wall", "Whose seconds count.", ("wall", "cpu")),
    ("--before", str, "An earlier checkout of this project, as one more side."),
    ("--only", "", "Run only the sides whose name has this text, such as ours."),
    ("--keep", str, "Keep the converted models in this folder (default: a temporary one)."),
)


class Side(NamedTuple):
    """One line of the table: the form of the base, whose program, and how the child is started."""

    form: str
    name: str
    kind: str
    settings: dict[str, Any]
    rows: tuple[int, ...] = ROWS
    checkout: str | None = None

    @property
    def key(self) -> str:
        """Its name in results."""
        return f"{self.form} | {self.name}"


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
        sides.append(Side("GGUF file", "llama.cpp", "llama.cpp", {"model": model, "threads": os.cpu_count()}))
    if before:
        forms = {form: {"model": folders[form]} for form in ("4-bit", "float32")}
        sides += [Side(form, "ours, before", "ours", settings, ROWS, before) for form, settings in forms.items()]
    return sides


def turn(child: Child, rows: int, seconds: float, clock: str) -> Callable[[int], dict[str, Any]]:
    """Return a side's turn with some rows; the first is short, warms up and sets the length of the others."""
    tokens = 4

    def run(number: int) -> dict[str, Any]:
        nonlocal tokens
        answer = child.ask(rows=rows, tokens=tokens)
        per_s = answer["tokens"] / answer["cpu_seconds" if clock == "cpu" else "seconds"]
        if not number:  # the first steps compile and read from disk, so this length is a lower bound
            tokens = min(MOST_TOKENS, max(LEAST_TOKENS, int(seconds * per_s / rows)))
        return {str(rows): per_s, "prompt": answer.get("prompt_tokens_per_s")}

    return run


def render(found: dict[str, dict[str, list[float]]]) -> str:
    """Return the table as Markdown: medians (least-largest), and 8 rows against one."""
    rows = []
    for key, columns in sorted(found.items()):
        cells = [cell(spread(columns[name])) if name in columns else "" for name in ("prompt", "1", "4", "8")]
        gain = f"{statistics.median(columns['8']) / statistics.median(columns['1']):.1f}" if "8" in columns else ""
        rows.append([*key.split(" | "), *cells, gain])
    return table(["base", "side", "prompt", "1 row", "4 rows", "8 rows", "8 against 1"], rows)


def main(argv: Sequence[str]) -> int:
    """Measure, print the table, and end with one line of JSON."""
    args = options(__doc__, *OPTIONS).parse_args(argv)
    model = str(Path(args.model).expanduser())
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(args.keep or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        folders = converted(model, {"4-bit": [], "float32": ["--no-quantize"]}, folder)
        folders |= converted(folders["float32"], {"8-bit": ["--bits", "8"]}, folder)
        turns = {}
        for side in sides_of(model, folders, args.before):
            if args.only in side.key:
                command = [sys.executable, str(SIDES_FOLDER / "decode_side.py"), side.kind, json.dumps(side.settings)]
                log = folder / f"{side.form}, {side.name}.log".replace(" ", "-")
                child = stack.enter_context(Child(side.key, command, log, side.checkout))
                child.wait()
                say(f"loaded: {side.key}")
                turns |= {(side.key, rows): turn(child, rows, args.seconds, args.clock) for rows in side.rows}
        measured = take_turns(turns, args.rounds, warm=True)
    found: dict[str, dict[str, list[float]]] = {}
    for (key, _), answers in measured.items():
        for name in answers[0]:
            if answers[0][name] is not None:
                found.setdefault(key, {})[name] = [answer[name] for answer in answers]
    print(render(found))
    record({"clock": args.clock, "tokens_per_s": found, "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
