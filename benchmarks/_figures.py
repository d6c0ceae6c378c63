"""Compute the compared figures from step records.

A step record is `{"end_s", "supervised", "real", "positions", "shape"}`: seconds since the training loop
began (with host and data work), trained tokens by our encoder's masks, targets that are not padding,
batch positions, and the shape of its inputs: rows and width, or for ours the names of all its shapes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

Step = dict[str, Any]

# What a check allows more where a side computes in 16 bits; docs/benchmarks.md has what was measured.
COARSER = 5.0


def run_figures(steps: Sequence[Step], first_step_s: float) -> dict[str, float | int | None]:
    """Return one run's figures.

    Args:
        steps: at least two records, in order.
        first_step_s: seconds from the start of the process to the end of the first step.

    Returns:
        `supervised_tokens_per_s` and `tokens_per_s` over all steps after the first, with retraces for new shapes;
        `steady_tokens_per_s` (supervised) over those of them whose shape had run before (None if there are fewer than
        two); `tokens_per_cpu_s` (supervised) per second of the process's own processor time (None where it is not
        known); `whole_tokens_per_s` (supervised) from the process's start (imports, model, data, compilation) to the last
        step's end.
    """
    if len(steps) < 2:
        raise ValueError("a run needs two steps: the first is not counted")
    counted, seconds = steps[1:], seconds_of(steps)
    steady = steady_steps(steps)
    steady_s = sum(seconds[i] for i in steady)
    spent_s = sum(seconds[1:])
    supervised, real = (sum(step[key] for step in counted) for key in ("supervised", "real"))
    return {
        "supervised_tokens_per_s": supervised / spent_s,
        "steady_tokens_per_s": sum(steps[i]["supervised"] for i in steady) / steady_s if len(steady) > 1 else None,
        "whole_tokens_per_s": (steps[0]["supervised"] + supervised) / (first_step_s + spent_s),
        "tokens_per_s": real / spent_s,
        "tokens_per_cpu_s": supervised / cpu_s if (cpu_s := _cpu_seconds(steps)) else None,
        "padding_fraction": 1 - real / sum(step["positions"] for step in counted),
        "first_step_s": first_step_s,
        "counted_steps": len(counted),
        "steady_steps": len(steady),
        "shapes": len({_shape(step) for step in steps}),
        "supervised_tokens": supervised,
        "supervised_tokens_per_step": supervised / len(counted),
        "positions_per_step": sum(step["positions"] for step in counted) / len(counted),
    }


def _cpu_seconds(steps: Sequence[Step]) -> float | None:
    """Return the processor seconds of all steps after the first, None where they were not noted."""
    first, last = (steps[i].get("cpu_s") for i in (0, -1))
    return None if first is None or last is None else last - first


def seconds_of(steps: Sequence[Step]) -> list[float]:
    """Return each step's seconds, from the end of the one before; of the first, from the start of the loop."""
    ends = [0.0, *(step["end_s"] for step in steps)]
    return [end - before for before, end in pairwise(ends)]


def steady_steps(steps: Sequence[Step]) -> list[int]:
    """Return the numbers of the steps after the first whose shape had run before."""
    seen, steady = {_shape(steps[0])}, []
    for number, step in enumerate(steps[1:], start=1):
        steady += [number] if _shape(step) in seen else []
        seen.add(_shape(step))
    return steady


def coarser(*checks: dict[str, Any]) -> float:
    """Return what a tolerance between these sides is multiplied by: 1 where all compute in float32."""
    dtypes = {dtype for check in checks for dtype in check.get("facts", {}).get("dtypes", ())}
    return COARSER if dtypes & {"bfloat16", "float16"} else 1.0


def _shape(step: Step) -> tuple[int | str, ...]:
    return tuple(step["shape"])


def spread(values: Sequence[float | int | None]) -> dict[str, float | int] | None:
    """Return median, least and largest of the values that are not None."""
    there = [value for value in values if value is not None]
    return {"median": statistics.median(there), "min": min(there), "max": max(there)} if there else None


def paired_ratio(side: Sequence[Any], reference: Sequence[Any]) -> dict[str, float | int] | None:
    """Return the spread of the round-by-round ratios, so that both sides of a pair have the same drift."""
    pairs = zip(side, reference, strict=True)
    return spread([a / b for a, b in pairs if a is not None and b])


def steps_from_metrics(records: Sequence[dict[str, Any]]) -> list[Step]:
    """Convert the lines of our metrics.jsonl, one per step, to step records; validation lines are skipped.

    A step that accumulates has several shapes, and counts as seen before only if the same set has run.
    """
    return [
        {
            "end_s": record["elapsed_s"],
            "loss": math.nan if record["loss"] is None else record["loss"],
            "supervised": record["supervised_tokens"],
            "real": record["real_tokens"],
            "positions": record["positions"],
            "shape": record["shapes"],
        }
        for record in records
        if record["positions"]
    ]
