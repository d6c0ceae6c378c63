"""Compare the planner's predictions for Macs with training figures that others have published.

    python benchmarks/plan_published.py

We measured none of these figures, and most are of other trainers with other kernels, padding and logits. They lie with their
sources in plan_published.json. Models are outlined from their published settings; nothing is downloaded.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip
from _harness import table

from mlx_lora.config.load import train_settings
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.fit import run_of
from mlx_lora.planner.memory import plan_memory
from mlx_lora.planner.speed import find_chip, listed_ceilings, step_seconds
from mlx_lora.trainer.fit import outlined_shape

PUBLISHED = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
FIGURES = PUBLISHED["figures"]
HEAD = (
    "who", "chip", "run", "tokens/s, theirs", "ours, predicted", "ratio", "GB, theirs", "ours, predicted", "guessed",
)  # fmt: skip


def row(figure: dict[str, Any]) -> list[str]:
    """Return a table row with a published figure and its prediction."""
    settings = train_settings({"model": "x", "rank": 8, "num_layers": figure["num_layers"]})
    chip = find_chip(figure["chip"])
    machine = chip.machine(figure["memory_gib"])
    packed = {"quantization": {"group_size": 64, "bits": figure["bits"]}} if figure["bits"] else {}
    outline = outline_of_config({**PUBLISHED["models"][figure["shape"]], **packed}, mx.bfloat16)
    shape = outlined_shape(outline, settings)
    run = run_of(settings, figure["rows"], figure["width"], figure["mode"])
    speed = run.positions / step_seconds(shape, run, machine, listed_ceilings(chip))[0]
    plan, theirs, peak = plan_memory(shape, run, machine), figure["tokens_per_s"], figure["peak_gb"]
    return [
        figure["who"], f"{figure['chip']} {figure['memory_gib']} GB",
        f"{figure['run']}, {figure['rows']} x {figure['width']}, {figure['mode']}", f"{theirs:g}" if theirs else "-",
        f"{speed:.0f}", f"{speed / theirs:.2f}" if theirs else "-", f"{peak:g}" if peak else "-",
        f"{plan.peak_bytes / 1e9:.1f}", figure["guessed"],
    ]  # fmt: skip


def main() -> int:
    """Print Markdown."""
    print(table(HEAD, map(row, FIGURES)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
