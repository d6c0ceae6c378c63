"""Find the learning rate in a run's own first part (`--learning-rate auto`).

    settings, base = find_learning_rate(settings)      then train_run(settings, base=base) as always

Several rates around the default are trained at once for a few steps, the better ones a little further (trainer/sweep.py), and the run goes
on from where the best one is: its checkpoint and metrics become the run's own. The steps of the others take at most a fifth of the run's
work. `trials/sweep.html` in the run folder compares them.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from mlx_lora.config.defaults import validated_every
from mlx_lora.config.presets import PRESETS
from mlx_lora.config.settings import TrainSettings
from mlx_lora.config.sweep import PAGE_FILE, SWEEP_FILE, TRIALS, Candidate, Rung, TooShort, candidates, work
from mlx_lora.exporters.adapter_folder import CONFIG_FILE
from mlx_lora.models.load import Base, load_base
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.reports.run_report import ROWS_FILE
from mlx_lora.reports.sweep_page import write_page
from mlx_lora.trainer.request import check_request
from mlx_lora.trainer.run_folder import CHECKPOINTS, remove_results
from mlx_lora.trainer.several_runs import check_trials
from mlx_lora.trainer.sweep import (
    FEWEST_STEPS,
    NothingHeldOut,
    Sweep,
    SweepState,
    Trial,
    check_validates,
    rates_around,
    trials_of,
)
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.progress import waiting
from mlx_lora.utils.text import counted

log = logging.getLogger(__name__)

# Times the default rate; a run with too few steps for the first tries the second.
AROUND_DEFAULT = ((1 / 4, 1 / 2, 1, 2, 4), (1 / 3, 1, 3))
FURTHER = 3  # the better ones train this many times as far
MOST_EXTRA = 0.2  # of the run's work, for the rates that are not chosen


def rounds_for(count: int) -> list[Rung]:
    """Return the rounds: all candidates, then two of them, so that those that are not chosen take `MOST_EXTRA` of a run."""
    # Extra work in units of the first round: all but one of it, and one candidate's way from there to the end of the second.
    first = MOST_EXTRA / ((count - 1) + (FURTHER - 1))
    return [Rung(count, first), Rung(2, FURTHER * first)]


def find_learning_rate(
    settings: TrainSettings, ranks: Ranks = ALONE, base: Base | None = None
) -> tuple[TrainSettings, Base | None]:
    """Try learning rates at the beginning of a run, and return the settings with which it goes on, and the loaded base.

    Args:
        settings: of the run, with the rate `auto`.
        ranks: must be a single process.
        base: that the settings name, if it is already loaded; it stays as it is.

    Raises:
        InputError: the run cannot be tried or begun.
        Interrupted: a signal ended the trials; --resume goes on with them.
    """
    loop, folder = settings.loop, Path(settings.loop.adapter_path)
    if ranks.size > 1:
        raise InputError("--learning-rate auto: works in a single process only; give a number to several")
    if loop.resume not in (None, "auto") or (loop.resume and (folder / CHECKPOINTS).is_dir()):
        resumed = with_rate(settings, None)  # a resumed run keeps the rate that it has
        if not (folder / TRIALS / SWEEP_FILE).is_file():
            return resumed, base  # it was begun with a number
        return keeping_best(resumed, max(SweepState.read(folder / TRIALS).totals.values(), default=0)), base
    check_request(settings, ranks)
    usual = replace(settings, optimizer=replace(settings.optimizer, learning_rate=None))
    steps = 0
    for tried in _ways(usual, folder):
        _check(tried)
        if base is None:
            with waiting("Loading the model"):
                base = load_base(settings.model)
        sweep = Sweep(folder / TRIALS, _state(settings, folder, tried), tried, rounds_for(len(tried)))
        rates = ", ".join(f"{trial.settings.optimizer.learning_rate:g}" for trial in tried)
        first = len(tried) == len(AROUND_DEFAULT[0])
        log.info(
            f"Learning rate: {'trying' if first else 'the run is short, so it tries only'} {rates} in its first part"
        )
        try:
            best = tried[sweep.choose(base, header=False)]
        except TooShort:
            steps = min(sweep.state.totals.values())
            continue
        except NothingHeldOut as refused:
            _leave_nothing(folder)
            raise _refusal(refused) from None
        log.info(_reason(sweep, best))
        write_page(folder / TRIALS / PAGE_FILE, sweep.compared())
        _take_over(best, folder)
        for trial in tried:
            shutil.rmtree(trial.folder, ignore_errors=True)
        chosen = with_rate(settings, best.settings.optimizer.learning_rate, resume="auto")
        return keeping_best(chosen, max(sweep.state.totals.values())), base
    _leave_nothing(folder)
    least = math.ceil(FEWEST_STEPS / rounds_for(len(AROUND_DEFAULT[-1]))[0].share)
    raise InputError(
        f"--learning-rate auto: the run has {counted(steps, 'step')}, too few steps to try rates in a fifth of its work; leave "
        f"--learning-rate out, and the run takes the rate that usually suits the model, or make it longer with --iters {least}"
    )


def _check(tried: list[Trial]) -> None:
    """Refuse a run whose rates cannot be tried."""
    try:
        check_validates(tried[0].settings)
        check_trials([trial.settings for trial in tried])
    except InputError as refused:
        raise _refusal(refused) from None


def _leave_nothing(folder: Path) -> None:
    """Remove the trials of a run that was refused, and its folder if nothing else is there."""
    shutil.rmtree(folder / TRIALS, ignore_errors=True)
    with suppress(OSError):
        folder.rmdir()


def _refusal(problem: InputError) -> InputError:
    return InputError(f"--learning-rate auto: {problem}; or give the rate as a number")


def with_rate(settings: TrainSettings, rate: object, resume: str | None = None) -> TrainSettings:
    """Return the settings with a rate, and with --resume if it is given."""
    optimizer = replace(settings.optimizer, learning_rate=rate)
    return replace(settings, optimizer=optimizer, loop=replace(settings.loop, resume=resume or settings.loop.resume))


def keeping_best(settings: TrainSettings, steps: int) -> TrainSettings:
    """Return the settings of a run that ends with the adapter of its lowest held-out loss, unless they say otherwise or the method has a schedule.

    The rate was chosen by a few steps. Over several epochs on few rows, such a rate may be right at first, and overfit later.

    Args:
        settings: of the run.
        steps: that it has.
    """
    loop = settings.loop
    whole = PRESETS[settings.adapter.method].events != "none"  # AdaLoRA's and ReLoRA's schedules need their end
    if whole or loop.keep_best is not None or loop.steps_per_eval is not None or not loop.save_every:
        return settings
    return replace(settings, loop=replace(loop, keep_best=True, steps_per_eval=validated_every(steps)))


def trials_around(settings: TrainSettings, factors: Sequence[float]) -> list[Trial]:
    """Return trials of rates around the default one, each with its settings."""
    rates = rates_around(settings, factors)
    return trials_of(settings, candidates({"learning_rate": rates}), 1, Path(settings.loop.adapter_path) / TRIALS)


def _ways(settings: TrainSettings, folder: Path) -> list[list[Trial]]:
    """Return the trials of a run with many steps and of one with few; with --resume, those that an earlier start has begun."""
    ways = [trials_around(settings, factors) for factors in AROUND_DEFAULT]
    begun = _begun(settings, folder)
    return [tried for tried in ways if begun is not None and begun.candidates == _rates(tried)] or ways


def _begun(settings: TrainSettings, folder: Path) -> SweepState | None:
    """Return what an earlier start has done, with --resume; None: nothing."""
    there = settings.loop.resume and (folder / TRIALS / SWEEP_FILE).is_file()
    return SweepState.read(folder / TRIALS) if there else None


def _rates(tried: Sequence[Trial]) -> list[Candidate]:
    return [{"learning_rate": trial.settings.optimizer.learning_rate} for trial in tried]


def _state(settings: TrainSettings, folder: Path, tried: Sequence[Trial]) -> SweepState:
    """Return what an earlier start has done, or an empty state."""
    begun = _begun(settings, folder)
    if begun is not None and begun.candidates == _rates(tried):
        return begun
    shutil.rmtree(folder / TRIALS, ignore_errors=True)
    return SweepState({}, _rates(tried))


def _reason(sweep: Sweep, chosen: Trial) -> str:
    """Return a line that says what was tried, and why a rate was chosen."""
    found = sweep.compared()
    parts = [
        f"at step {trials[0]['step']}, {'; '.join(found.round_words(number))}"
        for number, trials in enumerate(found.rounds)
    ]
    step, extra = sweep.state.rounds[-1][0]["step"], work(sweep.rungs, 1) - sweep.rungs[-1].share
    said = ". ".join(part[0].upper() + part[1:] for part in parts).replace("--learning-rate ", "")
    return (
        f"Learning rate: {chosen.settings.optimizer.learning_rate:g}, which has the {found.best_is} {found.measure}; the run goes on from its step "
        f"{step}. {said}. The other rates took {extra:.0%} of a run's work."
    )


def _take_over(trial: Trial, folder: Path) -> None:
    """Make a trial's checkpoints and metrics the run's own; the checkpoints come last, since they say that the run has begun."""
    if (folder / CONFIG_FILE).exists():  # --force
        remove_results(folder)
    for name in ("metrics.jsonl", ROWS_FILE, "run.yaml"):
        if (trial.folder / name).exists():
            shutil.copyfile(trial.folder / name, folder / name)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    (trial.folder / CHECKPOINTS).rename(folder / CHECKPOINTS)
