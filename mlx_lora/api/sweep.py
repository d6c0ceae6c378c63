"""`sweep`: find good settings by many short runs at once, train the best ones in full, and leave a page that compares them."""

from __future__ import annotations

import copy
import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_lora.api.base import Base, PathLike, as_base, speaks_python
from mlx_lora.api.train import Run, data_source, lent_for_training, run_settings, shown_figure
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import ROWS, TrainSettings
from mlx_lora.config.sweep import (
    BUDGET,
    PAGE_FILE,
    SWEEP_FILE,
    TRIALS,
    WINNER,
    Candidate,
    candidates,
    check_varied,
    read_budget,
    read_vary,
    rungs,
    with_candidate,
    words,
)
from mlx_lora.models.load import load_base
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.reports.sweep_page import LOSS, SweepResults, advice, write_page
from mlx_lora.trainer.run import check_request, train_run
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.trainer.several_runs import check_trials
from mlx_lora.trainer.sweep import (
    Sweep,
    SweepState,
    Trial,
    check_validates,
    held_out_curve,
    rates_around,
    score_of,
    trials_of,
)
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import check_writable
from mlx_lora.utils.progress import waiting
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.models.load import Base as Loaded
    from mlx_lora.trainer.progress import Progress
    from mlx_lora.trainer.trainer import Outcome

log = logging.getLogger(__name__)

AROUND_DEFAULT = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)  # times the default rate, without --vary


class SweepJob:
    """A sweep from its settings to its results.

    Attributes:
        settings: of the runs, before anything is varied.
        sweep: its rounds.
    """

    def __init__(
        self,
        settings: TrainSettings,
        out: Path,
        vary: Sequence[str] | Mapping[str, Any] = (),
        seeds: int = 1,
        budget: float = BUDGET,
        resume: bool = False,
        force: bool = False,
    ):
        """Check what is asked, and read what an earlier start has done.

        Args:
            settings: of the runs.
            out: the folder that it writes.
            vary: as `read_vary` takes it; empty: learning rates around the default.
            seeds: runs of each candidate.
            budget: runs of work.
            resume: whether to go on with a sweep that is there.
            force: whether to replace it.

        Raises:
            InputError: it cannot be done.
        """
        if not 1 <= seeds <= 100:
            raise InputError(f"--seeds {seeds}: from 1 to 100 are allowed")
        budget = read_budget(budget)
        placed = replace(settings.loop, adapter_path=str(out / WINNER), resume=None, force=True)
        check_request(replace(settings, loop=placed), ALONE)
        check_validates(settings)
        vary = read_vary(vary) if vary else {"learning_rate": rates_around(settings, AROUND_DEFAULT)}
        found = candidates(vary)
        check_varied(found, settings.to_flat())
        if len(found) < 2:
            raise InputError(
                f"--vary {', '.join(vary)}: has one value only, so there is nothing to compare; give several"
            )
        self.settings = replace(settings, loop=replace(placed, force=False))
        steps = rungs(len(found), seeds, budget)
        trials = trials_of(self.settings, found, seeds, out / TRIALS)
        check_trials([trial.settings for trial in trials])
        asked = {"vary": vary, "seeds": seeds, "budget": budget}
        state = self._state(out, asked, found, resume, force)
        check_writable(out, "--out", 1_000_000)
        self.sweep = Sweep(out, state, trials, steps, may_shorten=True)

    def _state(self, out: Path, asked: dict[str, Any], found: list[Candidate], resume: bool, force: bool) -> SweepState:
        """Return what an earlier start left, or an empty state."""
        flat = {name: value for name, value in self.settings.to_flat().items() if name not in ("resume", "force")}
        facts = console.finite_values({**asked, "settings": flat})
        if (out / SWEEP_FILE).exists() and resume:
            state = SweepState.read(out)
            changed = [name for name in ("vary", "seeds", "budget") if state.asked.get(name) != facts[name]]
            before = state.asked.get("settings", {})
            changed += [
                name for name in flat if not ROWS[name].may_change and before.get(name) != facts["settings"][name]
            ]
            if changed:
                raise InputError(
                    f"--resume: the sweep in {out} has another {', '.join(changed)}; give the same as before, or another --out"
                )
            state.candidates = found  # of --vary; the file may be a stranger's, and a candidate is a run's settings
            return state
        if (out / SWEEP_FILE).exists() and not force:
            raise InputError(
                f"--out {out}: already holds a sweep; choose another folder, --resume to continue, or --force to overwrite it"
            )
        # Without sweep.json, they may be anything of the user's.
        there = [f"{name}/" for name in (TRIALS, WINNER) if (out / name).exists()]
        if there and not force:
            raise InputError(
                f"--out {out}: has {' and '.join(there)}, which a sweep would replace, and no {SWEEP_FILE} to go on from; choose "
                "another folder, or --force to delete that"
            )
        for name in (TRIALS, WINNER):
            shutil.rmtree(out / name, ignore_errors=True)
        for name in (SWEEP_FILE, PAGE_FILE):
            (out / name).unlink(missing_ok=True)
        return SweepState(facts, found)

    def run(self, base: Loaded | None = None, show: Callable[[int], Progress] | None = None) -> Outcome:
        """Train what is left to train, and return how the winner's own run ended.

        Args:
            base: that the settings name, if it is already loaded; it stays as it is. None: it is loaded here.
            show: see `train_run`.

        Raises:
            Interrupted: a signal ended a round.
            InputError, RunError: see `Sweep.choose` and `train_run`.
        """
        if base is None:
            with waiting("Loading the model"):
                base = load_base(self.settings.model)
        sweep, state = self.sweep, self.sweep.state
        if not state.rounds:
            state.write(sweep.folder)  # not before the model is there, so that a wrong name leaves nothing behind
            of = len(sweep.trials) // len(state.candidates)
            rounds = ", ".join(f"{rung.candidates} to {rung.share:.0%}" for rung in sweep.rungs)
            seeds = f", {of} seeds each" if of > 1 else ""
            log.info(
                f"Sweep: {counted(len(state.candidates), 'candidate')}{seeds}; rounds: {rounds} of a run; then the best one's "
                "whole run"
            )
        sweep.choose(base, self._after_round)
        settings = self.winner_settings()
        log.info(f"Best: {words(state.candidates[state.winner or 0])}. Its whole run, alone:")
        # Copies modules, not their arrays.
        outcome = train_run(settings, show=show, base=replace(base, model=copy.deepcopy(base.model)))
        if not outcome.interrupted:
            curve = held_out_curve(sweep.folder / WINNER)
            state.val_loss = outcome.val_loss if outcome.val_loss is not None else curve[-1][1] if curve else None
            if settings.loop.metric_for_best_model != LOSS:
                error = score_of(Trial(WINNER, state.winner or 0, "", settings), outcome.steps).error
                state.val_score = 1 - error if math.isfinite(error) else None
            state.write(sweep.folder)
            self._after_round()
        return outcome

    def winner_settings(self) -> TrainSettings:
        """Return the settings of the winner's own run."""
        state, folder = self.sweep.state, self.sweep.folder / WINNER
        if state.winner is None:
            raise ValueError("the sweep has no winner yet")
        begun = (folder / CHECKPOINTS).is_dir()
        own = {"adapter_path": str(folder), "resume": "auto" if begun else None, "force": not begun}
        return train_settings({**with_candidate(self.settings.to_flat(), state.candidates[state.winner]), **own})

    def _after_round(self) -> None:
        """Say what a round has shown, and write the page."""
        state, compared = self.sweep.state, self.sweep.compared()
        number = len(state.rounds)
        if state.val_loss is None:
            at = state.rounds[-1][0]["step"]
            said = "; ".join(list(compared.round_words(number - 1))[:3])
            log.info(f"Round {number} of {len(self.sweep.rungs)}, {compared.measure} at step {at}: {said}")
        else:
            log.info(advice(compared))
        write_page(self.sweep.folder / PAGE_FILE, compared)


# Python


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep.

    Attributes:
        folder: with `sweep.html`, `sweep.json`, the trials, and the winner's run.
        best: the winner's settings that were varied.
        run: the winner's own run, over all its steps.
        table: a row for each candidate: its settings, `step` and `loss` (mean over seeds) where it was last measured, and what
            decides if it is not the loss, such as `accuracy`; best first.
        advice: one sentence.
        compared: what the page is made of.
    """

    folder: Path
    best: dict[str, Any]
    run: Run
    table: list[dict[str, Any]]
    advice: str
    compared: SweepResults = field(repr=False)

    @speaks_python()
    def plot(self) -> Any:
        """Return what decides against the first setting that varied, one line for each round, as a figure that a notebook shows.

        Raises:
            InputError: matplotlib is not installed.
        """
        figure = shown_figure(figsize=(7, 4), layout="constrained")
        axes, name = figure.subplots(), next(iter(self.best))
        tried = {candidate[name] for candidate in self.compared.candidates}
        for number, trials in enumerate(self.compared.rounds):
            best: dict[Any, float] = {}  # of several candidates with a value
            for of, measured in self.compared.values(number).items():  # the best first
                best.setdefault(self.compared.candidates[of][name], sum(measured) / len(measured))
            values = sorted(best, key=str if isinstance(self.best[name], str) else None)
            lines = axes.plot(values, [best[value] for value in values], label=f"step {trials[0]['step']}")
            seeds = [
                (self.compared.candidates[of][name], one)
                for of, measured in self.compared.values(number).items()
                for one in measured
            ]
            axes.plot(*zip(*seeds, strict=True), "o", color=lines[0].get_color(), markersize=3)
        if isinstance(self.best[name], (int, float)) and self.best[name] > 0:
            axes.set_xscale("log")
            axes.set_xticks(sorted(tried), [f"{value:g}" for value in sorted(tried)], rotation=45)
            axes.set_xticks([], minor=True)
        axes.axvline(self.best[name], color="gray", linestyle=":")
        axes.set(xlabel=name.replace("_", " "), ylabel=self.compared.measure)
        axes.legend()
        return figure


@speaks_python()
def sweep(
    base: Base | PathLike,
    data: Any,
    out: PathLike,
    vary: Mapping[str, Any] | Sequence[str] = (),
    *,
    seeds: int = 1,
    budget: float = BUDGET,
    resume: bool = False,
    force: bool = False,
    progress: bool = True,
    **settings: Any,
) -> SweepResult:
    """Find good settings by successive halving, and train the best ones in full; the base stays as it is.

    Args:
        base: from `load`, or a model's name.
        data: as for `train`.
        out: folder to write.
        vary: setting -> values, as in `{"learning_rate": "5e-5..2e-3", "rank": [8, 16]}`; default: learning rates around the
            default one.
        seeds: runs of each candidate.
        budget: all work, in runs.
        resume, force: go on with, or replace, a sweep in this folder.
        progress: show what happens; False: print nothing.
        settings: every other setting, as for `train`.

    Raises:
        InputError: settings, data or folder that cannot be used.
        RunError: the winner's run failed.
        KeyboardInterrupt: a signal ended it; `resume=True` goes on.
    """
    base = as_base(base, "sweep")
    job = SweepJob(
        run_settings(base.settings, {**settings, "data": data_source(data)}),
        Path(os.fspath(out)),
        vary,
        seeds,
        budget,
        resume,
        force,
    )
    with lent_for_training(base, progress) as lent:
        outcome = job.run(lent)
    if outcome.interrupted:
        raise KeyboardInterrupt
    compared, folder = job.sweep.compared(), job.sweep.folder
    run = Run(folder / WINNER, outcome.steps, outcome.val_loss, False, outcome.stopped_early)
    return SweepResult(
        folder, job.sweep.state.candidates[compared.winner or 0], run, compared.table(), advice(compared), compared
    )
