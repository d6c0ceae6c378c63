"""Step records -> the figures that are compared.

A step record is `{"end_s", "supervised", "real", "positions", "shape"}`: seconds since the training loop
began (host and data work counted), trained tokens by our encoder's masks, targets that are not padding,
batch positions, and the compiled shape.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from fractions import Fraction
from math import lcm
from typing import Any

Step = dict[str, Any]

# Tokens of one step at the most, when counts are recovered from rates.
MAX_TOKENS = 1 << 20


def run_figures(steps: Sequence[Step], first_step_s: float) -> dict[str, float | int | None]:
    """Return one run's figures.

    Args:
        steps: at least two records, in order.
        first_step_s: seconds from the start of the process to the end of the first step.

    Returns:
        `supervised_tokens_per_s` and `tokens_per_s` over all steps after the first, retraces of new shapes
        included; `steady_tokens_per_s` (supervised) over those of them whose shape had run before (None when
        there are fewer than two); `whole_tokens_per_s` (supervised) over everything from the process's start
        (imports, model, data, compilation) to the last step's end.
    """
    if len(steps) < 2:
        raise ValueError("a run needs two steps: the first is not counted")
    counted = steps[1:]
    seconds = [step["end_s"] - before["end_s"] for before, step in zip(steps, counted, strict=False)]
    seen = {_shape(steps[0])}
    steady_tokens, steady_s, steady_steps = 0, 0.0, 0
    for step, spent_s in zip(counted, seconds, strict=True):
        if _shape(step) in seen:
            steady_tokens, steady_s, steady_steps = (
                steady_tokens + step["supervised"],
                steady_s + spent_s,
                steady_steps + 1,
            )
        seen.add(_shape(step))
    spent_s = sum(seconds)
    supervised, real = (sum(step[key] for step in counted) for key in ("supervised", "real"))
    return {
        "supervised_tokens_per_s": supervised / spent_s,
        "steady_tokens_per_s": steady_tokens / steady_s if steady_steps > 1 else None,
        "whole_tokens_per_s": (steps[0]["supervised"] + supervised) / (first_step_s + spent_s),
        "tokens_per_s": real / spent_s,
        "padding_fraction": 1 - real / sum(step["positions"] for step in counted),
        "first_step_s": first_step_s,
        "counted_steps": len(counted),
        "steady_steps": steady_steps,
        "shapes": len(seen),
        "supervised_tokens": supervised,
        "supervised_tokens_per_step": supervised / len(counted),
        "positions_per_step": sum(step["positions"] for step in counted) / len(counted),
    }


def _shape(step: Step) -> tuple[int, ...]:
    return tuple(step["shape"])


def spread(values: Sequence[float | int | None]) -> dict[str, float | int] | None:
    """Return median, least and largest of what is there."""
    there = [value for value in values if value is not None]
    return {"median": statistics.median(there), "min": min(there), "max": max(there)} if there else None


def paired_ratio(side: Sequence[Any], reference: Sequence[Any]) -> dict[str, float | int] | None:
    """Return the spread of the round-by-round ratios: both halves of a pair saw the same drift."""
    pairs = zip(side, reference, strict=True)
    return spread([a / b for a, b in pairs if a is not None and b])


def steps_from_metrics(records: Sequence[dict[str, Any]]) -> list[Step]:
    """Turn the lines of our metrics.jsonl, one per step, into step records.

    metrics.jsonl holds rates, not counts. The counts are whole numbers and the rates share one time, so
    they come back exactly; see `recover_counts`. The shape is not there: rows x width stands in for it, so a
    new shape with the same product counts as an old one, which lowers our steady figure and never raises it.
    """
    steps, before_s = [], 0.0
    for record in (record for record in records if record["loss"] is not None):
        supervised, real, positions = recover_counts(
            record["supervised_tokens_per_s"],
            record["tokens_per_s"],
            record["padding_fraction"],
            record["elapsed_s"] - before_s,
        )
        before_s = record["elapsed_s"]
        counts = {"supervised": supervised, "real": real, "positions": positions, "shape": [positions]}
        steps.append({"end_s": record["elapsed_s"], "loss": record["loss"], **counts})
    return steps


def recover_counts(
    supervised_per_s: float, real_per_s: float, padding_fraction: float, about_s: float
) -> tuple[int, int, int]:
    """Return supervised tokens, real tokens and positions of a step from its rates.

    supervised / real and real / positions are known as ratios of whole numbers, so `real` is a multiple of
    a known number; `about_s`, the step's time to within a few per cent, says which.
    """
    trained = Fraction(supervised_per_s / real_per_s).limit_denominator(MAX_TOKENS)
    filled = Fraction(1 - padding_fraction).limit_denominator(MAX_TOKENS)
    unit = lcm(trained.denominator, filled.numerator)
    real = unit * max(1, round(real_per_s * about_s / unit))
    return int(real * trained), real, int(real / filled)
