"""Keep the result file of the kit, which is written after each check, so that a second call goes on from where one ended.

A check that was begun and never ended has taken the process with it, or someone killed the process meanwhile. It is tried
once more; if it does not end then either, that is its finding, and the kit goes on with the next one.

The file has a schema, version 1, which is checked by the same code as the results of `bench`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_lora.bench.schema import DEVICE, MACHINE, POWER, SOFTWARE, Field, field_problems, under
from mlx_lora.doctor.check import GROUPS, LARGEST, STATUSES, CheckFinding, KitCheck
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replacing_file

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
        for entry in self.content["checks"]:
            if (entry["group"], entry["name"]) == (check.group, check.name):
                return entry
        return None

    def is_done(self, check: KitCheck) -> bool:
        """Return whether a check has ended."""
        entry = self.entry(check)
        return entry is not None and entry["done"]

    def begin(self, check: KitCheck) -> int:
        """Note that a check begins, and return how often it was begun before and did not end."""
        entry = self.entry(check)
        if entry is None:
            entry = {
                "group": check.group, "name": check.name, "done": False, "attempts": 0, "seconds": None, "findings": [],
            }  # fmt: skip
            self.content["checks"].append(entry)
        before = entry["attempts"]
        entry["attempts"] += 1
        self.write()
        return before

    def take_back(self, check: KitCheck) -> None:
        """Forget that a check was begun, because the user interrupted it."""
        entry = self.entry(check)
        if entry is not None:
            entry["attempts"] -= 1
            self.write()

    def end(self, check: KitCheck, findings: Sequence[CheckFinding], seconds: float) -> None:
        """Keep what a check found."""
        entry = self.entry(check)
        assert entry is not None
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
        with replacing_file(self.path) as temporary:
            text = json.dumps(self.content, indent=1, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")


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


def _fields(*rows: tuple[str, str, str]) -> tuple[Field, ...]:
    """Return fields; a `?` after the kind allows null."""
    return tuple(Field(path, kind.rstrip("?"), text, kind.endswith("?")) for path, kind, text in rows)


TOP = _fields(
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
CHECK = _fields(
    ("group", "text", f"one of {', '.join(GROUPS)}"),
    ("name", "text", "unique within its group"),
    ("done", "yes/no", "whether it has ended"),
    ("attempts", "whole", "how often it was begun"),
    ("seconds", "number?", "how long it took; null before its end"),
    ("findings", "list", "what it found"),
)
FINDING = _fields(
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
