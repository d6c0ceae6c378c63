"""Compute a result's figures from a run's metrics.

A step's time is the wall-clock time from the end of the step before it to its own end, data and host work included. The
first pass over the rows is left out, because it compiles every batch shape; medians also leave out later steps with a
new shape. Tokens do not include padding.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

LEAST_STEPS = 2

Record = dict[str, Any]


def counted_records(records: Sequence[Record]) -> tuple[list[Record], list[Record]]:
    """Return (warm-up, counted) steps from the lines of metrics.jsonl, each with its `seconds`.

    In a run that ended before its second pass, only the first step is warm-up.

    Raises:
        ValueError: fewer than two steps would be counted.
    """
    steps = [record for record in records if record["positions"]]
    before = [0.0, *(record["elapsed_s"] for record in steps)]
    timed = [{**step, "seconds": step["elapsed_s"] - start} for step, start in zip(steps, before, strict=False)]
    warm = sum(step["epoch"] <= 1 + 1e-9 for step in timed)
    if len(timed) - warm < LEAST_STEPS:
        warm = 1
    if len(timed) - warm < LEAST_STEPS:
        raise ValueError(f"{len(timed)} steps were run; at least {LEAST_STEPS} are needed after the warm-up")
    return timed[:warm], timed[warm:]


def run_figures(records: Sequence[Record], first_step_s: float) -> dict[str, Any]:
    """Return the figures of one run.

    Args:
        records: lines of metrics.jsonl, one per step.
        first_step_s: from the start of the process to the end of its first step.

    Raises:
        ValueError: there are too few steps.
    """
    warm, counted = counted_records(records)
    seen = {tuple(step["shapes"]) for step in warm}
    steady = []
    for step in counted:
        steady += [step] if tuple(step["shapes"]) in seen else []
        seen.add(tuple(step["shapes"]))
    if len(steady) < LEAST_STEPS:
        steady = counted
    spent = sum(step["seconds"] for step in counted)
    total = {key: sum(step[key] for step in counted) for key in ("real_tokens", "supervised_tokens", "positions")}
    losses = [step["loss"] for step in counted if step["loss"] is not None]
    return {
        "tokens_per_s": spread([step["real_tokens"] / step["seconds"] for step in steady]),
        "supervised_tokens_per_s": spread([step["supervised_tokens"] / step["seconds"] for step in steady]),
        "step_s": spread([step["seconds"] for step in steady]),
        "overall_tokens_per_s": total["real_tokens"] / spent,
        "first_step_s": first_step_s,
        "warmup_steps": len(warm),
        "counted_steps": len(counted),
        "counted_s": spent,
        "real_tokens": total["real_tokens"],
        "supervised_tokens": total["supervised_tokens"],
        "positions": total["positions"],
        "shapes": dict(sorted(Counter("+".join(step["shapes"]) for step in counted).items())),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "process_peak_bytes": max(record["process_peak_bytes"] for record in records),
        "skipped_steps": records[-1]["skipped_steps"],
        "last_loss": losses[-1] if losses else None,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, 10th and 90th percentile (nearest rank), minimum and maximum."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def rank(share: float) -> float:
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    return {"median": median, "p10": rank(0.1), "p90": rank(0.9), "min": ordered[0], "max": ordered[-1]}
