"""Keep the kit's result file, from which a second call goes on, and write its page, one HTML file without scripts or network access.

The file is written after each check. A check that was begun and never ended has taken the process with it, or someone killed the
process meanwhile. It is tried once more; if it does not end then either, that is its finding, and the kit goes on with the next one.
The file has a schema, version 1, which is checked by the same code as the results of `bench`."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_lora.bench.schema import DEVICE, MACHINE, POWER, SOFTWARE, field_problems, fields_of, under
from mlx_lora.doctor.check import GROUPS, LARGEST, STATUSES, CheckFinding, KitCheck
from mlx_lora.reports.charts import Bar, bar_chart, render_page
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.text import format_duration

RESULT_FILE, PAGE_FILE = "doctor.json", "doctor.html"
MOST_ATTEMPTS = 2


class KitState:
    """What is known so far.

    Attributes:
        path: of the file.
        content: of the file.
    """

    def __init__(self, path: Path, content: dict[str, Any]):
        """Take the content of a file that exists, or will."""
        self.path, self.content = path, content

    def entry(self, check: KitCheck) -> dict[str, Any] | None:
        """Return a check's entry, None if it was never begun."""
        known = ((one["group"], one["name"], one) for one in self.content["checks"])
        return next((one for group, name, one in known if (group, name) == (check.group, check.name)), None)

    def is_done(self, check: KitCheck) -> bool:
        """Return whether a check has ended."""
        entry = self.entry(check)
        return entry is not None and entry["done"]

    def begin(self, check: KitCheck) -> dict[str, Any]:
        """Note that a check begins, and return its entry: `attempts` counts how often it was begun, now included."""
        entry = self.entry(check)
        if entry is None:
            entry = {
                "group": check.group, "name": check.name, "done": False, "attempts": 0, "seconds": None, "findings": [],
            }  # fmt: skip
            self.content["checks"].append(entry)
        entry["attempts"] += 1
        self.write()
        return entry

    def take_back(self, entry: dict[str, Any]) -> None:
        """Forget that a check was begun, because the user interrupted it."""
        entry["attempts"] -= 1
        self.write()

    def end(self, entry: dict[str, Any], findings: Sequence[CheckFinding], seconds: float) -> None:
        """Keep what a check found."""
        entry |= {"done": True, "seconds": round(seconds, 3), "findings": [_written(one) for one in findings]}
        self.write()

    def forget(self, checks: Sequence[KitCheck]) -> None:
        """Drop the entries of checks that are to run again."""
        names = {(check.group, check.name) for check in checks}
        self.content["checks"] = [one for one in self.content["checks"] if (one["group"], one["name"]) not in names]

    def write(self) -> None:
        """Write the file, with a new summary.

        Raises:
            ValueError: the content is not what the schema says, which is a mistake in a check.
        """
        findings = [one["status"] for entry in self.content["checks"] for one in entry["findings"]]
        seconds = sum(entry["seconds"] or 0.0 for entry in self.content["checks"])
        self.content["summary"] = {status: findings.count(status) for status in STATUSES} | {
            "seconds": round(seconds, 3)
        }
        if problems := kit_problems(self.content):
            raise ValueError(f"{self.path.name}: {'; '.join(problems[:3])}")
        text = json.dumps(self.content, indent=1, ensure_ascii=False, allow_nan=False)
        replace_text(self.path, text + "\n")


def _written(finding: CheckFinding) -> dict[str, Any]:
    """Return a finding as JSON values; what a user's folders are called stays here."""
    made = asdict(finding)
    for name in ("found", "wanted"):  # JSON has no infinity, and the schema no negative number
        if made[name] is not None:
            made[name] = min(max(made[name], 0.0), LARGEST) if math.isfinite(made[name]) else LARGEST
    home = str(Path.home())
    for name in ("name", "words", "unit", "advice"):
        made[name] = made[name].replace(home, "~") or None
    return made


def open_state(path: Path, facts: Mapping[str, Any], share: str, key: Mapping[str, str | None]) -> tuple[KitState, str]:
    """Return the state of a result file, and why it starts anew where there was another; empty if it does not.

    Args:
        path: of the file.
        facts: `machine`, `device`, `software`, `peers` and `power_before` of now.
        share: `full` or `quick`.
        key: what the results depend on.

    Raises:
        InputError: there is a file that is not ours.
    """
    before, why = _earlier(path), ""
    if before is not None:
        changed = [name for name in {**before["key"], **key} if before["key"].get(name) != key.get(name)]
        if not changed:
            return KitState(path, before), ""
        shown = [f"{name} was {before['key'].get(name)} and is {key.get(name)}" for name in changed[:3]]
        why = "; ".join(shown)
    content = {
        "schema": SCHEMA, "schema_version": VERSION, "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "share": share,
        "finished": False, "key": dict(key), **facts, "power_after": None, "summary": {}, "checks": [],
    }  # fmt: skip
    return KitState(path, content), why


def _earlier(path: Path) -> dict[str, Any] | None:
    """Return an earlier result; None if there is none, or it was cut short."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give another folder with --out") from None
    except ValueError:
        raise InputError(f"{path}: not a result of the doctor; give another folder with --out") from None
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise InputError(f"{path}: not a result of the doctor; give another folder with --out")
    return None if kit_problems(content) else content


# Schema

SCHEMA, VERSION = "mlx-lora-doctor", 1


TOP = fields_of(
    "",
    ("schema", "text", f"`{SCHEMA}`"),
    ("schema_version", "whole", "1"),
    ("created", "text", "local date and time of the start, ISO 8601"),
    ("share", "text", "`full`, or `quick` for the share of a minute"),
    ("finished", "yes/no", "whether every check that was asked for has run"),
    ("key", "mapping", "versions and device that all checks ran with; with others, they run again"),
    ("machine", "mapping", "hardware and operating system"),
    ("device", "mapping", "the device that MLX computes on"),
    ("device.virtual", "yes/no", "whether the GPU is that of a virtual machine"),
    ("software", "mapping", "versions and environment variables"),
    ("peers", "mapping", "versions of packages that training is compared with; null if they are not installed"),
    ("power_before", "mapping", "power and temperature before the first check"),
    ("power_after", "mapping?", "the same after the last check"),
    ("summary", "mapping", "how many findings have each status, and the seconds of all checks"),
    *((f"summary.{status}", "whole", f"findings with this status: {status}") for status in STATUSES),
    ("summary.seconds", "number", "the sum of the checks' seconds"),
    ("checks", "list", "one entry per check, in the order in which they ran"),
)
CHECK = fields_of(
    "",
    ("group", "text", f"one of {', '.join(GROUPS)}"),
    ("name", "text", "unique within its group"),
    ("done", "yes/no", "whether it has ended"),
    ("attempts", "whole", "how often it was begun"),
    ("seconds", "number?", "how long it took; null before its end"),
    ("findings", "list", "what it found"),
)
FINDING = fields_of(
    "",
    ("name", "text", "what was looked at"),
    ("status", "text", f"one of {', '.join(STATUSES)}"),
    ("words", "text", "what was found, in words; for `skipped`, why"),
    ("found", "number?", "the number that was measured"),
    ("wanted", "number?", "its bound, or the number that was expected"),
    ("unit", "text?", "of both"),
    ("advice", "text?", "what to do"),
    ("values", "mapping", "further numbers, by name"),
    ("values.{}", "number", "one of them"),
)


def kit_problems(content: Any) -> list[str]:
    """Return the problems of a result's content, a few words each; empty: it is valid."""
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        return [f'foreign: no "schema": "{SCHEMA}" in it']
    if content.get("schema_version") != VERSION:
        return [f"schema_version is {content.get('schema_version')!r}, not {VERSION}"]
    found = [line for fields in (TOP, MACHINE, DEVICE, SOFTWARE) for line in field_problems(content, fields)]
    for moment in ("power_before", "power_after"):
        if isinstance(content.get(moment), dict):
            found += under(moment, field_problems(content[moment], POWER))
    for number, check in enumerate(content["checks"] if isinstance(content.get("checks"), list) else []):
        found += under(f"checks[{number}]", _check_problems(check))
    return found


def _check_problems(check: Any) -> list[str]:
    problems = list(field_problems(check, CHECK))
    if problems:
        return problems
    if check["group"] not in GROUPS:
        problems.append(f"group is {check['group']!r}, not one of {', '.join(GROUPS)}")
    for number, finding in enumerate(check["findings"]):
        problems += under(f"findings[{number}]", field_problems(finding, FINDING))
        if isinstance(finding, dict) and finding.get("status") not in STATUSES:
            problems.append(f"findings[{number}].status is {finding.get('status')!r}, not one of {', '.join(STATUSES)}")
    return problems


# The page

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
    replace_text(path, page)


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
