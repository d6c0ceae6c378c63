"""A comparison's result as tables, the meaning of their columns, and all differences between the sides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from _figures import LOGPS_TOLERANCE, LOSS_TOLERANCE, START_TOLERANCE, coarser
from _harness import cell, table

# Head of a column: its figure, a factor, digits.
ROW_COLUMNS = {
    "supervised tokens/s": ("supervised_tokens_per_s", 1, 1), "steady": ("steady_tokens_per_s", 1, 1),
    "whole run": ("whole_tokens_per_s", 1, 1), "real tokens/s": ("tokens_per_s", 1, 1),
    "padding %": ("padding_fraction", 100, 1), "peak GB": ("peak_allocator_bytes", 1e-9, 2),
    "peak RSS GB": ("peak_process_bytes", 1e-9, 2), "first step s": ("first_step_s", 1, 1),
    "positions/step": ("positions_per_step", 1, 0), "steps": ("counted_steps", 1, 0), "shapes": ("shapes", 1, 0),
}  # fmt: skip
PAIR_COLUMNS = {
    "pairs/s": ("pairs_per_s", 1, 3), "steady": ("steady_pairs_per_s", 1, 3),
    "with reference": ("pairs_per_s_with_reference", 1, 3), "whole run": ("whole_pairs_per_s", 1, 3),
    "answer tokens/s": ("supervised_tokens_per_s", 1, 1), "padding %": ROW_COLUMNS["padding %"],
    "peak GB": ROW_COLUMNS["peak GB"], "peak RSS GB": ROW_COLUMNS["peak RSS GB"], "reference s": ("reference_s", 1, 1),
    "first step s": ROW_COLUMNS["first step s"], "positions/step": ROW_COLUMNS["positions/step"],
    "steps": ROW_COLUMNS["steps"], "shapes": ROW_COLUMNS["shapes"], "pairs": ("counted_pairs", 1, 0),
}  # fmt: skip
# The figures that ratios are taken of, by the head of their column.
ROW_RATIO_HEADS = {"speed": "supervised_tokens_per_s", "steady": "steady_tokens_per_s", "peak": "peak_allocator_bytes", "RSS": "peak_process_bytes"}  # fmt: skip
PAIR_RATIO_HEADS = {
    "pairs/s": "pairs_per_s", "steady": "steady_pairs_per_s", "with reference": "pairs_per_s_with_reference",
    "answer tokens/s": "supervised_tokens_per_s", "peak": "peak_allocator_bytes", "RSS": "peak_process_bytes",
}  # fmt: skip
ROW_RATIOS, PAIR_RATIOS = tuple(ROW_RATIO_HEADS.values()), tuple(PAIR_RATIO_HEADS.values())
ROW_FIGURES = (*(key for key, *_ in ROW_COLUMNS.values()), "tokens_per_cpu_s", "steady_steps")
PAIR_FIGURES = (*(key for key, *_ in PAIR_COLUMNS.values()), "steady_steps")

COUNTED = """
Counted: supervised tokens by our encoder's masks for every side; wall-clock time with data and host work; the first step is
left out. steady: only steps whose shape had run before (no retrace). whole run: from the process's start. peak: MLX's live
buffers; RSS: the whole process, with the freed buffers that MLX keeps for reuse.""".strip()
PAIRS_COUNTED = """
Counted: pairs that were trained on, over wall-clock time with data and host work; the first step is left out. steady: only
steps whose shape had run before. with reference: one epoch over the pairs with the pass that computes the reference
beforehand, where there is one. whole run: from the process's start, that pass included. answer tokens/s: trained tokens,
which does not depend on which pairs a side had by then. peak: MLX's live buffers; RSS: the whole process, of all sides alike.
""".strip()


def render(result: Mapping[str, Any]) -> str:
    """Return the tables with what was compared above and notes below."""
    summary, reference, on_pairs = result["summary"], result["arguments"]["reference"], "pairs" in result["prepared"]
    columns, heads = (PAIR_COLUMNS, PAIR_RATIO_HEADS) if on_pairs else (ROW_COLUMNS, ROW_RATIO_HEADS)
    figures = [[name, *(cell(side[key], *form) for key, *form in columns.values())] for name, side in summary.items()]
    key = "reference_over_it" if on_pairs else "ratio"
    ratios = [
        [name, *(cell(side[key][figure], digits=2) for figure in heads.values())]
        for name, side in summary.items()
        if name != reference
    ]
    what = f"{reference} over each side" if on_pairs else f"Each side over {reference}"
    title = f"{what}, round by round (speed: above 1 is faster; memory: below 1 is less)"
    return "\n\n".join(
        [_header(result), table(["side", *columns], figures), title, table(["side", *heads], ratios), _notes(result)]
    )


def _header(result: Mapping[str, Any]) -> str:
    facts, blas, asked = result["prepared"], result["prepared"]["blas"], result["arguments"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)
    lines = [
        f"{facts['device']['name']}, {result['cores']} cores, {facts['device']['backend']}; {blas['name']}, float32 GEMM "
        f"{blas['gemm_gflops']:g} GFLOP/s; {versions}; {result['date']}, commit {result['commit']}",
        f"Model: {facts['model']}; rank {asked['rank']} on {facts['targets']['layers']} layers",
    ]
    if "pairs" not in facts:
        lines.append(
            f"Data: {facts['rows']} rows, mean {facts['mean_row_tokens']} tokens, {facts['supervised_share']:.0%} supervised "
            f"({facts['kind']}); {facts['rows_left_out']} rows left out"
        )
        return "\n".join(lines)
    lines[1] += (
        f"; DPO, sigmoid, beta {asked['beta']:g}; AdamW with bias correction, weight decay {asked['weight_decay']:g}, no clip"
    )
    left_out = ", ".join(f"{count} {reason}" for reason, count in facts["left_out"].items()) or "none"
    means = ", ".join(f"{part} {facts[f'mean_{part}_tokens']}" for part in ("prompt", "chosen", "rejected"))
    return "\n".join([*lines, f"Data: {facts['pairs']} pairs; mean tokens: {means}; left out: {left_out}"])


def _notes(result: Mapping[str, Any]) -> str:
    checks, on_pairs = result["checks"], "pairs" in result["prepared"]
    lines = [
        PAIRS_COUNTED if on_pairs else COUNTED,
        f"Median (least-largest) of {result['arguments']['rounds']} rounds.",
    ]
    if on_pairs:
        more = coarser(*checks.values())
        lines.append(
            f"Check: steps on one batch of pairs at a large rate: all first losses are ln 2 within {START_TOLERANCE * more:g}, "
            f"losses agree within {LOSS_TOLERANCE * more:g}, mean log-probabilities of answers within {LOGPS_TOLERANCE * more:g} of their size:"
        )
        for name, check in checks.items():
            losses = " ".join(f"{loss:.5f}" for loss in check["losses"])
            last = ", ".join(f"{part} {check[f'{part}_logps'][-1]:.3f}" for part in ("chosen", "rejected"))
            lines.append(f"  {name}: {losses}; {last}")
        lines += [f"  {note}" for note in result["accuracies"]]
    else:
        sums = ", ".join(f"{name} {check['loss_sum']:.4f} / {check['count']}" for name, check in checks.items())
        lines.append(f"Loss check (8 rows, perturbed adapter), agreed within {result['tolerance']:g}: {sums}")
    for name, side in result["regimes"].items():
        lines.append(f"{name}: {side['regime']}" + (f"; reference {side['reference']}" if side["reference"] else ""))
        if facts := checks[name]["facts"]:
            speed = f", GEMM {facts['gemm_gflops']:g} GFLOP/s" if "gemm_gflops" in facts else ""
            own = "".join(f", {package} {version}" for package, version in facts.get("versions", {}).items())
            lines.append(f"{name}: computes in {', '.join(facts['dtypes'])} with {facts['blas']}{speed}{own}")
        # On pairs those of the last round, which has drawn the most pairs.
        notes = result["rounds"][name][-1]["notes"] if on_pairs else checks[name]["notes"]
        lines += [f"{name}: {note}" for note in notes]
    lines += [f"{name}: skipped: {reason}" for name, reason in result["skipped"].items()]
    removed = ", ".join(f"{name} (was {value or 'not set'})" for name, value in result["removed_variables"].items())
    return "\n".join([*lines, f"Removed from every child's environment: {removed}"])
