"""Where a run stands: its position, which a checkpoint keeps, and how it ends if it diverges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_lora.utils.errors import RunError
from mlx_lora.utils.text import words_of

LOSS, TASK = "loss", "task"  # what the best validation may be chosen by; others are numbers of the objective
VALIDATED = "validated_examples"  # in a run's identity: how many rows it validates on


@dataclass
class Position:
    """The position of a run, which the loop keeps up to date.

    Attributes:
        taken: optimizer steps so far.
        consumed: micro-batches of the plan so far.
        skipped, skipped_in_a_row: updates that were not finite.
        val_loss, val_at: the last validation and its step.
        best_loss, best_score, best_at: the best validation so far and its step; its score if it is not chosen by the loss.
        worse: validations since then that were not better by the early stopping threshold.
        parts: the number of parts in which each batch runs.
    """

    taken: int = 0
    consumed: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    val_loss: float | None = None
    val_at: int | None = None
    best_loss: float | None = None
    best_score: float | None = None
    best_at: int | None = None
    worse: int = 0
    parts: int = 1

    def validated(self, loss: float, threshold: float = 0.0, metric: str = LOSS, score: float | None = None) -> bool:
        """Record a validation, and return whether it is the best so far.

        Args:
            loss: mean per trained token, or per example of preference training.
            threshold: an improvement up to this does not count for early stopping, as in transformers'
                EarlyStoppingCallback.
            metric: what the best validation is chosen by: the lowest loss, or the highest of another number (of equal
                ones, the one with the lowest loss). Before the first step, an objective's numbers are only rounding,
                because policy and reference are still the same, or the head is new, so this validation is then not a
                candidate. With a task it is one.
            score: the number of that name; None: it was not measured. Of a score that is no number, nothing is better.
        """
        self.val_loss, self.val_at = loss, self.taken
        if metric not in (LOSS, TASK) and not self.taken:
            return False
        less = math.inf if self.best_loss is None else self.best_loss - loss
        gain = less
        if metric != LOSS and score is not None:
            gain = math.inf if self.best_score is None else score - self.best_score
        better = math.isfinite(loss) and not math.isnan(score or 0.0) and (gain > 0 or (gain == 0 and less > 0))
        self.worse = 0 if better and (gain > threshold or not threshold) else self.worse + 1
        if better:
            self.best_loss, self.best_at = loss, self.taken
            self.best_score = score if metric != LOSS else None
        return better

    def compare_anew(self) -> None:
        """Forget the validations so far, because those from here on measure something else."""
        self.best_loss = self.best_score = self.best_at = None
        self.worse = 0


def score_words(metric: str) -> str:
    """Return in words what the best validation is chosen by, if it is not the loss."""
    return "score on the task" if metric == TASK else f"held-out {words_of(metric)}"


class Diverged(RunError):
    """Ends a run because many updates in a row were not finite; `at` is the run's position."""

    def __init__(self, at: Position):
        super().__init__(f"step {at.taken}: loss or gradient was not finite {at.skipped_in_a_row} times in a row")
        self.at = at


@dataclass(frozen=True)
class StepsDone:
    """Where a run is when its next steps begin.

    Attributes:
        batches: planned batches that are done; the next one has this number.
        steps: optimizer steps that are done.
        of_steps: steps of the whole run.
        epochs: passes over the data that are done.
    """

    batches: int
    steps: int
    of_steps: int
    epochs: float
