"""Write the kit's page: one HTML file without scripts or network access, in the look of our other reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_lora.doctor.check import GROUPS, LARGEST, STATUSES
from mlx_lora.reports.charts import Bar, bar_chart, render_page
from mlx_lora.utils.files import replacing_file
from mlx_lora.utils.text import format_duration

PAGES = Path(__file__).parent / "pages"
PLANNED = "planned GB"
LINES = ("failed", "warning")  # that are shown first


def write_kit_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page of a result."""
    page = render_page(
        PAGES,
        "doctor.html",
        title=_title(content),
        good=not content["summary"]["failed"],
        finished=content["finished"],
        share=content["share"],
        date=content["created"][:10],
        tiles=_tiles(content),
        facts=_facts(content),
        urgent=_by_check([line for status in LINES for line in _lines(content["checks"], status)], True),
        groups=[group for name, asks in GROUPS.items() if (group := _group(name, asks, content["checks"]))],
    )
    with replacing_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _title(content: Mapping[str, Any]) -> str:
    failed, warned = content["summary"]["failed"], content["summary"]["warning"]
    if failed:
        return f"{failed} {'line is' if failed == 1 else 'lines are'} red"
    return f"No line is red, {warned} {'is a warning' if warned == 1 else 'are warnings'}" if warned else "All is well"


def _tiles(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    summary = content["summary"]
    return [
        ("good", str(summary["ok"])),
        ("red", str(summary["failed"])),
        ("warnings", str(summary["warning"])),
        ("time", format_duration(summary["seconds"])),
    ]


def _facts(content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the machine's facts as labels and texts."""
    machine, here, software = content["machine"], content["device"], content["software"]
    versions = [f"{name} {version}" for name, version in (software["versions"] | content["peers"]).items() if version]
    cores = [f"{machine['gpu_cores']} GPU cores" if machine["gpu_cores"] else "", f"{machine['cpu_cores']} CPU cores"]
    found = [
        ("machine", ", ".join(filter(None, [machine["chip"], machine["model"], *cores]))),
        ("device", f"{here['name']}, {here['backend']}, computes in {here['compute_dtype']}"),
        (
            "memory",
            f"{here['memory_bytes'] / 2**30:.0f} GiB, of which a run may use {here['working_set_bytes'] / 2**30:.1f}",
        ),
        ("system", f"{machine['system']} {machine['system_version'] or ''}, Python {software['python']}"),
        ("versions", ", ".join([*versions, *([f"commit {software['commit']}"] if software["commit"] else [])])),
        ("power before", _power(content["power_before"])),
    ]
    return [*found, ("power after", _power(content["power_after"]))] if content["power_after"] else found


def _power(power: Mapping[str, Any]) -> str:
    mode = power["low_power_mode"]
    words = [
        {"ac": "on the charger", "battery": "on battery"}.get(power["source"] or "", "source not known"),
        "low-power mode not known" if mode is None else f"low-power mode {'on' if mode else 'off'}",
        f"heat {power['thermal_state']}" if power["thermal_state"] else "",
        f"{power['temperature_c']:.0f} °C" if power["temperature_c"] is not None else "",
        f"load {power['load_average']:g}",
    ]
    return ", ".join(filter(None, words))


def _lines(checks: Iterable[Mapping[str, Any]], *statuses: str) -> list[dict[str, str]]:
    """Return the findings with one of these statuses as rows of a table."""
    return [
        {
            "group": check["group"],
            "check": check["name"],
            "status": finding["status"],
            "name": finding["name"],
            "words": finding["words"],
            "numbers": _numbers(finding),
            "advice": finding["advice"] or "",
        }
        for check in checks
        for finding in check["findings"]
        if finding["status"] in statuses
    ]


def _by_check(lines: Iterable[dict[str, str]], with_group: bool) -> list[dict[str, Any]]:
    """Return lines under their check's name, for urgent ones with that of the group."""
    found: dict[str, list[dict[str, str]]] = {}
    for line in lines:
        found.setdefault(f"{line['group']}: {line['check']}" if with_group else line["check"], []).append(line)
    return [{"title": title, "lines": own} for title, own in found.items()]


def _numbers(finding: Mapping[str, Any]) -> str:
    """Return a finding's number and its bound."""
    if finding["found"] is None:
        return ""
    found, wanted = "not finite" if finding["found"] >= LARGEST else _short(finding["found"]), finding["wanted"]
    if wanted is None:
        return found
    return f"{found} {'≤' if finding['found'] <= wanted else '>'} {_short(wanted)}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2g}"


def _group(name: str, asks: str, checks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return a group for the page, None if it was not run."""
    own = [check for check in checks if check["group"] == name]
    if not own:
        return None
    lines = _lines(own, *STATUSES)
    counts = {status: sum(line["status"] == status for line in lines) for status in STATUSES}
    words = [f"{count} {word}" for status, word in SHOWN.items() if (count := counts[status])]
    seconds = sum(check["seconds"] or 0.0 for check in own)
    return {
        "name": name,
        "asks": asks,
        "counts": ", ".join([*words, f"{len(own)} checks in {format_duration(seconds)}"]),
        "charts": _charts(name, own),
        "skipped": _skipped(lines),
        "lines": _by_check([line for line in lines if line["status"] != "skipped"], False),
    }


SHOWN = {"ok": "good", "failed": "red", "warning": "with a warning", "skipped": "skipped"}


def _skipped(lines: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """Return the reasons of what was skipped, each with the names that it holds for."""
    reasons: dict[str, list[str]] = {}
    for line in lines:
        if line["status"] == "skipped":
            name = line["check"] if line["name"] == line["check"] else f"{line['check']}: {line['name']}"
            reasons.setdefault(line["words"], []).append(name)
    return list(reasons.items())


def _charts(name: str, checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the charts of a group that has numbers to compare."""
    if name == "memory":
        return [chart for mode in ("none", "block") if (chart := _memory_chart(checks, mode))]
    return _speed_charts(checks) if name == "speed" else []


def _memory_chart(checks: Sequence[Mapping[str, Any]], mode: str) -> dict[str, Any] | None:
    """Draw planned and measured peaks of the runs with one way of checkpointing; None if there are none."""
    bars = []
    for check in checks:
        *parts, of = check["name"].split(", ")
        for finding in check["findings"]:
            if PLANNED in finding["values"] and of.endswith(mode):
                planned, measured = finding["values"][PLANNED], finding["values"]["measured GB"]
                # The column of names has room for a few letters.
                name = " ".join(parts).replace(" base rank ", " r").replace(" rows", "")
                bars.append(Bar(" x".join(name.rsplit(" ", 1)), measured, note=check["name"]))
                bars.append(Bar("by the plan", planned, predicted=True, note=check["name"]))
    if not bars:
        return None
    title = "Peak memory, nothing computed twice" if mode == "none" else "Peak memory with block checkpoints"
    keys = [(0, False, "measured"), (0, True, "planned before the run")]
    return {"title": title, "svg": bar_chart(title, bars, " GB"), "keys": keys}


def _speed_charts(checks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Draw a chart per model, and one of the steady load."""
    charts = []
    for check in checks:
        bars = [
            Bar(who, speed, color=0 if who == "mlx-lora" or who.endswith("minute") else 1)
            for finding in check["findings"]
            for who, speed in finding["values"].items()
        ]
        title = (
            check["findings"][0]["name"].rpartition(": ")[0] or check["name"] if check["findings"] else check["name"]
        )
        if bars:
            svg = bar_chart(f"{title}: tokens per second", bars)
            charts.append({"title": f"{title}: tokens/s", "svg": svg, "keys": []})
    return charts
