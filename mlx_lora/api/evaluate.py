"""Measure the loss of a model on data, with or without an adapter, and put both models' answers side by side.

A base and its adapter are measured on the same rows: both see a batch before either sees the next, so a measurement that is
stopped compares them on the same rows. Rows are read by the columns of the run that made the adapter, and without data, they
are those that the run held out.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base
from mlx_lora.api.errors import speaks_python
from mlx_lora.api.run_data import data_of_run, held_out_rows, with_settings_of_run
from mlx_lora.api.train import data_source, run_settings
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.data.notes import seen_rows
from mlx_lora.exporters.adapter_folder import run_of
from mlx_lora.losses.check import choose_loss
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.table import check_kind, objective_of, with_pictures
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.parallel.strategy import dividing_flag
from mlx_lora.reports.diagnosis import Count
from mlx_lora.reports.run_report import read_facts
from mlx_lora.trainer.adapter import adapter_head, adapter_template, put_adapter
from mlx_lora.trainer.ask import ADAPTER, BASE, ask, never
from mlx_lora.trainer.callbacks import row_answer
from mlx_lora.trainer.choose_strategy import strategy_of
from mlx_lora.trainer.evaluate import RowLosses, held_out_loss, held_out_plan, mean_loss, paired_change
from mlx_lora.utils.console import perplexity
from mlx_lora.utils.errors import InputError, refuse
from mlx_lora.utils.hub import resolve_adapter
from mlx_lora.utils.progress import tracked

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.dataset import EncodedSet

log = logging.getLogger(__name__)

MOST_SEEN_BYTES = 20_000_000  # of a run's data; larger data takes long to compare with
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
        found = measure_loss(resolved, lent, EvaluationRequest(folder, ignore_fingerprint, batch_tokens, show))
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
        ignore_fingerprint: as for load_adapter.
        batch_tokens: positions per batch; None: the default.
        show: rows of which to ask the questions; None: a few, if the rows have questions.
        held_out: measure the rows that the adapter's run held out, and not --data.
        stopped: asked whether to end with what is measured so far; the result then has `partial`.
    """

    adapter: Path | None = None
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
