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
    speeds = [row.speed["median"] for table in measured for row in table.rows if row.measured]
    macs = {one.chip for one in results if one.content["device"]["backend"] == "metal"}
    tiers = []
    for tier in TIERS:
        columns = {one.name: _chips(one) for one in WORKLOADS if one.tier == tier}
        rows = [(chip.name, [_tier_cell(column[n]) for column in columns.values()]) for n, chip in enumerate(CHIPS)]
        name = tier if tier == "embedded" else f"{tier} GB"
        tiers.append({"name": name, "workloads": list(columns), "rows": rows})
    page = render_page(
        PAGES,
        "bench.html",
        date=date.today().isoformat(),
        tiles=[
            ("results", str(len(results))),
            ("kinds of Macs", str(len(macs)) if macs else "none yet"),
            ("workloads measured", str(len(measured))),
            ("fastest, tokens/s", number(max(speeds)) if speeds else "–"),
        ],
        problems=problems,
        machines=_machines(results),
        columns=COLUMNS,
        sections=[_section(table, results) for table in measured],
        missing=[(table.name, remarks_of(table)) for table in tables if not table.reference],
        scaling=[_scaling(table, results) for table in measured if table.name in KNOWN],
        tiers=tiers,
        chips=CHIPS,
    )
    replace_text(path, page)


def _tier_cell(predicted: dict[str, Any]) -> str:
    if not predicted["fits"]:
        return "does not fit"
    return f"{number(predicted['tokens_per_s'])} ({predicted['memory_gib']} GB)"


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
    rows = [row for row in table.rows if row.measured]
    speed = [
        Bar(row.label, row.speed["median"], low=row.speed["p10"], high=row.speed["p90"], note="; ".join(row.notes))
        for row in rows
    ]
    memory = []
    for row in rows:
        figures, planned = row.entry["figures"], row.entry["predicted"]["peak_memory_bytes"]
        memory += [
            Bar(row.label, figures["peak_memory_bytes"] / 1e9, note="MLX's allocator"),
            Bar("its process", figures["process_peak_bytes"] / 1e9, color=1, note=row.label),
            Bar("by the plan", planned / 1e9, predicted=True, note=f"{row.label}, MLX's allocator"),
        ]
    measured = [_chart(table, "measured", "tokens per second", speed)]
    measured.append(_chart(table, "measured", "peak memory", memory, " GB"))
    predicted = []
    if workload := KNOWN.get(table.name):
        seen = {one.chip for one in results for row in rows if row.file == str(one.path)}
        speed = [
            Bar(
                one["chip"],
                one["tokens_per_s"],
                predicted=True,
                note=f"with {one['memory_gib']} GB; from {one['status']} peaks",
            )
            for one in _chips(workload)
            if one["chip"] not in seen and one["fits"]
        ]
        memory = []
        for size, one in predict_sizes(workload):
            peak, most = one["peak_memory_bytes"] / 1e9, one["working_set_bytes"] / 1e9
            words = f"{peak:.3g} of {most:.0f} GB" if one["fits"] else f"{peak:.3g} GB: too much"
            note = f"MLX's allocator; the GPU may use {most:.1f} GB"
            memory.append(Bar(f"Mac, {size} GB", peak, predicted=True, note=note, words=words))
        predicted = [_chart(table, "predicted", "tokens per second", speed)]
        predicted.append(_chart(table, "predicted", "peak memory", memory, " GB"))
    return {
        "table": table, "words": words_of(table.rows[0].entry["workload"]), "predicted": predicted, "measured": measured,
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


def _chart(table: Table, kind: str, what: str, bars: Sequence[Bar], unit: str = "") -> dict[str, Any]:
    kinds = dict.fromkeys((bar.color, bar.predicted) for bar in bars)
    words = {(0, False): "measured", (1, False): "measured, process", (0, True): "predicted, not measured"}
    keys = [(color, hollow, words[color, hollow]) for color, hollow in kinds]
    return {
        "title": f"{kind.capitalize()}: {what}",
        "svg": bar_chart(f"{table.name}: {kind} {what}", bars, unit),
        "keys": keys,
    }


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


@cache
def _chips(workload: Workload) -> list[dict[str, Any]]:
    return predict_chips(workload)


def _or_dash(value: Any) -> str:
    return "–" if value is None else str(value)
