"""Write the report page of results: one HTML file with charts, without network access or scripts.

Full bars are measured. Hollow, dashed bars are the planner's predictions, from listed peaks, for chips without results,
and are always labeled so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from mlx_lora.bench.results import COLUMNS, ResultFile, Table, cells_of, compare, labels_of, number, remarks_of
from mlx_lora.bench.workloads import TIERS, WORKLOADS, Workload, predict_chips, predict_sizes
from mlx_lora.planner.speed import CHIPS
from mlx_lora.reports.charts import Bar, Series, bar_chart, line_chart, render_page
from mlx_lora.utils.files import replace_text

PAGES = Path(__file__).parent / "pages"
KNOWN = {one.name: one for one in WORKLOADS}


def write_page(
    path: Path, results: Sequence[ResultFile], problems: Sequence[str], across_versions: bool = False
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        results: the valid results.
        problems: a line for each file that was left out.
        across_versions: as in `compare`.
    """
    tables = compare(results, across_versions)
    measured = [table for table in tables if table.reference]
    page = render_page(
        PAGES,
        "bench.html",
        date=date.today().isoformat(),
        tiles=_tiles(results, measured),
        problems=problems,
        machines=_machines(results),
        columns=COLUMNS,
        sections=[_section(table, results) for table in measured],
        missing=[(table.name, remarks_of(table)) for table in tables if not table.reference],
        scaling=[_scaling(table, results) for table in measured if table.name in KNOWN],
        tiers=[_tier(tier) for tier in TIERS],
        chips=CHIPS,
    )
    replace_text(path, page)


def _tiles(results: Sequence[ResultFile], measured: Sequence[Table]) -> list[tuple[str, str]]:
    rows = [row for table in measured for row in table.rows if row.measured]
    macs = {one.chip for one in results if one.content["device"]["backend"] == "metal"}
    return [
        ("results", str(len(results))),
        ("kinds of Macs", str(len(macs)) if macs else "none yet"),
        ("workloads measured", str(len(measured))),
        ("fastest, tokens/s", number(max(row.speed["median"] for row in rows)) if rows else "–"),
    ]


def _machines(results: Sequence[ResultFile]) -> list[dict[str, str]]:
    """Return the rows of the table of machines."""
    found = []
    for label, one in zip(labels_of(results), results, strict=True):
        content = one.content
        machine, rates, software = content["machine"], content["rates"], content["software"]
        flops = rates["gemm_flops_per_s"]
        power = [entry["power_before"] for entry in content["results"]]
        found.append(
            {
                "machine": label,
                "date": content["created"][:10],
                "backend": content["device"]["backend"],
                "GPU cores": _or_dash(machine["gpu_cores"]),
                "CPU cores": _or_dash(machine["cpu_cores"]),
                "system": f"{machine['system']} {(machine['system_version'] or '').partition('-')[0]}",  # no build of a Linux kernel
                "power": _or_dash(", ".join(sorted({one["source"] for one in power if one["source"]})) or None),
                **{f"{name} TFLOPS": f"{rate / 1e12:.2g}" for name, rate in flops.items()},
                "copy GB/s": f"{rates['copy_bytes_per_s'] / 1e9:.3g}",
                "mlx": _or_dash(software["versions"].get("mlx")),
                "mlx-lora": f"{software['versions'].get('mlx-lora') or '–'} {(software['commit'] or '')[:7]}",
            }
        )
    columns = dict.fromkeys(key for row in found for key in row)
    return [{key: row.get(key, "–") for key in columns} for row in found]


def _section(table: Table, results: Sequence[ResultFile]) -> dict[str, Any]:
    """Return one workload for the page: its table, its description, and charts of what was measured and is predicted."""
    workload = KNOWN.get(table.name)
    predicted = [_predicted_speed(table, workload, results), _predicted_memory(table, workload)] if workload else []
    return {
        "table": table, "words": words_of(table.rows[0].entry["workload"]), "predicted": predicted,
        "measured": [_measured_speed(table), _measured_memory(table)],
        "cells": [cells_of(row) for row in table.rows], "remarks": remarks_of(table),
    }  # fmt: skip


def words_of(definition: dict[str, Any]) -> str:
    """Return a description of a workload."""
    base = "4-bit base (QLoRA)" if definition["packed"] else "float base (LoRA)"
    rows = {"chat": "short chats", "2k": "rows of 2,048 tokens", "8k": "rows of 8,192 tokens"}
    rows["dpo"] = "DPO on pairs of short answers"
    sizes = (
        f"{definition['batch_tokens']:,} positions per step, rank {definition['rank']}, checkpointing {definition['checkpointing']}"
        if {"batch_tokens", "rank", "checkpointing"} <= definition.keys()
        else ""
    )
    words = [f"{definition['model']}, {base}", rows.get(definition["form"], definition["form"]), sizes]
    return "; ".join([*filter(None, words), f"version {definition['version']}"])


def _measured_speed(table: Table) -> dict[str, Any]:
    """Draw measured tokens per second."""
    bars = [
        Bar(row.label, row.speed["median"], low=row.speed["p10"], high=row.speed["p90"], note="; ".join(row.notes))
        for row in table.rows
        if row.measured
    ]
    return _chart("Measured: tokens per second", bar_chart(f"{table.name}: measured tokens per second", bars), bars)


def _predicted_speed(table: Table, workload: Workload | None, results: Sequence[ResultFile]) -> dict[str, Any]:
    """Draw predicted tokens per second of chips without results."""
    seen = {one.chip for one in results for row in table.rows if row.file == str(one.path) and row.measured}
    bars = [
        Bar(
            one["chip"],
            one["tokens_per_s"],
            predicted=True,
            note=f"with {one['memory_gib']} GB; from {one['status']} peaks",
        )
        for one in _chips(workload)
        if one["chip"] not in seen and one["fits"]
    ]
    return _chart("Predicted: tokens per second", bar_chart(f"{table.name}: predicted tokens per second", bars), bars)


def _measured_memory(table: Table) -> dict[str, Any]:
    """Draw measured peaks, MLX's and the process's, next to the plan's for the same run."""
    bars = []
    for row in table.rows:
        if row.measured:
            figures, planned = row.entry["figures"], row.entry["predicted"]["peak_memory_bytes"]
            bars += [
                Bar(row.label, figures["peak_memory_bytes"] / 1e9, note="MLX's allocator"),
                Bar("its process", figures["process_peak_bytes"] / 1e9, color=1, note=row.label),
                Bar("by the plan", planned / 1e9, predicted=True, note=f"{row.label}, MLX's allocator"),
            ]
    return _chart("Measured: peak memory", bar_chart(f"{table.name}: measured peak memory", bars, " GB"), bars)


def _predicted_memory(table: Table, workload: Workload | None) -> dict[str, Any]:
    """Draw the planned peaks on Macs by their memory."""
    bars = []
    for size, one in _sizes(workload):
        peak, most = one["peak_memory_bytes"] / 1e9, one["working_set_bytes"] / 1e9
        words = f"{peak:.3g} of {most:.0f} GB" if one["fits"] else f"{peak:.3g} GB: too much"
        note = f"MLX's allocator; the GPU may use {most:.1f} GB"
        bars.append(Bar(f"Mac, {size} GB", peak, predicted=True, note=note, words=words))
    return _chart("Predicted: peak memory", bar_chart(f"{table.name}: predicted peak memory", bars, " GB"), bars)


def _chart(title: str, svg: str, bars: Sequence[Bar]) -> dict[str, Any]:
    kinds = dict.fromkeys((bar.color, bar.predicted) for bar in bars)
    words = {(0, False): "measured", (1, False): "measured, process", (0, True): "predicted, not measured"}
    return {"title": title, "svg": svg, "keys": [(color, hollow, words[color, hollow]) for color, hollow in kinds]}


def _scaling(table: Table, results: Sequence[ResultFile]) -> dict[str, Any]:
    """Draw tokens per second over GPU cores: a dashed line per generation for predictions, dots for measurements."""
    generations: dict[str, list[tuple[float, float]]] = {}
    for one in _chips(KNOWN[table.name]):
        if one["fits"]:
            points = generations.setdefault(one["chip"].split()[0], [])
            points.append((one["gpu_cores"], one["tokens_per_s"]))
    series = [Series(f"{name}, predicted", sorted(points), dashed=True) for name, points in generations.items()]
    cores = {str(one.path): one.content["machine"]["gpu_cores"] for one in results}
    dots = sorted((cores[row.file], row.speed["median"]) for row in table.rows if row.measured and cores[row.file])
    # NaN makes gaps between the points, because different machines are not on one line.
    apart = [point for cores_there, speed in dots for point in ((cores_there, speed), (cores_there, math.nan))]
    series.append(Series("measured" if dots else "measured: no Mac yet", apart))
    title = f"{table.name}: tokens per second over GPU cores"
    return {"title": table.name, "series": series, "svg": line_chart(title, series, "", True, "cores")}


def _tier(tier: str) -> dict[str, Any]:
    """Return a tier's predictions: a row per chip, a column per workload."""
    workloads = [one for one in WORKLOADS if one.tier == tier]
    columns = [_chips(one) for one in workloads]
    rows = [
        (
            chip.name,
            [
                f"{number(column[index]['tokens_per_s'])} ({column[index]['memory_gib']} GB)"
                if column[index]["fits"]
                else "does not fit"
                for column in columns
            ],
        )
        for index, chip in enumerate(CHIPS)
    ]
    return {
        "name": tier if tier == "embedded" else f"{tier} GB",
        "workloads": [one.name for one in workloads],
        "rows": rows,
    }


@cache
def _chips(workload: Workload | None) -> list[dict[str, Any]]:
    return predict_chips(workload) if workload else []


@cache
def _sizes(workload: Workload | None) -> list[tuple[int, dict[str, Any]]]:
    return predict_sizes(workload) if workload else []


def _or_dash(value: Any) -> str:
    return "–" if value is None else str(value)
