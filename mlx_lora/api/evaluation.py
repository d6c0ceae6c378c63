"""Measure the loss of a model, with or without an adapter, on data."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlx_lora.api.base import Base as PublicBase
from mlx_lora.api.base import PathLike, as_base
from mlx_lora.api.given_data import data_source
from mlx_lora.api.given_settings import run_settings
from mlx_lora.api.python_errors import speaks_python
from mlx_lora.api.run_columns import run_of, with_columns_of_run
from mlx_lora.api.run_rows import data_of_run, held_out_rows
from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.loading import load_eval_set
from mlx_lora.data.seen_rows import seen_rows
from mlx_lora.data.teacher_rows import read_teacher_prompt
from mlx_lora.models.load import Base, check_token_ids
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.runs.adapting import adapter_template, put_adapter
from mlx_lora.runs.distilling import with_teacher
from mlx_lora.runs.reference import with_reference
from mlx_lora.runs.reward_models import load_rewards
from mlx_lora.runs.sampled_answers import sampled_plan
from mlx_lora.runs.shared_base import share_among
from mlx_lora.runs.side_by_side import ADAPTER, BASE, Compared, ask, measure_rows, never, questions_of, without_adapter
from mlx_lora.settings.config import TrainSettings
from mlx_lora.sources.hub import resolve_adapter
from mlx_lora.system import console
from mlx_lora.system.distributed import ALONE, Ranks
from mlx_lora.system.errors import InputError
from mlx_lora.training.agreement import check_one_run
from mlx_lora.training.teacher import check_teacher
from mlx_lora.training.trainer import held_out_loss

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
        the `change` of the loss, `low` and `high` of its 95% interval, and over how many `rows`; and `near_training`, how many
        rows repeat or nearly repeat rows that the adapter's run trained on (None: not known). With `show` also `examples`, and
        `exact_match` and `base_exact_match`: the share of answers that are the expected ones, of those for
        which at most 8 words are expected.

    Raises:
        InputError: base, adapter, data or a setting that cannot be used.
    """
    base, source = as_base(base, "evaluate"), data_source(data)
    resolved = run_settings(base.settings, {**settings, "objective": objective, "data": source})
    check_adapter(resolved, adapter)
    if batch_tokens is not None and batch_tokens < 2:
        raise InputError(f"--batch-tokens {batch_tokens}: must be at least 2")
    check_show(resolved, show)
    folder = None if adapter is None else resolve_adapter(os.fspath(adapter), None)
    resolved = with_columns_of_run(resolved, settings, folder, lambda line: None)
    with base.loaded.lent() as lent:
        found = measure_loss(resolved, lent, folder, ignore_fingerprint, batch_tokens, show=show)
    return found | {"adapter_path": None if adapter is None else os.fspath(adapter), "data": source}


def check_adapter(settings: TrainSettings, adapter: PathLike | None) -> None:
    """Refuse to measure scores without the adapter that gives them, before a model is loaded.

    Raises:
        InputError: there is none.
    """
    if objective_of(settings.objective).scores and not adapter:
        raise InputError("--objective reward without --adapter-path: no score head; give a reward model's adapter")


def measure_loss(
    settings: TrainSettings,
    base: Base,
    adapter: Path | None,
    ignore_fingerprint: bool = False,
    batch_tokens: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    ranks: Ranks = ALONE,
    show: int | None = 0,
    stopped: Callable[[], bool] = never,
    held_out: bool = False,
) -> dict[str, Any]:
    """Return what `evaluate` returns, without adapter_path and data.

    Args:
        settings: data and objective.
        base: the model; it gets the adapter.
        adapter: folder to put on the model.
        ignore_fingerprint: as for load_adapter.
        batch_tokens: positions per batch; None: the default.
        say: takes lines of progress.
        ranks: that share the base, if the settings say so.
        show: rows of which to ask the questions; None: a few, if the rows have questions.
        stopped: asked whether to end with what is measured so far; the result then has `partial`.
        held_out: measure the rows that the adapter's run held out, and not --data.

    Raises:
        InputError: adapter or data that cannot be used.
    """
    objective = objective_of(settings.objective)
    if objective.reference and settings.loop.shard_base != "off":
        raise InputError(
            f"--objective {settings.objective.objective} with --shard-base: the reference is the whole base without the "
            "adapter; leave out one of the two"
        )
    settings = replace(settings, loop=replace(settings.loop, batch_tokens=batch_tokens, test_batches=-1))
    data = settings.data
    if not data.chat_template and (template := adapter_template(adapter)):
        base.hf_tokenizer.chat_template = template
    check_teacher(settings, base.hf_tokenizer)
    prompt = read_teacher_prompt(settings.objective.teacher_prompt)
    if held_out and adapter:
        rows, trained = held_out_rows(adapter, base.hf_tokenizer, say)
    else:
        rows, trained = load_eval_set(data.data or "", data, base.hf_tokenizer, say, objective.records, prompt), None
    check_token_ids(base, int(rows.tokens.max(initial=0)), f"--data {data.data}")
    rows = objective.targets_of(rows)
    if objective.reference:
        rows = with_reference(settings, base, {"rows": rows}, say)["rows"]
    if compares(settings):
        near = {"near_training": _near_training(adapter, base, rows, trained, say)} if adapter else {}
        asked = questions_of(rows, show)
        return _compared(settings, base, adapter, rows, ignore_fingerprint, say, asked, stopped) | near
    taught = with_teacher(settings, base, {"rows": rows}, say)  # before the adapter: the base may be the teacher
    rows = taught.sets["rows"]
    rewards = load_rewards(settings, base, say)  # before the adapter is on the base
    if adapter:
        put_adapter(base, adapter, data, objective, ignore_fingerprint)
    settings, shared = share_among(settings, base, ranks)
    if shared.words:
        say(shared.words)
        check_one_run(ranks, settings, {"base": base.fingerprint, "rows": rows.fingerprint})
    answered = sampled_plan(settings, base, say, rewards, scorer=taught.scorer)
    found = held_out_loss(base, rows, settings.loop, objective, ranks, say, answered)
    means = found.reports or {"perplexity": console.perplexity(found.loss)}
    counted = {"answers": found.count} if objective.policy else {"supervised_tokens": rows.supervised_tokens}
    counts = {**counted, "rows": rows.examples}
    return {"loss": found.loss, **means, **counts, "model": base.model_id}


def compares(settings: TrainSettings) -> bool:
    """Return whether base and adapter are measured together: where a row's loss is its tokens', and this process has the base."""
    return settings.objective.objective == "sft" and settings.loop.shard_base == "off"


def check_show(settings: TrainSettings, show: int) -> None:
    """Refuse to ask questions where nothing is compared.

    Raises:
        InputError: it is asked to.
    """
    if show and not compares(settings):
        what = "--shard-base" if settings.loop.shard_base != "off" else f"--objective {settings.objective.objective}"
        raise InputError(f"--show {show} with {what}: only imitation with the whole base shows answers; leave it out")


def _near_training(
    adapter: Path, base: Base, rows: EncodedSet, trained: EncodedSet | None, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Return how many rows the adapter's run has seen, as JSON values; None where its training rows are not known."""
    if trained is None:
        if not run_of(adapter).get("data"):
            return None
        splits = data_of_run(adapter, base.hf_tokenizer, say, MOST_SEEN_BYTES)
        if isinstance(splits, str):
            say(f"Not compared with the rows that the run trained on: {splits}")
            return None
        trained = splits.train
    seen = seen_rows(rows, trained, base.hf_tokenizer)
    if words := seen.words():
        say(f"Note: {words}")
    return asdict(seen)


def _compared(
    settings: TrainSettings,
    base: Base,
    adapter: Path | None,
    rows: EncodedSet,
    ignore_fingerprint: bool,
    say: Callable[[str], None],
    asked: Sequence[int],
    stopped: Callable[[], bool],
) -> dict[str, Any]:
    """Measure base and adapter on the same rows, and ask both what some rows ask."""
    models = {BASE: base}
    if adapter:
        models = {BASE: without_adapter(base), ADAPTER: base}
        put_adapter(base, adapter, settings.data, objective_of(settings.objective), ignore_fingerprint)
    found, whole = measure_rows(models, rows, settings.loop, objective_of(settings.objective), say, stopped)
    examples, answered = ask(models, rows, asked, say, stopped) if asked and whole else ([], whole)
    result = Compared(found, whole and answered, examples).to_dict()
    measured = next(iter(found.values())).tokens if found else []
    counts = {"supervised_tokens": int(sum(measured)), "rows": len(measured)}
    losses = {name: result.pop(name) for name in ("loss", "perplexity") if name in result}
    return {**losses, **counts, "model": base.model_id, **result}
