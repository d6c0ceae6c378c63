"""The figures of a training run from its step records, and whether the sides of a comparison did the same work.

A step record is `{"end_s", "loss", "supervised", "real", "positions", "shape"}`: seconds since the training loop began (with
host and data work), mean loss, trained tokens by our encoder's masks, targets that are not padding, batch positions, and the
shape of its inputs: rows and width, or for ours the names of all its shapes. On preferences it also has its number of `pairs`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from _harness import Disagreement, paired_ratio, spread

Step = dict[str, Any]

# What a check allows more where a side computes in 16 bits; docs/development/benchmarks.md has what was measured.
COARSER = 5.0
TOLERANCE = 1e-3  # relative, of the loss sums
START = math.log(2)  # of DPO's loss: policy and reference are the same
START_TOLERANCE = 1e-4
LOSS_TOLERANCE = 2e-3  # absolute, of each step's loss
LOGPS_TOLERANCE = 1e-3  # relative, of the mean log-probability of an answer
BARS = {"losses": LOSS_TOLERANCE, "chosen_logps": LOGPS_TOLERANCE, "rejected_logps": LOGPS_TOLERANCE}
LEAST_FALL = 0.02  # of the loss over the check's steps, so that an adapter without a gradient is noticed


def steps_from_metrics(records: Sequence[Mapping[str, Any]]) -> list[Step]:
    """Convert the lines of our metrics.jsonl, one per step, to step records; validation lines are skipped.

    A step that accumulates has several shapes, and counts as seen before only if the same set has run.
    """
    names = {"supervised": "supervised_tokens", "real": "real_tokens", "positions": "positions", "shape": "shapes"}
    return [
        {
            "end_s": record["elapsed_s"],
            "loss": math.nan if record["loss"] is None else record["loss"],
            **{name: record[key] for name, key in names.items()},
        }
        for record in records
        if record["positions"]
    ]


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
    counted, spent_s = steps[1:], sum(_seconds(steps)[1:])
    supervised, real, positions = (sum(step[key] for step in counted) for key in ("supervised", "real", "positions"))
    first_cpu_s, last_cpu_s = (steps[i].get("cpu_s") for i in (0, -1))
    cpu_s = None if first_cpu_s is None or last_cpu_s is None else last_cpu_s - first_cpu_s
    return {
        "supervised_tokens_per_s": supervised / spent_s,
        "steady_tokens_per_s": _steady_rate(steps, "supervised"),
        "whole_tokens_per_s": (steps[0]["supervised"] + supervised) / (first_step_s + spent_s),
        "tokens_per_s": real / spent_s,
        "tokens_per_cpu_s": supervised / cpu_s if cpu_s else None,
        "padding_fraction": 1 - real / positions,
        "first_step_s": first_step_s,
        "counted_steps": len(counted),
        "steady_steps": len(_steady(steps)),
        "shapes": len({tuple(step["shape"]) for step in steps}),
        "supervised_tokens": supervised,
        "supervised_tokens_per_step": supervised / len(counted),
        "positions_per_step": positions / len(counted),
    }


def pair_figures(steps: Sequence[Step], first_step_s: float, pairs: int, reference_s: float) -> dict[str, Any]:
    """Return one run's figures on preferences; without a pass over the reference before the first step, `reference_s` is 0.

    They are `run_figures`, and pairs per second: of all steps but the first, of those whose shape had run before, of one
    epoch over the data's pairs with the reference's pass, and from the start of the process.
    """
    figures, spent_s = run_figures(steps, first_step_s), sum(_seconds(steps)[1:])
    trained = sum(step["pairs"] for step in steps[1:])
    return {
        **figures,
        "counted_pairs": trained,
        "pairs_per_s": trained / spent_s,
        "steady_pairs_per_s": _steady_rate(steps, "pairs"),
        "pairs_per_s_with_reference": pairs / (pairs * spent_s / trained + reference_s),
        "whole_pairs_per_s": (steps[0]["pairs"] + trained) / (first_step_s + spent_s),
        "reference_s": reference_s,
    }


def _seconds(steps: Sequence[Step]) -> list[float]:
    """Return each step's seconds, from the end of the one before; of the first, from the start of the loop."""
    return [end - before for before, end in pairwise([0.0, *(step["end_s"] for step in steps)])]


def _steady(steps: Sequence[Step]) -> list[int]:
    """Return the numbers of the steps after the first whose shape had run before."""
    shapes = [tuple(step["shape"]) for step in steps]
    return [number for number, shape in enumerate(shapes) if shape in shapes[:number]]


def _steady_rate(steps: Sequence[Step], key: str) -> float | None:
    """Return what steady steps did per second; None if there are fewer than two."""
    seconds, steady = _seconds(steps), _steady(steps)
    return sum(steps[i][key] for i in steady) / sum(seconds[i] for i in steady) if len(steady) > 1 else None


def summarize(
    rounds: Mapping[str, Sequence[Mapping[str, Any]]], reference: str, figures: Sequence[str], ratios: Sequence[str]
) -> dict[str, Any]:
    """Return, per side, the spreads of its figures, and of the round-by-round ratios: its own to the reference's as
    `ratio`, the reference's to its own as `reference_over_it`."""
    summary = {}
    for name, runs in rounds.items():
        pairs = {key: [[run[key] for run in rounds[side]] for side in (name, reference)] for key in ratios}
        summary[name] = {
            **{key: spread(run[key] for run in runs) for key in figures},
            "ratio": {key: paired_ratio(own, others) for key, (own, others) in pairs.items()},
            "reference_over_it": {key: paired_ratio(others, own) for key, (own, others) in pairs.items()},
        }
    return summary


# --- the same work?


def coarser(*checks: Mapping[str, Any]) -> float:
    """Return what a tolerance between these sides is multiplied by: 1 where all compute in float32."""
    dtypes = {dtype for check in checks for dtype in check.get("facts", {}).get("dtypes", ())}
    return COARSER if dtypes & {"bfloat16", "float16"} else 1.0


def check_agreement(checks: Mapping[str, Mapping[str, Any]], reference: str) -> float:
    """Compare every side's loss on the check rows with the reference's, and return the widest tolerance that was used.

    Raises:
        Disagreement: token ids or counts differ, or loss sums differ by more than the tolerance.
    """
    wanted, problems, widest = checks[reference], [], TOLERANCE
    for name, found in checks.items():
        if not found["same_ids"]:
            problems.append(f"{name}: {'; '.join(found['notes'])}")
        if found["count"] != wanted["count"]:
            problems.append(f"{name} trains {found['count']} tokens of the check rows, {reference} {wanted['count']}")
        tolerance = TOLERANCE * coarser(found, wanted)
        widest = max(widest, tolerance)
        apart = abs(found["loss_sum"] - wanted["loss_sum"]) / abs(wanted["loss_sum"])
        if not apart <= tolerance:  # NaN too
            problems.append(
                f"{name}: loss sum {found['loss_sum']:.4f}, {reference} {wanted['loss_sum']:.4f}, "
                f"{apart:.1e} apart, {tolerance:g} allowed"
            )
    if problems:
        raise Disagreement("; ".join(problems))
    return widest


def check_curves(checks: Mapping[str, Mapping[str, Any]], reference: str) -> float:
    """Compare every side's steps on the check's pairs with the reference's, and return the widest tolerance of a loss.

    Raises:
        Disagreement: a first loss is not ln 2, a loss does not fall, or losses or log-probabilities differ by more than
            the tolerances.
    """
    wanted, problems = checks[reference], []
    for name, found in checks.items():
        more, losses = coarser(found, wanted), found["losses"]
        if not abs(losses[0] - START) <= START_TOLERANCE * more:  # NaN too
            problems.append(f"{name}: first loss {losses[0]:.6f}; with policy and reference the same it is {START:.6f}")
        if not losses[0] - losses[-1] >= LEAST_FALL:
            problems.append(f"{name}: its loss goes from {losses[0]:.4f} to {losses[-1]:.4f}: nothing is trained")
        for key, allowed in BARS.items():
            size = 1 if key == "losses" else max(abs(value) for value in wanted[key])
            if (apart := furthest(found[key], wanted[key]) / size) > allowed * more:
                told = [", ".join(f"{value:.4f}" for value in side[key]) for side in (found, wanted)]
                what = f"{key} {told[0]}; {reference} {told[1]}"
                problems.append(f"{name}: {what}: {apart:.1e} apart, {allowed * more:g} allowed")
    if problems:
        raise Disagreement("; ".join(problems))
    return LOSS_TOLERANCE * coarser(*checks.values())


def furthest(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Return the largest difference; infinite where there is none."""
    if len(found) != len(wanted):
        return math.inf
    apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    return math.inf if math.isnan(apart) else apart


def wrong_accuracies(checks: Mapping[str, Mapping[str, Any]], reference: str) -> list[str]:
    """Return notes on sides that report another share of pairs in the right order than the reference does.

    The first step is left out: all margins are 0 but for rounding.
    """
    wanted = checks[reference]["accuracy"][1:]
    return [
        f"{name}: reports accuracies {found['accuracy'][1:]} in the check, where {reference} counts {wanted}"
        for name, found in checks.items()
        if furthest(found["accuracy"][1:], wanted) > 1e-3
    ]
