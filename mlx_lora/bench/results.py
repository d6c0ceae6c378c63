"""Write and read result files, compare them, and render comparisons as text.

A file that cannot be read is reported with one line. There is one table per workload, with ratios only if the work and the
versions are equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.bench.schema import SCHEMA, VERSION, problems_of
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.text import counted

# Files

MOST_BYTES = 10_000_000
SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class ResultFile:
    """A result that was read and is valid.

    Attributes:
        path: of the file.
        content: as described by the schema.
    """

    path: Path
    content: dict[str, Any]

    @property
    def chip(self) -> str:
        """The chip's name, without `Apple`."""
        return machine_name(self.content)

    @property
    def memory(self) -> str:
        """The machine's memory, as in `16 GB`."""
        return f"{round(self.content['machine']['memory_bytes'] / 2**30)} GB"


def machine_name(content: dict[str, Any]) -> str:
    """Return a result's chip: the GPU's name on a Mac and with CUDA, the processor's on a CPU."""
    name = content["machine"]["chip"] if content["device"]["backend"] == "cpu" else content["device"]["name"]
    return (name or content["device"]["name"]).removeprefix("Apple ")


def new_result(
    created: str, tiers: Sequence[str], machine: dict[str, Any], software: dict[str, Any], probe: dict[str, Any]
) -> dict[str, Any]:
    """Return a result without entries; `probe` holds `device` and `rates`."""
    return {
        "schema": SCHEMA,
        "schema_version": VERSION,
        "created": created,
        "tiers": list(tiers),
        "machine": machine,
        "device": probe["device"],
        "software": software,
        "rates": probe["rates"],
        "results": [],
    }


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write a result, completely or not at all.

    Raises:
        ValueError: it is not valid, which is a bug of ours.
    """
    problems = problems_of(content)
    if problems:
        raise ValueError("; ".join(problems))
    replace_text(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def default_path(content: dict[str, Any], root: Path) -> Path:
    """Return `root/<chip>/<date>-<tier>.json`, with a number if that exists."""
    tiers = "-".join(content["tiers"]) or "workloads"
    chip = re.sub(r"[^a-z0-9]+", "-", machine_name(content).lower()).strip("-") or "unknown"
    stem = root / chip / f"{content['created'][:10]}-{tiers}"
    path, number = stem.with_suffix(".json"), 2
    while path.exists():
        path, number = stem.with_name(f"{stem.name}-{number}.json"), number + 1
    return path


def read_result(path: Path) -> ResultFile:
    """Read one result.

    Raises:
        InputError: it is not JSON, not ours, has another schema version, or has fields that are missing or wrong.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path}: {path.stat().st_size / 1e6:.0f} MB, too large for a result file; left out")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); left out") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a text file; left out") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: corrupt, not JSON ({str(error).splitlines()[0]}); left out") from None
    problems = problems_of(content)
    if problems:
        more = f", and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise InputError(f"{path}: {'; '.join(problems[:SHOWN_PROBLEMS])}{more}; left out")
    return ResultFile(path, content)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def read_results(paths: Iterable[Path]) -> tuple[list[ResultFile], list[str]]:
    """Read files, and all .json files in folders and their subfolders.

    Returns:
        The valid results, in the order given (those of a folder by name), and a line for each invalid file.

    Raises:
        InputError: a path does not exist, or there is no valid result.
    """
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: no such file or folder; give result files or folders of them")
        found = sorted(one for one in path.rglob("*.json") if one.is_file()) if path.is_dir() else [path]
        for one in found:
            files.setdefault(one.resolve(), one)  # a file that is named twice is one result
    results, problems = [], []
    for file in files.values():
        try:
            results.append(read_result(file))
        except InputError as error:
            problems.append(str(error))
    if not results:
        reasons = "; ".join(problems) if problems else "no .json file in it"
        raise InputError(f"no result that can be read ({reasons}); make one with `mlx-lora bench run`")
    return results, problems


# Comparison

# With different versions of these, a ratio would compare software, not machines.
SAME_VERSIONS = ("mlx-lora", "mlx", "mlx-lm")
BUSY_LOAD = 1.0  # of other programs, per core, before a run


@dataclass(frozen=True)
class ResultRow:
    """One machine's figures on one workload.

    Attributes:
        label: of the machine.
        file: the result file.
        entry: the result's entry for the workload.
        mismatch: why there is no ratio to the reference; empty: there is one.
        notes: what a reader should know, a few words each.
        speed_ratio, memory_ratio: to the reference, or None.
    """

    label: str
    file: str
    entry: dict[str, Any]
    mismatch: tuple[str, ...]
    notes: tuple[str, ...]
    speed_ratio: float | None = None
    memory_ratio: float | None = None

    @property
    def measured(self) -> bool:
        """Whether there are figures."""
        return self.entry["status"] == "measured"

    @property
    def speed(self) -> dict[str, float]:
        """Median and spread of tokens per second."""
        return self.entry["figures"]["tokens_per_s"]

    @property
    def against_plan(self) -> float:
        """Measured speed divided by predicted speed."""
        return self.speed["median"] / self.entry["predicted"]["tokens_per_s"]


@dataclass(frozen=True)
class Table:
    """One workload on all machines.

    Attributes:
        name: of the workload.
        reference: label of the machine that the others are compared with; None: no machine measured it.
        rows: in the order of the files.
    """

    name: str
    reference: str | None
    rows: tuple[ResultRow, ...]


def labels_of(results: Sequence[ResultFile]) -> list[str]:
    """Return a label for each result's machine, as in `M2 Pro, 16 GB`.

    Where machines have one label, the numbers of their cores tell them apart: `M2 Pro, 19 GPU cores, 16 GB`. Results of equal
    machines also get the date, or the part of the path that differs.
    """
    parts = [[one.chip, one.memory] for one in results]
    for kind in ("GPU", "CPU"):
        cores = [one.content["machine"][f"{kind.lower()}_cores"] for one in results]
        for alike in _alike([", ".join(part) for part in parts]):
            if len({cores[n] for n in alike}) > 1:
                for n in alike:
                    # Not at the end, because charts cut long labels in the middle.
                    parts[n][-1:-1] = [counted(cores[n], f"{kind} core")] if cores[n] else []
    labels = [", ".join(part) for part in parts]
    for alike in _alike(labels):
        dates = [results[n].content["created"][:10] for n in alike]
        names = distinct_names([results[n].path for n in alike])
        for n, date, name in zip(alike, dates, names, strict=True):
            labels[n] += f" · {date if dates.count(date) == 1 else name}"
    return labels


def _alike(labels: Sequence[str]) -> list[list[int]]:
    """Return the positions of each label that occurs several times."""
    found = [[n for n, one in enumerate(labels) if one == label] for label in dict.fromkeys(labels)]
    return [alike for alike in found if len(alike) > 1]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a short name for each file: its own, or that of a folder if the files have one name in several folders."""
    parts = [path.with_suffix("").parts for path in paths]
    if len(set(parts)) < len(parts):
        return [str(path) for path in paths]
    while len({one[-1] for one in parts}) == 1 and all(Path(*one[:-1]).name not in ("", "..") for one in parts):
        parts = [one[:-1] for one in parts]  # what all have in common, up to a folder that has a name
    names = []
    for mine in parts:
        size = 1
        while sum(one[-size:] == mine[-size:] for one in parts) > 1:
            size += 1
        names.append(Path(*mine[-size:]).as_posix())
    return names


def compare(results: Sequence[ResultFile], across_versions: bool = False) -> list[Table]:
    """Return a table for each workload that any of the results has, in their order.

    Args:
        results: the first that measured a workload is its reference.
        across_versions: give ratios even if versions differ, and note the difference.
    """
    labels = labels_of(results)
    names = dict.fromkeys(entry["workload"]["name"] for one in results for entry in one.content["results"])
    return [_table(name, results, labels, across_versions) for name in names]


def _table(name: str, results: Sequence[ResultFile], labels: Sequence[str], across_versions: bool) -> Table:
    there = [
        (label, one, entry)
        for label, one in zip(labels, results, strict=True)
        for entry in one.content["results"]
        if entry["workload"]["name"] == name
    ]
    first = next((item for item in there if item[2]["status"] == "measured"), None)
    rows = []
    for label, one, entry in there:
        notes = notes_of(one.content, entry)
        mismatch: list[str] = []
        ratios: dict[str, float] = {}
        if first and entry["status"] == "measured" and entry is not first[2]:
            mismatch = work_differs(entry, first[2])
            versions = versions_differ(one.content, first[1].content)
            if across_versions:
                notes += versions
            else:
                mismatch += versions
            notes += variables_differ(one.content, first[1].content)
            commits = {content["software"]["commit"] for content in (one.content, first[1].content)}
            notes += [f"commit {one.content['software']['commit'] or 'unknown'}"] if len(commits) > 1 else []
            if not mismatch:
                ratios = _ratios(entry["figures"], first[2]["figures"])
        rows.append(ResultRow(label, str(one.path), entry, tuple(mismatch), tuple(notes), **ratios))
    return Table(name, first[0] if first else None, tuple(rows))


def work_differs(entry: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return how the work of two entries with one name differs, a few words per difference."""
    found = []
    ours, theirs = entry["workload"], reference["workload"]
    if ours["version"] != theirs["version"]:
        found.append(f"workload version {ours['version']} against {theirs['version']}")
    elif ours["digest"] != theirs["digest"]:
        found.append("another definition of the workload")
    if entry["data_sha256"] != reference["data_sha256"]:
        found.append("other training data")
    if (entry["base"] or {}).get("fingerprint") != (reference["base"] or {}).get("fingerprint"):
        found.append("other weights")
    if entry["shortened"] or reference["shortened"]:
        found.append("not run at the workload's length")
    return found


def versions_differ(content: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return the versions in which two results differ."""
    ours, theirs = content["software"]["versions"], reference["software"]["versions"]
    return [
        f"{name} {ours.get(name)} against {theirs.get(name)}"
        for name in SAME_VERSIONS
        if ours.get(name) != theirs.get(name)
    ]


def variables_differ(content: dict[str, Any], reference: dict[str, Any]) -> list[str]:
    """Return the environment variables in which two results differ, without those that were removed before measuring."""
    ours, theirs = (
        {name: value for name, value in software["variables"].items() if name not in software["removed_variables"]}
        for software in (content["software"], reference["software"])
    )
    return [
        f"{name} {ours.get(name) or 'unset'} against {theirs.get(name) or 'unset'}"
        for name in dict.fromkeys([*ours, *theirs])
        if (ours.get(name) or None) != (theirs.get(name) or None)
    ]


def notes_of(content: dict[str, Any], entry: dict[str, Any]) -> list[str]:
    """Return notes on a run: what may have slowed it down, and what else a reader should know."""
    if entry["status"] != "measured":
        return [f"{entry['status']}: {entry['reason']}"]
    notes = ["not run at the workload's length"] if entry["shortened"] else []
    moments = [entry["power_before"], entry["power_after"] or {}]
    if any(moment.get("source") == "battery" for moment in moments):
        notes.append("on battery")
    if any(moment.get("low_power_mode") for moment in moments):
        notes.append("low-power mode")
    states = {moment.get("thermal_state") for moment in moments} - {None, "nominal"}
    notes += [f"thermal state {state}" for state in sorted(states)]
    cores, load = content["machine"]["cpu_cores"] or 1, entry["power_before"]["load_average"]
    if load > BUSY_LOAD * cores:
        notes.append(f"other programs ran (load {load:g} on {cores} cores)")
    if entry["figures"]["skipped_steps"]:
        notes.append(f"{entry['figures']['skipped_steps']} updates were not finite")
    return notes


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    return {
        "speed_ratio": ours["tokens_per_s"]["median"] / theirs["tokens_per_s"]["median"],
        "memory_ratio": ours["peak_memory_bytes"] / theirs["peak_memory_bytes"],
    }


# Tables as text (aligned for a terminal, or Markdown) and as JSON

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


def cells_of(row: ResultRow) -> list[str]:
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
