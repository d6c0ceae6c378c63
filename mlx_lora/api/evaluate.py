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
from dataclasses import asdict, dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base
from mlx_lora.api.errors import speaks_python
from mlx_lora.api.run_data import data_of_run, held_out_rows, with_settings_of_run
from mlx_lora.api.train import data_source, run_settings
from mlx_lora.data.duplicates import seen_rows
from mlx_lora.exporters.adapter_folder import run_of
from mlx_lora.losses.check import choose_loss
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.objectives.base import Objective, RunContext
from mlx_lora.objectives.table import check_kind, objective_of
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.parallel.strategy import dividing_flag
from mlx_lora.reports.answers import Count
from mlx_lora.reports.run_report import read_facts
from mlx_lora.trainer.adapter import adapter_head, adapter_template, put_adapter
from mlx_lora.trainer.ask import ADAPTER, BASE, ask, never
from mlx_lora.trainer.choose_strategy import strategy_of
from mlx_lora.trainer.evaluate import RowLosses, mean_loss, paired_change
from mlx_lora.trainer.held_out import held_out_loss, held_out_plan
from mlx_lora.trainer.report_callback import row_answer
from mlx_lora.utils import console
from mlx_lora.utils.console import perplexity
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_adapter
from mlx_lora.utils.progress import tracked

if TYPE_CHECKING:
    from mlx_lora.config.settings import LoopSettings, TrainSettings
    from mlx_lora.data.dataset import EncodedSet

log = logging.getLogger(__name__)

MOST_SEEN_BYTES = 20_000_000  # of a run's data; larger data takes long to compare with


@speaks_python(adapter_path="adapter")
def evaluate(
    base: PublicBase | PathLike,
    data: Any,
    adapter: PathLike | None = None,
    *,
    objective: str = "sft",
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
    check_adapter(resolved, adapter)
    if batch_tokens is not None and batch_tokens < 2:
        raise InputError(f"--batch-tokens {batch_tokens}: must be at least 2")
    check_show(resolved, show)
    folder = None if adapter is None else resolve_adapter(os.fspath(adapter), None)
    resolved = with_settings_of_run(resolved, settings, folder)
    with base.loaded.lent() as lent:
        found = measure_loss(resolved, lent, EvaluationRequest(folder, ignore_fingerprint, batch_tokens, show))
    return found | {"adapter_path": None if adapter is None else os.fspath(adapter), "data": source}


def check_adapter(settings: TrainSettings, adapter: PathLike | None) -> None:
    """Refuse to measure scores without the adapter that gives them, before a model is loaded.

    Raises:
        InputError: there is none.
    """
    if objective_of(settings.objective).scores and not adapter:
        name = settings.objective.objective
        raise InputError(f"--objective {name} without --adapter-path: no score head; give an adapter trained with it")


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
    objective, adapter = objective_of(settings.objective), asked.adapter
    if objective.reference and (flag := dividing_flag(settings.loop)):
        raise InputError(
            f"--objective {settings.objective.objective} with {flag}: the reference is the whole base without the "
            "adapter; leave out one of the two"
        )
    settings = replace(settings, loop=replace(settings.loop, batch_tokens=asked.batch_tokens, test_batches=-1))
    data = settings.data
    if not data.chat_template and (template := adapter_template(adapter)):
        base.hf_tokenizer.chat_template = template
    strategy = strategy_of(settings, ranks)
    ctx = RunContext(settings, objective, base, strategy, trains=False, ignore_fingerprint=asked.ignore_fingerprint)
    check_kind(base.model, base.model_id, objective)
    if objective.reference and settings.adapter.resume_adapter_file:  # the reference is a copy with that adapter
        ctx.untrained = without_adapter(base)
    objective.open(ctx)  # before an adapter is on the base
    if adapter:
        objective.measures_with(adapter_head(adapter, objective))
    if asked.held_out and adapter:
        rows, trained = held_out_rows(adapter, base.hf_tokenizer)
    else:
        rows, trained = objective.read_set(ctx, data), None
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {data.data}")
    rows = objective.targets_of(rows)
    if compares(settings):
        near = {"near_training": near_training(adapter, base, rows, trained)} if adapter else {}
        return _compared(settings, base, rows, asked) | near
    rows = objective.compare(ctx, {"rows": rows})["rows"]  # before the adapter: the base may be the teacher
    if adapter:
        put_adapter(base, adapter, data, objective, asked.ignore_fingerprint)
    ctx.settings = strategy.divide(base, settings)
    if strategy.words:
        log.info(strategy.words)
        strategy.check_same(ctx.settings, {"base": base.fingerprint, "rows": rows.fingerprint})
    found = held_out_loss(ctx, rows)
    means = found.reports or {"perplexity": console.perplexity(found.loss)}
    counted = {"answers": found.count} if objective.policy else {"supervised_tokens": rows.supervised_tokens}
    counts = {**counted, "rows": rows.examples}
    return {"loss": found.loss, **means, **counts, "model": base.model_id, **objective.details}


def compares(settings: TrainSettings) -> bool:
    """Return whether base and adapter are measured together: where a row's loss is its tokens', and this process has the base."""
    return settings.objective.objective == "sft" and not dividing_flag(settings.loop)


def check_show(settings: TrainSettings, show: int) -> None:
    """Refuse to ask questions where nothing is compared.

    Raises:
        InputError: it is asked to.
    """
    if show and not compares(settings):
        what = dividing_flag(settings.loop) or f"--objective {settings.objective.objective}"
        raise InputError(f"--show {show} with {what}: only imitation with the whole base shows answers; leave it out")


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


def _compared(settings: TrainSettings, base: Base, rows: EncodedSet, asked: EvaluationRequest) -> dict[str, Any]:
    """Measure base and adapter on the same rows, and ask both what some rows ask."""
    models, objective, questions = {BASE: base}, objective_of(settings.objective), questions_of(rows, asked.show)
    if asked.adapter:
        models = {BASE: without_adapter(base), ADAPTER: base}
        put_adapter(base, asked.adapter, settings.data, objective, asked.ignore_fingerprint)
    found, whole = measure_rows(models, rows, settings.loop, objective, asked.stopped)
    examples, answered = ask(models, rows, questions, asked.stopped) if questions and whole else ([], whole)
    choices = choices_of(asked.adapter) if asked.held_out and asked.adapter else 1
    result = Compared(found, whole and answered, examples, choices).to_dict()
    measured = next(iter(found.values())).tokens if found else []
    counts = {"supervised_tokens": int(sum(measured)), "rows": len(measured)}
    losses = {name: result.pop(name) for name in ("loss", "perplexity") if name in result}
    return {**losses, **counts, "model": base.model_id, **result}


# Base and adapter on the same rows

USUAL = 5  # questions, where nobody says how many


def without_adapter(base: Base) -> Base:
    """Return the same model for an adapter to be put on, or to stay without one; the arrays are shared."""
    return replace(base, model=copy.deepcopy(base.model))  # copies modules, not their arrays


@dataclass(frozen=True)
class Compared:
    """The losses of models on the same rows, and their answers to some of them.

    Attributes:
        rows: model -> its row losses: `base`, and `adapter` if there is one.
        whole: whether all rows were measured, and all that were asked answered.
        examples: what was asked; see `ask`.
        choices: among how many the adapter was chosen by these rows.
    """

    rows: dict[str, RowLosses]
    whole: bool
    examples: list[dict[str, Any]] = field(default_factory=list)
    choices: int = 1

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: those of the model that was asked for by their own names, those of the base with `base_`."""
        found: dict[str, Any] = {}
        last = list(self.rows)[-1] if self.rows else None
        for name, rows in self.rows.items():
            prefix = "" if name == last else f"{name}_"
            found |= {f"{prefix}loss": rows.loss, f"{prefix}perplexity": perplexity(rows.loss)}
        if len(self.rows) == 2:
            found["change"] = asdict(paired_change(self.rows[BASE], self.rows[ADAPTER], self.choices))
        if self.examples:
            alone = [{"right": one["base_right"]} for one in self.examples]
            right = Count.over(self.examples if ADAPTER in self.rows else alone)
            found |= {"right": right and asdict(right), "examples": self.examples}
        return found | {"partial": not self.whole}


def measure_rows(
    models: Mapping[str, Base],
    rows: EncodedSet,
    loop: LoopSettings,
    objective: Objective,
    stopped: Callable[[], bool] = never,
) -> tuple[dict[str, RowLosses], bool]:
    """Return the losses of the rows for each model, and whether all rows were measured.

    Args:
        models: name -> model.
        rows: to measure.
        loop: how rows are put into batches.
        objective: whose loss is a mean over tokens.
        stopped: asked before each batch whether to end.
    """
    bound = {
        name: objective.bind(choose_loss(one.model, one.config, loop.kernels), one.model)
        for name, one in models.items()
    }
    plan = held_out_plan(rows, loop)
    found: dict[str, list[RowLosses]] = {name: [] for name in models}
    batches = takewhile(lambda _: not stopped(), plan.batches())
    for batch in tracked(batches, "Measuring", len(plan), "batches"):
        for name, one in models.items():
            measured = mean_loss(one.model, bound[name], [batch]).rows
            if measured is not None:
                found[name].append(measured)
    done = sum(len(one.tokens) for one in next(iter(found.values())))
    joined = {
        name: RowLosses(*(np.concatenate([getattr(part, of) for part in parts]) for of in ("sums", "tokens")))
        for name, parts in found.items()
        if parts
    }
    return joined, done == int((rows.supervised_counts > 0).sum())


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
