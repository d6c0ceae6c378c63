"""Records of the usual instruction formats -> one canonical form.

A record becomes a Conversation, a Completion or a Text, or is refused with a FormatError that says
which keys were found and what was expected; the caller adds the line number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_lora.parsing import parse_json

Record = dict[str, Any]
Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}
EXPECTED = {
    "alpaca": "instruction, output (and optionally input, system, history)",
    "sharegpt": "conversations: [{from, value}, ...] (and optionally system, tools)",
    "messages": "messages: [{role, content}, ...] (and optionally tools)",
    "completions": "prompt, completion",
    "text": "text",
}


class FormatError(ValueError):
    """One record cannot be used; the message is the reason, on one line."""


class EmptyRecord(FormatError):
    """The record has the right keys, but nothing in it to learn from."""


@dataclass(frozen=True)
class Conversation:
    """Turns in OpenAI's shape; a turn's `weight` 0 keeps it as context only (all others are trained).

    Each message has `role` (one of ROLES) and `content` (a string), and may have `tool_calls` (arguments
    as a dict), `reasoning_content`, `name` and `tool_call_id`.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Completion:
    """A prompt and what is to follow it."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Text:
    """Plain text, every token of it trained; `ends` is False for the first part of a text cut in two."""

    text: str
    ends: bool = True


Example = Conversation | Completion | Text


def parse_record(record: Record, data_format: str = "auto") -> tuple[str, Example]:
    """Bring one record into canonical form.

    Args:
        record: As read from the file; None stands for an absent value.
        data_format: `alpaca`, `sharegpt`, `messages`, `completions`, `text`, or `auto` to look at the keys.

    Returns:
        The format's name and the example.

    Raises:
        FormatError: the record does not have that shape (EmptyRecord: it has, with nothing to train).
    """
    record = {key: value for key, value in record.items() if value is not None}
    name = detect_format(record) if data_format == "auto" else data_format
    return name, PARSERS[name](record)


def detect_format(record: Record) -> str:
    """Return the name of the format whose keys the record has."""
    if "messages" in record:
        return "messages"
    if "conversations" in record or "conversation" in record:
        return "sharegpt"
    if "prompt" in record and "completion" in record:
        return "completions"
    if "instruction" in record and "output" in record:
        return "alpaca"
    if "text" in record:  # last: Alpaca's own set repeats each row as one text
        return "text"
    raise FormatError(f"found {_keys(record)}; expected one of: {'; '.join(EXPECTED.values())}")


def _alpaca(record: Record) -> Conversation:
    instruction, output = (
        _need_string(record, "instruction", "alpaca"),
        _need_string(record, "output", "alpaca"),
    )
    given = _string(record.get("input", ""), "input")
    if not output.strip():
        raise EmptyRecord("empty output")
    if not instruction.strip() and not given.strip():
        raise EmptyRecord("empty instruction")
    messages = []
    if system := _string(record.get("system", ""), "system"):
        messages.append({"role": "system", "content": system})
    for pair in _list(record.get("history", []), "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError("history must be a list of [instruction, output] pairs")
        messages.append({"role": "user", "content": _string(pair[0], "history")})
        messages.append({"role": "assistant", "content": _string(pair[1], "history")})
    question = "\n".join(part for part in (instruction, given) if part.strip())
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Conversation(messages)


def _sharegpt(record: Record) -> Conversation:
    key = "conversations" if "conversations" in record else "conversation"
    turns = _list(_need(record, key, "sharegpt"), key)
    if turns and all(isinstance(turn, dict) and "role" in turn and "from" not in turn for turn in turns):
        return _conversation(turns, record.get("tools"), record.get("system"))  # OpenAI's turns under this key
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise FormatError(f"turn {number} has {_keys(turn)}; expected from, value")
        name = turn["from"]
        if not isinstance(name, str) or name not in SHAREGPT_ROLES:
            raise FormatError(f"turn {number} is from {name!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
        message: Message = {"role": SHAREGPT_ROLES[name], "content": turn["value"]}
        if name == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": turn["value"]}
        if "weight" in turn:
            message["weight"] = turn["weight"]
        messages.append(message)
    return _conversation(messages, record.get("tools"), record.get("system"))


def _messages(record: Record) -> Conversation:
    return _conversation(_need(record, "messages", "messages"), record.get("tools"), None)


def _completions(record: Record) -> Conversation | Completion:
    prompt, completion = _need(record, "prompt", "completions"), _need(record, "completion", "completions")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise EmptyRecord("empty completion")
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        # TRL's conversational form: only the completion is trained, whatever roles the prompt holds.
        context = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in prompt]
        return _conversation(context + completion, record.get("tools"), None)
    raise FormatError("prompt and completion must both be strings, or both lists of messages")


def _text(record: Record) -> Text:
    text = _need_string(record, "text", "text")
    if not text.strip():
        raise EmptyRecord("empty text")
    return Text(text)


PARSERS: dict[str, Callable[[Record], Example]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "completions": _completions,
    "text": _text,
}


def _conversation(turns: Any, tools: Any, system: Any) -> Conversation:
    """Check every turn and return the conversation, or raise with the first thing wrong."""
    turns = _list(turns, "messages")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if system is not None and _string(system, "system") and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise EmptyRecord("no assistant turn")
    if all(message.get("weight") == 0 for message in answers):
        raise EmptyRecord("every assistant turn has weight 0")
    return Conversation(messages, _tools(tools))


def _message(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict) or "role" not in turn:
        raise FormatError(f"message {number} has {_keys(turn)}; expected role, content")
    turn = {key: value for key, value in turn.items() if value is not None}
    role = "tool" if turn["role"] == "function" else turn["role"]
    if role not in ROLES:
        raise FormatError(f"message {number} has role {role!r}; expected one of {', '.join(ROLES)}")
    message: Message = {"role": role, "content": _content(turn.get("content", ""), number)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if key in turn:
            message[key] = _string(turn[key], f"message {number}: {key}")
    if turn.get("tool_calls") and role == "assistant":
        message["tool_calls"] = _tool_calls(turn["tool_calls"], number)
    if turn.get("weight", 1) not in (0, 1):
        raise FormatError(f"message {number} has weight {turn['weight']!r}; only 0 and 1 are known")
    if turn.get("weight", 1) == 0:
        message["weight"] = 0
    if role == "assistant" and not message["content"].strip() and "tool_calls" not in message:
        raise EmptyRecord(f"message {number} is an empty assistant turn")
    return message


def _content(content: Any, number: int) -> str:
    """Return a message's text; OpenAI's list of text parts is joined."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type") != "text":
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise FormatError(f"message {number} has a content part of type {kind!r}; only text is trained")
        return "".join(part["text"] for part in content)
    raise FormatError(f"message {number}: content is a {type(content).__name__}, not a string")


def _tool_calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Return calls as `{type, function: {name, arguments: dict}}`, the shape chat templates expect."""
    calls = _parsed(calls, f"message {number}: tool call")
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise FormatError(f"message {number}: a tool call has {_keys(call)}; expected function: name, arguments")
        arguments = function.get("arguments")
        arguments = _parsed({} if arguments in (None, "") else arguments, f"message {number}: arguments")
        if not isinstance(arguments, dict):
            raise FormatError(f"message {number}: a tool call's arguments are no JSON object")
        kept = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**kept, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _tools(tools: Any) -> list[dict[str, Any]] | None:
    tools = _parsed(tools, "tools") if tools else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise FormatError("tools must be a list of objects, or such a list as a JSON string")
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _parsed(value: Any, what: str) -> Any:
    """Return `value`, decoded first when it is JSON in a string (as tables and some sets hold it)."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise FormatError(f"{what} is not valid JSON: {error}") from error


def _list(value: Any, what: str) -> list[Any]:
    value = _parsed(value, what)
    if not isinstance(value, list):
        raise FormatError(f"{what} is a {type(value).__name__}, not a list")
    return value


def _string(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise FormatError(f"{what} is a {type(value).__name__}, not a string")
    return value


def _need(record: Record, key: str, name: str) -> Any:
    if key not in record:
        raise FormatError(f"found {_keys(record)}; the {name} format needs {EXPECTED[name]}")
    return record[key]


def _need_string(record: Record, key: str, name: str) -> str:
    return _string(_need(record, key, name), key)


def _keys(value: Any) -> str:
    if not isinstance(value, dict):
        return f"a {type(value).__name__}"
    return "keys " + ", ".join(str(key) for key in list(value)[:8]) if value else "no keys"
