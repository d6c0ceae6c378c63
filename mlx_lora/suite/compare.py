"""Compare results: one table per workload, with ratios only if the work and the versions are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lora.suite.result import ResultFile

# With different versions of these, a ratio would compare software, not machines.
SAME_VERSIONS = ("mlx-lora", "mlx", "mlx-lm")
BUSY_LOAD = 1.0  # of other programs, per core, before a run


@dataclass(frozen=True)
class Row:
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
    rows: tuple[Row, ...]


def labels_of(results: Sequence[ResultFile]) -> list[str]:
    """Return a label for each result's machine; results from equal machines also get the date or the file name."""
    plain = [one.label for one in results]
    dated = [f"{label} · {one.content['created'][:10]}" for label, one in zip(plain, results, strict=True)]
    named = [f"{label} · {one.path.stem}" for label, one in zip(plain, results, strict=True)]
    found = []
    for number, label in enumerate(plain):
        if plain.count(label) > 1:
            label = dated[number] if dated.count(dated[number]) == 1 else named[number]
        found.append(label)
    return found


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
            commits = {content["software"]["commit"] for content in (one.content, first[1].content)}
            notes += [f"commit {one.content['software']['commit'] or 'unknown'}"] if len(commits) > 1 else []
            if not mismatch:
                ratios = _ratios(entry["figures"], first[2]["figures"])
        rows.append(Row(label, str(one.path), entry, tuple(mismatch), tuple(notes), **ratios))
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
