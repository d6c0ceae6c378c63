"""Compare predicted and measured peak memory for mlx-lm's architectures, as small random models.

    PYTHONPATH=tests python -m architectures.peaks measure --out measured.jsonl [--only mamba2 --only qwen3_5]
    PYTHONPATH=tests python -m architectures.peaks table --out measured.jsonl

`measure` writes each architecture of tests/architectures with multiplied widths and blocks, so that blocks decide the
peak, trains it for two steps in its own process, and takes MLX's peak from the run's last report. `table` calls the
planner for the same run and prints both as Markdown.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from architectures.build import write_architecture
from architectures.configs import CONFIGS
from architectures.scaling import scaled
from mlx_lora.config.load import train_settings
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.fit import run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import MemoryPlan, plan_memory
from mlx_lora.trainer.fit import outlined_shape
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from _harness import options, say
from _harness import table as markdown
from plan_memory import append, measure, read_measured

OPTIONS = (
    ("action", ..., "What to do.", ("measure", "table")),
    ("--out", ..., "File of results, one JSON object a line."),
    ("--only", (), "An architecture; may be repeated [default: all]."),
    ("--length", 512, "Of rows."),
    ("--rows", 2, "Of a step."),
    ("--width", 4, "Factor of the tiny model's widths."),
    ("--layers", 2, "Factor of its blocks."),
    ("--checkpointing", "none", "As in --grad-checkpoint."),
)
KEY = ("architecture", "length", "rows", "checkpointing", "width", "layers")


def planned(case: dict[str, Any]) -> tuple[MemoryPlan, tuple[str, ...]]:
    """Return the plan of a measured run for this machine, and the blocks whose memory is not known."""
    config = scaled(case["architecture"], case["width"], case["layers"])
    settings = train_settings({"model": "x", "rank": case["rank"], "grad_checkpoint": case["checkpointing"]})
    shape = outlined_shape(outline_of_config(config, device.compute_dtype()), settings)
    run = run_of(settings, case["rows"], case["length"], case["checkpointing"])
    return plan_memory(shape, run, this_machine()), shape.not_known


def measure_all(args: argparse.Namespace) -> None:
    """Measure all cases that are not in the file, and append each result at once."""
    known = {tuple(case[name] for name in KEY) for case in read_measured(args.out)}
    for name in args.only or sorted(CONFIGS):
        case = {"architecture": name, "length": args.length, "rows": args.rows, "checkpointing": args.checkpointing}
        case |= {"width": args.width, "layers": args.layers, "rank": 8, "method": "lora"}
        if tuple(case[key] for key in KEY) in known:
            continue
        with tempfile.TemporaryDirectory() as temporary:
            try:
                folder = write_architecture(Path(temporary) / name, name, config=scaled(name, args.width, args.layers))
                flags = {**case, "folder": str(folder), "batch_tokens": args.length * args.rows}
                case |= measure(flags, iters=2, more=["--no-memory-check"])
            except (RuntimeError, ValueError, SystemExit) as error:
                say(f"{name}: cannot be measured ({' '.join(str(error).split())[-200:]})")
                continue
        append(args.out, case, name)


def table(cases: list[dict[str, Any]]) -> str:
    """Return planned and measured peaks as Markdown, with a summary at the end."""
    rows, ratios, unknown = [], [], []
    for case in cases:
        try:
            plan, not_known = planned(case)
        except InputError as error:
            unknown.append(f"{case['architecture']} ({error})")
            continue
        if not_known:
            unknown.append(f"{case['architecture']} ({not_known[0]})")
            continue
        found = case["peak_memory_bytes"]
        ratios.append(plan.peak_bytes / found)
        shape, figures = f"{case['rows']} x {case['length']}", (f"{plan.peak_bytes / 1e6:.1f}", f"{found / 1e6:.1f}")
        rows.append([case["architecture"], shape, case["checkpointing"], plan.phase, *figures, f"{ratios[-1]:.2f}"])
    within = sum(0.9 <= ratio <= 1.5 for ratio in ratios)
    head = [
        "architecture",
        "rows x length",
        "checkpointing",
        "decided by",
        "planned MB",
        "measured MB",
        "planned / measured",
    ]
    lines = [
        markdown(head, rows),
        f"{within} of {len(ratios)} within -10% and +50%; from {min(ratios):.2f} to {max(ratios):.2f}",
    ]
    return "\n\n".join([*lines, *([f"Not known: {'; '.join(unknown)}"] if unknown else [])])


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
