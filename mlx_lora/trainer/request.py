"""What a run is asked for, checked before anything is loaded, and the task that its validations score (`--eval-tasks`)."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora.data.data_sets import all_files
from mlx_lora.data.examples import Text
from mlx_lora.data.read import read_rows
from mlx_lora.objectives.table import objective_of
from mlx_lora.trainer.guards import LOSS, TASK
from mlx_lora.trainer.run_folder import continues_here, holds_adapter
from mlx_lora.utils.errors import InputError, refuse
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.load import DataSplits
    from mlx_lora.evaluation.models import Models
    from mlx_lora.evaluation.paired import TaskScore
    from mlx_lora.objectives.base import RunContext
    from mlx_lora.parallel.ranks import Ranks
    from mlx_lora.trainer.build import BuiltRun

log = logging.getLogger(__name__)


def wants_training(settings: TrainSettings) -> bool:
    """Train unless only --test was asked for, as in mlx_lm.lora, or a draft head for the adapter that is there."""
    loop = settings.loop
    there = loop.train_mtp and loop.adapter_path and holds_adapter(Path(loop.adapter_path))
    return bool(loop.train) or not (loop.test or (there and not loop.force and loop.resume is None))


def check_request(
    settings: TrainSettings, ranks: Ranks, functions: Mapping[str, Callable[..., Any]] | None = None
) -> None:
    """Refuse, before anything is loaded, a run whose results could not be written or would overwrite others'."""
    objective_of(settings.objective).check(settings.objective, functions or {})
    loop, trains = settings.loop, wants_training(settings)
    if loop.metric_for_best_model != LOSS or settings.data.ask or loop.eval_tasks:
        from mlx_lora.trainer.request import check_task  # few runs need it

        check_task(settings)
    needed = {"--model": settings.model.model, "--data": settings.data.data, "--adapter-path": loop.adapter_path}
    if settings.objective.row.taught:
        del needed["--data"]  # without it, the model writes the prompts itself
    missing = [flag for flag, value in needed.items() if not value]
    row, asks = settings.objective.row, loop.train_mtp
    refuse(
        {
            f"--train-mtp with --objective {settings.objective.objective}: it drafts answers to texts; leave it out": asks
            and (not row.writes or settings.objective.images),
            "--train-mtp with --shard-base or --offload-base on: it needs the whole model; leave it out": asks
            and (loop.shard_base != "off" or loop.offload_base == "on"),
            "--train-mtp: heads that draft tokens are mlx-vlm's; pip install 'mlx-lora[vision]'": asks
            and importlib.util.find_spec("mlx_vlm") is None,
        }
    )
    single = {
        "--train-mtp": loop.train_mtp,
        "--test without --train": not trains,
        "--max-restarts": loop.max_restarts,
        "--ask": settings.data.ask,
    }
    alone = [flag for flag, asked in single.items() if asked]
    if alone and ranks.size > 1:
        raise InputError(
            f"{' and '.join(alone)} in {ranks.size} processes: works in a single process only; start it without a launcher"
        )
    if missing:
        raise InputError(
            f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} required (--help says what each takes)"
        )
    if not trains or not ranks.leads:
        return
    folder = Path(loop.adapter_path)
    check_writable(folder, "--adapter-path", needed_bytes=1_000_000)
    if holds_adapter(folder) and not (loop.force or continues_here(loop)):
        raise InputError(
            f"--adapter-path {folder}: already holds an adapter; choose another folder, --resume to continue, or --force to overwrite it"
        )


def check_test_split(settings: TrainSettings, splits: DataSplits) -> None:
    """Refuse --test without a test split, before the training and not after it."""
    if settings.loop.test and splits.test is None:
        raise InputError(
            f"--test: {splits.report.data} has no test split; add a test file to the folder, or leave --test out"
        )


# Score the model on a task at each validation (`--eval-tasks`), as `mlx-lora evaluate` scores it afterward.
#
# The score is one more number of a validation, `task`, beside those of the objective. So metrics.jsonl, the best checkpoint, early
# stopping, resumed runs and sweeps take it as they take a held-out accuracy.
#
# Answers are the likeliest tokens of the model in the form that is trained, without float copies of quantized weights. Copies are
# chosen by the memory that is free, so a resumed run could get other answers.

YAML = (".yaml", ".yml")
USUAL_METRIC = "exact_match"  # of a file of rows
# The flags of `evaluate`, in errors -> those of a run.
FLAGS = {"--tasks": "--eval-tasks", "--data": "--eval-tasks", "--metric": "--eval-metric"}


def has_rows(asked: str) -> bool:
    """Return whether --eval-tasks names a file of rows, and not a task of lm-eval."""
    path = Path(asked).expanduser()
    return path.suffix not in YAML and path.exists()


def check_task(settings: TrainSettings) -> None:
    """Refuse, before anything is loaded, a metric, questions or a task that this run cannot be measured by.

    Raises:
        InputError: there is no such file, metric or package, or the run's model writes no text.
    """
    if settings.data.ask:
        rows = read_rows(all_files(settings.data.ask), settings.data, "examples").entries
        if all(isinstance(one, Text) for one in rows):
            raise InputError(
                f"--ask {settings.data.ask}: no question with its answer; give rows of prompt and completion"
            )
    loop, asked = settings.loop, settings.loop.eval_tasks
    if asked is None:
        return
    path, name = Path(asked).expanduser(), settings.objective.objective
    refuse(
        {
            f"--eval-tasks {asked} with --objective {name}: its model writes no text; leave it out": not settings.objective.row.writes,
            f"--eval-tasks {asked}: there is no such file; give its path, or the name of a task": path.suffix
            and not path.exists(),
            f"--eval-chat-template: the rows of {asked} always have the form of a chat; leave it out": has_rows(asked)
            and loop.eval_chat_template,
            f"--eval-tasks {asked}: a task needs lm-eval; pip install 'mlx-lora[eval]'": not has_rows(asked)
            and importlib.util.find_spec("lm_eval") is None,
        }
    )
    if has_rows(asked):
        from mlx_lora.evaluation.metrics import metric_of  # only where it is asked for

        with _in_words_of_a_run():
            metric_of(loop.eval_metric or USUAL_METRIC)


def scorer_of(run: BuiltRun) -> ValidationTask:
    """Return what adds the score of --eval-tasks to a run's validations.

    Raises:
        InputError: the run has no held-out rows, or its base is divided among processes.
    """
    loop = run.ctx.settings.loop
    asked = loop.eval_tasks or ""
    refuse(
        {
            f"--eval-tasks {asked}: it is scored at validations, and there are no held-out rows; give a validation file, or "
            "leave --valid-fraction at its default": run.validation is None,
            f"--eval-tasks {asked}: this run divides its base, and the task needs all of it; leave it out": (
                run.ctx.strategy.divides_base
            ),
        }
    )
    metric = loop.eval_metric or (USUAL_METRIC if has_rows(asked) else "its own metric")
    log.info(f"Task: {asked}, {metric} of at most {counted(loop.eval_rows, 'row')}, at each validation")
    return ValidationTask(run.ctx, asked)


@dataclass
class ValidationTask:
    """Scores a run's model on a task.

    Attributes:
        ctx: of the run, with settings in which nothing is open.
        asked: as --eval-tasks names it.
    """

    ctx: RunContext
    asked: str
    _models: Models | None = field(default=None, repr=False)

    def __call__(self, stopped: Callable[[], bool]) -> dict[str, float]:
        """Return the score as `task`, on all ranks; nothing if it was ended.

        Args:
            stopped: asked before each batch whether to end.

        Raises:
            InputError: the task or its rows cannot be used.
            RunError: a metric of the user failed.
        """
        strategy, model, found = self.ctx.strategy, self.ctx.base.model, {}
        if strategy.ranks.leads:  # it has the whole model, and the others wait for it
            training = model.training
            model.eval()
            try:
                with _in_words_of_a_run():
                    found = {TASK: self._score(stopped)}
            except KeyboardInterrupt:
                pass
            finally:
                model.train(training)
        return found if strategy.ranks.size == 1 else strategy.everyone(found)[0]

    def _score(self, stopped: Callable[[], bool]) -> float:
        # Imported here, because a run without a task needs none of it, and lm-eval may not be installed.
        from mlx_lora.evaluation.models import BASE, DEFAULT_BATCH_TOKENS, Models

        loop = self.ctx.settings.loop
        if self._models is None:
            self._models = Models(self.ctx.base, {}, False, DEFAULT_BATCH_TOKENS)
        if has_rows(self.asked):
            from mlx_lora.evaluation.metrics import answer_rows, metric_of, score_rows

            metrics = [metric_of(loop.eval_metric or USUAL_METRIC)]
            data = replace(self.ctx.settings.data, data=self.asked)
            answered = answer_rows(self._models, data, metrics, loop.eval_max_tokens, loop.eval_rows, stopped)
            found = score_rows(TASK, *answered, metrics).scores
            return found[0].scores[BASE].value if found else math.nan
        from mlx_lora.evaluation.harness import run_tasks

        template, limit = loop.eval_chat_template, loop.eval_rows
        found = run_tasks(self._models, [self.asked], template, limit=limit, stopped=stopped).scores
        return chosen_score(found, loop.eval_metric, self.asked).scores[BASE].value


def chosen_score(found: list[TaskScore], metric: str | None, asked: str) -> TaskScore:
    """Return the score of a task, or of a group of tasks, by which validations are compared.

    Args:
        found: of all tasks, then of groups.
        metric: its name, with or without the filter; None: the first one for which higher is better.
        asked: the task's or the group's name, or the file's.

    Raises:
        InputError: there is no such metric, or it is better when it is lower.
    """
    # A group in a group has scores of its own; a file's task has the name that the file gives it.
    name = asked if any(one.task == asked for one in found) else found[-1].task
    own = [one for one in found if one.task == name]
    names = list(dict.fromkeys(one.metric for one in own))
    chosen = [one for one in own if metric in (None, one.metric, one.metric.split(" ")[0])]
    if not chosen:
        raise InputError(f"--eval-metric {metric}: {asked} has {', '.join(names)}; give one of them")
    better = [one for one in chosen if one.better]
    if not better:
        raise InputError(
            f"--eval-tasks {asked}: {chosen[0].metric} is better when it is lower, and validations are compared by the highest "
            "score; take another metric or task"
        )
    return better[0]


@contextmanager
def _in_words_of_a_run() -> Iterator[None]:
    """Name the flags of a run in errors that name those of `evaluate`."""
    try:
        yield
    except InputError as error:
        words = str(error)
        for theirs, ours in FLAGS.items():
            words = words.replace(theirs, ours)
        raise InputError(words) from None
