"""Find the columns of a record, and parse records of the usual instruction formats.

Columns that the settings name are renamed to those of our formats. Without such settings, usual names that are not
ours are recognized in any case: question and answer, Prompt and Response, Dolly's instruction, context and response.

A record becomes a Conversation, a Completion or a Text, or is refused with a FormatError that says
which keys were found and what was expected; the caller adds the line number.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_lora.config.fields import flag_of
from mlx_lora.config.settings import COLUMNS, DataSettings, turn_names
from mlx_lora.data.examples import (
    EmptyRecord,
    Example,
    Fields,
    FormatError,
    Message,
    MissingColumn,
    as_list,
    as_string,
    keys_of,
    parsed,
    tools_of,
)
from mlx_lora.data.forms import forms
from mlx_lora.utils.text import closest, did_you_mean

# A prompt has one of QUESTIONS, or what GIVEN names, or both; an answer has exactly one of ANSWERS.
QUESTIONS = ("prompt", "question", "instruction", "query", "problem")
GIVEN = ("input", "context")
ANSWERS = ("completion", "response", "output", "answer", "solution")
SYSTEM = ("system", "system_prompt")
# A row that has both columns of a pair compares two answers.
PREFERENCE_PAIRS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("chosen_messages", "rejected_messages"),
    ("preferred_output", "non_preferred_output"),
)
# A row with a list of several answers compares them by scores or ranks; one with a rating says whether an answer is good.
ANSWER_LISTS, RATING_COLUMNS = ("completions", "answers"), ("label", "kto_tag")
# What a row has in addition to its prompt and answers, under names of our own.
_COMPARED = tuple(name for pair in PREFERENCE_PAIRS for name in pair)
_BESIDE = (*SYSTEM, "history", "tools", "functions", "chat_template_kwargs", "margin")
_WHOLE = ("messages", "conversations", "conversation", "text")
KEPT = frozenset((*_BESIDE, *RATING_COLUMNS, *ANSWER_LISTS, *_COMPARED))


@dataclass(frozen=True)
class NamedColumns:
    """The columns and the names of turns' fields that the settings give.

    Attributes:
        prompt, completion, system, chat, text: Names of columns; None: not given.
        fields: A turn's field in the data -> ours.
        roles: A role in the data -> ours.
    """

    prompt: str | None = None
    completion: str | None = None
    system: str | None = None
    chat: str | None = None
    text: str | None = None
    fields: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: DataSettings) -> NamedColumns:
        """Return what these settings name."""
        names = {name.removesuffix("_column"): getattr(settings, name) for name in COLUMNS}
        turns = turn_names(settings.turn_names)
        return cls(**names, fields=turns["fields"], roles=turns["roles"])

    def renamed(self, record: Fields, records: str) -> tuple[str | None, Fields]:
        """Return a record under our names, and the names of the columns that it had them in.

        Args:
            record: As read from the file; it is not changed.
            records: `examples`, `pairs`, `rated` or `prompts`: the records that the run trains on.

        Returns:
            The columns in words (None: the settings name none, and the record is as it was), and the record.

        Raises:
            FormatError: the record does not have the columns that the settings name.
        """
        if self.fields or self.roles:
            record = {key: self._turns(key, value) for key, value in record.items()}
        if not any((self.prompt, self.completion, self.system, self.chat, self.text)):
            return None, record
        record = {key: value for key, value in record.items() if value is not None}
        found, used = self._parts(record, records)
        if self.system:
            if self.system not in record:
                raise MissingColumn(not_there(record, "--system-column", self.system))
            found["system"] = _text(record[self.system], self.system)
            used = [self.system, *used]
        kept = {key: value for key, value in record.items() if key in KEPT and key not in used}
        if records == "examples" and "system" in found and "completion" in found:  # as a form that has a system prompt
            system, prompt, completion = found["system"], found["prompt"], found["completion"]
            if isinstance(prompt, str) and isinstance(completion, str):
                found = {"system": system, "instruction": prompt, "output": completion}
            else:
                found = {"prompt": [{"role": "system", "content": system}, *prompt], "completion": completion}
        return " + ".join(used), {**kept, **found}

    def _parts(self, record: Fields, records: str) -> tuple[Fields, list[str]]:
        """Return prompt and completion, or the chat, or the text, and the columns that they were in."""
        if records == "pairs":
            return self._prompt(record) if self.prompt else ({**record}, [])
        if records == "prompts":  # rewards see the other columns
            found, used = self._prompt(record) if self.prompt else ({}, [])
            answer = {"answer": record[self.completion]} if self.completion in record else {}
            return {**record, **answer, **found}, used
        asks_both = bool(self.prompt or self.completion or not (self.chat or self.text))
        if asks_both and (found := self._prompt_and_answer(record, required=not (self.chat or self.text))):
            return found
        if self.chat and self.chat in record:
            return {"conversations": record[self.chat]}, [self.chat]
        if self.text and self.text in record:
            return {"text": _text(record[self.text], self.text)}, [self.text]
        given = [flag_of(name) for name in COLUMNS if getattr(self, name.removesuffix("_column"))]
        name = self.chat or self.text or ""
        raise MissingColumn(
            f"found {columns_of(record, name)}; {' and '.join(given)} name others{did_you_mean(name, map(str, record))}"
        )

    def _prompt_and_answer(self, record: Fields, required: bool) -> tuple[Fields, list[str]] | None:
        """Return prompt and completion with their columns; None if one is not there and not `required`."""
        try:
            prompt, asked = self._prompt(record)
            found = [self.completion] if self.completion else usual_answers(record, asked)
            if self.completion and self.completion not in record:
                raise MissingColumn(not_there(record, "--completion-column", self.completion))
            if len(found) != 1:
                raise MissingColumn(f"found {columns_of(record)}; name the answer's with --completion-column")
        except FormatError:
            if required:
                raise
            return None
        value = record[found[0]]
        value = value if isinstance(value, list) else _text(value, found[0])
        if isinstance(value, str) and not value.strip():
            raise EmptyRecord(are_empty([found[0]]))
        return {**prompt, "completion": value}, [*asked, *found]

    def _prompt(self, record: Fields) -> tuple[Fields, list[str]]:
        if self.prompt:
            names = [self.prompt] if self.prompt in record else [name.strip() for name in self.prompt.split(",")]
        else:
            names = usual_question(record, without=(self.completion, self.system))
        if missing := [name for name in names if name not in record]:
            raise MissingColumn(not_there(record, "--prompt-column", *missing))
        if not names:
            raise MissingColumn(f"found {columns_of(record)}; name the prompt's with --prompt-column")
        if len(names) == 1 and isinstance(record[names[0]], list):
            return {"prompt": record[names[0]]}, names
        return {"prompt": joined_parts(record, names)}, names

    def _turns(self, name: str, value: Any) -> Any:
        """Return a list of turns with our names of fields and roles; anything else as it is."""
        if name == self.chat or (name in ("messages", "conversations") and isinstance(value, str)):
            value = parsed(value, name)
        if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
            return value
        turns = [{self.fields.get(key, key): part for key, part in turn.items()} for turn in value]
        for turn in turns:
            for key in ("role", "from"):
                if isinstance(turn.get(key), str):
                    turn[key] = self.roles.get(turn[key], turn[key])
        return turns


def without_names(settings: DataSettings) -> DataSettings:
    """Return the settings for other data than that whose format, columns and turns they name."""
    return replace(settings, data_format="auto", turn_names=None, speaker=None, **dict.fromkeys(COLUMNS))


def usual_names(record: Fields) -> Fields:
    """Return a record with its columns' names in lower case, with `_` for spaces; as it is if two become one."""
    names = {key: _plain(key) for key in record}
    if len(set(names.values())) < len(names):
        return record
    return {names[key]: value for key, value in record.items()}


def _plain(name: str) -> str:
    return "_".join(str(name).lower().replace("-", " ").split())


def usual_question(record: Fields, without: tuple[str | None, ...] = ()) -> list[str]:
    """Return the columns that make up the prompt by their names; none if it is not clear."""
    questions = [name for name in record if _plain(name) in QUESTIONS and name not in without]
    given = [name for name in record if _plain(name) in GIVEN and name not in without]
    return [] if len(questions) > 1 else [*questions, *given]


def usual_answers(record: Fields, without: list[str]) -> list[str]:
    """Return the columns that are answers by their names."""
    return [name for name in record if _plain(name) in ANSWERS and name not in without]


def question_and_answer(record: Fields) -> tuple[str, Fields] | None:
    """Return a question and its answer by the usual names, as an Alpaca record; None if they are not clear.

    Args:
        record: Without absent values.

    Returns:
        The columns in words, and `instruction`, `output` and maybe `system` and `history`.
    """
    asked, answers = usual_question(record), usual_answers(record, [])
    if not asked or len(answers) != 1:
        return None
    found = {"instruction": joined_parts(record, asked), "output": _text(record[answers[0]], answers[0])}
    system = [name for name in record if _plain(name) in SYSTEM and record[name] != ""][:1]
    for name in system:
        found["system"] = _text(record[name], name)
    if "history" in record:
        found["history"] = record["history"]
    return " + ".join([*system, *asked, *answers]), found


def has_question_and_answer(record: Fields) -> bool:
    """Tell whether a record has one question and one answer with content under the usual names."""
    asked, answers = usual_question(record), usual_answers(record, [])
    if len(answers) != 1 or not any(_plain(name) in QUESTIONS for name in asked):
        return False
    cells = [record[name] for name in (*asked, *answers)]
    return all(isinstance(cell, str) for cell in cells) and bool(cells[-1].strip()) and any(map(str.strip, cells[:-1]))


def joined_parts(record: Fields, names: list[str]) -> str:
    """Return the texts of some columns, each that is not empty on lines of its own."""
    texts = [_text(record[name], name) for name in names]
    return "\n".join(text for text in texts if text.strip())


def empty_cells(record: Fields, settings: DataSettings) -> list[str]:
    """Return the columns of a prompt, an answer, a chat or a text whose cell is absent or blank."""
    blank = {key for key, value in record.items() if value is None or (isinstance(value, str) and not value.strip())}
    named = {name.strip() for column in COLUMNS for name in (getattr(settings, column) or "").split(",")}
    usual = {*QUESTIONS, *ANSWERS, *_WHOLE, *_COMPARED}
    # Beside a question, which may be the empty one, these may be empty.
    usual |= set() if any(_plain(key) in QUESTIONS for key in record) else set(GIVEN)
    return [key for key in record if key in blank and (key in named or _plain(key) in usual)]


def are_empty(cells: list[str]) -> str:
    """Return that these columns of a row are empty, and what to do."""
    if cells[1:]:
        return f"the cells {' and '.join(cells)} are empty; fill them in, or remove the row"
    return f"the cell {cells[0]} is empty; fill it in, or remove the row"


def ignored_columns(record: Fields, kind: str) -> list[str]:
    """Return the columns of a plain example that have content and are not read.

    Args:
        record: As in the file.
        kind: The format, or the names of the columns, that it was read by.
    """
    read = forms()[kind].columns if kind in forms() else {*map(_plain, kind.split(" + ")), *SYSTEM, "history"}
    return [
        key
        for key, value in record.items()
        if value not in (None, "", [], {})
        and ((name := _plain(key)) not in read or not fits(name, value))
        and not is_id(name)
    ]


def fits(name: str, value: Any) -> bool:
    """Tell whether a column beside prompts and answers has what its name says: a system text, a history, tools."""
    try:
        if name in SYSTEM:
            return isinstance(value, str)
        if name == "history":
            return all(isinstance(pair, list) and len(pair) == 2 for pair in as_list(value or [], name))
        if name in ("tools", "functions"):
            tools_of(value)
    except FormatError:
        return False
    return True


def fitting(record: Fields) -> Fields:
    """Return a record without the columns beside its prompt and answer that are something else."""
    return {name: value for name, value in record.items() if fits(name, value)}


def is_id(name: str) -> bool:
    """Tell whether a column, in lower case, numbers or names a row and tells nothing about it."""
    return name in ("id", "idx", "index", "uuid", "row", "row_idx", "__index_level_0__") or name.endswith("_id")


def not_there(record: Fields, flag: str, *names: str) -> str:
    """Return that a record does not have the columns that a flag names, with those it has, the most similar first."""
    hint = did_you_mean(names[0], map(str, record))
    return f"found {columns_of(record, names[0])}; {flag} {', '.join(names)} is not there{hint}"


def columns_of(record: Fields, near: str = "") -> str:
    """Return the names of a record's columns in words, for an error; those similar to `near` come first."""
    names = [str(name) for name in record]
    first = closest(near, names, most=3)
    names = [name[:40] for name in [*first, *(name for name in names if name not in first)]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"columns {', '.join(names[:8])}{more}" if names else "no columns"


def _text(value: Any, name: str) -> str:
    """Return a cell as text; a number is written as JSON has it."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise FormatError(f"{name} is a {type(value).__name__}, not a string")
    return str(value)


# Columns
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
# What a row may have that rates an answer.
ANSWERED = ({"prompt", "completion"}, {"instruction", "output"}, {"messages"}, {"conversations"}, {"conversation"})


def parse_record(record: Fields, data_format: str = "auto") -> tuple[str, Example]:
    """Return a record's format and the example that it holds.

    Args:
        record: As read from the file; a value of None counts as absent.
        data_format: one of `forms()`, or `auto` to choose by the keys.

    Returns:
        The format's name, or the names of its columns if they are not those of a format, and the example.

    Raises:
        FormatError: the record does not have that format (EmptyRecord: it has, but there is nothing to train).
    """
    record = {key: value for key, value in record.items() if value is not None}
    if data_format != "auto":
        return data_format, forms()[data_format].parse(record)
    _refuse_preference(record)
    name = next((name for name, form in forms().items() if form.fits(record)), None)
    return _by_usual_names(record) if name is None else (name, forms()[name].parse(record))


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
    if name := next((name for name, form in forms().items() if form.fits(plain)), None):
        return name, forms()[name].parse(plain)
    found = question_and_answer(record)
    if found is None:
        names = [shlex.quote(str(name)) for name, value in record.items() if isinstance(value, str)]
        both = len(names) == len(record) == 2  # of two columns of text, the first is the question's
        flags = [f"--{kind}-column" for kind in ("prompt", "completion")]
        first, second = map(" ".join, zip(flags, names, strict=True)) if both else flags
        raise MissingColumn(
            f"found {columns_of(record)}; name yours: {first} {second if both else f'and {second}'}, or --chat-column, or "
            "--text-column, or rename them to prompt and completion"
        )
    columns, example = found
    for pair in PREFERENCE_PAIRS:
        if name := next((name for name in pair if name in plain), None):
            raise FormatError(f"a preference row ({name}); train with --objective dpo, or remove that column")
    _refuse_preference({**plain, "prompt": "", "completion": ""})
    return columns, forms()["alpaca"].parse(example)


def _refuse_preference(record: Fields) -> None:
    """Refuse a row that compares or rates answers: as a chat, it would train bad answers as if they were good."""
    for pair in PREFERENCE_PAIRS:
        if record.keys() >= set(pair):
            raise FormatError(
                f"a preference row ({' and '.join(pair)}); train with --objective dpo, orpo, simpo or cpo, or save the "
                f"{pair[0]} answers as prompt and completion"
            )
    for name in RATING_COLUMNS:
        rating = str(record.get(name)).strip().lower()  # a bool, 0 or 1, or its text in a CSV file
        if rating in ("true", "false", "0", "1") and any(record.keys() >= keys for keys in ANSWERED):
            raise FormatError(
                f"a row with a rated answer ({name}: {record[name]}); train with --objective kto, or keep the rows with "
                f"good answers and remove {name}"
            )


def opening(record: Fields) -> list[Message]:
    """Return the turns that a record's columns `system` (or `system_prompt`) and `history` give.

    Raises:
        FormatError: one of them is not a text, or not a list of pairs.
    """
    messages: list[Message] = []
    if system := system_text(record):
        messages.append({"role": "system", "content": system})
    for pair in as_list(record.get("history") or [], "history"):
        if not isinstance(pair, list) or len(pair) != 2:
            raise FormatError("history must be a list of [instruction, output] pairs")
        messages.append({"role": "user", "content": as_string(pair[0], "history")})
        messages.append({"role": "assistant", "content": as_string(pair[1], "history")})
    return messages


def opened(record: Fields, turns: list[Any]) -> list[Any]:
    """Return turns after those that their record's columns give, or as they are if they begin with a system text."""
    first = turns[0] if turns else None
    own = isinstance(first, dict) and first.get("role") in ("system", "developer")
    return turns if own else [*opening(record), *turns]


def system_text(record: Fields) -> str:
    """Return the system text that a record has in a column of its own; empty if it has none.

    Raises:
        FormatError: it is not a text.
    """
    return next((text for name in SYSTEM if (text := as_string(record.get(name) or "", name)).strip()), "")


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
