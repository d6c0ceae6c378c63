"""Score answers to a user's rows: metrics by name, and functions of a user's file.

    exact_match      the answer is the expected one, but for white space around it
    number_match     its last number is that of the expected answer
    json             it is valid JSON
    json_schema:FILE it is JSON that fits a schema
    regex:PATTERN    the pattern is found in it
    rouge_l          the longest common subsequence of words, as F1
    tool_calls       it makes the expected calls: names, arguments, order
    math-verify      it equals the expected answer as mathematics
    FILE.py:NAME     a function with the signature of a reward: def NAME(prompts, completions, **columns)

A metric gives each answer a number, or None where a row has nothing to compare with; such rows are left out and counted.
All of them that rewards have too are the functions of rewards (rollouts/rewards.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from mlx_lora.rollouts.rewards import ANSWER_COLUMNS, MATH, PLAIN, TrainerState, call_reward, problem_of, ready_reward
from mlx_lora.rollouts.tools import Said
from mlx_lora.rollouts.user_code import FAILURES, from_file, one_line
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.text import closest

WORD = re.compile(r"[^\W_]+")
TOOLS = "tool_calls"
OWN = ("json", "rouge_l", TOOLS)
READY = ("exact_match", "number_match", MATH)
NAMES = (*READY[:2], *OWN, MATH, "regex:PATTERN", "json_schema:FILE")
GIVE = f"give {', '.join(NAMES)}, or a function as FILE.py:NAME"


@dataclass(frozen=True)
class AskedRow:
    """A row of a user's data that models answer.

    Attributes:
        prompt: text or messages, as rewards see it.
        chat: whether the prompt is messages.
        columns: of the record; `answer` is the expected one, if it has one.
        calls: of tools that are expected, None for a row without tools.
        tools: schemas that the prompt shows.
    """

    prompt: Any
    chat: bool
    columns: Mapping[str, Any]
    calls: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True)
class ModelAnswer:
    """What a model wrote: the text as a person reads it, its tokens, and its calls of tools."""

    text: str
    tokens: tuple[int, ...]
    said: Said


Values = dict[str, list[float | None]]
"""Name of a metric -> a value for each row, None where a row has nothing to compare with."""


@dataclass(frozen=True)
class Metric:
    """A metric by its name, which may give several numbers.

    Attributes:
        name: as it was asked for.
        of: takes it.
        applies: whether a row has what it compares with.
    """

    name: str
    of: Callable[[Sequence[AskedRow], Sequence[ModelAnswer]], Values]
    applies: Callable[[AskedRow], bool] = lambda row: True


def expected_of(row: AskedRow) -> Any:
    """Return a row's expected answer, None if it has none."""
    return next((row.columns[name] for name in ANSWER_COLUMNS if row.columns.get(name) is not None), None)


def _has_answer(row: AskedRow) -> bool:
    return expected_of(row) is not None


def metric_of(name: str) -> Metric:
    """Return the metric of a name.

    Raises:
        InputError: there is none, or its file cannot be used.
    """
    if name == TOOLS:
        return Metric(name, tool_call_values, lambda row: row.calls is not None or bool(row.tools))
    if name == "json":
        return Metric(name, lambda rows, answers: {name: [_valid_json(answer.text) for answer in answers]})
    if name == "rouge_l":
        return Metric(name, _rouge_values, _has_answer)
    path, colon, called = name.rpartition(":")
    if colon and path.endswith(".py"):
        return Metric(called, partial(_function_values, called, name, from_file("--metric", name, "function")))
    kind = name.partition(":")[0]
    if name in READY or (kind in ("regex", "json_schema") and name != kind):
        function = ready_reward(name, "--metric")
        of = partial(_function_values, name, name, function)
        return Metric(name, of, _has_answer) if name in READY else Metric(name, of)
    near = closest(name, [*READY, *OWN])
    raise InputError(f"--metric {name}: {f'did you mean {near[0]}?' if near else 'no such metric;'} {GIVE}")


def _function_values(
    shown: str, name: str, function: Any, rows: Sequence[AskedRow], answers: Sequence[ModelAnswer]
) -> Values:
    """Return the values of a function with the signature of a reward.

    Args:
        shown: name of the metric.
        name: as it was asked for.
        function: to call.
        rows, answers: to take it of.
    """
    names = dict.fromkeys(key for row in rows for key in row.columns)
    columns = {key: [row.columns.get(key) for row in rows] for key in names}
    for key in ("prompt", "completion", "prompts", "completions", "completion_ids"):
        columns.pop(key, None)
    completions = [
        [answer.said.message] if row.chat else answer.text for row, answer in zip(rows, answers, strict=True)
    ]
    arguments = {
        **columns, "prompts": [row.prompt for row in rows], "completions": completions,
        "completion_ids": [list(answer.tokens) for answer in answers],
    }  # fmt: skip
    try:
        found = call_reward(function, arguments, TrainerState())
    except InputError:
        raise
    except FAILURES as error:  # a user's code may raise anything
        if name in PLAIN:  # of ours, which says what its rows lack
            raise InputError(f"--metric {name}: {one_line(error).partition(': ')[2]}") from error
        raise RunError(f"--metric {name} failed ({one_line(error)}); correct it") from error
    if len(found) != len(rows):
        raise RunError(f"--metric {name} gave {len(found)} values for {len(rows)} answers; correct it")
    for value in found:
        if problem := problem_of(value):
            raise RunError(f"--metric {name} gave {problem} for an answer; correct it")
    return {shown: [None if value is None else float(value) for value in found]}


def _valid_json(text: str) -> float:
    try:
        json.loads(text)
    except ValueError:
        return 0.0
    return 1.0


def _rouge_values(rows: Sequence[AskedRow], answers: Sequence[ModelAnswer]) -> Values:
    expected = [expected_of(row) for row in rows]
    pairs = zip(expected, answers, strict=True)
    return {"rouge_l": [None if right is None else rouge_l(str(right), answer.text) for right, answer in pairs]}


def rouge_l(expected: str, said: str) -> float:
    """Return ROUGE-L's F1 of two texts, of words in lower case without stemming, as the package rouge-score computes it.

    Words are runs of letters and digits of any script, where that package has a to z only.

    Source: Lin, ROUGE (2004), section 3.
    """
    first, second = WORD.findall(expected.lower()), WORD.findall(said.lower())
    if not first or not second:
        return 0.0
    before = [0] * (len(second) + 1)
    for word in first:
        now = [0]
        for column, other in enumerate(second):
            now.append(before[column] + 1 if word == other else max(before[column + 1], now[-1]))
        before = now
    common = before[-1]
    return 2 * common / (len(first) + len(second))


# Calls of tools


def tool_call_values(rows: Sequence[AskedRow], answers: Sequence[ModelAnswer]) -> Values:
    """Return how far the calls of answers are the expected ones.

    `tool_calls`: all calls are right, in the expected order, and there is no other; a row that expects none wants none.
    `tool_names`: the names are right, in order. `tool_arguments`: the share of expected calls whose arguments are right, among
    rows that expect calls. `tool_schema`: every call is of a tool that the row shows, with arguments that its schema allows,
    among rows in which the model called any.
    """
    found: Values = {TOOLS: [], "tool_names": [], "tool_arguments": [], "tool_schema": []}
    for row, answer in zip(rows, answers, strict=True):
        made = [(str(call["name"]), call["arguments"]) for call in answer.said.calls]
        schemas = {tool.get("function", tool).get("name"): tool.get("function", tool) for tool in row.tools}
        fits = None
        if made and schemas:
            fits = float(all(name in schemas and _fits(schemas[name], own) for name, own in made))
        found["tool_schema"].append(fits)
        if row.calls is None:
            for name in (TOOLS, "tool_names", "tool_arguments"):
                found[name].append(None)
            continue
        wanted = [_call(call) for call in row.calls]
        names = [name for name, _ in wanted] == [name for name, _ in made]
        same = [
            place < len(made) and made[place][0] == name and _same(given, made[place][1], schemas.get(name))
            for place, (name, given) in enumerate(wanted)
        ]
        found[TOOLS].append(float(names and all(same)))
        found["tool_names"].append(float(names))
        found["tool_arguments"].append(sum(same) / len(same) if same else None)
    return found


def _call(call: Mapping[str, Any]) -> tuple[str, Any]:
    """Return name and arguments of an expected call; arguments may be JSON text, as OpenAI has them."""
    function = call.get("function", call)
    given = function.get("arguments", {})
    if isinstance(given, str):
        with suppress(ValueError):
            given = json.loads(given)
    return str(function["name"]), given


def _same(wanted: Any, made: Any, schema: Mapping[str, Any] | None) -> bool:
    """Return whether arguments are the same, where one that is left out has its schema's default."""
    if not isinstance(wanted, dict) or not isinstance(made, dict):
        return wanted == made
    properties = ((schema or {}).get("parameters") or {}).get("properties") or {}
    defaults = {name: one["default"] for name, one in properties.items() if isinstance(one, dict) and "default" in one}
    return _strict({**defaults, **wanted}) == _strict({**defaults, **made})


def _strict(value: Any) -> Any:
    """Return a value in which true is not 1, as it is in JSON and not in Python; 1 and 1.0 are the same in both."""
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, dict):
        return {key: _strict(one) for key, one in value.items()}
    return [_strict(one) for one in value] if isinstance(value, list) else value


# Of a value's type: what a schema calls it.
TYPES = {
    "str": ("string",), "int": ("integer", "number"), "float": ("number",), "boolean": ("boolean",), "list": ("array",),
    "dict": ("object",),
}  # fmt: skip


def _fits(tool: Mapping[str, Any], given: Any) -> bool:
    """Return whether arguments fit a tool's schema: known names, required ones there, types, and listed values.

    These are what the schemas of tools say; jsonschema, which knows all of JSON Schema, need not be installed.
    """
    parameters = tool.get("parameters") or {"type": "object", "properties": {}}
    return isinstance(given, dict) and _allowed(parameters, given)


def _allowed(schema: Mapping[str, Any], value: Any) -> bool:
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds] if kinds else []
    if "enum" in schema and _strict(value) not in [_strict(one) for one in schema["enum"]]:
        return False
    if value is None:
        return not kinds or "null" in kinds or bool(schema.get("nullable"))
    known = TYPES.get("boolean" if isinstance(value, bool) else type(value).__name__, ())
    whole = ("integer",) if isinstance(value, float) and value.is_integer() else ()
    if kinds and not {*known, *whole} & set(kinds):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        closed = schema.get("additionalProperties", False) is False
        if (closed and value.keys() - known.keys()) or set(schema.get("required", ())) - value.keys():
            return False
        return all(_allowed(known[name], one) for name, one in value.items() if name in known)
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        return all(_allowed(schema["items"], one) for one in value)
    return True
