"""Train several runs at once on one base: each has its own folder, data and settings, and is as if alone.

    runs = SeveralRuns.open([settings_a, settings_b, settings_c])
    runs.train()                      or, to look at them in between:  while runs.active: runs.round()

A round takes the next step of every run that is not over: the forward and backward passes together (trainer/stacked_step.py), the
update by each run's own step. So validation, reports, checkpoints, early
stopping and the skipping of updates are each run's own. A run that ends or diverges leaves; the others go on, with the same bytes
whichever of the two it was.

Rows that are computed together are rounded together, so a resumed run only gets the same bytes if the others are where they were.
Therefore all runs save together: when one saves, the others do too. `--resume` begins at the last round at which every run has a
checkpoint, unless it had ended by then, and together.json in each folder says which runs belong together and how each ended.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.adapters.stacked import unstackable
from mlx_lora.config.objectives import OBJECTIVES
from mlx_lora.config.settings import AUTO, TrainSettings, checkpoint_every
from mlx_lora.losses.agree import Compute, choose_compute
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.load import Base, load_base
from mlx_lora.models.meta import Outline, outline_for
from mlx_lora.parallel.ranks import ALONE
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.planner.fit import SMALLEST_BATCH, fit
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import held_bytes, most_that_fit
from mlx_lora.trainer.checkpoint import numbered
from mlx_lora.trainer.fit import outlined_shape, shared_shapes, with_kernels
from mlx_lora.trainer.guards import interrupt_flag
from mlx_lora.trainer.request import check_request, wants_training
from mlx_lora.trainer.run import open_run
from mlx_lora.trainer.run_folder import CHECKPOINTS, holds_adapter
from mlx_lora.trainer.stacked_step import StackedStep
from mlx_lora.trainer.trainer import Outcome, StepWanted, Trainer
from mlx_lora.utils import console, device
from mlx_lora.utils.errors import InputError, RunError
from mlx_lora.utils.files import replacing_file
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.progress import waiting
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.trainer.callbacks import Callback
    from mlx_lora.trainer.step import StepResult


# Find where several runs go on together: the last round at which every run has a checkpoint, unless it had ended by then

TOGETHER_FILE = "together.json"


@dataclass(frozen=True)
class Left:
    """What an earlier start of a run left in its folder.

    Attributes:
        steps: of its checkpoints.
        ended: the step after which it was over; None: it was not.
        error: what ended it, if it failed.
        length: its --iters and --epochs, if it took all of its steps; None: it ended earlier, or is not known to have.
    """

    steps: frozenset[int]
    ended: int | None = None
    error: str | None = None
    length: list[Any] | None = None

    def is_over(self, at: int) -> bool:
        """Return whether the run had ended by a round, and so need not go on from there."""
        return self.ended is not None and 0 < self.ended <= at

    @classmethod
    def of(cls, folder: Path) -> Left:
        """Read a run folder."""
        steps = frozenset(step for step, _ in numbered(folder / CHECKPOINTS))
        file = folder / TOGETHER_FILE
        state = read_json(file, "start the runs again with --force") if file.is_file() else {}
        ended, error = state.get("ended"), state.get("error")
        error, length = error if isinstance(error, str) else None, state.get("length")
        return cls(steps, ended if type(ended) is int else None, error, length if isinstance(length, list) else None)

    def goes_on(self, settings: TrainSettings, at: int) -> bool:
        """Tell whether a run that took all of its steps is to go on, because its settings have another length now.

        Raises:
            InputError: it ended before the round from which the runs go on.
        """
        if self.error or self.length is None or self.length == length_of(settings):
            return False
        if self.ended != at or at not in self.steps:
            raise InputError(
                f"--resume: {settings.loop.adapter_path} ended at step {self.ended}, and the runs go on from step {at}, so its "
                "length cannot be changed; resume it by itself"
            )
        return True


def length_of(settings: TrainSettings) -> list[Any]:
    """Return what decides how long a run is."""
    return [settings.loop.iters, settings.loop.epochs]


def common_round(left: Sequence[Left]) -> int:
    """Return the last round at which every run has a checkpoint, or was over; 0: they begin."""
    rounds = sorted({0}.union(*(run.steps for run in left)), reverse=True)
    return next(at for at in rounds if not at or all(at in run.steps or run.is_over(at) for run in left))


def resumed(runs: Sequence[TrainSettings]) -> tuple[list[TrainSettings], list[Left], int]:
    """Return settings that go on from where all runs were last together, what each had left, and the round."""
    left = [Left.of(Path(settings.loop.adapter_path)) for settings in runs]
    at = common_round(left)
    found = []
    for settings in runs:
        place = str(Path(settings.loop.adapter_path) / CHECKPOINTS / f"step-{at:06d}") if at else None
        found.append(replace(settings, loop=replace(settings.loop, resume=place, force=at == 0)))
    return found, left, at


def refuse_to_lose(runs: Sequence[TrainSettings], names: Sequence[str], left: Sequence[Left]) -> None:
    """Raise InputError if runs have checkpoints and none in common, unless a kill during the first saving left them so.

    So it does if all have adapters and no checkpoints, or one has an adapter and no checkpoint because it was over.
    """
    trained = [
        name
        for name, settings, one in zip(names, runs, left, strict=True)
        if not one.steps and holds_adapter(Path(settings.loop.adapter_path))
    ]
    over = [name for name, one in zip(names, left, strict=True) if one.ended is not None and one.error is None]
    if len(trained) == len(runs) or set(trained) & set(over):
        raise InputError(
            f"--resume: {', '.join(trained)} hold adapters, and no checkpoints to go on from; give --force to replace them"
        )
    saved = frozenset[int]().union(*(one.steps for one in left))
    begun = all((Path(settings.loop.adapter_path) / "run.yaml").is_file() for settings in runs)
    if saved and not (begun and len(saved) == 1):
        last = ", ".join(f"{name}: {max(one.steps, default='none')}" for name, one in zip(names, left, strict=True))
        advice = "resume each by itself, or to begin all again, give --force instead"
        raise InputError(f"--resume: the runs have no checkpoint in common (last steps: {last}); {advice}")


# Train several runs at once on one base: each has its own folder, data and settings, and is as if alone

log = logging.getLogger(__name__)

# What is asked for


def check_together(runs: Sequence[TrainSettings], names: Sequence[str]) -> None:
    """Refuse runs that cannot be trained together, before anything is loaded.

    Raises:
        InputError: all that is wrong with them.
    """
    problems = []
    folders: dict[Path, str] = {}
    for settings, name in zip(runs, names, strict=True):
        folder = Path(settings.loop.adapter_path).resolve()
        if folder in folders:
            problems.append(
                f"{name}: --adapter-path {settings.loop.adapter_path} is also that of {folders[folder]}; give each run a folder"
            )
        folders[folder] = name
        problems += [f"{name}: {problem}" for problem in _problems(settings, runs[0], names[0])]
    if problems:
        raise InputError("; ".join(problems))


def check_trials(trials: Sequence[TrainSettings]) -> None:
    """Refuse trials that cannot be trained together, where they differ in nothing that decides it.

    Raises:
        InputError: what is wrong with all of them, told once.
    """
    problems = dict.fromkeys(problem for trial in trials for problem in _problems(trial, trials[0], "the first"))
    if problems:
        raise InputError("; ".join(problems))


def _problems(settings: TrainSettings, first: TrainSettings, its_name: str) -> Iterator[str]:
    loop = settings.loop
    if settings.model != first.model:
        own, other = asdict(settings.model), asdict(first.model)
        name = next(name for name in own if own[name] != other[name])
        yield f"--{name} {own[name]}, and {its_name} has {other[name]}; runs are trained together on one base only"
    if not settings.objective.row.together:
        able = ", ".join(name for name, row in OBJECTIVES.items() if row.together)
        yield f"--objective {settings.objective.objective} cannot be trained together with other runs; only {able} can"
    if not wants_training(settings):
        yield "--test alone trains nothing; leave it out"
    if loop.resume not in (None, "auto"):
        yield f"--resume {loop.resume}: runs go on together, from where all have a checkpoint; give --resume without a value"
    asked = {
        "--shard-base": loop.shard_base != "off",
        "--parallel": loop.parallel != "data",
        "--offload-base on": loop.offload_base == "on",
        "--cache-trunk on": loop.cache_trunk == "on",
        "--max-restarts": bool(loop.max_restarts),
        "--short-buffers": loop.short_buffers,
        "--train-mtp": loop.train_mtp,
        "--learning-rate auto": settings.optimizer.learning_rate == AUTO,
    }
    yield from (f"{flag} is for a run of its own; leave it out" for flag, is_asked in asked.items() if is_asked)


def prepared(settings: TrainSettings) -> TrainSettings:
    """Return the settings of a run among several: no frozen prefix is kept, and at least two checkpoints are."""
    loop = settings.loop
    return replace(
        settings,
        loop=replace(loop, cache_trunk="off", offload_base="off", keep=2 if loop.keep == 1 else loop.keep),
    )


# A run


class Named(logging.Handler):
    """Gives each log line to other handlers, with the name of its run before it."""

    def __init__(self, handlers: Sequence[logging.Handler], name: str):
        super().__init__()
        self._handlers, self._name = handlers, name

    def emit(self, record: logging.LogRecord) -> None:
        named = copy.copy(record)
        named.msg, named.args = "\n".join(f"{self._name}: {line}" for line in record.getMessage().split("\n")), ()
        for handler in self._handlers:
            handler.emit(named)


class ConcurrentRun:
    """One of several runs.

    Attributes:
        name: of the run, for the log.
        settings: of the run.
        wanted: its next step; None: it is over, or has not begun.
        outcome: how it ended; None: it did not.
        error: what ended it instead.
    """

    def __init__(self, name: str, settings: TrainSettings, base: Base, callbacks: Sequence[Callback]):
        self.name, self.settings = name, settings
        self.wanted: StepWanted | None = None
        self.outcome: Outcome | None = None
        self.error: str | None = None
        self._state: mx.array | None = None  # of its random stream, while others run
        self._base, self._callbacks, self._opened = base, callbacks, ExitStack()

    @property
    def folder(self) -> Path:
        return Path(self.settings.loop.adapter_path)

    @property
    def taken(self) -> int:
        """Steps that are done."""
        return self.wanted.trainer.at.taken if self.wanted is not None else self.outcome.steps if self.outcome else 0

    @property
    def saved(self) -> bool:
        """Whether the run has saved where it is; one that is over has."""
        return self.wanted is None or self.wanted.trainer.saved

    def begin(self, signaled: Callable[[], bool]) -> None:
        """Go to the first step.

        Raises:
            InputError: the run cannot begin.
        """
        own = replace(self._base, model=copy.deepcopy(self._base.model))  # copies modules, not their arrays
        with self.running(), self._failing():
            run = open_run(self.settings, base=own, callbacks=self._callbacks, signaled=signaled)
            trainer = self._opened.enter_context(run)
            if trainer is None:
                raise ValueError("a run among several that trains nothing")
            trainer.begin()
            self._go_on(trainer)

    def take(self, wanted: StepWanted, result: StepResult) -> None:
        """Go on with the result of the step that was wanted; a run that fails is over, and `error` says why."""
        try:
            with self.running(), self._failing():
                wanted.trainer.finish_step(wanted, result)
                self._go_on(wanted.trainer)
        except RunError as error:
            self.wanted, self.error = None, str(error)

    def save(self) -> None:
        """Save the run where it is."""
        if self.wanted is None:
            return
        try:
            with self.running(), self._failing():
                self.wanted.trainer.save()
        except RunError as error:
            self.wanted, self.error = None, str(error)

    def pause(self) -> None:
        """Measure the held-out rows and save the run where it is, to go on from there later."""
        if self.wanted is None:
            return
        trainer = self.wanted.trainer
        with self.running():
            if trainer.at.val_at != trainer.at.taken:
                trainer.validate()
        self.save()

    def close(self) -> None:
        """End the run at once, and leave what it has saved."""
        if self.wanted is not None:
            self.wanted, end = None, GeneratorExit()
            self._opened.__exit__(GeneratorExit, end, None)

    def _go_on(self, trainer: Trainer) -> None:
        """Go to the next step, or to the end of the run."""
        self.wanted = trainer.next_step()
        if self.wanted is None:
            self.outcome = trainer.end()
            self._opened.close()

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Let the run's own context know what fails in it; it restores, and says what is kept."""
        try:
            yield
        except BaseException:
            if not self._opened.__exit__(*sys.exc_info()):
                raise

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the process be this run's: its random stream, and its name in the log."""
        before = console.LOGGER.handlers
        console.LOGGER.handlers = [Named(before, self.name)]
        if self._state is not None:
            high, low = np.array(self._state).tolist()  # the state of a stream cannot be assigned, only seeded
            mx.random.seed(high << 32 | low)
        try:
            yield
        finally:
            self._state = mx.random.state[0]
            console.LOGGER.handlers = before

    @property
    def drops(self) -> bool:
        """Whether it draws random numbers in its steps."""
        return self.settings.adapter.dropout > 0

    @property
    def key(self) -> mx.array:
        """The state of its random stream."""
        if self._state is None:
            raise ValueError("the run has not begun")
        return self._state

    def went_to(self, key: mx.array) -> None:
        """Set the state of its random stream, which a joint step drew from."""
        self._state = key


# All


class SeveralRuns:
    """Several runs on one base, a round of steps at a time.

    Attributes:
        members: the runs, in the order of their settings.
        at: rounds that are done.
        joint: computes their steps together; None before they have begun, or where fewer than two can be stacked.
    """

    def __init__(self, members: Sequence[ConcurrentRun], base: Base, left: Sequence[Left], at: int = 0):
        self.members, self.at = list(members), at
        self._base = base
        self.joint: StackedStep | None = None
        for member, own in zip(members, left, strict=False):
            if own.is_over(at) and own.ended is not None and not own.goes_on(member.settings, at):
                member.error = own.error
                member.outcome = None if own.error else Outcome(own.ended, None, False)

    @classmethod
    def open(
        cls,
        runs: Sequence[TrainSettings],
        names: Sequence[str] | None = None,
        base: Base | None = None,
        callbacks: Sequence[Sequence[Callback]] = (),
        may_restart: bool = False,
    ) -> SeveralRuns:
        """Check the runs and load their base.

        Args:
            runs: settings, each with a folder of its own. If one asks for --resume, all go on from where they were together.
            names: of the runs, for the log; None: those of their folders.
            base: that they name, if it is already loaded; it stays as it is.
            callbacks: of each run; none if empty.
            may_restart: begin again where the runs to resume have no checkpoint in common, whatever is lost.

        Raises:
            InputError: they cannot be trained together, or resumed so.
        """
        names = list(names or [Path(settings.loop.adapter_path).name for settings in runs])
        check_together(runs, names)
        left: list[Left] = []
        at = 0
        own = [prepared(settings) for settings in runs]
        if any(settings.loop.resume is not None for settings in runs):
            own, left, at = resumed(own)
            if not at and not may_restart and not all(settings.loop.force for settings in runs):
                refuse_to_lose(own, names, left)
        for settings in own:
            check_request(settings, ALONE)
        refuse_too_many(len(own), how_many_fit(own), all(settings.loop.memory_check for settings in own))
        if base is None:
            with waiting("Loading the model"):
                base = load_base(own[0].model)
        told = callbacks or [()] * len(own)
        members = [ConcurrentRun(*run) for run in zip(names, own, [base] * len(own), told, strict=True)]
        return cls(members, base, left, at)

    @property
    def active(self) -> list[ConcurrentRun]:
        """The runs that want a step."""
        return [member for member in self.members if member.wanted is not None]

    def train(self) -> list[ConcurrentRun]:
        """Train all runs to their ends, and return them."""
        with self.begun():
            while self.active:
                self.round()
        return self.members

    @contextmanager
    def begun(self, told: Callable[[ConcurrentRun], None] = lambda member: None) -> Iterator[None]:
        """Bring all runs to their first step, for the rounds in this context; runs that are not over then are left as saved.

        Args:
            told: called with each run that has begun.

        Raises:
            InputError: a run cannot begin.
        """
        with interrupt_flag() as signaled, shared_shapes():
            try:
                for member in self.members:
                    if member.outcome is not None or member.error is not None:
                        log.info(f"{member.name}: was over before{f': {member.error}' if member.error else ''}")
                        continue
                    (member.folder / TOGETHER_FILE).unlink(missing_ok=True)
                    try:
                        member.begin(signaled)
                    except (InputError, RunError) as error:
                        raise type(error)(f"{member.name}: {error}") from error
                    if member.wanted is None:
                        self._note(member)
                    told(member)
                self._together()
                device.compile_for(max((m.wanted.trainer.total for m in self.active if m.wanted), default=0))
                yield
            finally:
                for member in self.members:
                    member.close()

    def round(self) -> None:
        """Take the next step of every run that is not over."""
        active = {number: m for number, m in enumerate(self.members) if m.wanted is not None}
        wanted = {number: member.wanted for number, member in active.items() if member.wanted is not None}
        results = self._results(active, wanted)
        ended = []
        for number, member in active.items():
            member.take(wanted[number], results[number])
            ended += [member] if member.wanted is None else []
        self.at += 1
        if any(member.saved for member in active.values()):  # one that is over has saved
            for member in self.active:
                if not member.saved:
                    member.save()
                    ended += [member] if member.wanted is None else []  # it could not be saved
        for member in ended:
            self._note(member)

    def _results(self, active: Mapping[int, ConcurrentRun], wanted: Mapping[int, StepWanted]) -> dict[int, StepResult]:
        """Compute the steps."""
        keys = {number: member.key for number, member in active.items() if member.drops}
        joined = [] if self.joint is None else self.joint.joined(wanted)
        sums = {}
        if self.joint is not None and joined:
            sums = self.joint.sums({number: wanted[number] for number in joined}, keys)
        results = {}
        for number, member in active.items():
            if number in joined:
                results[number] = wanted[number].trainer.step.optim_step(sums[number])
                if number in keys:
                    member.went_to(keys[number])
                continue
            with member.running():
                results[number] = wanted[number].take()
        return results

    def _together(self) -> None:
        """Make the joint step of the runs whose rows can be stacked, and say of the others why they cannot be."""
        trainers = {}
        for number, member in enumerate(self.members):
            if member.wanted is None:
                continue
            trainer = member.wanted.trainer
            reason = "they have pictures" if trainer.ctx.objective.pictures else unstackable(trainer.step.model)
            if reason is None:
                trainers[number] = member.wanted.trainer
            else:
                log.info(f"{member.name}: its rows are computed by themselves: {reason}")
        if not trainers:
            return
        room_bytes = self._room_bytes()
        if len(trainers) < 2:
            return
        first = next(iter(trainers))
        settings, rows = self.members[first].settings, trainers[first].plan.rows

        def choose(base: Base) -> Compute:
            return choose_compute(settings, base, rows, SINGLE_DEVICE)

        base = replace(self._base, model=copy.deepcopy(self._base.model))
        with waiting("Preparing the joint step"):
            modes = [trainer.settings.grad_checkpoint for trainer in trainers.values()]
            self.joint = StackedStep(base, trainers, choose, min(modes, key=_kept_share), room_bytes)
        log.info(f"Together: {counted(len(trainers), 'run')} on one base; {self.joint.words}")

    def _room_bytes(self) -> float:
        """Return the bytes that the activations of all rows that are computed together may take.

        Raises:
            InputError: the runs do not fit; says how many of them do.
        """
        trainers = [member.wanted.trainer for member in self.members if member.wanted is not None]
        memories = [trainer.ctx.memory for trainer in trainers]
        if any(memory is None for memory in memories):
            return float("inf")
        kept = ([trainer.step.masters.arrays, trainer.step.optimizer.state] for trainer in trainers)
        held = [sum(array.nbytes for _, array in tree_flatten(arrays)) for arrays in kept]
        plans = [memory for memory in memories if memory is not None]
        base = self._base.size_bytes
        steps = [max(0, plan.peak_bytes - base - own) for plan, own in zip(plans, held, strict=True)]
        budget = min(plan.budget_bytes - plan.cache_bytes for plan in plans)
        checks = all(trainer.settings.memory_check for trainer in trainers)
        refuse_too_many(len(plans), most_that_fit(base, held, steps, budget), checks)
        return max(max(steps, default=0), budget - base - sum(held))

    def _note(self, member: ConcurrentRun) -> None:
        """Write into a run's folder how it ended."""
        if member.outcome is not None and member.outcome.interrupted:
            return
        if member.error is not None:
            log.info(f"{member.name}: {member.error}; the other runs go on")
        state = {
            "runs": [str(other.folder.resolve()) for other in self.members],
            "ended": self.at if member.outcome is None else member.outcome.steps,
            "error": member.error,
        }
        if member.outcome is not None and not member.outcome.stopped_early:
            state["length"] = length_of(member.settings)
        member.folder.mkdir(parents=True, exist_ok=True)
        with replacing_file(member.folder / TOGETHER_FILE) as temporary:
            temporary.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")


def _kept_share(mode: str) -> tuple[int, int]:
    """Return an order of checkpointing modes, those that keep the least first."""
    every = checkpoint_every(mode)
    return (3, 0) if every is None else (2, 0) if mode == "selective" else (1, every)


def failures(members: Sequence[ConcurrentRun]) -> RunError | None:
    """Return the error that says which runs failed, and why; None: none did."""
    failed = [member for member in members if member.error is not None]
    if not failed:
        return None
    reasons = "; ".join(f"{member.name}: {member.error}" for member in failed)
    return RunError(f"{len(failed)} of {counted(len(members), 'run')} failed: {reasons}")


# Memory


class TooManyRuns(InputError):
    """Refuses runs that do not fit in memory together; `fitting` is how many of them do."""

    def __init__(self, asked: int, fitting: int):
        advice = f"start {fitting} at a time" if fitting > 1 else "start each by itself"
        super().__init__(
            f"--runs: {asked} runs on one base do not fit in memory, and the first {fitting} do; {advice}, lower --rank, or use "
            "--optimizer with less state"
        )
        self.fitting = fitting


def how_many_fit(runs: Sequence[TrainSettings]) -> int:
    """Return how many runs the memory can hold with the shortest rows, from their settings, before the base is loaded."""
    known: dict[Any, tuple[int, int, int]] = {}
    dtype = device.compute_dtype(runs[0].model.dtype)
    try:
        outline = outline_for(runs[0].model, dtype)
        for settings in runs:
            if _of_adapter(settings) not in known:
                known[_of_adapter(settings)] = _least(settings, outline)
    except (InputError, *FOREIGN_ERRORS) as error:
        if not isinstance(error, InputError) and not is_foreign(error):
            raise
        return len(runs)  # loading reports what is wrong with the model
    base, held, steps = zip(*(known[_of_adapter(settings)] for settings in runs), strict=True)
    machine = this_machine(runs[0].model.dtype)
    budgets = [int(settings.loop.memory_budget * 1e9) for settings in runs if settings.loop.memory_budget]
    budget = min([machine.working_set_bytes, *budgets])
    return most_that_fit(base[0], held, steps, budget - min(machine.cache_bytes, budget // 16))


def _of_adapter(settings: TrainSettings) -> tuple[Any, ...]:
    """Return what a run's memory with the shortest rows depends on."""
    return settings.adapter, settings.optimizer.optimizer, settings.objective


def _least(settings: TrainSettings, outline: Outline) -> tuple[int, int, int]:
    """Return the bytes of the base, of what a run holds, and of its step with the shortest row."""
    shape = outlined_shape(outline, settings)
    machine = with_kernels(settings, shape, this_machine(settings.model.dtype))
    short = replace(settings, loop=replace(settings.loop, batch_size=1, grad_checkpoint="block"))
    memory = fit(short, shape, machine, SMALLEST_BATCH).memory
    held = held_bytes(shape, settings.optimizer.optimizer)
    return shape.base_bytes, held, max(0, memory.peak_bytes - shape.base_bytes - held)


def refuse_too_many(asked: int, fitting: int, checks: bool = True) -> None:
    """Raise TooManyRuns, which says how many fit, if they do not, unless no run checks its memory."""
    if fitting < asked and checks:
        raise TooManyRuns(asked, fitting)
