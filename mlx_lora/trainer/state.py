"""Where a run stands: its position, which a checkpoint keeps, and how it ends if it diverges."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_lora.utils.errors import RunError

VALIDATED = "validated_examples"  # in a run's identity: how many rows it validates on


@dataclass
class Position:
    """The position of a run, which the loop keeps up to date.

    Attributes:
        taken: optimizer steps so far.
        consumed: micro-batches of the plan so far.
        skipped, skipped_in_a_row: updates that were not finite.
        val_loss, val_at: the last validation and its step.
        best_loss, best_accuracy, best_at: the best validation so far and its step; None if it reported no accuracy.
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
    best_accuracy: float | None = None
    best_at: int | None = None
    worse: int = 0
    parts: int = 1

    def validated(
        self, loss: float, threshold: float = 0.0, accuracy: float | None = None, by_accuracy: bool = False
    ) -> bool:
        """Record a validation, and return whether it is the best so far.

        Args:
            loss: mean per trained token, or per example of preference training.
            threshold: an improvement up to this does not count for early stopping, as in transformers'
                EarlyStoppingCallback.
            accuracy: share of pairs that are preferred as labeled, if the objective reports it.
            by_accuracy: whether the best validation is the one with the highest accuracy (of equal ones, the one with
                the lowest loss); otherwise it is the one with the lowest loss. A validation before the first step is
                then not a candidate: policy and reference are still the same, so its accuracy is only rounding.
        """
        self.val_loss, self.val_at = loss, self.taken
        if by_accuracy and not self.taken:
            return False
        less = math.inf if self.best_loss is None else self.best_loss - loss
        gain = less
        if by_accuracy and accuracy is not None:
            gain = math.inf if self.best_accuracy is None else accuracy - self.best_accuracy
        better = math.isfinite(loss) and (gain > 0 or (gain == 0 and less > 0))
        self.worse = 0 if better and (gain > threshold or not threshold) else self.worse + 1
        if better:
            self.best_loss, self.best_at = loss, self.taken
            self.best_accuracy = accuracy if self.taken else None
        return better


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
