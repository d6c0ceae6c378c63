"""Compare predicted and measured peak memory for mlx-lm's architectures, as small random models.

    PYTHONPATH=tests python benchmarks/plan_architectures.py measure --out measured.jsonl [--only mamba2 --only qwen3_5]
    PYTHONPATH=tests python benchmarks/plan_architectures.py table --out measured.jsonl

`measure` writes each architecture of tests/architectures with multiplied widths and blocks, so that blocks decide the
peak, trains it for two steps in its own process, and takes MLX's peak from the run's last report. `table` calls the
planner for the same run and prints both as Markdown.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _environment import environment
from architectures.build import write_architecture
from architectures.configs import CONFIGS
from architectures.scaling import scaled
from plan_memory import measure, read_measured

from mlx_lora.config.load import train_settings
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.fit import run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import MemoryPlan, plan_memory
from mlx_lora.trainer.fit import outlined_shape
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError

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
                print(f"{name}: cannot be measured ({' '.join(str(error).split())[-200:]})", file=sys.stderr)
                continue
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**case, "environment": environment()}) + "\n")
        print(f"{name}: {case['peak_memory_bytes'] / 1e6:.1f} MB", file=sys.stderr)


def table(cases: list[dict[str, Any]]) -> str:
    """Return planned and measured peaks as Markdown, with a summary at the end."""
    lines = [
        "| architecture | rows x length | checkpointing | decided by | planned MB | measured MB | planned / measured |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    ratios, unknown = [], []
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
        lines.append(
            f"| {case['architecture']} | {case['rows']} x {case['length']} | {case['checkpointing']} | {plan.phase} "
            f"| {plan.peak_bytes / 1e6:.1f} | {found / 1e6:.1f} | {ratios[-1]:.2f} |"
        )
    within = sum(0.9 <= ratio <= 1.5 for ratio in ratios)
    lines.append(f"\n{within} of {len(ratios)} within -10% and +50%; from {min(ratios):.2f} to {max(ratios):.2f}")
    lines += [f"\nNot known: {'; '.join(unknown)}"] if unknown else []
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("action", choices=("measure", "table"))
    parser.add_argument("--out", type=Path, required=True, help="File of results, one JSON object a line.")
    parser.add_argument("--only", action="append", default=[], help="An architecture; may be repeated [default: all].")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--width", type=int, default=4, help="Factor of the tiny model's widths.")
    parser.add_argument("--layers", type=int, default=2, help="Factor of its blocks.")
    parser.add_argument("--checkpointing", default="none")
    args = parser.parse_args(argv)
    if args.action == "measure":
        measure_all(args)
    else:
        print(table(read_measured(args.out)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
