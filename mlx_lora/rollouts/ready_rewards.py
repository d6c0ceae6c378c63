"""Rewards by name, such as exact_match or length:200."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_lora.data.task_sets import GYM, gym
from mlx_lora.utils.errors import InputError

ANSWER_COLUMNS = ("answer", "solution", "completion", "output", "response")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ESCAPED_COMMA = re.compile(
    r"(?<!\\)((?:\\\\)*)\\x2c", re.IGNORECASE
)  # \x2c, which is no comma between the numbers of {1,3}
FINAL_MARK = "####"  # before the result in GSM8K's answers
RewardFunction = Callable[..., list[float | None]]
THINKING = re.compile(r"^\s*<think>(?!.*<think>).*?</think>\s*\S.*$", re.DOTALL)


def text_of(completion: Any) -> str:
    """Return a completion's text, given as text or as messages."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def exact_match(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 for an answer that equals the record's own, without white space around it, else 0."""
    return [
        None if right is None else float(text_of(completion).strip() == str(right).strip())
        for completion, right in zip(completions, _right_answers(completions, columns, "exact_match"), strict=True)
    ]


def number_match(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 if an answer's last number is that of the record's own answer, else 0.

    In both, a number after "####" (GSM8K) counts before the last one. Commas in numbers are ignored.
    """
    found = []
    for completion, right in zip(completions, _right_answers(completions, columns, "number_match"), strict=True):
        wanted = _number(str(right)) if right is not None else None
        given = _number(text_of(completion))
        found.append(None if wanted is None else float(given is not None and given == wanted))
    return found


def think_format(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 for one thought in <think> tags, followed by an answer, else 0."""
    return [float(THINKING.match(text_of(completion)) is not None) for completion in completions]


# Rewards with an argument: it is no keyword of theirs, because the data may have a column of any name.


def length(most: int) -> RewardFunction:
    """Return what gives 0 up to `most` tokens, and beyond, minus the share by which an answer is longer."""

    def reward(completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any) -> list:
        return [-max(0, len(tokens) - most) / most for tokens in completion_ids]

    return reward


def matches(pattern: re.Pattern) -> RewardFunction:
    """Return what gives 1 for an answer in which the pattern is found, else 0."""

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [float(pattern.search(text_of(completion)) is not None) for completion in completions]

    return reward


def fits_schema(validator: Any) -> RewardFunction:
    """Return what gives 1 for an answer that is JSON and fits the schema, half for JSON that does not fit, else 0."""

    def score(text: str) -> float:
        try:
            value = json.loads(text)
        except ValueError:
            return 0.0
        return 1.0 if validator.is_valid(value) else 0.5

    def reward(completions: Sequence[Any], **columns: Any) -> list[float | None]:
        return [score(text_of(completion)) for completion in completions]

    return reward


def math_verify(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give 1 for an answer that equals the record's own as mathematics, else 0; None if the record's own is none.

    Both are read by the package math-verify, in LaTeX or as plain expressions.
    """
    library = _math_verify()
    found: list[float | None] = []
    for completion, right in zip(completions, _right_answers(completions, columns, MATH), strict=True):
        # The package's own time limits use the timer that rewards have.
        gold = library.parse(str(right), parsing_timeout=None) if right is not None else []
        given = library.parse(text_of(completion), parsing_timeout=None) if gold else []
        found.append(float(library.verify(gold, given, timeout_seconds=None)) if gold else None)
    return found


def _math_verify() -> Any:
    try:
        return import_module("math_verify")
    except ImportError:
        raise InputError(f"--reward {MATH}: needs math-verify; pip install 'mlx-lora[rewards]'") from None


def gym_score(completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """Give what the package reasoning-gym gives an answer to its task, from 0 to 1."""
    package = gym(f"--reward {GYM}")
    if "metadata" not in columns:
        raise ValueError(f"{GYM} needs the column metadata of --data {GYM}:NAME")
    answers = columns.get("answer") or [None] * len(completions)  # of tasks with many right answers, none is known
    found: list[float | None] = []
    for said, answer, about in zip(completions, answers, columns["metadata"], strict=True):
        if about is None:  # a record of other data
            found.append(None)
            continue
        score, text = package.get_score_answer_fn(about["source_dataset"]), text_of(said).strip()
        # JSON has no tuples, and some tasks compare what they find in an answer with tuples.
        forms = (about, _with_tuples(about))
        found.append(max(float(score(answer=text, entry={"answer": answer, "metadata": form})) for form in forms))
    return found


def _with_tuples(value: Any) -> Any:
    """Return a JSON value with tuples in place of its lists."""
    if isinstance(value, dict):
        return {name: _with_tuples(one) for name, one in value.items()}
    return tuple(map(_with_tuples, value)) if isinstance(value, list) else value


MATH = "math-verify"
PLAIN: dict[str, RewardFunction] = {
    "exact_match": exact_match,
    "number_match": number_match,
    "think_format": think_format,
    MATH: math_verify,
    GYM: gym_score,
}
WITH_ARGUMENT = ("length", "regex", "json_schema")
NAMES = (*PLAIN, "length:N", "regex:PATTERN", "json_schema:FILE")
GIVE = f"a function as FILE.py:FUNCTION, the folder of a reward model, or {', '.join(NAMES)}"


def ready_reward(name: str) -> Callable[..., Any] | None:
    """Return the ready function of a name, such as exact_match or length:200; None if there is none.

    Raises:
        InputError: what follows the colon cannot be used.
    """
    kind, colon, argument = name.partition(":")
    if not colon:
        if kind == MATH:
            _math_verify()  # told before a model is loaded
        if kind == GYM:
            gym(f"--reward {GYM}")
        return PLAIN.get(kind)
    if kind == "length":
        if not argument.isdecimal() or not int(argument):
            raise InputError(f"--reward {name}: write a number of tokens, as in length:200")
        return length(int(argument))
    if kind == "regex":
        try:
            return matches(re.compile(ESCAPED_COMMA.sub(r"\1,", argument), re.DOTALL))
        except re.error as error:
            raise InputError(f"--reward {name}: not a regular expression ({error}); correct it") from None
    return fits_schema(_validator(name, Path(argument))) if kind == "json_schema" else None


def _validator(name: str, file: Path) -> Any:
    try:
        import jsonschema
        from jsonschema.validators import validator_for
    except ImportError:
        raise InputError(f"--reward {name}: needs jsonschema; install it: pip install jsonschema") from None
    try:
        schema = json.loads(file.read_text(encoding="utf-8"))
        kind = validator_for(schema)
        kind.check_schema(schema)
    except (OSError, ValueError, jsonschema.SchemaError) as error:
        raise InputError(f"--reward {name}: {file} holds no JSON schema ({error}); correct it") from None
    return kind(schema)


def _right_answers(completions: Sequence[Any], columns: dict[str, Any], name: str) -> Sequence[Any]:
    """Return the record's own answer for each completion: its first column with one; None where it has none."""
    found = [columns[column] for column in ANSWER_COLUMNS if column in columns]
    if not found:
        raise ValueError(f"{name} needs the right answer in a column of the data: {', '.join(ANSWER_COLUMNS)}")
    return [next((one for one in own if one is not None), None) for own in zip(*found, strict=True)]


def _number(text: str) -> float | None:
    """Return the number after "####", else the last one; None without any."""
    if FINAL_MARK in text:
        text = text.rpartition(FINAL_MARK)[2]
        numbers = NUMBER.findall(text)[:1]
    else:
        numbers = NUMBER.findall(text)[-1:]
    return float(numbers[0].replace(",", "")) if numbers else None
