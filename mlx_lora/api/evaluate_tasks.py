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
from mlx_lora.config.settings import DataSettings, ModelSettings
from mlx_lora.engine.adapter_store import AdapterSource, check_names, own_name
from mlx_lora.evaluation.judge import AnswerPair, judge_pairs
from mlx_lora.evaluation.metrics import Metric, metric_of
from mlx_lora.evaluation.models import BASE, Models
from mlx_lora.evaluation.own_rows import answer_rows, expected_text, question_text, score_rows
from mlx_lora.evaluation.paired import TaskResults
from mlx_lora.models.load import Base, load_base
from mlx_lora.trainer.ask import never
from mlx_lora.utils.errors import InputError, refuse
from mlx_lora.utils.hub import resolve_adapter

MANY = 5  # comparisons, from which on some are expected to be called a difference by chance


@dataclass(frozen=True)
class TasksRequest:
    """What is measured.

    Attributes:
        tasks: names of lm-eval's tasks, or YAML files.
        data: rows of a user's file; None: none.
        max_tokens: of an answer to them.
        metrics: of these answers, by name.
        judge: a model that compares the answers; None: none.
        chat_template: ask tasks in the form of the chat template.
        fewshot: solved examples before each question of a task; None: as the task says.
        limit: rows of each task, and of the file; None: all.
        adapters: name -> where it is.
        ignore_fingerprint: use adapters that were trained on another base of the same shape.
        batch_tokens: positions of a batch; None: the default.
        stopped: asked whether to end.
    """

    tasks: Sequence[str] = ()
    data: DataSettings | None = None
    max_tokens: int = 256
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
    rows, named = None, adapters if isinstance(adapters, Mapping) else {}
    if not isinstance(adapters, Mapping):
        folders = [adapters] if isinstance(adapters, str | os.PathLike) else adapters
        named = {own_name("adapters", os.fspath(one)): one for one in folders}
    sources = {name: AdapterSource(folder=resolve_adapter(os.fspath(one))) for name, one in named.items()}
    if not isinstance(chat_template, bool):
        raise InputError("chat_template: True or False; rows of your own are asked in the form of each adapter's run")
    if data is not None:
        resolved = run_settings(loaded.settings, {**settings, "data": data_source(data)}, of=("data",))
        folders = [source.folder for source in sources.values() if source.folder]
        rows = with_settings_of_runs(resolved, settings, folders).data
    elif settings:
        raise InputError(f"{', '.join(settings)}: settings of data; give data, or leave them out")
    asked = TasksRequest(
        [tasks] if isinstance(tasks, str) else list(tasks), rows, max_tokens,
        [metrics] if isinstance(metrics, str) else list(metrics), None if judge is None else os.fspath(judge),
        chat_template, fewshot, limit, sources, ignore_fingerprint, batch_tokens,
    )  # fmt: skip
    metric_list = check_tasks(asked)
    with loaded.loaded.lent() as lent:
        found = measure_tasks(lent, asked, metric_list)
    return found.to_dict() | {"model": loaded.loaded.model_id}


def check_tasks(asked: TasksRequest) -> list[Metric]:
    """Refuse what cannot be measured, before a model is loaded, and return the metrics.

    Raises:
        InputError: there is nothing to measure, a metric is not known, or a package is missing.
    """
    no_data, scored = asked.data is None, bool(asked.metrics or asked.judge)
    refuse(
        {
            "--tasks: needs lm-eval; pip install 'mlx-lora[eval]'": asked.tasks
            and importlib.util.find_spec("lm_eval") is None,
            "--metric and --judge: score answers to rows of your own; give --data FILE": scored and no_data,
            "--metric: no rows to answer; give --data FILE, or --tasks": not asked.tasks and no_data and not scored,
            "--data with --tasks: give --metric exact_match, or another, to say how its answers are scored": (
                not no_data and not scored
            ),
            "--judge: compares answers of adapters with those of the base; give --adapter": asked.judge is not None
            and not asked.adapters,
        }
    )
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
    found = TaskResults()
    name = Path((asked.data and asked.data.data) or "").name or "rows"
    with Models.opened(base, asked.adapters, asked.ignore_fingerprint, asked.batch_tokens) as models:
        if asked.tasks:
            # Imported here, because lm-eval may not be installed.
            from mlx_lora.evaluation.harness import run_tasks

            found = run_tasks(models, asked.tasks, asked.chat_template, asked.fewshot, asked.limit, asked.stopped)
        if asked.data is not None:
            rows, answers = answer_rows(models, asked.data, metrics, asked.max_tokens, asked.limit, asked.stopped)
            own = score_rows(name, rows, answers, metrics)
            found.scores += own.scores
            found.answers |= own.answers
            found.notes += own.notes
            if asked.judge is not None:
                base, shown = load_base(ModelSettings(model=asked.judge)), Path(asked.judge).name
                with Models.opened(base, {}, batch_tokens=asked.batch_tokens) as judge:
                    for adapter in asked.adapters:
                        pairs = [
                            AnswerPair(question_text(row), one.text, other.text, expected_text(row))
                            for row, one, other in zip(rows, answers[BASE], answers[adapter], strict=True)
                        ]
                        verdict = judge_pairs(judge, pairs, asked.stopped)
                        found.scores.append(verdict.score(name, shown, adapter))
                        found.notes += verdict.notes(shown, adapter)
    comparisons = sum(len(score.compared) for score in found.scores)
    if comparisons >= MANY:
        by_chance = f"about {comparisons / 20:.1g} of them would be called one"
        found.notes.append(f"{comparisons} comparisons: without any true difference, {by_chance}")
    return found
