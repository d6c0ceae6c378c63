"""What a data file holds: records, and rows that cannot be used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_lora.system.parsing import check_value

MAX_LINE_BYTES = 64 * 1024 * 1024  # a longer record means a damaged file


@dataclass(frozen=True)
class Record:
    """One record of a file, and its location.

    Attributes:
        line: the line that it starts on, from 1.
        value: its content.
        unit: what `line` counts: `line`; `row` of a table without lines; or `record` of a JSON file with one line or one
            object.
        without: what was left out of its text, for the report.
        form: what it was made of, if its file has no records; empty: the record's keys tell.
    """

    line: int
    value: dict[str, Any]
    unit: str = "line"
    without: str = ""
    form: str = ""


@dataclass(frozen=True)
class BadRow:
    """A line without a usable record, and the reason; `line` and `unit` as in a Record."""

    line: int
    why: str
    unit: str = "line"


def as_record(number: int, value: Any, unit: str = "line") -> Record | BadRow:
    """Return a value as a record, or as a bad row if it is no object."""
    if not isinstance(value, dict):
        return BadRow(number, f"a JSON {_json_type(value)}, not an object", unit)
    return Record(number, value, unit)


def checked(number: int, value: Any, text: str, unit: str) -> Record | BadRow:
    """Return a value as a record, or as a bad row if it cannot be used; `text` is its JSON."""
    try:
        check_value(value, text)
    except ValueError as error:
        return BadRow(number, f"not usable JSON: {error}", unit)
    return as_record(number, value, unit)


def _json_type(value: Any) -> str:
    names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")
