"""The schema of the kit's result file, version 1, checked by the same code as the results of `bench`."""

from __future__ import annotations

from typing import Any

from mlx_lora.owner_kit.kit_check import GROUPS, STATUSES
from mlx_lora.suite.schema import DEVICE, MACHINE, POWER, SOFTWARE, Field, field_problems, under

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
