"""Let models answer the rows of a user's file, and score the answers.

Rows are read as those of a run that samples answers (data/prompts.py): chats up to the last answer, prompts, or questions,
with the record's own answer as what is expected. Each model is asked with its own chat template, and all answer in one
batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import own_template
from mlx_lora.data.examples import Conversation
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.tool_turns import ToolTurns
from mlx_lora.evaluation.metrics import TOOLS, AskedRow, Metric, ModelAnswer
from mlx_lora.evaluation.models import Models, TextRequest, Written
from mlx_lora.evaluation.paired import Answered, TaskResults, TaskScore
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.rollouts.environment import CallReader, Said
from mlx_lora.utils.errors import InputError

MOST_SHOWN = 2000  # characters of a question


def answer_rows(
    models: Models,
    data: DataSettings,
    metrics: Sequence[Metric],
    max_tokens: int = 256,
    limit: int | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> tuple[list[AskedRow], dict[str, list[ModelAnswer]]]:
    """Let all models answer all rows, and return the rows, and each model's answers to them.

    Args:
        models: a base and adapters.
        data: file, and how it is read.
        metrics: that will be taken; those of tools need a chat template that shows tools.
        max_tokens: of an answer.
        limit: rows, from the first on; None: all.
        stopped: asked before each step whether to end.

    Raises:
        InputError: the data cannot be read, has no prompts, or has nothing that a metric compares with.
        KeyboardInterrupt: it was stopped.
    """
    base, sets, readers, prompts = models.base, {}, {}, []
    tokenizer, own = base.hf_tokenizer, base.hf_tokenizer.chat_template
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
        prompts += [TextRequest(name, tokens, max_tokens, special=True) for tokens in asked]
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
    return text if len(text) <= MOST_SHOWN else "… " + text[-MOST_SHOWN:]


def expected_text(row: AskedRow) -> str:
    """Return the expected answer as text, with the calls that it makes."""
    answer = row.columns.get("answer")
    calls = [f"→ {one['function']['name']} {one['function']['arguments']}" for one in row.calls or ()]
    return "\n".join(filter(None, ["" if answer is None else str(answer), *calls]))


def _answer(base: Base, reader: CallReader | None, row: AskedRow, written: Written) -> ModelAnswer:
    text = str(base.hf_tokenizer.decode(list(written.tokens), skip_special_tokens=True)).strip()
    if reader is None:
        return ModelAnswer(text, written.tokens, Said(text))
    said = replace(reader, turns=replace(reader.turns, tools=row.tools))(written.tokens)
    calls = [f"→ {call['name']} {call['arguments']}" for call in said.calls]
    return ModelAnswer("\n".join(filter(None, [said.content, *calls])), written.tokens, said)
