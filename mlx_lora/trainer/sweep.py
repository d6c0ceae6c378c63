"""Find good settings by successive halving: many short runs at once on one base, the better ones go on.

    trials = trials_of(settings, candidates, seeds, folder / TRIALS)
    Sweep(folder, SweepState(asked, candidates), trials, rungs(len(candidates), seeds, budget)).choose(base)

The whole job, with the winner's own run and the page, is api/train.py; `--learning-rate auto` is `find_learning_rate`. A trial is an ordinary run (trainer/several_runs.py) that is stopped and saved at the end of a round, and resumed exactly in the next.
Trials are compared on the held-out rows, which are the same for all trials of a seed: by their loss, or by --metric-for-best-model. Runs that are computed together are rounded together,
so the winner is trained again by itself: its folder is what `train` gives with these settings, byte for byte. sweep.json is written after
each round; a sweep that was killed goes on from there, and each trial from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_lora.config.defaults import learning_rate_for, validated_every
from mlx_lora.config.load import train_settings
from mlx_lora.config.presets import PRESETS
from mlx_lora.config.settings import TrainSettings
from mlx_lora.config.sweep import (
    PAGE_FILE,
    SWEEP_FILE,
    TRIALS,
    WINNER,
    Candidate,
    Rung,
    TooShort,
    candidates,
    check_long_enough,
    order_of,
    with_candidate,
    without_last_round,
    words,
    work,
)
from mlx_lora.exporters.adapter_folder import CONFIG_FILE
from mlx_lora.models.load import Base, load_base
from mlx_lora.models.meta import outline_for
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.reports.run_report import ROWS_FILE, compared_validations, read_facts, read_records
from mlx_lora.reports.sweep_page import WHOLE, SweepResults, write_page
from mlx_lora.trainer.fit import outlined_shape, shared_shapes
from mlx_lora.trainer.guards import LOSS, TASK
from mlx_lora.trainer.request import check_request
from mlx_lora.trainer.run_folder import CHECKPOINTS, remove_results
from mlx_lora.trainer.several_runs import (
    ConcurrentRun,
    Left,
    SeveralRuns,
    TooManyRuns,
    check_trials,
    common_round,
    how_many_fit,
)
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.parsing import parse_yaml, read_json
from mlx_lora.utils.progress import long_task, waiting
from mlx_lora.utils.text import counted

log = logging.getLogger(__name__)

MOST_AT_ONCE = 16  # more gain little, and each has its own arrays
FEWEST_STEPS = 4  # of the first round
# Settings that decide how many steps a run has; trials that are trained together have these in common.
OF_LENGTH = ("iters", "epochs", "batch_size", "batch_tokens", "grad_accumulation_steps")


# Trials


class NothingHeldOut(InputError):
    """Refuses candidates that cannot be compared, because the run has no held-out rows."""

    def __init__(self) -> None:
        super().__init__(
            "candidates are compared on held-out rows, and the run has none; give --valid-fraction 0.05, or add a validation file "
            "to the data"
        )


def check_validates(settings: TrainSettings) -> None:
    """Refuse a run without validations, before anything is loaded.

    Raises:
        InputError: candidates could not be compared.
    """
    if settings.loop.val_batches == 0:
        raise InputError(
            "--val-batches 0: candidates are compared on held-out rows; leave it out, or give -1 for all of them"
        )


@dataclass(frozen=True)
class Trial:
    """One candidate with one seed.

    Attributes:
        name: of its folder.
        candidate: number of the candidate.
        words: its settings, for people.
        settings: of the run.
    """

    name: str
    candidate: int
    words: str
    settings: TrainSettings

    @property
    def folder(self) -> Path:
        return Path(self.settings.loop.adapter_path)


@dataclass(frozen=True, order=True)
class Score:
    """How good a trial is; the least is the best.

    Attributes:
        error: 1 minus the number that the best validation is chosen by, such as an accuracy; 0 if it is the loss, infinite if
            the run diverged or the number is none.
        loss: on the held-out rows; infinite if the run diverged.
    """

    error: float
    loss: float

    @classmethod
    def mean(cls, scores: Sequence[Score]) -> Score:
        return cls(sum(s.error for s in scores) / len(scores), sum(s.loss for s in scores) / len(scores))


DIVERGED = Score(math.inf, math.inf)


def trials_of(settings: TrainSettings, found: Sequence[Candidate], seeds: int, folder: Path) -> list[Trial]:
    """Return the trials of all candidates, each with its settings and a folder.

    Raises:
        InputError: a candidate's settings cannot be used.
    """
    flat, trials = settings.to_flat(), []
    for number, candidate in enumerate(found):
        for seed in range(settings.loop.seed, settings.loop.seed + seeds):
            name = f"{number + 1:02d}" + (f"-seed{seed}" if seeds > 1 else "")
            own = {
                "adapter_path": str(folder / name), "seed": seed, "resume": "auto", "force": False, "sample_tokens": 0, "test": False,
                "report_to": None, "max_restarts": 0, "short_buffers": False, "save_every": flat["save_every"] or 100, "keep": 2,
            }  # fmt: skip
            said = words(candidate) + (f" --seed {seed}" if seeds > 1 else "")
            trials.append(Trial(name, number, said, train_settings({**with_candidate(flat, candidate), **own})))
    return trials


def rates_around(settings: TrainSettings, factors: Sequence[float]) -> list[float]:
    """Return the model's default learning rate times each factor, with two digits."""
    shape = outlined_shape(outline_for(settings.model, device.compute_dtype(settings.model.dtype)), settings)
    usual = learning_rate_for(shape.model_type, shape.width, settings)
    return [float(f"{usual * factor:.1e}") for factor in factors]


def score_of(trial: Trial, until: int) -> Score:
    """Return a trial's score after so many steps, from its folder.

    Raises:
        NothingHeldOut: it has no held-out rows.
    """
    if Left.of(trial.folder).error is not None:
        return DIVERGED
    records = read_records(trial.folder / "metrics.jsonl")
    validations = [line for line in records if _is_validation(line) and 0 < line["step"] <= until]
    if not validations:
        raise NothingHeldOut
    used = parse_yaml((trial.folder / "run.yaml").read_text(encoding="utf-8"))
    if used["keep_best"]:
        rounded_from = read_facts(trial.folder).get("rounded_from") or 0
        validations = compared_validations(validations, rounded_from)
    metric = trial.settings.loop.metric_for_best_model
    scores = [
        Score(0.0 if metric == LOSS else 1 + _number(line.get(metric), -1), _number(line["val_loss"]))
        for line in validations
    ]
    return min(scores) if used["keep_best"] else scores[-1]


def _is_validation(line: Mapping[str, Any]) -> bool:
    """Tell whether a line of metrics.jsonl is a validation's; a loss that is not finite is null there, and it has no examples."""
    return line["val_loss"] is not None or line.get("examples") == 0


def _number(value: Any, sign: int = 1) -> float:
    """Return a number of a file with a sign; infinity for one that is not finite, which is null there."""
    return sign * float(value) if isinstance(value, (int, float)) and math.isfinite(value) else math.inf


def held_out_curve(folder: Path, metric: str = LOSS) -> list[tuple[int, float]]:
    """Return the steps of a run's validations, and the loss or another number at each.

    An objective's own numbers are only rounding before the first step (see `Position.validated`), so it has none there.
    """
    name, first = ("val_loss", 0) if metric == LOSS else (metric, 0 if metric == TASK else 1)
    return [
        (line["step"], line[name])
        for line in read_records(folder / "metrics.jsonl")
        if _is_validation(line) and line["step"] >= first and isinstance(line.get(name), (int, float))
    ]


# Rounds


class Interrupted(KeyboardInterrupt):
    """A signal ended a round; everything is saved."""


class OnlyWarnings(logging.Handler):
    """Gives warnings of trials to other handlers, and of the first trial also what it says before its first step."""

    def __init__(self, handlers: Sequence[logging.Handler], first: str, begins: bool):
        super().__init__()
        self._handlers, self._first, self.begins = handlers, f"{first}: ", begins

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.WARNING and not (self.begins and record.getMessage().startswith(self._first)):
            return
        for handler in self._handlers:
            handler.emit(record)


@contextlib.contextmanager
def quieter(first: str, header: bool) -> Iterator[OnlyWarnings]:
    """Log only warnings of trials in this block, and with `header` what the first one says as it begins."""
    before = console.LOGGER.handlers
    handler = OnlyWarnings(before, first, header)
    console.LOGGER.handlers = [handler]
    try:
        yield handler
    finally:
        console.LOGGER.handlers = before


@dataclass
class Rounds:
    """Trains trials up to a step, as many at once as fit.

    Attributes:
        base: that all are trained on; it stays as it is.
        header: whether the next trial's header is shown.
        totals: steps of a whole run, by what decides them.
        check: called with the steps of a whole run as soon as they are known.
    """

    base: Base
    header: bool = True
    totals: dict[str, int] = field(default_factory=dict)
    check: Callable[[int], None] = lambda total: None

    def train(self, trials: Sequence[Trial], rung: Rung) -> dict[str, Score]:
        """Train trials to the end of a round, and return their scores by name.

        Raises:
            Interrupted: a signal asked to stop; the trials go on from there.
            InputError: not even one of them fits, or they have no held-out rows.
        """
        groups: dict[str, list[Trial]] = {}
        for trial in trials:
            groups.setdefault(self.kind(trial), []).append(trial)
        for group in groups.values():
            size = max(1, min(MOST_AT_ONCE, how_many_fit([trial.settings for trial in group])))
            waiting = list(group)
            while waiting:
                try:
                    self._together(waiting[:size], rung)
                except TooManyRuns as refused:
                    if size == 1 or refused.fitting < 1:
                        raise
                    size = min(refused.fitting, size - 1)
                    continue
                waiting = waiting[size:]
        return {trial.name: score_of(trial, rung.steps(self.totals[self.kind(trial)])) for trial in trials}

    @staticmethod
    def kind(trial: Trial) -> str:
        """Return what trials that are trained together have in common."""
        flat = trial.settings.to_flat()
        return json.dumps({name: flat[name] for name in OF_LENGTH})

    def _together(self, trials: Sequence[Trial], rung: Rung) -> None:
        """Train some trials in one pass to the end of a round."""
        kind, left = self.kind(trials[0]), [Left.of(trial.folder) for trial in trials]
        if kind in self.totals:
            end = rung.steps(self.totals[kind])
            if common_round(left) >= end or all(one.ended is not None for one in left):
                return
        with quieter(trials[0].name, self.header) as said:
            settings, names = [trial.settings for trial in trials], [trial.name for trial in trials]
            runs = SeveralRuns.open(settings, names, self.base, may_restart=True)
            with runs.begun(lambda member: self._learn(kind, member)):
                said.begins = self.header = False
                self.totals.setdefault(kind, max(one.ended or 0 for one in left))  # where all were over before
                self._to(runs, rung.steps(self.totals[kind]))

    def _learn(self, kind: str, member: ConcurrentRun) -> None:
        """Note how many steps a whole run has, as soon as the first of its kind has begun; refuse it if it cannot be compared.

        Raises:
            NothingHeldOut: it has no held-out rows.
        """
        if member.wanted is not None and member.wanted.trainer.validation is None:
            raise NothingHeldOut
        if kind not in self.totals and member.wanted is not None:
            self.totals[kind] = member.wanted.trainer.total
            self.check(self.totals[kind])

    def _to(self, runs: SeveralRuns, end: int) -> None:
        """Take rounds of steps until the runs are at a step."""
        begun, joined = runs.at, counted(len(runs.active), "trial")
        with long_task(f"{joined} to step {end}", end - begun, "steps") as task:
            while runs.active and runs.at < end:
                runs.round()
                task.reach(runs.at - begun)
        if any(member.outcome is not None and member.outcome.interrupted for member in runs.members):
            raise Interrupted
        for member in runs.active:
            member.pause()


# The sweep


@dataclass
class SweepState:
    """What sweep.json holds; it has no times, so that a sweep that was killed leaves the same bytes.

    Attributes:
        asked: everything that decides what a sweep does: settings, what varies, seeds, budget.
        candidates: the settings of each.
        totals: steps of whole runs, see `Rounds`.
        rounds: of each that is done, an entry for each trial: `name`, `candidate`, `seed`, `step`, `loss`, `error`.
        winner: number of the best candidate; None: not known yet.
        val_loss: of its own run; None: not trained yet, or not measured.
        val_score: of its own run, if another number than the loss decides.
    """

    asked: dict[str, Any]
    candidates: list[Candidate]
    totals: dict[str, int] = field(default_factory=dict)
    rounds: list[list[dict[str, Any]]] = field(default_factory=list)
    winner: int | None = None
    val_loss: float | None = None
    val_score: float | None = None

    def write(self, folder: Path) -> None:
        """Write the file, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(console.finite_values(vars(self)), indent=1, ensure_ascii=False)
        replace_text(folder / SWEEP_FILE, text + "\n")

    @classmethod
    def read(cls, folder: Path) -> SweepState:
        """Read what a sweep has done so far.

        Raises:
            InputError: the file is damaged.
        """
        file, advice = folder / SWEEP_FILE, "start the sweep again with --force"
        found = read_json(file, advice)
        try:
            return cls(**found)
        except TypeError:
            raise InputError(f"{file}: not a sweep's file; {advice}") from None

    def scores(self, number: int) -> dict[int, Score]:
        """Return the mean score of each candidate of a round, the best first."""
        found: dict[int, list[Score]] = {}
        for trial in self.rounds[number]:
            found.setdefault(trial["candidate"], []).append(Score(_number(trial["error"]), _number(trial["loss"])))
        means = {candidate: Score.mean(scores) for candidate, scores in found.items()}
        orders = {of: order_of(score.error, score.loss, self.candidates) for of, score in means.items()}
        return dict(sorted(means.items(), key=lambda item: (orders[item[0]], item[0])))


def results_of(state: SweepState, metric: str, curves: Mapping[str, list[tuple[int, float]]]) -> SweepResults:
    """Return what the page of a sweep is made of, by the number that decides."""
    total = max(state.totals.values(), default=0)
    return SweepResults(
        state.candidates, state.rounds, state.winner, state.val_loss, total, curves, metric, state.val_score
    )


class Sweep:
    """Runs the rounds of a sweep, and keeps what came out.

    Attributes:
        folder: of trials and state.
        state: what is done.
        trials: of all candidates.
        rungs: the rounds.
        may_shorten: whether there may be fewer rounds, if the first one is too short to tell candidates apart.
    """

    def __init__(
        self,
        folder: Path,
        state: SweepState,
        trials: Sequence[Trial],
        rungs: Sequence[Rung],
        may_shorten: bool = False,
    ):
        self.folder, self.state, self.trials, self.rungs, self.may_shorten = folder, state, trials, rungs, may_shorten

    def choose(self, base: Base, told: Callable[[], None] = lambda: None, header: bool = True) -> int:
        """Train the rounds that are left, and return the best candidate's number.

        Args:
            base: to train on; it stays as it is.
            told: called after each round.
            header: whether the first trial's header is shown.

        Raises:
            Interrupted: a signal ended a round.
            InputError: all candidates diverged, the rounds are too short, nothing is held out, or nothing fits in memory. If
                nothing was trained, nothing is left in the folder.
        """
        try:
            return self._choose(base, told, header)
        except InputError:
            self._forget_unbegun()
            raise

    def _choose(self, base: Base, told: Callable[[], None], header: bool) -> int:
        state = self.state
        rounds = Rounds(base, header and not state.rounds, dict(state.totals))
        rounds.check = self._check_length
        self._shorten()
        with shared_shapes():
            while state.winner is None:
                self._round(rounds)
                told()
                self._drop_checkpoints()
        return state.winner

    def _forget_unbegun(self) -> None:
        """Remove what planning left in the folder, so that the same command works when it has been corrected."""
        if self.state.rounds or any((trial.folder / CHECKPOINTS).is_dir() for trial in self.trials):
            return
        for trial in self.trials:
            shutil.rmtree(trial.folder, ignore_errors=True)
        (self.folder / SWEEP_FILE).unlink(missing_ok=True)
        for folder in dict.fromkeys((*(trial.folder.parent for trial in self.trials), self.folder)):
            with contextlib.suppress(OSError):  # what else is there is the user's
                folder.rmdir()

    def _round(self, rounds: Rounds) -> None:
        """Train the next round, and note its scores."""
        state = self.state
        kept = self.left()
        trials = [trial for trial in self.trials if trial.candidate in kept]
        while True:
            rung = self.rungs[len(state.rounds)]
            try:
                scores = rounds.train(trials, rung)
            except TooShort:  # known as soon as a run has been planned, before its first step
                state.totals = dict(rounds.totals)
                if not self._shorten():
                    raise
                self._check_length(min(state.totals.values()))  # a total that is known is not checked again
            else:
                break
        state.totals = dict(rounds.totals)
        entries = []
        for trial in trials:
            step, score = rung.steps(state.totals[Rounds.kind(trial)]), scores[trial.name]
            entry = {
                "name": trial.name,
                "candidate": trial.candidate,
                "seed": trial.settings.loop.seed,
                "step": step,
            }
            entries.append({**entry, "loss": score.loss, "error": score.error})
        state.rounds.append(entries)
        best = next(iter(state.scores(len(state.rounds) - 1).items()))
        if not math.isfinite(best[1].loss):
            raise InputError(f"every candidate diverged (see {self.folder / TRIALS}); try lower learning rates")
        if len(state.rounds) == len(self.rungs):
            state.winner = best[0]
        state.write(self.folder)

    @property
    def _seeds(self) -> int:
        return len(self.trials) // len(self.state.candidates)

    def _check_length(self, total: int) -> None:
        """Refuse rounds that are too short for runs of so many steps."""
        check_long_enough(self.rungs, total, self._seeds, FEWEST_STEPS)

    def _shorten(self) -> bool:
        """Drop last rounds until the first one is long enough for the runs that are known, and return whether any was."""
        before, total = len(self.rungs), min(self.state.totals.values(), default=0)
        while self.may_shorten and total and len(self.rungs) > 1 and self.rungs[0].share * total < FEWEST_STEPS:
            self.rungs = without_last_round(self.rungs, self._seeds)
        return len(self.rungs) < before

    def left(self) -> list[int]:
        """Return the candidates that take part in the next round."""
        done = len(self.state.rounds)
        if not done:
            return list(range(len(self.state.candidates)))
        return list(self.state.scores(done - 1))[: self.rungs[done].candidates if done < len(self.rungs) else 1]

    def compared(self) -> SweepResults:
        """Return what the page of the sweep is made of."""
        folders = {trial.name: trial.folder for trial in self.trials} | {WHOLE: self.folder / WINNER}
        metric = self.trials[0].settings.loop.metric_for_best_model
        curves = {name: held_out_curve(folder, metric) for name, folder in folders.items()}
        return results_of(self.state, metric, curves)

    def _drop_checkpoints(self) -> None:
        """Remove the checkpoints of trials that do not go on."""
        kept = self.left()
        for trial in self.trials:
            if trial.candidate not in kept:
                shutil.rmtree(trial.folder / CHECKPOINTS, ignore_errors=True)


# Find the learning rate in a run's own first part (`--learning-rate auto`).
#
#     settings, base = find_learning_rate(settings)      then train_run(settings, base=base) as always
#
# Several rates around the default are trained at once for a few steps, the better ones a little further, and the run goes
# on from where the best one is: its checkpoint and metrics become the run's own. The steps of the others take at most a fifth of the run's
# work. `trials/sweep.html` in the run folder compares them.


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


def _ways(settings: TrainSettings, folder: Path) -> list[list[Trial]]:
    """Return the trials of a run with many steps and of one with few; with --resume, those that an earlier start has begun."""
    place = Path(settings.loop.adapter_path) / TRIALS
    around = [candidates({"learning_rate": rates_around(settings, factors)}) for factors in AROUND_DEFAULT]
    ways = [trials_of(settings, rates, 1, place) for rates in around]
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
