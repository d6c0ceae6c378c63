"""A training run from its settings to its results, as the train command and Python call it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.models.load import Base, check_token_ids, load_base
from mlx_lora.objectives.base import RunContext
from mlx_lora.objectives.table import check_kind, objective_of, with_pictures
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.parallel.strategy import offloaded
from mlx_lora.reports.run_report import RunReport, read_report
from mlx_lora.trainer.adapter import adapter_head, first_qat_step, put_adapter, qat_from, with_reference_of_run
from mlx_lora.trainer.build import BuiltRun, build_run
from mlx_lora.trainer.callbacks import Callback, Callbacks, RunPage, leave_card, logger_callbacks, reporting
from mlx_lora.trainer.checkpoint import take_first_ranks
from mlx_lora.trainer.evaluate import held_out_loss
from mlx_lora.trainer.fit import READ_WORDS, choose_strategy, may_read_base, strategy_of
from mlx_lora.trainer.guards import Diverged, MemoryGuard, interrupt_flag
from mlx_lora.trainer.header import left_by, loss_words, outcome_line, told_after
from mlx_lora.trainer.request import check_request, check_test_split, wants_training
from mlx_lora.trainer.run_folder import check_room, first_day, own_folder
from mlx_lora.trainer.trainer import LoopHooks, Outcome, Trainer
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import DoesNotFitError, InputError
from mlx_lora.utils.progress import waiting

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.load import DataSplits
    from mlx_lora.parallel.strategy import Strategy
    from mlx_lora.trainer.progress import Progress

log = logging.getLogger(__name__)


def train_run(
    settings: TrainSettings,
    ranks: Ranks = ALONE,
    show: Callable[[int], Progress] | None = None,
    base: Base | None = None,
    callbacks: Sequence[Callback] = (),
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> Outcome:
    """Train as the settings say and write the run folder; with --test, measure the loss on the test set.

    Args:
        settings: of the run. With --test alone nothing is trained: the adapter in --adapter-path is measured.
        ranks: the processes that train together.
        show: makes a live display from the number of steps; None: a line is logged for each report.
        base: the model that the settings name, if it is already loaded; it is changed. None: it is loaded here.
        callbacks: are told what happens, on the first rank, as are those of --report-to.
        functions: rewards that were given in Python, by what --reward calls them.

    Raises:
        InputError: settings, model, data, callbacks or run folder that cannot be used.
        RunError: the run diverged, its results could not be written, or a callback failed.
    """
    with open_run(settings, ranks, show, base, callbacks, functions) as trainer:
        return Outcome(0, None, False) if trainer is None else trainer.fit()


@contextmanager
def open_run(
    settings: TrainSettings,
    ranks: Ranks = ALONE,
    show: Callable[[int], Progress] | None = None,
    base: Base | None = None,
    callbacks: Sequence[Callback] = (),
    functions: Mapping[str, Callable[..., Any]] | None = None,
    signaled: Callable[[], bool] | None = None,
) -> Iterator[Trainer | None]:
    """Yield the trainer of a run, which has to come to its end inside the context; None: nothing is trained.

    Args:
        settings, ranks, show, base, callbacks, functions: as for `train_run`.
        signaled: tells whether the run is to end; None: a signal asks it to.
    """
    told = Callbacks([*callbacks, *logger_callbacks(settings)] if ranks.leads else ())
    check_request(settings, ranks, functions)
    settings = with_pictures(settings)
    device.compile_for(steps=settings.loop.iters or 0)  # until `build_run` knows how many there are
    fits = base is not None or not wants_training(settings)
    with waiting("Planning the run"):
        settings, strategy = choose_strategy(settings, ranks, fits)
    reported = partial(_reported, show=show, told=told, signaled=signaled)
    opened = partial(_opened, base=base, functions=functions, reported=reported)
    with ExitStack() as stack:
        try:
            trainer = stack.enter_context(opened(settings, strategy))
            again = False
        except DoesNotFitError:  # with the batches of the data, which are read by now
            if fits or not may_read_base(settings, ranks):
                raise
            again = True
        if again:  # beyond the handler, nothing holds the whole base any more
            device.release_memory()
            log.info(READ_WORDS)
            settings = offloaded(settings)
            trainer = stack.enter_context(opened(settings, strategy_of(settings, ranks), again=True))
        yield trainer


@contextmanager
def _opened(
    settings: TrainSettings,
    strategy: Strategy,
    base: Base | None,
    functions: Mapping[str, Callable[..., Any]] | None,
    reported: Callable[[BuiltRun, DataSplits], AbstractContextManager[Trainer]],
    again: bool = False,
) -> Iterator[Trainer | None]:
    """Load the model and the data, and build the run; see `open_run`.

    Args:
        settings: of the run, with what its processes divide.
        strategy: of that.
        base, functions: see `open_run`.
        reported: see `_reported`.
        again: whether the data were reported on before.

    Raises:
        DoesNotFitError: the batches of the data do not fit in memory; no step was taken.
    """
    objective, trains, ranks = objective_of(settings.objective), wants_training(settings), strategy.ranks
    if base is None:
        with waiting("Loading the model"):
            base = load_base(settings.model, read=not strategy.divides_base)
    ctx = RunContext(settings, objective, base, strategy, functions or {}, first_day(settings.loop, ranks), trains)
    check_kind(base.model, base.model_id, objective)
    if not trains:
        ctx.settings = with_reference_of_run(settings, Path(settings.loop.adapter_path))
        ctx.untrained = replace(base, model=copy.deepcopy(base.model))  # copies modules, not their arrays
        ctx.score_head = adapter_head(Path(settings.loop.adapter_path), settings.objective)
    objective.open(ctx)  # before an adapter is on
    if not trains:
        put_adapter(base, Path(settings.loop.adapter_path), settings.data, settings.objective)
    with waiting("Reading the data"):
        data = read_data(ctx, tell=not again)
    interrupted, test = False, data.test
    if trains:
        with own_folder(Path(settings.loop.adapter_path), ranks), device.own_memory_limit():
            with waiting("Preparing the run: memory, batches, kernels"):
                run = build_run(ctx, data)
            with reported(run, data) as trainer:
                yield trainer
            test, interrupted = run.test, trainer.outcome is None or trainer.outcome.interrupted
    else:
        test = test and objective.compare(ctx, {"test": test})["test"]
        yield None
    if settings.loop.train_mtp and not trains:
        _train_draft(ctx, data, read_report(Path(settings.loop.adapter_path)))
    if settings.loop.test and test is not None and not interrupted:
        found = held_out_loss(replace(ctx, settings=settings), test)  # with the batches of any measurement
        log.info(f"Test {loss_words(found)}")


def read_data(ctx: RunContext, tell: bool = True) -> DataSplits:
    """Read the data, check that the base can take them, and log what is trained on what unless `tell` is false.

    Raises:
        InputError: no usable data, --test without a test split, or tokens that the base does not have.
    """
    data = ctx.objective.load_data(ctx)
    check_test_split(ctx.settings, data)
    if ask := ctx.settings.data.ask:
        own = replace(ctx.settings.data, data=ask, mask_prompt=True)
        data = replace(data, asked=ctx.objective.read_set(ctx, own))
    for rows in filter(None, (data.train, data.valid, data.test)):
        check_token_ids(ctx.base, int(rows.tokens.max(initial=0)), f"--data {data.report.data}")
    if tell:
        log.info(device.current_device().header())
        log.info(f"Base: {ctx.base.model_id}: {ctx.base.describe()}")
        log.info(data.report.render(color=console.wants_color()))
    return data


@contextmanager
def _reported(
    run: BuiltRun,
    data: DataSplits,
    show: Callable[[int], Progress] | None,
    told: Callbacks,
    signaled: Callable[[], bool] | None,
) -> Iterator[Trainer]:
    """Yield the trainer of a run, report and save meanwhile, and leave its results.

    Args:
        run: over the adapted base.
        data: that it was built from.
        show, signaled: see `open_run`.
        told: the callbacks.

    Raises:
        RunError: the run diverged, its results could not be written, or a callback failed.
    """
    folder, base, memory = run.folder, run.ctx.base, run.ctx.planned
    settings, strategy, step, at = folder.settings, folder.strategy, folder.step, folder.at
    device.set_cache_limit(memory.budget_bytes)
    device.wire_working_set()
    strategy.bound_memory(memory.peak_bytes)
    log.info("\n".join(run.words if settings.loop.verbose else run.words[:-1]))
    scored: dict[str, Any] = {}
    if settings.loop.eval_tasks:
        from mlx_lora.trainer.request import scorer_of  # few runs need it

        scored["score"] = scorer_of(run)
    page = None
    if strategy.ranks.leads:
        check_room(settings.loop, run.steps, sum(p.nbytes for p in adapter_parameters(base.model).values()))
        page = RunPage.begin(run, data)
    folder.begin(run.found, run.steps, data.written)
    guard = MemoryGuard(at, memory.budget_bytes, run.bound.sorts, strategy.ranks.size)

    def save(step_number: int) -> None:
        take_first_ranks(strategy, step)
        folder.save()
        if page is not None:
            page.write()
        told.tell("on_save", {"step": step_number, "adapter_path": str(folder.path)})

    with told.around(run.steps, settings.to_flat()) as ending:
        try:
            with folder.kept_if_it_fails(), reporting(run, told, show, page) as (report, shown, watch):
                on_step = qat_from(settings.adapter, base.model, run.steps, at, shown)
                hooks = LoopHooks(report, save, on_step, told.failed, watch, **scored)
                ends_from = first_qat_step(settings.adapter.qat, run.steps) or 0
                trainer = Trainer(run.ctx, step, run.bound, run.plan, run.validation, hooks, at, guard, ends_from)
                with interrupt_flag() if signaled is None else nullcontext(signaled) as trainer.signaled:
                    yield trainer
                outcome = trainer.outcome or trainer.end()
                best = None if outcome.interrupted else folder.put_best()
        except Diverged as diverged:
            raise folder.roll_back(diverged) from diverged
        ending.update(asdict(outcome))
    if not outcome.interrupted:
        run.trunk.end()
    if page is not None:
        asks = settings.loop.sample_tokens and strategy.ranks.size == 1 and not folder.info.scores
        if asks and not outcome.interrupted:
            from mlx_lora.trainer.ask import ask_run  # a run without texts needs none of it

            page.report.answers = ask_run(run.ctx, data)
        if settings.loop.train_mtp and not outcome.interrupted:
            try:
                _train_draft(run.ctx, data, page.report)
            except InputError as error:  # the adapter is there, and its report is not yet
                log.info(f"Note: without a head that drafts tokens: {error}")
        page.end(outcome.interrupted, folder.kept_step)
        leave_card(folder.path, base, folder.info)
        log.info(outcome_line(settings.loop, outcome, best, settings.objective.rewarded))
        if not outcome.interrupted:
            log.info(told_after(page.report.verdict))
            log.info(page.closing_words(settings, folder.info, data))
    told.raise_failure(left_by(settings.loop, outcome))


def _train_draft(ctx: RunContext, data: DataSplits, report: RunReport | None) -> None:
    """Train a head that drafts what the model with its adapter says, and tell the run's report, if there is one."""
    from mlx_lora.trainer.train_drafts import train_draft  # few runs need it

    folder = Path(ctx.settings.loop.adapter_path)
    if ctx.strategy.divides_base or ctx.settings.objective.images:  # chosen by the run itself
        raise InputError("it needs the whole model in memory, and rows without pictures")
    drafts = train_draft(ctx.base, data, folder, ctx.settings.loop.seed)
    if report is not None:
        report.drafts = drafts
        report.write(folder)
