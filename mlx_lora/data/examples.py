"""The records of a data file, the examples that they become, and the conversion of their turns to OpenAI's format.

An example is a conversation, a completion or plain text. A record that cannot be used is a `BadRow`, or raises a
`FormatError` with the reason. Three things have several names in data sets, and one here:

- the thinking before an answer: `reasoning_content` (Qwen, DeepSeek), `thinking` (GPT-OSS), `reasoning` (vLLM, Gemma),
  a content part of type `thinking`, or harmony's message of `channel: analysis`;
- a call: `tool_calls`, OpenAI's older `function_call`, or harmony's `channel: commentary` with a `recipient`;
- the result of a call: role `tool` or `function`, identified by an id, by a name, or only by its position.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlx_lora.utils.parsing import check_value, parse_json

Fields = dict[str, Any]
Message = dict[str, Any]
MAX_LINE_BYTES = 64 * 1024 * 1024  # a longer record means a damaged file
MOST_CHARACTERS = 16_000_000  # of a text: the tokenizer needs 150 to 450 bytes of memory for each


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
        names = {list: "list", str: "string", bool: "boolean", int: "number", float: "number"}
        return BadRow(number, f"a JSON {names.get(type(value), 'null')}, not an object", unit)
    return Record(number, value, unit)


def checked(number: int, value: Any, text: str, unit: str) -> Record | BadRow:
    """Return a value as a record, or as a bad row if it cannot be used; `text` is its JSON."""
    try:
        check_value(value, text)
    except ValueError as error:
        return BadRow(number, f"not usable JSON: {error}", unit)
    return as_record(number, value, unit)


# Examples


class FormatError(ValueError):
    """A record cannot be used; the message is the reason, on one line."""


class MissingColumn(FormatError):
    """The record has not all of the columns that its format, or the settings, ask for."""


def tokenizable(text: str) -> str:
    """Return a text; FormatError if it is too long for the tokenizer."""
    if len(text) > MOST_CHARACTERS:
        raise FormatError(f"a text of {len(text):,} characters, the most is {MOST_CHARACTERS:,}; divide it")
    return text


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
    """Plain text, with every token trained; `ends` is False for the first part of a text that was cut in two.

    `pair` has the two texts that it was made of, for a tokenizer that has a form for pairs (data/labeled.py).
    """

    text: str
    ends: bool = True
    pair: tuple[str, str] | None = None


Example = Conversation | Completion | Text


def as_conversation(example: Conversation | Completion) -> Conversation:
    """Return an example as turns."""
    if isinstance(example, Conversation):
        return example
    asked, answer = {"role": "user", "content": example.prompt}, {"role": "assistant", "content": example.completion}
    return Conversation([asked, answer])


class OwnEntry(ABC):
    """A record that is read and encoded by a class of its own, beside the formats of imitation: a row of `OWN_ENTRIES`.

    Attributes:
        optional: matches the names of columns whose empty cells in a table say nothing; None: all cells count.
    """

    optional: ClassVar[re.Pattern[str] | None] = None

    @property
    @abstractmethod
    def shown(self) -> Example:
        """The example by which records are compared, and which is shown."""

    @classmethod
    @abstractmethod
    def parse(cls, record: Fields, settings: Any) -> OwnEntry:
        """Read one record as the settings of the data say.

        Raises:
            FormatError: it cannot be used.
        """

    @classmethod
    @abstractmethod
    def encode(cls, encoder: Any, entries: Sequence[Any], on_rows: Callable[[int], None]) -> Any:
        """Encode entries of this class as `Encoder.encode` does (data/tokenize.py); `on_rows` is called with the number done."""


# Messages
ROLES = ("system", "developer", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
CHANNELS = ("analysis", "commentary", "final")
READ = frozenset(["role", "content", "name", "tool_call_id", "weight"])
READ_OF_ASSISTANT = READ | {*REASONING, "tool_calls", "function_call", "channel", "recipient"}


def conversation(turns: Any, tools: Any, system: Any, functions: Any = None) -> Conversation:
    """Check every turn and return the conversation.

    Args:
        turns: A list of messages, or such a list as JSON text.
        tools: The tools that the model may call: a list of objects, or such a list as JSON text; None: no tools.
        system: A system text from outside of the turns, or None.
        functions: OpenAI's older name of `tools`.

    Raises:
        FormatError: with the first thing that is wrong (EmptyRecord: there is nothing to train).
    """
    turns = as_list(turns, "messages")
    messages = _joined([_message(turn, number) for number, turn in enumerate(turns, 1)])
    if (
        system is not None
        and as_string(system, "system")
        and not (messages and messages[0]["role"] in ("system", "developer"))
    ):
        messages.insert(0, {"role": "system", "content": system})
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise EmptyRecord("no assistant turn")
    if all(message.get("weight") == 0 for message in answers):
        raise EmptyRecord("every assistant turn has weight 0")
    _name_results(messages)
    named = (name for turn in turns for name in REASONING if turn.get(name))
    return Conversation(messages, tools_of(tools or functions), next(named, REASONING[0]), _unread(turns))


def usual_role(role: Any) -> Any:
    """Return a role in lower case if it is one of ours in another one (`User`), anything else as it is."""
    plain = role.strip().lower() if isinstance(role, str) else role
    return plain if isinstance(role, str) and plain in (*ROLES, "function") else role


def _unread(turns: list[dict[str, Any]]) -> frozenset[str]:
    """Return the names of fields that have content but are ignored."""
    found = set()
    for turn in turns:
        known = READ_OF_ASSISTANT if usual_role(turn["role"]) == "assistant" else READ
        found |= {str(key) for key, value in turn.items() if key not in known and value not in (None, "", [], {})}
    return frozenset(found)


def _message(turn: Any, number: int) -> Message:
    """Return one turn in OpenAI's format; an assistant's turn may still have `channel` and `recipient`."""
    if not isinstance(turn, dict) or turn.get("role") is None:
        raise FormatError(f"message {number} has {keys_of(turn)}; expected role, content")
    turn = {key: value for key, value in turn.items() if value is not None}
    role = usual_role(turn["role"])
    role = "tool" if role == "function" else role
    if role not in ROLES:
        raise FormatError(f"message {number} has role {role!r}; expected one of {', '.join(ROLES)}")
    content, thought = _content(turn.get("content", ""), number)
    message: Message = {"role": role, "content": content}
    for key in ("name", "tool_call_id"):
        if key in turn:
            message[key] = as_string(turn[key], f"message {number}: {key}")
    if turn.get("weight", 1) not in (0, 1):
        raise FormatError(f"message {number} has weight {turn['weight']!r}; only 0 and 1 are allowed")
    if turn.get("weight", 1) == 0:
        message["weight"] = 0
    if role == "assistant":
        message |= _assistants_own(turn, thought, number)
        if not content.strip() and not message.keys() & {"tool_calls", "channel"}:
            raise EmptyRecord(f"message {number} is an empty assistant turn")
    return message


def _assistants_own(turn: dict[str, Any], thought: str, number: int) -> Message:
    """Return the fields that only an assistant's turn has: thinking, calls, a harmony channel."""
    found: Message = {}
    if reasoning := _reasoning(turn, thought, number):
        found["reasoning_content"] = reasoning
    if calls := turn.get("tool_calls") or turn.get("function_call"):
        found["tool_calls"] = _tool_calls(calls, number)
    channel = turn.get("channel")
    if channel and channel not in CHANNELS:
        raise FormatError(f"message {number} has channel {channel!r}; expected one of {', '.join(CHANNELS)}")
    if channel:
        recipient = as_string(turn.get("recipient", ""), f"message {number}: recipient")
        found |= {"channel": channel, "recipient": recipient}
    return found


def _reasoning(turn: dict[str, Any], thought: str, number: int) -> str:
    """Return a turn's thinking under any of its names; equal copies under several names count once."""
    found = {name: as_string(turn[name], f"message {number}: {name}") for name in REASONING if name in turn}
    found = {"a content part": thought, **found}
    found = {name: text for name, text in found.items() if text.strip()}
    if len(set(found.values())) > 1:
        raise FormatError(f"message {number} has {' and '.join(found)}, and they differ; keep one of them")
    return next(iter(found.values()), "")


def _joined(messages: list[Message]) -> list[Message]:
    """Return the turns, with harmony's messages of one turn (analysis, then commentary or final) joined."""
    found: list[Message] = []
    thoughts: list[str] = []
    preamble = ""
    for number, message in enumerate(messages, 1):
        channel, recipient = message.pop("channel", None), message.pop("recipient", "")
        if message["role"] != "assistant" and (thoughts or preamble):
            break
        if channel == "analysis" and not recipient:
            thoughts.append(message["content"])
            continue
        if recipient and "tool_calls" not in message:
            name = recipient.removeprefix("functions.")
            call = {"name": name, "arguments": message["content"]}
            message |= {"content": preamble, "tool_calls": _tool_calls(call, number)}
            preamble = ""
        elif channel == "commentary" and "tool_calls" not in message:
            preamble = message["content"]
            continue
        if preamble:
            break
        if thoughts and "reasoning_content" not in message:
            message["reasoning_content"] = "\n".join(thoughts)
        thoughts = []
        if channel and not message["content"].strip() and "tool_calls" not in message:
            raise EmptyRecord(f"message {number} is an empty assistant turn")
        found.append(message)
    if thoughts or preamble:
        raise FormatError("a message of channel analysis or commentary is followed by no answer and no call")
    return found


def _name_results(messages: list[Message]) -> None:
    """Give each call's result the call's name, found by its id or else by its position among the results."""
    waiting: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "assistant":
            waiting = list(message.get("tool_calls", []))
        elif message["role"] == "tool":
            call = call_of(message, waiting)
            if call is not None:
                waiting.remove(call)
                message.setdefault("name", call["function"]["name"])
            message["name"] = message["name"].removeprefix("functions.") if "name" in message else ""
            if not message["name"]:
                del message["name"]


def call_of(result: Message, waiting: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the call that a tool's message answers: that with its id or its name, or the first; None if none waits."""
    for ours, theirs in (
        ("tool_call_id", lambda call: call.get("id")),
        ("name", lambda call: call["function"]["name"]),
    ):
        for call in waiting:
            if ours in result and theirs(call) == result[ours]:
                return call
    return waiting[0] if waiting else None


def _content(content: Any, number: int) -> tuple[str, str]:
    """Return a message's text and its thinking; a list of text parts is joined."""
    if isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise FormatError(f"message {number}: content is a {type(content).__name__}, not a string")
    texts: dict[str, list[str]] = {"text": [], "thinking": []}
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        # LLaMA-Factory's v1 files call the text of every part its value.
        value = part.get(kind, part.get("value")) if isinstance(part, dict) and kind in texts else None
        if isinstance(value, list):  # Mistral's thinking is itself a list of text parts
            value = _content(value, number)[0]
        if not isinstance(value, str):
            seen = "; a vision-language model takes questions with pictures" if "image" in str(kind) else ""
            raise FormatError(f"message {number} has a content part of type {kind!r}; only text is trained{seen}")
        texts[str(kind)].append(value)
    return "".join(texts["text"]), "".join(texts["thinking"])


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return calls as `{type, function: {name, arguments: dict}}`, as chat templates expect them."""
    calls = parsed(calls, f"message {number}: tool call")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FormatError(f"message {number}: a tool call has {keys_of(call)}; expected function: name, arguments")
        arguments = function.get("arguments")
        arguments = parsed({} if arguments in (None, "") else arguments, f"message {number}: arguments")
        if not isinstance(arguments, dict):
            raise FormatError(f"message {number}: a tool call's arguments are not a JSON object")
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def tools_of(tools: Any) -> list[dict[str, Any]] | None:
    """Return tools, or such a list as JSON text, each as `{type, function: {name, ...}}`; None if there are none."""
    tools = parsed(tools, "tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise FormatError("tools must be a list of objects, or such a list as a JSON string")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def parsed(value: Any, what: str) -> Any:
    """Return `value`, decoded if it is a string of JSON, as in tables and some data sets."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON: {error}") from error


def as_list(value: Any, what: str) -> list[Any]:
    """Return `value` as a list, decoded if it is JSON text."""
    value = parsed(value, what)
    if not isinstance(value, list):
        raise FormatError(f"{what} is a {type(value).__name__}, not a list")
    return value


def as_string(value: Any, what: str) -> str:
    """Return `value` if it is a string, otherwise raise."""
    if not isinstance(value, str):
        raise FormatError(f"{what} is a {type(value).__name__}, not a string")
    return value


def keys_of(value: Any) -> str:
    """Return the keys of an object in words, for an error."""
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    return "keys " + ", ".join(str(key) for key in list(value)[:8]) if value else "no keys"


def number_of(value: Any) -> float | None:
    """Return a number, also one that a table has as text; None: it is none, or not finite."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
