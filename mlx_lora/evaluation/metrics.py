"""Let models answer the rows of a user's file, and score the answers: by metrics, by functions of the user's, by another model.

Rows are read as those of a run that samples answers (data/prompts.py): chats up to the last answer, prompts, or questions,
with the record's own answer as what is expected. Each model is asked with its own chat template, and all answer in one
batch.

    exact_match      the answer is the expected one, but for white space around it
    number_match     its last number is that of the expected answer
    json             it is valid JSON; where the expected answer is an object, also the share of its fields that are equal
    json_schema:FILE it is JSON that fits a schema
    regex:PATTERN    the pattern is found in it
    rouge_l          the longest common subsequence of words, as F1
    tool_calls       it makes the expected calls: names, arguments, order
    math-verify      it equals the expected answer as mathematics
    FILE.py:NAME     a function with the signature of a reward: def NAME(prompts, completions, **columns)

A metric gives each answer a number, or None where a row has nothing to compare with; such rows are left out and counted.
All of them that rewards have too are the functions of rewards (rollouts/rewards.py).

Another local model, the judge, says which of two answers is better. It reads question and both answers in its chat template, and
is not asked to write: the log-probabilities of "A" and "B" as its next word are compared, so each question costs one batch row and
always has an answer. A small judge often prefers the first answer, or the second, whatever they are. So each pair is asked in both
orders, an answer wins if it is preferred in both, and all else is a tie. How often the two orders agree is reported; a judge with
low agreement says little. If all of this is longer than the judge's context, the answers and the expected one are cut at their
ends, all at the same length, and the question stays whole. Where it alone leaves no room for them, the pair is not judged.

Source: Zheng et al., arXiv 2306.05685, section 3.4 (position bias, swapping).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jinja2

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import chat_tokens, own_template
from mlx_lora.data.examples import Conversation
from mlx_lora.data.load import load_eval_set
from mlx_lora.evaluation.models import BASE, Models, Scored, TextRequest, Written
from mlx_lora.evaluation.paired import (
    FEWEST_ROWS,
    MOST_QUESTION,
    Answered,
    Comparison,
    ModelScore,
    TaskResults,
    TaskScore,
    score_interval,
)
from mlx_lora.models.generator import Sampling
from mlx_lora.models.grammar import opens_thinking
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.rollouts.rewards import ANSWER_COLUMNS, MATH, PLAIN, TrainerState, call_reward, problem_of, ready_reward
from mlx_lora.rollouts.tool_calls import CallReader, Said, ToolTurns
from mlx_lora.rollouts.user_code import FAILURES, from_file, one_line
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.text import closest, counted

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
        return Metric(name, _json_values)
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


NO_JSON = object()
MOST_FIELDS = 20  # that have a score of their own


def _json_values(rows: Sequence[AskedRow], answers: Sequence[ModelAnswer]) -> Values:
    """Return which answers are JSON, and of objects the share of the expected fields that are equal, together and by field."""
    said, expected = [_parsed(answer.text) for answer in answers], [_parsed(expected_of(row)) for row in rows]
    found: Values = {"json": [float(one is not NO_JSON) for one in said]}
    wanted = [one if isinstance(one, dict) and one else None for one in expected]
    names = list(dict.fromkeys(name for right in wanted if right for name in right))
    equal = [
        right
        and {
            name: float(isinstance(own, dict) and name in own and _strict(own[name]) == _strict(right[name]))
            for name in right
        }
        for right, own in zip(wanted, said, strict=True)
    ]
    if names:
        found["json_fields"] = [None if own is None else sum(own.values()) / len(own) for own in equal]
    for name in names[:MOST_FIELDS]:
        found[f"json_fields {name}"] = [None if own is None else own.get(name) for own in equal]
    return found


def _parsed(text: Any) -> Any:
    """Return what a text is as JSON, or NO_JSON; anything but a text as it is."""
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return NO_JSON


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


# Answers


def answer_rows(
    models: Models,
    data: DataSettings,
    metrics: Sequence[Metric],
    max_tokens: int = 256,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
    schema: Any = None,
) -> tuple[list[AskedRow], dict[str, list[ModelAnswer]]]:
    """Let all models answer all rows, and return the rows, and each model's answers to them.

    Args:
        models: a base and adapters.
        data: file, and how it is read.
        metrics: that will be taken; those of tools need a chat template that shows tools.
        max_tokens: of an answer.
        limit: rows, from the first on; None: all.
        stopped: asked before each step whether to end.
        schema: a JSON Schema that the answers fit, unless they are cut; None: they may be any text.

    Raises:
        InputError: the data cannot be read, has no prompts, or has nothing that a metric compares with.
        KeyboardInterrupt: it was stopped.
    """
    base, sets, readers, prompts = models.base, {}, {}, []
    tokenizer, own = base.hf_tokenizer, base.hf_tokenizer.chat_template
    form = None if schema is None else models.grammars.of_schema(schema, "--schema")
    for name in models.names:
        template = None if data.chat_template else models.templates[name]
        if template not in sets:
            tokenizer.chat_template = own if template is None else template
            try:
                rows = load_eval_set(data.data or "", data, tokenizer, "prompts")
            finally:
                tokenizer.chat_template = own
            check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {data.data}")
            sets[template] = rows.select(range(min(rows.examples, limit))) if limit else rows
        asked = [tuple(sets[template].row(number)[0].tolist()) for number in range(len(sets[template]))]
        for tokens in asked:
            grammar = None if form is None else models.grammars.whole(form, opened=opens_thinking(tokenizer, tokens))
            sampling = Sampling(temperature=0, grammar=grammar)
            prompts.append(TextRequest(name, tokens, max_tokens, sampling=sampling, special=True))
        used = template if template is not None else data.chat_template or own_template(tokenizer)
        readers[name] = None
        if used is not None and any(metric.name == TOOLS for metric in metrics):
            turns = ToolTurns(tokenizer, used, frozenset(base.tokenizer.eos_token_ids))
            try:
                readers[name] = CallReader.of(turns)
            except InputError as error:  # the template shows no tools, or its form is not known
                raise InputError(f"--metric {TOOLS}: {error}") from None
    counts = {len(rows) for rows in sets.values()}
    if len(counts) > 1:
        raise InputError(
            f"--data {data.data}: {' and '.join(map(str, sorted(counts)))} rows fit --max-seq-length by the models' "
            "chat templates; raise it, or give one with --chat-template"
        )
    rows = []
    for fact in next(iter(sets.values())).facts or []:
        example, calls, tools = fact["example"], None, ()
        if isinstance(example, Conversation):
            tools, last = tuple(example.tools or ()), example.messages[-1]
            calls = last.get("tool_calls", []) if tools or "tool_calls" in last else None
        rows.append(AskedRow(fact["prompt"], fact["chat"], fact["columns"], calls, tools))
    for metric in metrics:
        if not any(map(metric.applies, rows)):
            raise InputError(
                f"--metric {metric.name}: no row has what it compares with; docs/is-my-model-better.md says what it needs"
            )
    written = iter(models.texts(prompts, stopped))
    return rows, {name: [_answer(base, readers[name], row, next(written)) for row in rows] for name in models.names}


def score_rows(
    name: str, rows: Sequence[AskedRow], answers: Mapping[str, list[ModelAnswer]], metrics: Sequence[Metric]
) -> TaskResults:
    """Return the scores of answers.

    Args:
        name: of the rows.
        rows, answers: from `answer_rows`.
        metrics: to take.

    Raises:
        RunError: a user's function failed.
    """
    measured = TaskResults()
    shown: list[dict[str, dict[str, float]]] = [{} for _ in rows]
    for metric in metrics:
        taken = {model: metric.of(rows, own) for model, own in answers.items()}
        for part in next(iter(taken.values())):
            values = {model: own[part] for model, own in taken.items()}
            known = [at for at in range(len(rows)) if all(own[at] is not None for own in values.values())]
            if not known:
                measured.notes.append(f"{part}: no row can be compared")
                continue
            of_known = {model: [float(own[at] or 0) for at in known] for model, own in values.items()}
            measured.scores.append(TaskScore.of(name, part, of_known))
            if len(known) < len(rows):
                measured.notes.append(f"{part}: of {len(known)} of {len(rows)} rows; the others cannot be compared")
            for place, at in enumerate(known):
                shown[at][part] = {model: own[place] for model, own in of_known.items()}
    measured.answers[name] = [
        Answered(question_text(row), expected_text(row), {m: own[at].text for m, own in answers.items()}, shown[at])
        for at, row in enumerate(rows)
    ]
    return measured


def question_text(row: AskedRow) -> str:
    """Return a row's question as a person reads it: the last turn, with those before it if there are several."""
    if isinstance(row.prompt, str):
        text = row.prompt
    else:
        turns = [f"{turn['role']}: {turn['content']}" for turn in row.prompt]
        text = str(row.prompt[-1]["content"]) if len(turns) == 1 else "\n".join(turns)
    return text if len(text) <= MOST_QUESTION else "… " + text[-MOST_QUESTION:]


def expected_text(row: AskedRow) -> str:
    """Return the expected answer as text, with the calls that it makes."""
    answer = row.columns.get("answer")
    calls = [f"→ {one['function']['name']} {one['function']['arguments']}" for one in row.calls or ()]
    return "\n".join(filter(None, ["" if answer is None else str(answer), *calls]))


def _answer(base: Base, reader: CallReader | None, row: AskedRow, written: Written) -> ModelAnswer:
    text = str(base.hf_tokenizer.decode(list(written.tokens), skip_special_tokens=True)).strip()
    if reader is None:
        return ModelAnswer(text, written.tokens, Said(text))
    said = replace(reader, tools=row.tools)(written.tokens)
    calls = [f"→ {call['name']} {call['arguments']}" for call in said.calls]
    return ModelAnswer("\n".join(filter(None, [said.content, *calls])), written.tokens, said)


# The judge

QUESTION = """Here are a question and two answers to it, A and B.{reference}

[Question]
{question}

[Answer A]
{first}

[Answer B]
{second}

Which answer is better: more correct, more helpful, and to the point? Reply with one letter, A or B."""
REFERENCE = "\nA correct answer, to compare with:\n\n[Reference]\n{expected}"
MOST_CHARACTERS = 6000  # of each text
LEAST_CHARACTERS = 100  # to which an answer is cut


@dataclass(frozen=True)
class AnswerPair:
    """A question with the base's answer and an adapter's, and the expected answer, empty if there is none."""

    question: str
    base: str
    other: str
    expected: str = ""


@dataclass(frozen=True)
class Judged:
    """What a judge said of pairs.

    Attributes:
        wins: of the adapter's answer.
        losses: of it.
        rows: all pairs but those that do not fit; the others are ties.
        asked: pairs whose answers differ; the others were not asked.
        agreed: of these, in which both orders prefer the same answer.
        verdicts: of each pair, 1, 0 (a tie) or -1; None if it does not fit the judge's context.
        shortened: pairs whose answers were cut.
    """

    wins: int
    losses: int
    rows: int
    asked: int
    agreed: int
    verdicts: tuple[int | None, ...]
    shortened: int = 0

    @property
    def agreement(self) -> float | None:
        """The share of asked pairs in which both orders agree; None if none was asked."""
        return self.agreed / self.asked if self.asked else None

    def notes(self, judge: str, adapter: str) -> list[str]:
        """Return what is said of the verdicts, in lines."""
        ties = self.rows - self.wins - self.losses
        words = f"judge {judge}, {adapter} against base: {self.wins} wins, {self.losses} losses, {ties} ties"
        if self.agreement is not None:
            words += f"; both orders agree on {self.agreement:.0%} of {self.asked} pairs"
            words += " (below two thirds, do not rely on it)" if self.agreement < 2 / 3 else ""
        cut = f"answers of {counted(self.shortened, 'pair')} were cut" if self.shortened else ""
        lost = f"{counted(len(self.verdicts) - self.rows, 'pair')} could not be judged" if None in self.verdicts else ""
        found = " and ".join(filter(None, (cut, lost)))
        return [words] + (
            [f"judge {judge}: {found}, to fit its context; choose one with a longer context"] if found else []
        )

    def score(self, task: str, judge: str, adapter: str) -> TaskScore:
        """Return the shares of wins as a score: of the base those that the adapter lost."""
        difference = (self.wins - self.losses) / max(1, self.rows)
        few = self.rows < FEWEST_ROWS
        low, high = (-float("inf"), float("inf")) if few else score_interval(self.wins, self.losses, self.rows)
        scores = {}
        for name, count in ((BASE, self.losses), (adapter, self.wins)):
            share = count / max(1, self.rows)
            scores[name] = ModelScore(share, (share * (1 - share) / max(1, self.rows - 1)) ** 0.5)
        compared = {adapter: Comparison(difference, low, high, self.rows)}
        return TaskScore(task, f"judge {judge}", True, self.rows, scores, {**compared})


def judge_pairs(judge: Models, pairs: Sequence[AnswerPair], stopped: Callable[[], bool] = lambda: False) -> Judged:
    """Let a model judge pairs of answers.

    Args:
        judge: its base alone is asked.
        pairs: with different or equal answers; equal ones are ties.
        stopped: asked before each batch whether to end.

    Raises:
        InputError: the judge has no chat template.
        KeyboardInterrupt: it was stopped.
    """
    # The tokens of the two letters, as an answer begins with them.
    letters = [judge.base.hf_tokenizer.encode(letter, add_special_tokens=False)[-1] for letter in "AB"]
    verdicts: list[int | None] = [0] * len(pairs)
    asked: list[Scored] = []
    differing, shortened = [], 0
    for number, pair in enumerate(pairs):
        if pair.base.strip() == pair.other.strip():
            continue
        contexts, cut = _contexts(judge, pair)
        if not contexts:
            verdicts[number] = None
            continue
        differing.append(number)
        shortened += cut
        asked += [Scored(BASE, context, (letter,)) for context in contexts for letter in letters]
    found, agreed = judge.log_likelihoods(asked, stopped), 0
    for at, number in enumerate(differing):
        one, two, three, four = (likelihood.total for likelihood in found[4 * at : 4 * at + 4])
        # Whether the adapter's answer is preferred: 1, -1, or 0, as logits of 16 bits are often equal.
        first_order, second_order = ((own > other) - (own < other) for own, other in ((two, one), (three, four)))
        if first_order == second_order != 0:
            agreed += 1
            verdicts[number] = first_order
    wins, losses = verdicts.count(1), verdicts.count(-1)
    rows = len(pairs) - verdicts.count(None)
    return Judged(wins, losses, rows, len(differing), agreed, tuple(verdicts), shortened)


def _contexts(judge: Models, pair: AnswerPair) -> tuple[list[tuple[int, ...]], bool]:
    """Return what the judge reads in both orders, nothing if it does not fit its context, and whether answers were cut for it."""
    most, cut = min(MOST_CHARACTERS, max(map(len, (pair.base, pair.other, pair.expected)))), False
    while True:
        orders = ((pair.base, pair.other), (pair.other, pair.base))
        contexts = [_context(judge, pair, *order, most) for order in orders]
        if max(map(len, contexts)) <= judge.context_tokens:
            return contexts, cut
        if most <= LEAST_CHARACTERS:
            return [], False
        most, cut = max(LEAST_CHARACTERS, most * 3 // 4), True


def _context(judge: Models, pair: AnswerPair, first: str, second: str, most: int) -> tuple[int, ...]:
    """Return what the judge reads: the question, and at most so many characters of each other text."""
    template = judge.templates[BASE]
    if template is None:
        raise InputError(f"--judge {judge.base.model_id}: it has no chat template; choose an instruction-tuned model")
    cut = {"question": pair.question[:MOST_CHARACTERS], "first": first[:most], "second": second[:most]}
    reference = REFERENCE.format(expected=pair.expected[:most]) if pair.expected else ""
    message = {"role": "user", "content": QUESTION.format(reference=reference, **cut)}
    try:
        return tuple(chat_tokens(judge.base.hf_tokenizer, [message], template))
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise InputError(f"--judge {judge.base.model_id}: its chat template refuses the question ({error})") from None
