"""Let models answer the rows of a user's file, and score the answers.

Rows are read as those of a run that samples answers (data/prompts.py): chats up to the last answer, prompts, or questions,
with the record's own answer as what is expected. Each model is asked with its own chat template, and all answer in one
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import own_template
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Conversation
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.tool_turns import ToolTurns
from mlx_lora.evaluation.metrics import TOOLS, AskedRow, Metric, ModelAnswer
from mlx_lora.evaluation.models import Models, TextRequest, Written
from mlx_lora.evaluation.results import Answered, TaskResults, TaskScore
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.rollouts.tools import CallReader, Said
from mlx_lora.utils.errors import InputError

MOST_SHOWN = 2000  # characters of a question


@dataclass(frozen=True)
class RowsAsked:
    """Rows and how they are asked.

    Attributes:
        data: file, and how it is read.
        max_tokens: of an answer.
        limit: rows, from the first on; None: all.
    """

    data: DataSettings
    max_tokens: int = 256
    limit: int | None = None


@dataclass(frozen=True)
class RowsAnswered:
    """Rows, and each model's answers to them."""

    rows: list[AskedRow]
    answers: dict[str, list[ModelAnswer]]


def answer_rows(
    models: Models, asked: RowsAsked, metrics: Sequence[Metric], stopped: Callable[[], bool] = lambda: False
) -> RowsAnswered:
    """Let all models answer all rows.

    Args:
        models: a base and adapters.
        asked: the rows.
        metrics: that will be taken; those of tools need a chat template that shows tools.
        stopped: asked before each step whether to end.

    Raises:
        InputError: the data cannot be read, has no prompts, or has nothing that a metric compares with.
        KeyboardInterrupt: it was stopped.
    """
    base, readers, prompts = models.base, {}, []
    sets: dict[str | None, EncodedSet] = {}
    given = asked.data.chat_template
    wants_tools = any(metric.name == TOOLS for metric in metrics)
    for name in models.names:
        template = None if given else models.templates[name]
        if template not in sets:
            sets[template] = _rows(base, asked, template)
        tokens = [sets[template].row(number)[0].tolist() for number in range(len(sets[template]))]
        prompts += [TextRequest(name, tuple(own), asked.max_tokens, special=True) for own in tokens]
        used = _template_text(base, asked.data, template)
        readers[name] = None if used is None or not wants_tools else (used, _reader(base, used))
    counts = {len(rows) for rows in sets.values()}
    if len(counts) > 1:
        raise InputError(
            f"--data {asked.data.data}: {' and '.join(map(str, sorted(counts)))} rows fit --max-seq-length by the models' "
            "chat templates; raise it, or give one with --chat-template"
        )
    facts = next(iter(sets.values())).facts or []
    rows = [_asked_row(fact) for fact in facts]
    for metric in metrics:
        if not any(map(metric.applies, rows)):
            raise InputError(
                f"--metric {metric.name}: no row has what it compares with; docs/is-my-model-better.md says what it needs"
            )
    written = models.texts(prompts, stopped)
    answers = {
        name: [
            _answer(base, readers[name], row, one)
            for row, one in zip(rows, written[at * len(rows) : (at + 1) * len(rows)], strict=True)
        ]
        for at, name in enumerate(models.names)
    }
    return RowsAnswered(rows, answers)


def score_rows(name: str, found: RowsAnswered, metrics: Sequence[Metric]) -> TaskResults:
    """Return the scores of answers.

    Args:
        name: of the rows.
        found: rows and answers.
        metrics: to take.

    Raises:
        RunError: a user's function failed.
    """
    measured = TaskResults()
    shown: list[dict[str, dict[str, float]]] = [{} for _ in found.rows]
    for metric in metrics:
        taken = {model: metric.of(found.rows, answers) for model, answers in found.answers.items()}
        first = next(iter(taken.values()))
        for part in first:
            values = {model: own[part] for model, own in taken.items()}
            given = {
                model: {at: float(one) for at, one in enumerate(own) if one is not None}
                for model, own in values.items()
            }
            known = [row for row in range(len(found.rows)) if all(row in own for own in given.values())]
            if not known:
                measured.notes.append(f"{part}: no row can be compared")
                continue
            of_known = {model: [own[row] for row in known] for model, own in given.items()}
            measured.scores.append(TaskScore.of(name, part, of_known))
            if len(known) < len(found.rows):
                measured.notes.append(
                    f"{part}: of {len(known)} of {len(found.rows)} rows; the others cannot be compared"
                )
            for row in known:
                shown[row][part] = {model: own[row] for model, own in given.items()}
    measured.answers[name] = [
        Answered(
            question_text(row), expected_text(row), {m: own[at].text for m, own in found.answers.items()}, shown[at]
        )
        for at, row in enumerate(found.rows)
    ]
    return measured


def question_text(row: AskedRow) -> str:
    """Return a row's question as a person reads it: the last turn, with those before it if there are several."""
    if isinstance(row.prompt, str):
        text = row.prompt
    else:
        turns = [f"{turn['role']}: {turn['content']}" for turn in row.prompt]
        text = str(row.prompt[-1]["content"]) if len(turns) == 1 else "\n".join(turns)
    return text if len(text) <= MOST_SHOWN else "… " + text[-MOST_SHOWN:]


def expected_text(row: AskedRow) -> str:
    """Return the expected answer as text, with the calls that it makes."""
    answer = row.columns.get("answer")
    calls = [f"→ {one['function']['name']} {one['function']['arguments']}" for one in row.calls or ()]
    return "\n".join(filter(None, ["" if answer is None else str(answer), *calls]))


def _rows(base: Base, asked: RowsAsked, template: str | None) -> EncodedSet:
    """Return the prompts of the data, rendered with a template; None: as the settings say."""
    tokenizer, before = base.hf_tokenizer, base.hf_tokenizer.chat_template
    if template is not None:
        tokenizer.chat_template = template
    try:
        rows = load_eval_set(asked.data.data or "", asked.data, tokenizer, "prompts")
    finally:
        tokenizer.chat_template = before
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {asked.data.data}")
    return rows.select(range(min(rows.examples, asked.limit))) if asked.limit else rows


def _template_text(base: Base, data: DataSettings, template: str | None) -> str | None:
    return template if template is not None else data.chat_template or own_template(base.hf_tokenizer)


def _reader(base: Base, template: str) -> CallReader:
    """Return what reads calls in the form of a template.

    Raises:
        InputError: the template shows no tools, or its form is not known.
    """
    turns = ToolTurns(base.hf_tokenizer, template, frozenset(base.tokenizer.eos_token_ids))
    try:
        return CallReader.of(turns)
    except InputError as error:
        raise InputError(f"--metric {TOOLS}: {error}") from None


def _asked_row(fact: dict[str, Any]) -> AskedRow:
    example = fact["example"]
    calls, tools = None, ()
    if isinstance(example, Conversation):
        tools = tuple(example.tools or ())
        last = example.messages[-1]
        calls = last.get("tool_calls", []) if tools or "tool_calls" in last else None
    return AskedRow(fact["prompt"], fact["chat"], fact["columns"], calls, tools)


def _answer(base: Base, reader: tuple[str, CallReader] | None, row: AskedRow, written: Written) -> ModelAnswer:
    text = str(base.hf_tokenizer.decode(list(written.tokens), skip_special_tokens=True)).strip()
    if reader is None:
        return ModelAnswer(text, written.tokens, Said(text))
    own = replace(reader[1], turns=replace(reader[1].turns, tools=row.tools))
    said = own(written.tokens)
    calls = [f"→ {call['name']} {call['arguments']}" for call in said.calls]
    return ModelAnswer("\n".join(filter(None, [said.content, *calls])), written.tokens, said)
