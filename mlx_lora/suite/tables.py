"""Render comparisons as text: aligned for a terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lora.suite.compare import Row, Table

COLUMNS = (
    "machine",
    "tokens/s",
    "10-90%",
    "ratio",
    "peak GB",
    "ratio",
    "process GB",
    "first step s",
    "MFU",
    "predicted tokens/s",
    "predicted GB",
)


def cells_of(row: Row) -> list[str]:
    """Return a row's cells for `COLUMNS`; the planner's figures have their own columns."""
    if not row.measured:
        return [row.label, row.entry["status"], *[""] * (len(COLUMNS) - 2)]
    figures, predicted = row.entry["figures"], row.entry["predicted"]
    return [
        row.label,
        number(row.speed["median"]),
        f"{number(row.speed['p10'])}-{number(row.speed['p90'])}",
        "none" if row.mismatch else _ratio(row.speed_ratio),
        _gigabytes(figures["peak_memory_bytes"]),
        "none" if row.mismatch else _ratio(row.memory_ratio),
        _gigabytes(figures["process_peak_bytes"]),
        f"{figures['first_step_s']:.1f}",
        f"{figures['mfu']:.0%}",
        f"{number(predicted['tokens_per_s'])} ({row.against_plan:.0%} reached)",
        _gigabytes(predicted["peak_memory_bytes"]),
    ]


def remarks_of(table: Table) -> list[str]:
    """Return a line for each note on a table's rows, and for each row without a ratio."""
    found = []
    for row in table.rows:
        if row.mismatch:
            found.append(f"{row.label}: no ratio to {table.reference}: {'; '.join(row.mismatch)}")
        found += [f"{row.label}: {note}" for note in row.notes]
    return found


def render_tables(tables: Sequence[Table], markdown: bool) -> str:
    """Return all tables as text."""
    parts = []
    for table in tables:
        title = f"{table.name} (ratios to {table.reference})" if table.reference else f"{table.name} (not measured)"
        rows = [list(COLUMNS), *(cells_of(row) for row in table.rows)]
        lines = _markdown(rows) if markdown else _aligned(rows)
        remarks = [f"- {line}" if markdown else f"  {line}" for line in remarks_of(table)]
        head = [f"### {title}", ""] if markdown else [title]
        parts.append("\n".join([*head, *lines, *([""] if markdown and remarks else []), *remarks]))
    return "\n\n".join(parts)


def to_json(tables: Sequence[Table]) -> dict[str, Any]:
    """Return the comparison as JSON values."""
    return {
        "comparisons": [
            {
                "workload": table.name,
                "reference": table.reference,
                "rows": [
                    {
                        "machine": row.label,
                        "file": row.file,
                        "status": row.entry["status"],
                        "figures": row.entry["figures"],
                        "predicted": row.entry["predicted"],
                        "speed_ratio": row.speed_ratio,
                        "memory_ratio": row.memory_ratio,
                        "no_ratio_because": list(row.mismatch),
                        "notes": list(row.notes),
                    }
                    for row in table.rows
                ],
            }
            for table in tables
        ]
    }


def number(value: float) -> str:
    """Return a rate with at least three digits, without decimals from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "1" if value is None else f"{value:.2f}"


def _gigabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:.2f}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in escaped]
    return [lines[0], f"|{'---|' * len(rows[0])}", *lines[1:]]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if n == 0 else cell.rjust(width)
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
