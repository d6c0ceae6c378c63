"""The records of a data file, and the examples that they become: a conversation, a completion or plain text.

A record that cannot be used is a `BadRow`, or raises a `FormatError` with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mlx_lora.utils.parsing import check_value

Fields = dict[str, Any]
Message = dict[str, Any]
MAX_LINE_BYTES = 64 * 1024 * 1024  # a longer record means a damaged file


# Records


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


# Examples


class FormatError(ValueError):
    """A record cannot be used; the message is the reason, on one line."""


class MissingColumn(FormatError):
    """The record has not all of the columns that its format, or the settings, ask for."""


class EmptyRecord(FormatError):
    """The record has the right keys, but nothing in it to learn from."""


class EmptyPart(EmptyRecord):
    """One of a record's columns, such as its answer, has no text."""


@dataclass(frozen=True)
class Conversation:
    """Turns in OpenAI's format; an assistant's turn with `weight` 0 is only context (its other turns are trained).

    Each message has `role` (one of ROLES) and `content` (a string), and may have `tool_calls` (arguments
    as a dict), `reasoning_content`, `name` and `tool_call_id`.

    Attributes:
        messages: The turns.
        tools: The tools that the model may call, each `{type, function: {name, ...}}`; None: no tools.
        reasoning_field: The record's own name for `reasoning_content`.
        unread: Fields of its messages that are ignored.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    reasoning_field: str = field(default="reasoning_content", compare=False)
    unread: frozenset[str] = field(default=frozenset(), compare=False)


@dataclass(frozen=True)
class Completion:
    """A prompt and the text that follows it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text, with every token trained; `ends` is False for the first part of a text that was cut in two."""

    text: str
    ends: bool = True


Example = Conversation | Completion | Text
