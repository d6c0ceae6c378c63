"""Find good settings by successive halving: many short runs at once on one base, the better ones go on.

    trials = trials_of(settings, candidates, seeds, folder / TRIALS)
    Sweep(folder, SweepState(asked, candidates), trials, rungs(len(candidates), seeds, budget)).choose(base)

The whole job, with the winner's own run and the page, is api/train.py; `--learning-rate auto` is find_learning_rate.py. A trial is an ordinary run (trainer/several_runs.py) that is stopped and saved at the end of a round, and resumed exactly in the next.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora.config.defaults import learning_rate_for
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.config.sweep import (
    SWEEP_FILE,
    TRIALS,
    WINNER,
    Candidate,
    Rung,
    TooShort,
    check_long_enough,
    order_of,
    with_candidate,
    without_last_round,
    words,
)
from mlx_lora.models.load import Base
from mlx_lora.models.meta import outline_for
from mlx_lora.reports.run_report import compared_validations, read_facts, read_records
from mlx_lora.reports.sweep_page import WHOLE, SweepResults
from mlx_lora.trainer.fit import outlined_shape, shared_shapes
from mlx_lora.trainer.guards import LOSS, TASK
from mlx_lora.trainer.run_folder import CHECKPOINTS
from mlx_lora.trainer.several_runs import ConcurrentRun, Left, SeveralRuns, TooManyRuns, common_round, how_many_fit
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text
from mlx_lora.utils.parsing import parse_yaml, read_json
from mlx_lora.utils.progress import long_task
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
