"""What to do after a run that did not go well: a sentence, and the command that does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lora.artifacts.checkpoint import numbered
from mlx_lora.artifacts.diagnosis import (
    ENOUGH_STEPS,
    LEARNED,
    MEMORIZED,
    OVER_FITTED,
    TOO_FEW_STEPS,
    UNCHANGED,
    UNKNOWN,
    WORSE,
    Diagnosis,
)
from mlx_lora.system.program import command_line
from mlx_lora.system.units import counted, format_duration
from mlx_lora.training.held_out_rows import FEWEST_ROWS, KnownRows

AIM_STEPS = 60  # updates that a mending run of a small set gets at least
VALIDATIONS = 8  # in a run that looks for the lowest held-out loss
LOW_RATE = 1e-4  # below this, a run that changed nothing had too low a rate
FACTOR = 5  # between the rate that was wrong and the one to try, and between epochs for a form and for facts
FEWEST_EPOCHS, MOST_EPOCHS = 10, 40  # of a run over facts
FEW_KNOWN, MOST_KNOWN = 0.5, 0.9  # shares of training rows that are answered word for word


@dataclass(frozen=True)
class RunFacts:
    """What the commands need to know of a run.

    Attributes:
        folder: of the run; None: there is none, so no command can be given.
        settings: of run.yaml.
        steps: that were taken.
        epochs: that they went over the data.
        step_s: seconds per step, validations included.
    """

    folder: Path | None
    settings: Mapping[str, Any]
    steps: int
    epochs: float
    step_s: float

    @property
    def rate(self) -> float:
        """The learning rate at its peak."""
        return float(self.settings.get("learning_rate") or 2e-4)

    def train_again(self, *flags: str) -> str:
        """Return the command that repeats the run with other settings in another folder."""
        if self.folder is None:
            return ""
        return command_line(
            ["train", "--config", str(self.folder / "run.yaml"), "--adapter-path", f"{self.folder}-2", *flags]
        )


def mending(diagnosis: Diagnosis, run: RunFacts, known: KnownRows | None = None) -> tuple[str, str]:
    """Return what mends a run as a sentence, and as a command; both empty if nothing is to mend.

    Args:
        diagnosis: what became of it.
        run: for the command.
        known: how many training rows it answers word for word; None: nobody asked.
    """
    if known is not None and diagnosis.name == LEARNED and known.share < FEW_KNOWN:
        epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(FACTOR * run.epochs)))
        flags = ["--epochs", str(epochs), "--no-keep-best", "--early-stopping-patience", "0"]
        if epochs > run.epochs:
            return f"{known.words()} If the rows are facts to remember, train for more epochs:", run.train_again(*flags)
    if known is not None and diagnosis.name == OVER_FITTED and known.share >= MOST_KNOWN:
        mend, command = mending(diagnosis, run)
        return f"{known.words()} If the rows are facts to remember, keep this adapter. If not: {mend}", command
    if diagnosis.name == TOO_FEW_STEPS:
        return _more_steps(run)
    if diagnosis.name in (OVER_FITTED, WORSE) and diagnosis.change and 0 < diagnosis.change.rows < FEWEST_ROWS:
        few = counted(diagnosis.change.rows, "held-out row")
        return (
            f"{few} cannot tell: before you train again, look at the answers to questions that are not in the training rows.",
            _new_questions(run, "--show", "10"),
        )
    if diagnosis.name == OVER_FITTED:
        return _earlier(diagnosis, run)
    if diagnosis.name == MEMORIZED:
        return "Measure on questions that are not in the training rows.", _new_questions(run)
    if diagnosis.name == UNCHANGED:
        if run.rate < LOW_RATE:
            rate = f"{min(2e-4, run.rate * FACTOR * 20):.0e}"
            return f"The learning rate of {run.rate:g} is low; try {float(rate):g}.", run.train_again(
                "--learning-rate", rate
            )
        return _more_steps(run)
    if diagnosis.name == WORSE:
        rate = run.rate / FACTOR
        return (
            f"Try a lower learning rate, such as {rate:.1g}, and check that the held-out rows are like the training rows.",
            run.train_again("--learning-rate", f"{rate:.1g}"),
        )
    if diagnosis.name == UNKNOWN and math.isnan(diagnosis.first):
        return "Hold some rows out to see it.", run.train_again("--valid-fraction", "0.1")
    return "", ""


def _new_questions(run: RunFacts, *flags: str) -> str:
    """Return the command that measures an adapter on another file; nothing without a folder."""
    if run.folder is None:
        return ""
    words = ["evaluate", "--model", str(run.settings.get("model")), "--adapter-path", str(run.folder)]
    return command_line([*words, "--data", "new-questions.jsonl", *flags])


def _more_steps(run: RunFacts) -> tuple[str, str]:
    """Return advice to train longer: enough epochs for the aim, and at least twice as many as now."""
    per_epoch = run.steps / run.epochs if run.epochs else float(max(1, run.steps))
    least = 2 * run.steps if run.steps >= ENOUGH_STEPS else max(AIM_STEPS, 2 * run.steps)
    epochs = max(1, math.ceil(least / max(per_epoch, 1e-9)))
    steps = max(1, round(epochs * per_epoch))
    time = f", about {format_duration(steps * run.step_s)}" if run.step_s else ""
    return f"--epochs {epochs} gives {counted(steps, 'step')}{time}.", run.train_again("--epochs", str(epochs))


def _earlier(diagnosis: Diagnosis, run: RunFacts) -> tuple[str, str]:
    """Return advice to end with the adapter of the lowest held-out loss."""
    every = str(max(1, run.steps // VALIDATIONS))
    again = run.train_again("--keep-best", "--steps-per-eval", every)
    best = diagnosis.best_step
    if not best:
        return f"--keep-best with --steps-per-eval {every} finds the step to end at, or train for fewer epochs.", again
    kept = [] if run.folder is None else [path for step, path in numbered(run.folder / "checkpoints") if step == best]
    if kept:
        return f"The adapter of step {best:,} is in {kept[0]}; --keep-best puts it into the run's folder.", again
    fewer = (
        f"--iters {best}" if run.settings.get("iters") else f"--epochs {max(0.1, run.epochs * best / run.steps):.2g}"
    )
    return f"Train again with --keep-best, or for less long ({fewer}).", again
