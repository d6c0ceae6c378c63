"""Measure a base and its adapters: the loss of rows, what was forgotten, and scores of tasks and of answers.

    models     a base, and adapters on it that share its arrays
    rows       a file, what a run held out, general texts, tasks of lm-eval
    measures   losses, answers, drift from the base, metrics, another model's judgment

Models are measured on the same rows: each sees a batch before any sees the next, so a measurement that is stopped compares them
on the same rows. Rows are read by the columns of the run that made the adapter, and without data, they are those that the run
held out.

What was forgotten is measured on the task, general text and general chat; probe questions are asked as well. The general sets in
the package (data/general) were written after the models that they test; users can give other sets. For each trained token x of the
held-out rows, given the tokens before it:

    change = log p_base(x) - log p_tuned(x)                          nats; above 0: the tuned model is worse
    KL     = sum over the vocabulary of p_base (log p_base - log p_tuned)    nats; how far the tuned model has moved

On the new task, this KL correlates with forgetting across methods (arXiv 2509.04259). LoRA forgets less than full
fine-tuning, and learns less (arXiv 2405.09673). Errors are standard errors over rows (utils/statistics.py), because the tokens
of one row are not independent.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base, speaks_python
from mlx_lora.api.train import data_source, run_settings
from mlx_lora.config.fields import flag_of
from mlx_lora.config.load import train_settings
from mlx_lora.config.objectives import ObjectiveSettings, row_of
from mlx_lora.config.rules import settings_problems
from mlx_lora.config.settings import COLUMNS, DEFAULT_BATCH_TOKENS, FIELDS, DataSettings, ModelSettings, TrainSettings
from mlx_lora.data.chat_exports import chat_kind
from mlx_lora.data.chat_template import encode_prompt, own_template, resolve_template
from mlx_lora.data.data_sets import find_sets, is_local, named_sets
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.examples import Record
from mlx_lora.data.file_formats import read_records
from mlx_lora.data.formats import without_names
from mlx_lora.data.load import DataSplits, load_data, load_eval_set
from mlx_lora.data.notes import seen_rows
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.engine.adapter_store import AdapterSource, check_names, own_name
from mlx_lora.evaluation.metrics import (
    AnswerPair,
    Metric,
    answer_rows,
    expected_text,
    judge_pairs,
    metric_of,
    question_text,
    score_rows,
)
from mlx_lora.evaluation.models import Models
from mlx_lora.evaluation.paired import Readout, TaskResults, token_losses
from mlx_lora.exporters.adapter_folder import check_writes_text, load_adapter, run_of, with_limits_of_run
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.load import Base, check_token_ids, load_base
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.synthetic_prompts import written_data
from mlx_lora.objectives.table import check_kind, objective_of, with_pictures
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.parallel.strategy import dividing_flag
from mlx_lora.reports.charts import COMMON, Bar, bar_chart, render_page
from mlx_lora.reports.charts import perplexity as perplexity_text
from mlx_lora.reports.run_report import Count, read_facts
from mlx_lora.trainer.adapter import adapter_head, adapter_template, put_adapter, with_reference_of_run
from mlx_lora.trainer.ask import ADAPTER, BASE, ask, never
from mlx_lora.trainer.callbacks import greedy_text, row_answer
from mlx_lora.trainer.evaluate import RowLosses, held_out_loss, held_out_plan, mean_loss, paired_change
from mlx_lora.trainer.fit import strategy_of
from mlx_lora.trainer.run_folder import WRITTEN
from mlx_lora.utils.console import perplexity
from mlx_lora.utils.errors import InputError, refuse
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.hub import resolve_adapter
from mlx_lora.utils.progress import tracked
from mlx_lora.utils.statistics import ratio_error

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mlx_lora.data.batch import Batch

log = logging.getLogger(__name__)

MOST_SEEN_BYTES = 20_000_000  # of a run's data; larger data takes long, and is only read on request (--data)
USUAL = 5  # questions, where nobody says how many


@speaks_python(adapter_path="adapter")
def evaluate(
    base: PublicBase | PathLike,
    data: Any,
    adapter: PathLike | None = None,
    *,
    objective: str = ObjectiveSettings.objective,
    batch_tokens: int | None = None,
    ignore_fingerprint: bool = False,
    show: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Return the losses of adapter and base, and their answers, as `mlx-lora evaluate --json` prints them.

    Args:
        base: from `load`, or a model's name; it stays as it is.
        data: as for `train`; of several splits, test is measured, else validation.
        adapter: folder or hub id of an adapter to put on the base; None: the base alone.
        objective: what the data is: sft, or the objective of a preference run (dpo, kto, reward ...).
        batch_tokens: tokens per batch, padding included; None: the default.
        ignore_fingerprint: use an adapter that was trained on another base of the same shape.
        show: questions of the data to ask base and adapter, whose answers come back as `examples`; each takes a second or
            more.
        settings: of data and objective, as for `train`: `max_seq_length`, `mask_prompt`, `chat_template`, `beta` ...

    Returns:
        `loss`, `perplexity` (or what the objective reports), `supervised_tokens` (`answers` if they were sampled), `rows`,
        `model`, `adapter_path`, `data`. For imitation with an adapter also `base_loss`, `base_perplexity`, and `change`:
        the `change` of the loss, `low` and `high` of its 95% interval, over how many `rows`, and among how many `choices`
        these rows chose the adapter; and `near_training`, how many rows repeat or nearly repeat rows that the adapter's run
        trained on (None: not known). With `show` also `examples`, and `right`: how many answers are `right`, `of` those that can
        be checked, and how many of the `base`'s.

    Raises:
        InputError: base, adapter, data or a setting that cannot be used.
    """
    base, source = as_base(base, "evaluate"), data_source(data)
    resolved = run_settings(
        base.settings, {**settings, "objective": objective, "data": source}, of=("data", "objective")
    )
    if batch_tokens is not None and batch_tokens < 2:
        raise InputError(f"--batch-tokens {batch_tokens}: must be at least 2")
    check_evaluation(resolved, adapter, show)
    folder = None if adapter is None else resolve_adapter(os.fspath(adapter), None)
    resolved = with_settings_of_run(resolved, settings, folder)
    with base.loaded.lent() as lent:
        found = measure_loss(
            resolved,
            lent,
            EvaluationRequest(folder, ignore_fingerprint=ignore_fingerprint, batch_tokens=batch_tokens, show=show),
        )
    return found | {"adapter_path": None if adapter is None else os.fspath(adapter), "data": source}


def compares(settings: TrainSettings) -> bool:
    """Return whether base and adapter are measured together: where a row's loss is its tokens', and this process has the base."""
    asked = settings.objective
    return asked.row.of_answers and not asked.images and not dividing_flag(settings.loop)


def check_evaluation(settings: TrainSettings, adapter: PathLike | None, show: int) -> None:
    """Refuse, before a model is loaded, scores without the adapter that gives them, and questions where nothing is compared.

    Raises:
        InputError: there is no such adapter, or questions are asked for.
    """
    name = settings.objective.objective
    what = dividing_flag(settings.loop) or f"--objective {name}"
    refuse(
        {
            f"--objective {name} without --adapter-path: no score head; give an adapter trained with it": (
                settings.objective.row.scores and not adapter
            ),
            f"--show {show} with {what}: only imitation with the whole base shows answers; leave it out": (
                show and not compares(settings)
            ),
        }
    )


@dataclass(frozen=True)
class EvaluationRequest:
    """What is measured besides data and objective.

    Attributes:
        adapter: folder to put on the model; None: the base alone is measured.
        against: folders of further adapters, for what was forgotten.
        general: set -> file or id, instead of the package's general sets.
        ignore_fingerprint: as for load_adapter.
        batch_tokens: positions per batch; None: the default.
        show: rows of which to ask the questions; None: a few, if the rows have questions.
        held_out: measure the rows that the adapter's run held out, and not --data, which then only says how data is read.
        stopped: asked whether to end with what is measured so far; the result then has `partial`.
    """

    adapter: Path | None = None
    against: Sequence[Path] = ()
    general: Mapping[str, str] = field(default_factory=dict)
    ignore_fingerprint: bool = False
    batch_tokens: int | None = None
    show: int | None = 0
    held_out: bool = False
    stopped: Callable[[], bool] = never


def measure_loss(settings: TrainSettings, base: Base, asked: EvaluationRequest, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Return what `evaluate` returns, without adapter_path and data.

    Args:
        settings: data and objective.
        base: the model; it gets the adapter.
        asked: what else is asked.
        ranks: that share the base, if the settings say so.

    Raises:
        InputError: adapter or data that cannot be used.
    """
    settings = with_pictures(settings, base.config)
    adapter, ignore_fingerprint, objective = asked.adapter, asked.ignore_fingerprint, objective_of(settings.objective)
    if settings.objective.row.reference and (flag := dividing_flag(settings.loop)):
        raise InputError(
            f"--objective {settings.objective.objective} with {flag}: the reference is the whole base without the "
            "adapter; leave out one of the two"
        )
    settings = replace(settings, loop=replace(settings.loop, batch_tokens=asked.batch_tokens, test_batches=-1))
    data = settings.data
    if not data.chat_template and (template := adapter_template(adapter)):
        base.hf_tokenizer.chat_template = template
    strategy = strategy_of(settings, ranks)
    ctx = RunContext(settings, objective, base, strategy, trains=False, ignore_fingerprint=ignore_fingerprint)
    check_kind(base.model, base.model_id, objective)
    if (
        settings.objective.row.reference and settings.adapter.resume_adapter_file
    ):  # the reference is a copy with that adapter
        ctx.untrained = without_adapter(base)
    if adapter:
        ctx.score_head = adapter_head(adapter, settings.objective)
    objective.open(ctx)  # before an adapter is on the base
    if asked.held_out and adapter:
        rows, trained = held_out_rows(adapter, base.hf_tokenizer)
    else:
        rows, trained = objective.read_set(ctx, data), None
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {data.data}")
    if not compares(settings):
        rows = objective.compare(ctx, {"rows": rows})["rows"]  # before the adapter: the base may be the teacher
        if adapter:
            put_adapter(base, adapter, data, settings.objective, ignore_fingerprint)
        ctx.settings = strategy.divide(base, settings)
        if strategy.words:
            log.info(strategy.words)
            strategy.check_same(ctx.settings, {"base": base.fingerprint, "rows": rows.fingerprint})
        found = held_out_loss(ctx, rows)
        means = found.reports or {"perplexity": perplexity(found.loss)}
        counted = (
            {"answers": found.count} if settings.objective.rewarded else {"supervised_tokens": rows.supervised_tokens}
        )
        counts = {**counted, "rows": rows.examples}
        return {"loss": found.loss, **means, **counts, "model": base.model_id, **found.details}

    near = {"near_training": near_training(adapter, base, rows, trained)} if adapter else {}
    models, questions = {BASE: base}, questions_of(rows, asked.show)
    if adapter:
        models = {BASE: without_adapter(base), ADAPTER: base}
        put_adapter(base, adapter, data, settings.objective, ignore_fingerprint)
    losses, whole = measure_rows(models, rows, ctx, asked.stopped)
    examples, answered = ask(models, rows, questions, asked.stopped) if questions and whole else ([], whole)
    measured = losses[BASE].tokens if losses else []
    result: dict[str, Any] = _losses(losses[ADAPTER if adapter else BASE]) if losses else {}
    result |= {"supervised_tokens": int(sum(measured)), "rows": len(measured), "model": base.model_id}
    if adapter and losses:
        result |= {f"base_{name}": value for name, value in _losses(losses[BASE]).items()}
        choices = choices_of(adapter) if asked.held_out else 1
        result["change"] = asdict(paired_change(losses[BASE], losses[ADAPTER], choices))
    if examples:
        right = Count.over(examples if adapter else [{"right": one["base_right"]} for one in examples])
        result |= {"right": right and asdict(right), "examples": examples}
    return {**result, "partial": not (whole and answered), **near}


def _losses(rows: RowLosses) -> dict[str, float]:
    return {"loss": rows.loss, "perplexity": perplexity(rows.loss)}


def near_training(adapter: Path, base: Base, rows: EncodedSet, trained: EncodedSet | None) -> dict[str, Any] | None:
    """Return how many rows the adapter's run has seen, as JSON values; None where its training rows are not known.

    Args:
        adapter: its folder.
        base: for the tokenizer.
        rows: that are measured.
        trained: the run's training rows, if they are read already.
    """
    if trained is None:
        if not run_of(adapter).get("data"):
            return None
        splits = data_of_run(adapter, base.hf_tokenizer, MOST_SEEN_BYTES)
        if isinstance(splits, str):
            log.info(f"Not compared with the rows that the run trained on: {splits}")
            return None
        trained = splits.train
    seen = seen_rows(rows, trained, base.hf_tokenizer)
    if words := seen.words():
        log.info(f"Note: {words}")
    return asdict(seen)


def choices_of(adapter: Path) -> int:
    """Return among how many its run chose an adapter by the rows that it held out, as report.json says; 1: it did not."""
    with suppress(KeyError, TypeError, ValueError):
        return max(1, int(read_facts(adapter)["verdict"]["change"]["choices"]))
    return 1


def without_adapter(base: Base) -> Base:
    """Return the same model for an adapter to be put on, or to stay without one; the arrays are shared."""
    return replace(base, model=copy.deepcopy(base.model))  # copies modules, not their arrays


def measure_rows(
    models: Mapping[str, Base],
    rows: EncodedSet,
    ctx: RunContext,
    stopped: Callable[[], bool] = never,
) -> tuple[dict[str, RowLosses], bool]:
    """Return the losses of the rows for each model, and whether all rows were measured.

    Args:
        models: name -> model.
        rows: to measure.
        ctx: of the measurement, whose objective's loss is a mean over tokens.
        stopped: asked before each batch whether to end.
    """
    loop = ctx.settings.loop
    bound = {
        name: ctx.objective.bind(replace(ctx, base=one), choose_loss(one.model, one.config, loop.kernels), rows)
        for name, one in models.items()
    }
    plan = held_out_plan(rows, loop)
    parts: dict[str, list[RowLosses]] = {name: [] for name in models}
    batches = takewhile(lambda _: not stopped(), plan.batches())
    for batch in tracked(batches, "Measuring", len(plan), "batches"):
        for name, one in models.items():
            measured = mean_loss(one.model, bound[name], [batch]).rows
            if measured is not None:
                parts[name].append(measured)
    found = {
        name: RowLosses(*(np.concatenate([getattr(part, of) for part in own]) for of in ("sums", "tokens")))
        for name, own in parts.items()
        if own
    }
    done = max((len(own.tokens) for own in found.values()), default=0)
    return found, done == int((rows.supervised_counts > 0).sum())


def questions_of(rows: EncodedSet, most: int | None) -> list[int]:
    """Return the numbers of the rows whose questions are asked, spaced evenly over all.

    Args:
        rows: of prompts and answers; rows of plain text ask nothing.
        most: how many to ask; None: a few, or none if no row has a prompt.

    Raises:
        InputError: no row has a prompt.
    """
    if most == 0:
        return []
    asked = [number for number in range(0, len(rows), rows.group) if row_answer(rows, number)]
    if not asked and most is not None:
        raise InputError("--show: the rows are plain text without questions; leave it out, or give --show 0")
    most = USUAL if most is None else most
    return [asked[(2 * i + 1) * len(asked) // (2 * most)] for i in range(most)] if most < len(asked) else asked


# Rows of a run

# Settings of a run that say how its data is read: of columns, of chat exports, and all that decide which rows it has.
NAMES = (*COLUMNS, "label_column", "turn_names")
CHAT_COLUMNS = ("speaker", "conversation_gap")
TRAINED_PARTS = ("mask_prompt", "allow_special_tokens")
# Settings of an objective that name code to run or what to fetch: an adapter may be a stranger's, so its run.yaml must not choose them.
NAMED_BY_USER = ("reward", "reward_weights", "environment", "tools", "teacher", "teacher_prompt", "own_prompts")
HOW_COMPUTED = ("shared_prefix", "reward_errors", "reward_timeout")  # settings of an objective that change no loss
DATA_FIELDS = (*(field.name for field in dataclasses.fields(DataSettings)), "seed", "objective")


def with_settings_of_run(settings: TrainSettings, given: Collection[str], adapter: Path | None) -> TrainSettings:
    """Return the settings with those of the run that made the adapter: limits, objective, reference, and columns if the data has them.

    Args:
        settings: of the evaluation.
        given: settings that the user gave; each of them decides, and not the run. If one names columns, format or turns, the
            run's columns are not used.
        adapter: the adapter's folder; one without run.yaml changes nothing.
    """
    if adapter is None:
        return settings
    settings = replace(settings, data=with_limits_of_run(settings.data, given, adapter))
    run, words = run_of(adapter), f"As in the run that trained {adapter}"
    if run.get("objective") == settings.objective.objective:
        ours = asdict(settings.data)
        trained = {
            name: run[name]
            for name in TRAINED_PARTS
            if name not in given and isinstance(run.get(name), bool) and run[name] != ours[name]
        }
        settings = _taken(settings, "data", trained, words)
        names = {*given, *HOW_COMPUTED, *NAMED_BY_USER}  # not those, and no code
        loss = {
            name: run[name]
            for name, value in asdict(settings.objective).items()
            if name in run and name not in names and run[name] != value
        }
        settings = _taken(settings, "objective", loss, words)
    data = settings.data.data
    if data and {*NAMES, *CHAT_COLUMNS, "data_format"}.isdisjoint(given):
        firsts = [files[0].path for files in find_sets(data)[0].splits.values()]
        if isinstance(run.get("speaker"), str) and any(map(chat_kind, firsts)):  # a chat export
            columns = {name: run[name] for name in CHAT_COLUMNS if name in run}
        else:
            columns = {name: value for name, value in run.items() if name in NAMES and value and isinstance(value, str)}
        if columns and _has_columns(data, columns):
            settings = _taken(settings, "data", columns, f"Columns a{words[1:]}")
    return with_reference_of_run(settings, adapter)


def _taken(settings: TrainSettings, section: str, found: Mapping[str, Any], words: str) -> TrainSettings:
    """Return the settings with those of a run in one section, and say so; without them where they exclude each other."""
    changed = replace(settings, **{section: replace(getattr(settings, section), **found)})
    if not found or settings_problems(changed.to_flat()):
        return settings
    flags = []
    for name, value in found.items():
        flag = flag_of(name)
        flags.append({True: flag, False: f"--no-{flag[2:]}"}[value] if isinstance(value, bool) else f"{flag} {value}")
    log.info(f"{words}: {', '.join(flags)}")
    return changed


def with_settings_of_runs(settings: TrainSettings, given: Collection[str], adapters: Collection[Path]) -> TrainSettings:
    """Return the settings as `with_settings_of_run` does, for rows that several adapters answer.

    Raises:
        InputError: their runs read other columns.
    """
    found = {folder: with_settings_of_run(settings, given, folder) for folder in adapters}
    columns = {tuple(getattr(one.data, name) for name in (*NAMES, *CHAT_COLUMNS)) for one in found.values()}
    if len(columns) > 1:
        raise InputError(
            f"--data {settings.data.data}: the runs of {', '.join(map(str, found))} read other columns; name those to read "
            "(--prompt-column, --completion-column)"
        )
    return next(iter(found.values()), settings)


def _has_columns(data: str, found: dict[str, str]) -> bool:
    """Tell whether the first record has one of the columns; names of turns alone are taken for any data."""
    columns = {part.strip() for name, value in found.items() if name in COLUMNS for part in (value, *value.split(","))}
    if not columns:
        return True
    for files in find_sets(data)[0].splits.values():
        for record in read_records(files[0].path, files[0].sheet):
            if isinstance(record, Record):
                return not columns.isdisjoint(record.value)
    return False


def settings_of_run(adapter: Path | None, given: Mapping[str, Any]) -> TrainSettings:
    """Return settings with the data of the run that made an adapter, for measuring the rows that it held out.

    Args:
        adapter: its folder.
        given: the other settings, by name.

    Raises:
        InputError: there is no run of imitation whose data is named, or a setting would change how the data is read.
    """
    run = {} if adapter is None else run_of(adapter)
    found = {name: run[name] for name in DATA_FIELDS if run.get(name) is not None}
    objective = given.get("objective") or found.get("objective")
    changed = ", ".join(flag_of(name) for name in given if name in DATA_FIELDS and name != "objective")
    if not found.get("data"):
        raise InputError(
            "--data is required: a data file, or a folder with a test or valid split; only the adapter of a run can do "
            "without, and the rows that the run held out are measured"
        )
    refuse(
        {
            f"--data is required with --objective {objective}: name the rows to measure": not row_of(
                objective
            ).of_answers,
            f"{changed} without --data: held-out rows are read as the run read them; name the data": changed,
        }
    )
    return train_settings({**found, **given})


def held_out_rows(adapter: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[EncodedSet, EncodedSet]:
    """Return the rows that a run held out, its test rows if it has some, and those that it trained on.

    Raises:
        InputError: it held nothing out, or its data is not there as it was.
    """
    splits = data_of_run(adapter, tokenizer)
    held_out = splits if isinstance(splits, str) else splits.test or splits.valid
    if isinstance(splits, str) or not isinstance(held_out, EncodedSet):
        why = splits if isinstance(splits, str) else "the run held no rows out"
        raise InputError(f"no --data, and no held-out rows of {adapter}: {why}; give --data FILE")
    return held_out, splits.train


def data_of_run(
    adapter: Path,
    tokenizer: PreTrainedTokenizerBase,
    most_bytes: float = math.inf,
) -> DataSplits | str:
    """Return the data of the run that made an adapter, split as in the run, or why there is none.

    Args:
        adapter: its folder.
        tokenizer: with the adapter's chat template.
        most_bytes: larger files are not read.
    """
    run = {name: value for name, value in run_of(adapter).items() if name in FIELDS}
    data = run.get("data")
    if not data:
        return "the adapter's folder does not name its data"
    try:
        settings = train_settings(run)
        if not settings.objective.row.of_answers:
            return f"the adapter was trained with --objective {settings.objective.objective}"
        if not all(is_local(name) for name, _ in named_sets(data)):
            return "the data of its run is not on this disk"
        files = [file for one in find_sets(data) for part in one.splits.values() for file in part]
        if sum(file.path.stat().st_size for file in files) > most_bytes:
            return "the data of its run is large"
        written = settings.data.rephrase and (adapter / WRITTEN).is_dir()
        asked = written_data(settings.data, adapter / WRITTEN) if written else settings.data
        splits = load_data(asked, tokenizer, settings.loop.seed)
    except InputError as error:
        return f"the data of its run cannot be read ({error})"
    # The training rows have the sizes that the run's report has; without a report nobody knows.
    known = (read_facts(adapter).get("data") or {}).get("splits", {}).get("train")
    if known is None or known == splits.report.to_dict()["splits"]["train"]:
        return splits
    return "the data of its run has changed"


# Forgetting

GENERAL = Path(__file__).parents[1] / "data" / "general"
TASK, TEXT, CHAT = "task", "general text", "general chat"
PROBE_TOKENS = 24
# The largest rise in loss that counts as no change, and the largest that counts as small: 2% and 10% of perplexity.
NO_CHANGE, SMALL_CHANGE = 0.02, 0.1


@dataclass(frozen=True)
class Drift:
    """The differences between a tuned model and its base on one held-out set.

    Attributes:
        rows, tokens: how many the set has.
        base_loss, loss: nats per token, of the base and of the tuned model.
        change_error, change_reach: of loss - base_loss, the standard error and half of the 95% interval.
        kl, kl_error: nats per token, and its standard error.
        same_top: fraction of tokens for which both models have the same most likely token.
    """

    rows: int
    tokens: int
    base_loss: float
    loss: float
    change_error: float
    change_reach: float
    kl: float
    kl_error: float
    same_top: float

    @property
    def change(self) -> float:
        """The change in nats per token; above 0 the tuned model is worse."""
        return self.loss - self.base_loss

    def verdict(self, learned: bool) -> str:
        """Return the change in words.

        Args:
            learned: whether the set is of the trained task, so that a fall is wanted.
        """
        if abs(self.change) <= self.change_reach:
            if learned:
                return "not learned"
            return "kept" if self.change + self.change_reach <= SMALL_CHANGE else "unclear, too few rows"
        if learned:
            return "learned" if self.change < 0 else "worse than the base"
        if self.change <= NO_CHANGE:
            return "kept" if self.change > -NO_CHANGE else "better than the base"
        return "slightly forgotten" if self.change <= SMALL_CHANGE else "forgotten"


def measure_forgetting(settings: DataSettings, base: Base, asked: EvaluationRequest) -> dict[str, Any]:
    """Measure adapters against the base, which is unadapted and is not changed.

    Args:
        settings: the task's data; its template and lengths are used for the general sets as well.
        base: the model.
        asked: which adapters, and what else. A set that was begun when it is stopped is of the batches so far.

    Returns:
        JSON values: `model`, `adapters` (name -> method and rank), `sets` (set -> its `source`, and by adapter the numbers
        of a Drift and its `verdict`), `probes` (`questions`, how many each model got `right`, and `texts`).

    Raises:
        InputError: an adapter does not fit, adapters have different templates, data have no trained token, or no rows were
            held out.
    """
    general, stopped = asked.general, asked.stopped
    folders = [*([asked.adapter] if asked.adapter else []), *asked.against]
    models, adapters, templates = {}, {}, set()
    for folder, name in zip(folders, adapter_names(folders), strict=True):
        models[name] = without_adapter(base)
        check_writes_text(folder)
        info = load_adapter(models[name], folder, asked.ignore_fingerprint)
        templates.add(info.chat_template)
        adapters[name] = info.method if info.method == "full" else f"{info.method}, rank {info.rank}"
    if len(templates) > 1:
        raise InputError(
            f"--against: {', '.join(models)} were trained with different chat templates; measure them one by one"
        )
    if (template := templates.pop()) and not settings.chat_template:
        base.hf_tokenizer.chat_template = template
    sources = {TASK: settings.data, TEXT: GENERAL / "text.jsonl", CHAT: GENERAL / "chat.jsonl", **general}
    readout, readouts = Readout(base), {name: Readout(model) for name, model in models.items()}
    sets: dict[str, dict[str, Drift]] = {}
    for where, source in takewhile(lambda _: not stopped(), sources.items()):
        held_out = where == TASK and asked.held_out
        if held_out:
            rows, trained = held_out_rows(folders[0], base.hf_tokenizer)
        else:
            chosen, trained = settings if where == TASK else without_names(settings), None
            rows = load_eval_set(str(source), chosen, base.hf_tokenizer)
        if where == TASK:
            near_training(folders[0], base, rows, trained)
        check_token_ids(base, int(rows.tokens.max(initial=0)), str(source))
        plan = BatchPlan(rows, batch_tokens=asked.batch_tokens or DEFAULT_BATCH_TOKENS, batch_size=None, seed=0)
        log.info(f"Measuring the set '{where}': {int(rows.supervised_counts.sum())} tokens in {len(rows)} rows")
        begun = takewhile(lambda _: not stopped(), plan.batches())
        batches = tracked(begun, f"Measuring {where}", len(plan), "batches")
        choices = {name: choices_of(folder) for name, folder in zip(models, folders, strict=True) if held_out}
        if drifts := measure_drifts(readout, readouts, batches, choices):
            sets[where] = drifts
        elif not stopped():
            raise InputError(f"--data {source}: no trained token in the set; give rows with something to answer")
    log.info(f"Asking {len(models) + 1} models the probe questions")
    template = own_template(base.hf_tokenizer)
    if settings.chat_template:
        template = resolve_template(settings.chat_template, base.hf_tokenizer)[0]
    probes = ask_probes({"base": base, **models}, template, stopped)
    named = {TASK: f"held-out rows of {settings.data}" if asked.held_out else settings.data, **general}
    facts: dict[str, Any] = {"model": base.model_id, "adapters": adapters, "sets": {}}
    for where, drifts in sets.items():
        measured = {
            name: {**asdict(drift), "change": drift.change, "verdict": drift.verdict(learned=where == TASK)}
            for name, drift in drifts.items()
        }
        facts["sets"][where] = {"source": str(named.get(where, "built in")), "adapters": measured}
    right = {name: sum(probe["right"][name] for probe in probes) for name in ("base", *adapters)}
    return facts | {"probes": {"questions": len(probes), "right": right, "texts": probes}}


def adapter_names(folders: Sequence[Path]) -> list[str]:
    """Return a short name for each: the folder's name, or as much of its path as makes it unique."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for own in parts:
        others = [other for other in parts if other is not own]
        depth = next((n for n in range(1, len(own)) if all(o[-n:] != own[-n:] for o in others)), len(own) - 1)
        names.append("/".join(own[-depth:]))
    if len(set(names)) < len(names):
        raise InputError(f"--against {folders[-1]}: given twice; give each adapter once")
    return names


def ask_probes(
    models: dict[str, Base], template: str | None, stopped: Callable[[], bool] = never
) -> list[dict[str, Any]]:
    """Ask every model every probe question, and return of each `question`, `answers`, and by model what was `said` and `right`.

    Args:
        models: name -> model.
        template: Jinja text for questions; None: the models complete sentences instead.
        stopped: asked before each question whether to end.
    """
    probes = []
    lines = (GENERAL / "probes.jsonl").read_text(encoding="utf-8").splitlines()
    for line in tracked(takewhile(lambda _: not stopped(), lines), "Asking", len(lines), "questions"):
        row = json.loads(line)
        prompt = row["question"] if template else row["completion"]
        said = {}
        for name, model in models.items():
            tokens = encode_prompt(model.hf_tokenizer, prompt, template)
            said[name] = greedy_text(model, tokens, PROBE_TOKENS).strip()
        right = {name: has_answer(text, row["answers"]) for name, text in said.items()}
        probes.append({"question": prompt, "answers": row["answers"], "said": said, "right": right})
    return probes


def has_answer(text: str, answers: Sequence[str]) -> bool:
    """Tell whether a text contains one of some answers as a whole word, in any case."""
    words = "|".join(map(re.escape, answers))
    return re.search(rf"(?<!\w)(?:{words})(?!\w)", text, re.IGNORECASE) is not None


def measure_drifts(
    base: Readout, tuned: Mapping[str, Readout], batches: Iterable[Batch], choices: Mapping[str, int] | None = None
) -> dict[str, Drift]:
    """Measure the same batches with the base, once, and with every tuned model; nothing if they have no trained token.

    Args:
        base: the model that all are compared with.
        tuned: name -> model, with the same vocabulary.
        batches: held-out rows, each once.
        choices: name -> among how many the model was chosen by these rows; None: none was.
    """
    base_losses, columns, owners, row_count = [np.zeros(0)], [], [], 0
    for batch in batches:
        losses, found = token_losses(base.read(batch), [one.read(batch) for one in tuned.values()])
        base_losses.append(losses)
        columns.append(found)
        owners.append(np.flatnonzero(batch.mask) // batch.mask.shape[1] + row_count)
        row_count += len(batch.mask)
    of_base = np.concatenate(base_losses).astype(np.float64)
    if not len(of_base):
        return {}
    rows = np.unique(np.concatenate(owners), return_inverse=True)[1]
    counts, drifts = np.bincount(rows), {}
    for name, parts in zip(tuned, zip(*columns, strict=True), strict=True):
        losses, kls, same = np.concatenate(parts, axis=1).astype(np.float64)
        changes = np.bincount(rows, losses - of_base)
        change_error, change_reach = ratio_error(changes, counts, (choices or {}).get(name, 1))
        drifts[name] = Drift(
            rows=int(rows.max()) + 1, tokens=len(rows), base_loss=float(of_base.mean()), loss=float(losses.mean()),
            change_error=change_error, change_reach=change_reach, kl=float(kls.mean()),
            kl_error=ratio_error(np.bincount(rows, kls), counts)[0], same_top=float(same.mean()),
        )  # fmt: skip
    return drifts


# The page


def write_page(path: Path, facts: dict[str, Any], command: str, device: str) -> None:
    """Write the page.

    Args:
        path: its file; replaced atomically.
        facts: from `measure_forgetting`.
        command: the command that measured it.
        device: a line about the machine.
    """
    names = list(facts["adapters"])
    probes = [
        {"question": probe["question"], "said": [(probe["said"][n], probe["right"][n]) for n in ("base", *names)]}
        for probe in facts["probes"]["texts"]
    ]
    page = render_page(
        COMMON, "forgetting.html", facts=facts, names=names, badges=badges(facts), charts=charts(facts),
        rows=verdict_rows(facts), small=(NO_CHANGE, SMALL_CHANGE),
        sources={where: one["source"] for where, one in facts["sets"].items()}, probes=probes, command=command,
        device=device, date=date.today().isoformat(),
    )  # fmt: skip
    replace_text(path, page)


def verdict_rows(facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return the table's rows (column -> cell), one per set and adapter, with the probes last.

    Args:
        facts: from `measure_forgetting`.
    """

    def error(value: float | None) -> str:
        """Return a standard error as text; nothing for a set of one row, which has none."""
        return "" if value is None or math.isnan(value) else f" ± {value:.4f}"

    rows = [
        {
            "set": where, "adapter": name, "verdict": drift["verdict"], "tokens": f"{drift['tokens']:,}",
            "base perplexity": perplexity_text(drift["base_loss"]), "perplexity": perplexity_text(drift["loss"]),
            "change": f"{drift['change']:+.4f}{error(drift['change_error'])}",
            "KL": f"{drift['kl']:.4f}{error(drift['kl_error'])}", "same top token": f"{drift['same_top']:.1%}",
        }
        for where, one in facts["sets"].items()
        for name, drift in one["adapters"].items()
    ]  # fmt: skip
    right, asked = facts["probes"]["right"], facts["probes"]["questions"]
    for name in facts["adapters"] if rows and asked else ():
        counts = {"base perplexity": f"{right['base']} right", "perplexity": f"{right[name]} right"}
        rows.append(
            {**dict.fromkeys(rows[0], ""), "set": "probes", "adapter": name, "tokens": f"{asked} asked", **counts}
        )
    return rows


TONES = {
    "kept": "good", "learned": "good", "better than the base": "good", "slightly forgotten": "plain", "not learned": "plain",
    "unclear, too few rows": "plain", "forgotten": "bad", "worse than the base": "bad",
}  # fmt: skip


def badges(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the page's beginning: for each adapter a sentence, and (set, verdict, tone) of each set.

    Args:
        facts: from `measure_forgetting`.
    """
    found = []
    for name in facts["adapters"]:
        verdicts = {where: one["adapters"][name]["verdict"] for where, one in facts["sets"].items()}
        found.append(
            {
                "adapter": name,
                "sentence": _sentence(verdicts),
                "badges": [(where, words, TONES[words]) for where, words in verdicts.items()],
                "right": f"{facts['probes']['right'][name]} of {facts['probes']['questions']}",
                "base_right": facts["probes"]["right"]["base"],
            }
        )
    return found


def _sentence(verdicts: dict[str, str]) -> str:
    """Return what an adapter learned and forgot as one sentence."""
    task, *general = verdicts.values()
    learned = {
        "learned": "learned the task",
        "not learned": "did not measurably learn the task",
        "worse than the base": "made the task worse",
    }[task]
    lost = [where for where, words in verdicts.items() if words in ("forgotten", "slightly forgotten")]
    slightly = "slightly " if "forgotten" not in general else ""
    if lost:
        return f"{learned}, and {slightly}forgot {' and '.join(lost)}"
    if any(words.startswith("unclear") for words in general):
        return f"{learned}; the general sets have too few rows to tell what it forgot"
    return f"{learned}, and kept what the base knew" if task == "learned" else f"{learned}; it kept what the base knew"


def charts(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the page's charts, with a bar for each model: perplexity and KL of each set, and the probes.

    Args:
        facts: from `measure_forgetting`.
    """
    names = list(facts["adapters"])
    perplexities, divergences = [], []
    for where, measured in facts["sets"].items():
        of_set = measured["adapters"]
        losses = [("base", of_set[names[0]]["base_loss"], 2, "")]
        losses += [(name, one["loss"], at % 2, one["verdict"]) for at, (name, one) in enumerate(of_set.items())]
        bars = [
            # Finite even for a diverged adapter.
            Bar(name, math.exp(min(loss, 30.0)), words=perplexity_text(loss), color=color, note=note)
            for name, loss, color, note in losses
        ]
        perplexities.append((f"Perplexity, {where}", bars))
        bars = []
        for index, (name, drift) in enumerate(of_set.items()):
            kl, error = max(drift["kl"], 0.0), drift["kl_error"] if math.isfinite(drift["kl_error"]) else 0.0
            bars.append(Bar(name, kl, low=max(kl - error, 0.0), high=kl + error, color=index % 2))
        divergences.append((f"KL from the base, {where}", bars))
    right = facts["probes"]["right"]
    answers = [Bar(name, right[name], color=2 if name == "base" else names.index(name) % 2) for name in right]
    drawn = [*perplexities, *divergences, (f"Right answers to {facts['probes']['questions']} probes", answers)]
    return [{"title": title, "svg": bar_chart(title, bars)} for title, bars in drawn]


# Tasks, and answers to rows of a file

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
        schema: a JSON Schema that the answers to the rows fit; None: they may be any text.
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
    schema: Any = None


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
    schema: dict[str, Any] | None = None,
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
        schema: a JSON Schema that these answers fit, unless they are cut.
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
        chat_template, fewshot, limit, sources, ignore_fingerprint, batch_tokens, schema=schema,
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
            "--schema: is of answers to rows of your own; give --data FILE": asked.schema is not None and no_data,
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
            rows, answers = answer_rows(
                models, asked.data, metrics, asked.max_tokens, asked.limit, asked.stopped, asked.schema
            )
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
