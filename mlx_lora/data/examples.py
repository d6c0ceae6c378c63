"""The types that a record is turned into: a conversation, a completion or plain text, or an error with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Record = dict[str, Any]
Message = dict[str, Any]


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
