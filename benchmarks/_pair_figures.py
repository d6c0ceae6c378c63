"""The figures of runs on preferences, and whether the sides took the same steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from _figures import Step, coarser, paired_ratio, run_figures, seconds_of, spread, steady_steps

START = math.log(2)  # of DPO's loss: policy and reference are the same
START_TOLERANCE = 1e-4
LOSS_TOLERANCE = 2e-3  # absolute, of each step's loss
LOGPS_TOLERANCE = 1e-3  # relative, of the mean log-probability of an answer
LEAST_FALL = 0.02  # of the loss over the check's steps, so that an adapter without a gradient is noticed
FIGURES = (
    "pairs_per_s",
    "steady_pairs_per_s",
    "pairs_per_s_with_reference",
    "whole_pairs_per_s",
    "supervised_tokens_per_s",
    "padding_fraction",
    "peak_allocator_bytes",
    "peak_process_bytes",
    "reference_s",
    "first_step_s",
    "counted_steps",
    "counted_pairs",
    "steady_steps",
    "shapes",
    "positions_per_step",
)
RATIOS = (
    "pairs_per_s",
    "steady_pairs_per_s",
    "pairs_per_s_with_reference",
    "supervised_tokens_per_s",
    "peak_allocator_bytes",
    "peak_process_bytes",
)


class Disagreement(Exception):
    """Two sides compute different things, so their speed cannot be compared."""


def pair_figures(steps: Sequence[Step], first_step_s: float, pairs: int, reference_s: float) -> dict[str, Any]:
    """Return one run's figures.

    Args:
        steps: as for `run_figures`, with the `pairs` of each.
        first_step_s: from the start of the process to the end of the first step.
        pairs: in the data.
        reference_s: seconds of a pass over the reference before the first step; 0: it is computed in the steps.

    Returns:
        `run_figures`, and pairs per second: of all steps but the first, of those whose shape had run before, of one
        epoch with the reference's pass, and from the start of the process.
    """
    figures = run_figures(steps, first_step_s)
    spent_s = seconds_of(steps)
    counted, steady = range(1, len(steps)), steady_steps(steps)
    trained = sum(steps[i]["pairs"] for i in counted)
    total_s = sum(spent_s[i] for i in counted)
    rate = trained / total_s
    return {
        **figures,
        "counted_pairs": trained,
        "pairs_per_s": rate,
        "steady_pairs_per_s": sum(steps[i]["pairs"] for i in steady) / sum(spent_s[i] for i in steady)
        if len(steady) > 1
        else None,
        "pairs_per_s_with_reference": pairs / (pairs / rate + reference_s),
        "whole_pairs_per_s": (steps[0]["pairs"] + trained) / (first_step_s + total_s),
        "reference_s": reference_s,
    }


def check_curves(checks: dict[str, dict[str, Any]], reference: str) -> None:
    """Compare every side's steps of the check with the reference's.

    Raises:
        Disagreement: a first loss is not ln 2, a loss does not fall, or losses or log-probabilities differ by more than
            the tolerances.
    """
    wanted, problems = checks[reference], []
    for name, found in checks.items():
        more = coarser(found, wanted)
        first, last = found["losses"][0], found["losses"][-1]
        if not abs(first - START) <= START_TOLERANCE * more:  # NaN too
            problems.append(
                f"{name}: first loss {first:.6f}, and policy and reference are the same: ln 2 is {START:.6f}"
            )
        if not first - last >= LEAST_FALL:
            problems.append(f"{name}: its loss goes from {first:.4f} to {last:.4f}: nothing is trained")
        if (apart := furthest(found["losses"], wanted["losses"])) > LOSS_TOLERANCE * more:
            losses = ", ".join(f"{loss:.4f}" for loss in found["losses"])
            theirs = ", ".join(f"{loss:.4f}" for loss in wanted["losses"])
            problems.append(
                f"{name}: losses {losses}; {reference} {theirs}: {apart:.1e} apart, {LOSS_TOLERANCE * more:g} allowed"
            )
        for logps in ("chosen_logps", "rejected_logps"):
            size = max(abs(value) for value in wanted[logps])
            if (apart := furthest(found[logps], wanted[logps]) / size) > LOGPS_TOLERANCE * more:
                problems.append(
                    f"{name}: {logps} {found[logps][0]:.3f} to {found[logps][-1]:.3f}, {reference} "
                    f"{wanted[logps][0]:.3f} to {wanted[logps][-1]:.3f}: {apart:.1e} apart, {LOGPS_TOLERANCE * more:g} allowed"
                )
    if problems:
        raise Disagreement("; ".join(problems))


def furthest(found: Sequence[float], wanted: Sequence[float]) -> float:
    """Return the largest difference; infinite where there is none."""
    if len(found) != len(wanted):
        return math.inf
    apart = max(abs(a - b) for a, b in zip(found, wanted, strict=True))
    return math.inf if math.isnan(apart) else apart


def wrong_accuracies(checks: dict[str, dict[str, Any]], reference: str) -> list[str]:
    """Return notes on sides that report another share of pairs in the right order than the reference does.

    The first step is left out: all margins are 0 but for rounding.
    """
    wanted = checks[reference]["accuracy"][1:]
    return [
        f"{name}: reports accuracies {found['accuracy'][1:]} in the check, where {reference} counts {wanted}"
        for name, found in checks.items()
        if furthest(found["accuracy"][1:], wanted) > 1e-3
    ]


def summarize_pairs(rounds: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, Any]:
    """Return spreads of every figure per side, and of the reference's round-by-round ratios to it."""
    summary = {}
    for name, runs in rounds.items():
        figures = {key: spread([run[key] for run in runs]) for key in FIGURES}
        ratios = {
            key: paired_ratio([run[key] for run in rounds[reference]], [run[key] for run in runs]) for key in RATIOS
        }
        summary[name] = {**figures, "reference_over_it": ratios}
    return summary
