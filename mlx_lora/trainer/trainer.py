"""The training loop: `Trainer` takes a run's steps, reports, validates and saves, and knows no objective by name.

`fit` takes the steps of a run one after the other. trainer/several_runs.py drives several trainers step by step instead, and computes
their steps together.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice, takewhile
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx

from mlx_lora.data.sampler import rounds, total_steps
from mlx_lora.trainer.evaluate import Measured, mean_loss
from mlx_lora.trainer.guards import Agreement, Diverged, MemoryGuard, Position, StepsDone
from mlx_lora.trainer.progress import Metrics, Window
from mlx_lora.utils import text as process

if TYPE_CHECKING:
    from mlx_lora.config.settings import LoopSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.objectives.base import BoundObjective, RunContext
    from mlx_lora.trainer.evaluate import HeldOutBatches
    from mlx_lora.trainer.step import Step, StepResult

log = logging.getLogger(__name__)

# Without --steps-per-report: the number of reports in a run, and the most steps between two reports in a long run.
REPORTS, MOST_BETWEEN_REPORTS = 20, 25


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        steps: the number of steps taken.
        val_loss: the validation loss after the last step, if it was measured.
        interrupted: whether a signal ended the run.
        stopped_early: whether the run ended because the validations no longer got better.
    """

    steps: int
    val_loss: float | None
    interrupted: bool
    stopped_early: bool = False


def report_interval(total: int, settings: LoopSettings) -> int:
    """Return the steps between reports: --steps-per-report, or by the run's length, so that a short run shows its loss early."""
    return settings.steps_per_report or max(1, min(total // REPORTS, MOST_BETWEEN_REPORTS))


@dataclass(frozen=True)
class LoopHooks:
    """What the loop calls.

    Attributes:
        report: takes each record.
        save: takes the step's number; writes the adapter, and with --save-every a checkpoint.
        on_step: takes the step's number after each step, for a live display.
        stop: asked after each step whether to end as after an interruption.
        watch: yields a validation's batches, so many, and shows how far it is.
        score: asked whether to end, returns further numbers of a validation (trainer/request.py).
    """

    report: Callable[[Metrics], None]
    save: Callable[[int], None]
    on_step: Callable[[int], None] = lambda step: None
    stop: Callable[[], bool] = lambda: False
    watch: Callable[[Iterable[Batch], int], Iterable[Batch]] = lambda batches, count: batches
    score: Callable[[Callable[[], bool]], dict[str, float]] = lambda stopped: {}


class StepWanted(NamedTuple):
    """A step that a run takes next.

    Attributes:
        trainer: of the run.
        planned: the micro-batches.
        batches, asked, divide: what the step is called with.
    """

    trainer: Trainer
    planned: list[Batch]
    batches: list[Batch]
    asked: bool
    divide: Callable[[list[Batch]], list[Batch]]

    def take(self) -> StepResult:
        """Take the step by itself."""
        return self.trainer.step(self.batches, self.asked, self.divide)


@dataclass
class Trainer:
    """Trains until the run's steps are done, the validations no longer get better, or it is interrupted.

    Attributes:
        ctx: of the run, with settings in which nothing is open.
        step: the compiled step; the trainable parameters of its model are the adapter.
        bound: the objective on the model, for validation and reports; the step has its loss.
        plan: training batches.
        validation: held-out batches, of which --val-batches are measured, or all if it is not set; None: there are none.
        hooks: what the loop calls.
        at: the run's position, which is up to date when `save` is called.
        guard: watches memory; None: nothing is watched.
        ends_from: the step before which validations that do not get better do not end the run (--qat 0.3).
        signaled: whether a signal asked the run to end.
        outcome: how the run ended; None: it did not end yet. After an interruption the adapter has been saved.
    """

    ctx: RunContext
    step: Step
    bound: BoundObjective
    plan: BatchPlan
    validation: HeldOutBatches | None
    hooks: LoopHooks
    at: Position = field(default_factory=Position)
    guard: MemoryGuard | None = None
    ends_from: int = 0
    signaled: Callable[[], bool] = lambda: False
    outcome: Outcome | None = None

    def __post_init__(self) -> None:
        self.settings, self.strategy = self.ctx.settings.loop, self.ctx.strategy
        self._guard = self.guard or MemoryGuard(self.at)
        self.total = total_steps(self.plan, self.settings, self.ctx.settings.objective.updates)
        self._window, self._begun_s = Window(), time.perf_counter()
        self._saved_at = self.at.taken if self.at.taken else None
        self._told_idle = False
        self._previous: StepResult | None = None  # the device works on it while the host prepares the next
        self._batches = self._steps()

    def fit(self) -> Outcome:
        """Take all steps of the run.

        Raises:
            Diverged: many updates in a row, or all of a short run, were skipped because they were not finite; nothing is
                saved.
        """
        self.begin()
        while (wanted := self.next_step()) is not None:
            self.finish_step(wanted, wanted.take())
        return self.end()

    def begin(self) -> None:
        """Measure the held-out rows, before the first step."""
        self.step.model.train()
        self._interrupted = Agreement(lambda: self.signaled() or self.hooks.stop(), self.strategy.ranks)
        every, at = self.settings.steps_per_eval, self.at
        due = at.taken == self.total or (bool(every) and at.taken % every == 0)
        if not at.taken:
            self.validate()
        # The run was interrupted during the validation after its last step, and was saved without it.
        elif due and at.val_at != at.taken and self.validate() and self.settings.save_every:
            self.save()
        self._window = Window()

    def next_step(self) -> StepWanted | None:
        """Return the step that is next; None: the run is over, which it is only after all updates on the same batches."""
        stops = self.at.taken % self.ctx.settings.objective.updates == 0 and (
            self._interrupted() or self._stopped_early()
        )
        if self.at.taken >= self.total or stops:
            return None
        planned, divide = next(self._batches), self._guard.divide
        return StepWanted(self, planned, self.strategy.split(planned, divide), self._interrupted.asked(), divide)

    def _steps(self) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step, from where the run is; the model is read as each round begins."""
        at, updates, a_step = self.at, self.ctx.settings.objective.updates, self.settings.grad_accumulation_steps
        within = at.consumed % (a_step * updates) if updates > 1 else 0  # of a round, which is begun again
        skipped = within // a_step
        for batches, first in rounds(self.plan, self.settings, updates, at.consumed - within):
            done = StepsDone(first, at.taken - skipped, self.total, first / len(self.plan))
            yield from islice(self.ctx.objective.steps(batches, done), skipped, None)
            skipped = 0

    def end(self) -> Outcome:
        """Report and save what is left, and return how the run ended."""
        if self._window.results:
            self._report()
        if self.at.taken and not self.saved:
            # Interrupted between steps; an untrained adapter is not worth a folder.
            self.save()
        val_loss = self.at.val_loss if self.at.val_at == self.at.taken else None
        self.outcome = Outcome(self.at.taken, val_loss, self._interrupted(), self._stopped_early())
        return self.outcome

    @property
    def saved(self) -> bool:
        """Whether the run has been saved where it is."""
        return self._saved_at == self.at.taken

    def finish_step(self, wanted: StepWanted, result: StepResult) -> None:
        """Go on after a step: report, validate and save, each if it is time."""
        at, guard, settings = self.at, self._guard, self.settings
        # The device works on this step while the host waits for the one before: one step ahead, no more.
        self._interrupted.hear(self._previous)
        if self._previous is not None and self._diverged(self._previous):
            raise Diverged(at)
        self._previous = result
        at.taken, at.consumed = at.taken + 1, at.consumed + len(wanted.planned)
        self._window.add(wanted.batches, result)
        self.hooks.on_step(at.taken)
        rows = max(len(batch.inputs) for batch in wanted.planned)
        guard.watch(-(-rows // (self.strategy.ranks.size * at.parts)))
        last = at.taken == self.total or self._interrupted()
        to_report, to_validate, to_save = (
            last or (every and at.taken % every == 0)
            for every in (report_interval(self.total, settings), settings.steps_per_eval, settings.save_every)
        )
        gone = False
        if to_report or to_validate or to_save:
            self._interrupted.hear(result)
            gone = self._diverged(result) or at.skipped_in_a_row == self.total
            self._previous = None  # already counted: do not count it again
        if to_report:
            self._report()
        if gone:
            raise Diverged(at)
        with self._window.paused():
            best = to_validate and self.validate()
            if to_save or self._stopped_early() or (best and settings.save_every):
                self.save()

    def _diverged(self, result: StepResult) -> bool:
        """Return whether the run has diverged with a step; one without anything to train on says nothing of that."""
        if result.applied.item() or not result.idle:
            return self.at.diverged(result.applied.item())
        if not self._told_idle:
            self._told_idle = True
            sampled = self.ctx.settings.objective.samples
            why = ", because all of its answers were cut: raise --max-new-tokens" if sampled else ""
            log.info(f"Note: a step trained no token and changed nothing{why}")
        return False

    def _report(self) -> None:
        """Report the steps since the last report."""
        self.hooks.report(self._record(self._window))
        self._window = Window()

    def save(self) -> None:
        """Save the run where it is."""
        self.hooks.save(self.at.taken)
        self._saved_at = self.at.taken

    def _stopped_early(self) -> bool:
        patience = self.settings.early_stopping_patience
        return bool(patience) and self.at.worse >= patience and self.at.taken >= self.ends_from

    def validate(self) -> bool:
        """Measure the held-out batches and report them; returns whether this is the best validation so far."""
        settings, validation, strategy = self.settings, self.validation, self.strategy
        if validation is None or settings.val_batches == 0:
            return False
        most = -1 if settings.val_batches is None else settings.val_batches
        # In lockstep, ranks go through a validation together, and so to its end.
        asked = self._interrupted.asked
        held_out = takewhile(lambda _: strategy.lockstep or not asked(), strategy.held_out(validation, most))
        watched = self.hooks.watch(held_out, strategy.held_out_count(validation, most))
        measured = mean_loss(self.step.model, self.bound, watched, strategy)
        measured = replace(measured, reports=measured.reports | self.hooks.score(asked))
        self._interrupted.ask_all()
        if not measured.count or self._interrupted():
            return False
        # The window continues: its tokens are counted once, in its own line.
        self.hooks.report(self._record(Window(), measured))
        metric = settings.metric_for_best_model
        return self.at.validated(measured.loss, settings.early_stopping_threshold, metric, measured.reports.get(metric))

    def _record(self, window: Window, measured: Measured | None = None) -> Metrics:
        """Read the window's scalars, once per report, and make its record."""
        results, bound = window.results, self.bound
        mx.eval(results)
        spent_s = window.spent_s()
        good = [r for r in results if r.applied.item()]
        count = sum(r.count.item() for r in good)
        loss = sum(r.loss_sum.item() for r in good) / count if count else math.nan
        reports = {name: sum(r.reports[name].item() for r in good) / count for name in bound.reports} if count else {}
        reports = bound.finish(reports) | bound.rates() if reports else measured.reports if measured else {}
        reports |= self.strategy.measured_shares(spent_s) if results else {}
        return Metrics(
            step=self.at.taken,
            epoch=round(self.at.consumed / (len(self.plan) * self.ctx.settings.objective.updates), 4),
            loss=loss if results else None,
            val_loss=measured.loss if measured else None,
            learning_rate=self.step.learning_rate,
            grad_norm=results[-1].grad_norm.item() if results else 0.0,
            supervised_tokens_per_s=window.supervised_tokens / spent_s,
            tokens_per_s=window.real_tokens / spent_s,
            examples=window.examples,
            supervised_tokens=window.supervised_tokens,
            real_tokens=window.real_tokens,
            positions=window.positions,
            shapes=[f"{rows}x{width}" for rows, width in sorted(window.shapes)],
            padding_fraction=1 - window.real_tokens / window.positions if window.positions else 0.0,
            skipped_steps=self.at.skipped,
            peak_memory_bytes=self._guard.peak_bytes,
            process_peak_bytes=process.peak_bytes(),
            elapsed_s=round(time.perf_counter() - self._begun_s, 3),
            reports=reports,
            rows=measured.rows if measured else None,
        )
