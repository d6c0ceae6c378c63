"""Render a comparison's result as a table with notes."""

from __future__ import annotations

from typing import Any

GB = 1e9
HEAD = (
    "side",
    "supervised tokens/s",
    "steady",
    "whole run",
    "real tokens/s",
    "padding %",
    "peak GB",
    "peak RSS GB",
    "first step s",
    "positions/step",
    "steps",
    "speed ratio",
    "steady ratio",
    "peak ratio",
    "RSS ratio",
)


def render(result: dict[str, Any]) -> str:
    """Return the table, the meaning of its columns, and all differences between the sides."""
    rows = [HEAD, *(_row(name, side) for name, side in result["summary"].items())]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([*_header(result), "", *lines, "", *_notes(result)])


def _row(name: str, side: dict[str, Any]) -> tuple[str, ...]:
    ratio = side["ratio"]
    return (
        name,
        cell(side["supervised_tokens_per_s"]),
        cell(side["steady_tokens_per_s"]),
        cell(side["whole_tokens_per_s"]),
        cell(side["tokens_per_s"]),
        cell(side["padding_fraction"], 100),
        cell(side["peak_allocator_bytes"], 1 / GB, 2),
        cell(side["peak_process_bytes"], 1 / GB, 2),
        cell(side["first_step_s"]),
        cell(side["positions_per_step"], digits=0),
        f"{side['counted_steps']['median']:g} ({side['shapes']['median']:g} shapes)",
        cell(ratio["supervised_tokens_per_s"], digits=2),
        cell(ratio["steady_tokens_per_s"], digits=2),
        cell(ratio["peak_allocator_bytes"], digits=2),
        cell(ratio["peak_process_bytes"], digits=2),
    )


def cell(value: dict[str, float] | None, factor: float = 1, digits: int = 1) -> str:
    """Return the median, and the extremes if there are several values."""
    if value is None:
        return "-"
    middle, low, high = (f"{value[key] * factor:.{digits}f}" for key in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low}-{high})"


def versions_of(result: dict[str, Any]) -> str:
    """Return the packages of this environment."""
    return ", ".join(f"{name} {version}" for name, version in result["versions"].items() if version)


def _header(result: dict[str, Any]) -> list[str]:
    facts, blas = result["prepared"], result["prepared"]["blas"]
    return [
        f"{facts['device']['name']}, {result['cores']} cores, {facts['device']['backend']}; {blas['name']}, float32 GEMM "
        f"{blas['gemm_gflops']:g} GFLOP/s; {versions_of(result)}; {result['date']}, commit {result['commit']}",
        f"Model: {facts['model']}; rank {result['arguments']['rank']} on {facts['targets']['layers']} layers",
        f"Data: {facts['rows']} rows, mean {facts['mean_row_tokens']} tokens, {facts['supervised_share']:.0%} supervised "
        f"({facts['kind']}); {facts['rows_left_out']} rows left out",
    ]


def _notes(result: dict[str, Any]) -> list[str]:
    reference = result["arguments"]["reference"]
    lines = [
        "Counted: supervised tokens by our encoder's masks for every side; wall-clock time with data and host work; the",
        "first step is left out. steady: only steps whose shape had run before (no retrace). whole run: from the process's",
        "start. peak: MLX's live buffers; RSS: the whole process, with the freed buffers that MLX keeps for reuse.",
        f"Median (least-largest) of {result['arguments']['rounds']} rounds; ratios to {reference}, round by round.",
        "Loss check (8 rows, perturbed adapter), agreed within "
        f"{result['tolerance']:g}: "
        + ", ".join(f"{name} {check['loss_sum']:.4f} / {check['count']}" for name, check in result["checks"].items()),
    ]
    for name, check in result["checks"].items():
        lines += [f"{name}: {note}" for note in check["notes"]]
        facts = check["facts"]
        if facts:
            speed = f", GEMM {facts['gemm_gflops']:g} GFLOP/s" if "gemm_gflops" in facts else ""
            own = "".join(f", {package} {version}" for package, version in facts.get("versions", {}).items())
            lines.append(f"{name}: computes in {', '.join(facts['dtypes'])} with {facts['blas']}{speed}{own}")
    lines += [f"{name}: {regime}" for name, regime in result["regimes"].items()]
    lines += [f"{name}: skipped: {reason}" for name, reason in result["skipped"].items()]
    removed = ", ".join(f"{k} (was {v or 'not set'})" for k, v in result["removed_variables"].items())
    return [*lines, f"Removed from every child's environment: {removed}"]
