"""Score a base and adapters on tasks of lm-eval and on rows of your own, and say which differences are shown."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base
from mlx_lora.api.errors import speaks_python
from mlx_lora.api.run_data import with_settings_of_runs
from mlx_lora.api.train import data_source, run_settings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.evaluation.judge import judge_pairs, pairs_of
from mlx_lora.evaluation.metrics import Metric, metric_of
from mlx_lora.evaluation.models import BASE, Models
from mlx_lora.evaluation.own_rows import (
    RowsAnswered,
    RowsAsked,
    answer_rows,
    expected_text,
    question_text,
    score_rows,
)
from mlx_lora.evaluation.paired import TaskResults, TaskScore
from mlx_lora.models.load import Base, load_base
from mlx_lora.serving.adapter_store import AdapterSource, check_names, own_name
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_adapter

MANY = 5  # comparisons, from which on some are expected to be called a difference by chance


def never() -> bool:
    """Say that nobody asked to stop."""
    return False


@dataclass(frozen=True)
class TasksRequest:
    """What is measured.

    Attributes:
        tasks: names of lm-eval's tasks, or YAML files.
        rows: of a user's file; None: none.
        metrics: of answers to these rows, by name.
        judge: a model that compares the answers; None: none.
        chat_template: ask tasks in the form of the chat template.
        fewshot: solved examples before each question of a task; None: as the task says.
        limit: rows of each task; None: all.
        adapters: name -> where it is.
        ignore_fingerprint: use adapters that were trained on another base of the same shape.
        batch_tokens: positions of a batch; None: the default.
        stopped: asked whether to end.
    """

    tasks: Sequence[str] = ()
    rows: RowsAsked | None = None
    metrics: Sequence[str] = ()
    judge: str | None = None
    chat_template: bool = False
    fewshot: int | None = None
    limit: int | None = None
    adapters: Mapping[str, AdapterSource] = field(default_factory=dict)
    ignore_fingerprint: bool = False
    batch_tokens: int | None = None
    stopped: Callable[[], bool] = never


@speaks_python()
def evaluate_tasks(
    base: PublicBase | PathLike,
    tasks: str | Sequence[str] = (),
    adapters: PathLike | Sequence[PathLike] | Mapping[str, PathLike] = (),
    *,
    data: Any = None,
    metrics: str | Sequence[str] = (),
    judge: PathLike | None = None,
    chat_template: bool = False,
    fewshot: int | None = None,
    limit: int | None = None,
    max_tokens: int = 256,
    batch_tokens: int | None = None,
    ignore_fingerprint: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Return the scores of a base and adapters, as `mlx-lora evaluate --tasks --json` prints them.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        tasks: names of lm-eval's tasks, or YAML files.
        adapters: folders or hub ids, or name -> folder; all are measured in the same batches as the base.
        data: rows of your own, as for `train`.
        metrics: of the answers to these rows: exact_match, number_match, json, rouge_l, tool_calls, FILE.py:NAME ...
        judge: another model, which compares the answers of each adapter with those of the base.
        chat_template: ask tasks in the form of the chat template; rows of your own always are.
        fewshot: solved examples before each question of a task; None: as the task says.
        limit: rows of each task, and of your own; None: all.
        max_tokens: of an answer to your own rows.
        batch_tokens: positions of a batch, padding included.
        ignore_fingerprint: use adapters that were trained on another base of the same shape.
        settings: of data, as for `train`.

    Returns:
        `tasks`: for each task and metric its `models` (`score`, `standard_error`) and, by adapter, `compared` with the base
        (`difference`, `low`, `high`, `verdict`, `words`); `answers`: by task, what the models said; `notes`; `model`.

    Raises:
        InputError: base, adapter, task, metric or data that cannot be used.
    """
    loaded = as_base(base, "evaluate_tasks")
    given = [tasks] if isinstance(tasks, str) else list(tasks)
    rows, sources = None, _sources(adapters)
    if not isinstance(chat_template, bool):
        raise InputError("chat_template: True or False; rows of your own are asked in the form of each adapter's run")
    if data is not None:
        resolved = run_settings(loaded.settings, {**settings, "data": data_source(data)}, of=("data",))
        folders = [source.folder for source in sources.values() if source.folder]
        rows = RowsAsked(with_settings_of_runs(resolved, settings, folders).data, max_tokens, limit)
    elif settings:
        raise InputError(f"{', '.join(settings)}: settings of data; give data, or leave them out")
    asked = TasksRequest(
        given, rows, [metrics] if isinstance(metrics, str) else list(metrics), None if judge is None else os.fspath(judge),
        chat_template, fewshot, limit, sources, ignore_fingerprint, batch_tokens,
    )  # fmt: skip
    metric_list = check_tasks(asked)
    with loaded.loaded.lent() as lent:
        found = measure_tasks(lent, asked, metric_list)
    return found.to_dict() | {"model": loaded.loaded.model_id}


def _sources(adapters: PathLike | Sequence[PathLike] | Mapping[str, PathLike]) -> dict[str, AdapterSource]:
    if isinstance(adapters, str | os.PathLike):
        adapters = [adapters]
    named = (
        adapters if isinstance(adapters, Mapping) else {own_name("adapters", os.fspath(one)): one for one in adapters}
    )
    return {name: AdapterSource(folder=resolve_adapter(os.fspath(one))) for name, one in named.items()}


def check_tasks(asked: TasksRequest) -> list[Metric]:
    """Refuse what cannot be measured, before a model is loaded, and return the metrics.

    Raises:
        InputError: there is nothing to measure, a metric is not known, or a package is missing.
    """
    if asked.tasks and importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks: needs lm-eval; pip install 'mlx-lora[eval]'")
    if not asked.tasks and asked.rows is None:
        raise InputError("--metric: no rows to answer; give --data FILE, or --tasks")
    if asked.rows is not None and not asked.metrics and asked.judge is None:
        raise InputError(
            "--data with --tasks: give --metric exact_match, or another, to say how its answers are scored"
        )
    if (asked.metrics or asked.judge) and asked.rows is None:
        raise InputError("--metric and --judge: score answers to rows of your own; give --data FILE")
    if asked.judge is not None and not asked.adapters:
        raise InputError("--judge: compares answers of adapters with those of the base; give --adapter")
    check_names("--adapter", asked.adapters, (BASE,))
    return [metric_of(name) for name in asked.metrics]


def measure_tasks(base: Base, asked: TasksRequest, metrics: Sequence[Metric]) -> TaskResults:
    """Measure everything.

    Args:
        base: its layers are replaced by routed ones.
        asked: what.
        metrics: from `check_tasks`.

    Raises:
        InputError: adapter, task or data that cannot be used.
        KeyboardInterrupt: it was stopped; nothing is returned.
    """
    found, answered = TaskResults(), None
    with Models.opened(base, asked.adapters, asked.ignore_fingerprint, asked.batch_tokens) as models:
        if asked.tasks:
            # Imported here, because lm-eval may not be installed.
            from mlx_lora.evaluation.harness import TaskOptions, run_tasks

            options = TaskOptions(asked.chat_template, asked.fewshot, asked.limit)
            found = run_tasks(models, asked.tasks, options, asked.stopped)
        if asked.rows is not None:
            name = Path(asked.rows.data.data or "").name or "rows"
            answered = answer_rows(models, asked.rows, metrics, asked.stopped)
            own = score_rows(name, answered, metrics)
            found.scores += own.scores
            found.answers |= own.answers
            found.notes += own.notes
            if asked.judge is not None:
                scores, notes = _judged(asked, name, answered)
                found.scores += scores
                found.notes += notes
    if found.comparisons >= MANY:
        by_chance = found.comparisons / 20
        found.notes.append(
            f"{found.comparisons} comparisons: without any true difference, about {by_chance:.1g} of them would be called one"
        )
    return found


def _judged(asked: TasksRequest, name: str, answered: RowsAnswered) -> tuple[list[TaskScore], list[str]]:
    """Let the judge compare each adapter's answers with the base's."""
    base = load_base(ModelSettings(model=asked.judge))
    questions = [question_text(row) for row in answered.rows]
    expected = [expected_text(row) for row in answered.rows]
    texts = {model: [one.text for one in own] for model, own in answered.answers.items()}
    scores, notes, shown = [], [], Path(asked.judge or "").name
    with Models.opened(base, {}, batch_tokens=asked.batch_tokens) as judge:
        for adapter in asked.adapters:
            verdict = judge_pairs(judge, pairs_of(questions, expected, texts, adapter), asked.stopped)
            scores.append(verdict.score(name, shown, adapter))
            notes += verdict.notes(shown, adapter)
    return scores, notes
