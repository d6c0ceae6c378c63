"""Parse records of the usual instruction formats.

A record becomes a Conversation, a Completion or a Text, or is refused with a FormatError that says
which keys were found and what was expected; the caller adds the line number.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from mlx_lora.data.columns import (
    ANSWER_LISTS,
    PREFERENCE_PAIRS,
    RATING_COLUMNS,
    columns_of,
    question_and_answer,
    usual_names,
)
from mlx_lora.data.examples import (
    Completion,
    Conversation,
    EmptyPart,
    Example,
    Fields,
    FormatError,
    Message,
    MissingColumn,
    Text,
)
from mlx_lora.data.messages import as_list, as_string, conversation, keys_of

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
ANSWERED = ({"prompt", "completion"}, {"messages"}, {"conversations"})  # what a row may have that rates an answer
EXPECTED = {
    "alpaca": "instruction, output (and optionally input, system, history)",
    "sharegpt": "conversations: [{from, value}, ...] (and optionally system, tools)",
    "messages": "messages: [{role, content}, ...] (and optionally tools)",
    "completions": "prompt, completion",
    "text": "text",
}


def parse_record(record: Fields, data_format: str = "auto") -> tuple[str, Example]:
    """Return a record's format and the example that it holds.

    Args:
        record: As read from the file; a value of None counts as absent.
        data_format: `alpaca`, `sharegpt`, `messages`, `completions`, `text`, or `auto` to choose by the keys.

    Returns:
        The format's name, or the names of its columns if they are not those of a format, and the example.

    Raises:
        FormatError: the record does not have that format (EmptyRecord: it has, but there is nothing to train).
    """
    record = {key: value for key, value in record.items() if value is not None}
    if data_format != "auto":
        return data_format, PARSERS[data_format](record)
    _refuse_preference(record)
    name = _format_of(record)
    if name is None:
        return _by_usual_names(record)
    return name, PARSERS[name](record)


def _format_of(record: Fields) -> str | None:
    """Return the name of the format whose keys the record has, None if it has those of none."""
    if "messages" in record:
        return "messages"
    if "conversations" in record or "conversation" in record:
        return "sharegpt"
    if "prompt" in record and "completion" in record:
        return "completions"
    if "instruction" in record and "output" in record:
        return "alpaca"
    return "text" if "text" in record else None  # last: Alpaca's own set repeats each row as one text


def _by_usual_names(record: Fields) -> tuple[str, Example]:
    """Read a record whose columns have other names than those of the formats.

    Raises:
        FormatError: no names are recognized, or the row is meant for preference training.
    """
    plain = usual_names(record)
    _refuse_preference(plain)
    for name in ANSWER_LISTS:
        if isinstance(plain.get(name), list) and all(isinstance(answer, dict) for answer in plain[name]):
            raise FormatError(f"a row with several answers ({name}); train with --objective dpo, orpo, simpo or cpo")
    if name := _format_of(plain):
        return name, PARSERS[name](plain)
    found = question_and_answer(record)
    if found is None:
        raise MissingColumn(
            f"found {columns_of(record)}; name yours: {_column_flags(record)}, or --chat-column, or --text-column"
        )
    columns, example = found
    for pair in PREFERENCE_PAIRS:
        if name := next((name for name in pair if name in plain), None):
            raise FormatError(f"a preference row ({name}); train with --objective dpo, or remove that column")
    _refuse_preference({**plain, "prompt": "", "completion": ""})
    return columns, _alpaca(example)


def _column_flags(record: Fields) -> str:
    """Return the flags that name the columns of question and answer; of two text columns, the first is the question's."""
    names = [shlex.quote(str(name)) for name, value in record.items() if isinstance(value, str)]
    if len(names) == len(record) == 2:
        return f"--prompt-column {names[0]} --completion-column {names[1]}"
    return "--prompt-column and --completion-column"


def _refuse_preference(record: Fields) -> None:
    """Refuse a row that compares or rates answers: as a chat, it would train bad answers as if they were good."""
    for pair in PREFERENCE_PAIRS:
        if record.keys() >= set(pair):
            raise FormatError(
                f"a preference row ({' and '.join(pair)}); train with --objective dpo, orpo, simpo or cpo, or save the "
                f"{pair[0]} answers as prompt and completion"
            )
    for name in RATING_COLUMNS:
        if _is_rating(record.get(name)) and any(record.keys() >= keys for keys in ANSWERED):
            raise FormatError(
                f"a row with a rated answer ({name}: {record[name]}); train with --objective kto, or keep the rows with "
                f"good answers and remove {name}"
            )


def _is_rating(value: object) -> bool:
    """Tell whether a value means good or bad: a bool, 0 or 1, or its text in a CSV file."""
    return str(value).strip().lower() in ("true", "false", "0", "1")


def _alpaca(record: Fields) -> Conversation:
    instruction, output = (
        _need_string(record, "instruction", "alpaca"),
        _need_string(record, "output", "alpaca"),
    )
    given = as_string(record.get("input", ""), "input")
    if not output.strip():
        raise EmptyPart("empty output")
    if not instruction.strip() and not given.strip():
        raise EmptyPart("empty instruction")
    messages = opening(record)
    question = "\n".join(part for part in (instruction, given) if part.strip())
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return Conversation(messages)


def opening(record: Fields) -> list[Message]:
    """Return the turns that a record's columns `system` and `history` give.

    Raises:
        FormatError: one of them is not a text, or not a list of pairs.
    """
    messages: list[Message] = []
    if system := as_string(record.get("system", ""), "system"):
        messages.append({"role": "system", "content": system})
    for pair in as_list(record.get("history", []), "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError("history must be a list of [instruction, output] pairs")
        messages.append({"role": "user", "content": as_string(pair[0], "history")})
        messages.append({"role": "assistant", "content": as_string(pair[1], "history")})
    return messages


def _sharegpt(record: Fields) -> Conversation:
    key = "conversations" if "conversations" in record else "conversation"
    turns = as_list(_need(record, key, "sharegpt"), key)
    if turns and all(isinstance(turn, dict) and "role" in turn and "from" not in turn for turn in turns):
        return conversation(
            turns, record.get("tools"), record.get("system"), record.get("functions")
        )  # OpenAI's turns under this key
    return conversation(sharegpt_messages(turns), record.get("tools"), record.get("system"), record.get("functions"))


def sharegpt_messages(turns: Any) -> list[Message]:
    """Return ShareGPT's turns, {from, value}, as messages.

    Raises:
        FormatError: a turn has other keys, or an unknown speaker.
    """
    messages = []
    for number, turn in enumerate(as_list(turns, "conversations"), 1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise FormatError(f"turn {number} has {keys_of(turn)}; expected from, value")
        name = turn["from"]
        speaker = name.lower() if isinstance(name, str) else ""
        if speaker not in SHAREGPT_ROLES:
            raise FormatError(f"turn {number} is from {name!r}; expected one of {', '.join(SHAREGPT_ROLES)}")
        others = {key: value for key, value in turn.items() if key not in ("from", "value")}
        message: Message = {**others, "role": SHAREGPT_ROLES[speaker], "content": turn["value"]}
        if speaker == "function_call":
            message |= {"content": "", "tool_calls": turn["value"]}
        messages.append(message)
    return messages


def _messages(record: Fields) -> Conversation:
    turns = _need(record, "messages", "messages")
    return conversation(turns, record.get("tools"), None, record.get("functions"))


def _completions(record: Fields) -> Conversation | Completion:
    prompt, completion = _need(record, "prompt", "completions"), _need(record, "completion", "completions")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise EmptyPart("empty completion")
        return Completion(prompt, completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        # TRL's conversational format: only the completion is trained, whatever roles the prompt has.
        context = [{**turn, "weight": 0} if isinstance(turn, dict) else turn for turn in prompt]
        return conversation(context + completion, record.get("tools"), None, record.get("functions"))
    raise FormatError("prompt and completion must both be strings, or both lists of messages")


def _text(record: Fields) -> Text:
    text = _need_string(record, "text", "text")
    if not text.strip():
        raise EmptyPart("empty text")
    return Text(text)


PARSERS: dict[str, Callable[[Fields], Example]] = {
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "messages": _messages,
    "completions": _completions,
    "text": _text,
}


def _need(record: Fields, key: str, name: str) -> object:
    if key not in record:
        raise MissingColumn(f"found {keys_of(record)}; the {name} format requires {EXPECTED[name]}")
    return record[key]


def _need_string(record: Fields, key: str, name: str) -> str:
    return as_string(_need(record, key, name), key)
