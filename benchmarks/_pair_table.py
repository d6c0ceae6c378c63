"""Render a comparison on preferences as two tables with notes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from _figures import coarser
from _pair_figures import LOGPS_TOLERANCE, LOSS_TOLERANCE, START_TOLERANCE
from _table import GB, cell, versions_of

HEAD = (
    "side", "pairs/s", "steady", "with reference", "whole run", "answer tokens/s", "padding %", "peak GB", "peak RSS GB",
    "reference s", "first step s", "positions/step", "steps", "pairs",
)  # fmt: skip
RATIO_HEAD = ("side", "pairs/s", "steady", "with reference", "answer tokens/s", "peak", "RSS")


def render_pairs(result: dict[str, Any]) -> str:
    """Return the tables, the meaning of their columns, and all differences between the sides."""
    reference, summary = result["arguments"]["reference"], result["summary"]
    rows = [_row(name, side) for name, side in summary.items()]
    ratios = [_ratio_row(name, side["reference_over_it"]) for name, side in summary.items() if name != reference]
    title = f"{reference} over each side, round by round (speed: above 1 is faster; memory: below 1 is less)"
    return "\n".join(
        [*_header(result), "", *_table(HEAD, rows), "", title, "", *_table(RATIO_HEAD, ratios), "", *_notes(result)]
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    whole = [head, *rows]
    widths = [max(len(row[i]) for row in whole) for i in range(len(head))]
    lines = [
        "| " + " | ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) + " |" for row in whole
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def _row(name: str, side: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        cell(side["pairs_per_s"], digits=3),
        cell(side["steady_pairs_per_s"], digits=3),
        cell(side["pairs_per_s_with_reference"], digits=3),
        cell(side["whole_pairs_per_s"], digits=3),
        cell(side["supervised_tokens_per_s"]),
        cell(side["padding_fraction"], 100),
        cell(side["peak_allocator_bytes"], 1 / GB, 2),
        cell(side["peak_process_bytes"], 1 / GB, 2),
        cell(side["reference_s"]),
        cell(side["first_step_s"]),
        cell(side["positions_per_step"], digits=0),
        f"{side['counted_steps']['median']:g} ({side['shapes']['median']:g} shapes)",
        cell(side["counted_pairs"], digits=0),
    )


def _ratio_row(name: str, ratio: dict[str, Any]) -> tuple[str, ...]:
    keys = (
        "pairs_per_s", "steady_pairs_per_s", "pairs_per_s_with_reference", "supervised_tokens_per_s",
        "peak_allocator_bytes", "peak_process_bytes",
    )  # fmt: skip
    return (name, *(cell(ratio[key], digits=2) for key in keys))


def _header(result: dict[str, Any]) -> list[str]:
    facts, blas, asked = result["prepared"], result["prepared"]["blas"], result["arguments"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in facts["left_out"].items()) or "none"
    return [
        f"{facts['device']['name']}, {result['cores']} cores, {facts['device']['backend']}; {blas['name']}, float32 GEMM "
        f"{blas['gemm_gflops']:g} GFLOP/s; {versions_of(result)}; {result['date']}, commit {result['commit']}",
        f"Model: {facts['model']}; rank {asked['rank']} on {facts['targets']['layers']} layers; DPO, sigmoid, beta "
        f"{asked['beta']:g}; AdamW with bias correction, weight decay {asked['weight_decay']:g}, no clip",
        f"Data: {facts['pairs']} pairs; mean tokens: prompt {facts['mean_prompt_tokens']}, chosen "
        f"{facts['mean_chosen_tokens']}, rejected {facts['mean_rejected_tokens']}; left out: {left_out}",
    ]


def _notes(result: dict[str, Any]) -> list[str]:
    checks, reference = result["checks"], result["arguments"]["reference"]
    more = coarser(*checks.values())
    lines = [
        "Counted: pairs that were trained on, over wall-clock time with data and host work; the first step is left out.",
        "steady: only steps whose shape had run before. with reference: one epoch over the pairs with the pass that",
        "computes the reference beforehand, where there is one. whole run: from the process's start, that pass included.",
        "answer tokens/s: trained tokens, which does not depend on which pairs a side had by then. peak: MLX's live",
        "buffers; RSS: the whole process, of all sides alike. "
        f"Median (least-largest) of {result['arguments']['rounds']} rounds.",
        f"Check: {len(next(iter(checks.values()))['losses'])} steps on one batch of pairs at a large rate: all first losses "
        f"are ln 2 within {START_TOLERANCE * more:g}, losses agree within {LOSS_TOLERANCE * more:g}, mean log-probabilities of answers "
        f"within {LOGPS_TOLERANCE * more:g} of their size ({reference}):",
    ]
    for name, check in checks.items():
        losses = " ".join(f"{loss:.5f}" for loss in check["losses"])
        lines.append(
            f"  {name}: {losses}; chosen {check['chosen_logps'][-1]:.3f}, rejected {check['rejected_logps'][-1]:.3f}"
        )
    lines += [f"  {note}" for note in result["accuracies"]]
    for name, side in result["regimes"].items():
        lines += [f"{name}: {side['regime']}; reference {side['reference']}"]
        if facts := checks[name]["facts"]:
            own = "".join(f", {package} {version}" for package, version in facts.get("versions", {}).items())
            lines.append(f"{name}: computes in {', '.join(facts['dtypes'])} with {facts['blas']}{own}")
        lines += [f"{name}: {note}" for note in _own_notes(result, name)]
    lines += [f"{name}: skipped: {reason}" for name, reason in result["skipped"].items()]
    removed = ", ".join(f"{k} (was {v or 'not set'})" for k, v in result["removed_variables"].items())
    return [*lines, f"Removed from every child's environment: {removed}"]


def _own_notes(result: dict[str, Any], name: str) -> list[str]:
    """Return what a side says of itself, once each; the last round's, which has drawn the most pairs."""
    return result["rounds"][name][-1]["notes"]
