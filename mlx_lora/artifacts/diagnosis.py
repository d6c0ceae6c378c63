"""What became of a run: learned, too few steps, overfitted, memorized, nothing changed, or worse; and what mends it.

`diagnose` is a pure function of `Evidence`, which a run folder holds: metrics.jsonl, held_out_rows.jsonl, and the texts
before and after in report.json. benchmarks/verdicts.py measures how often it names a run rightly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.training.held_out_rows import Change, RowLosses, paired_change

LEARNED, TOO_FEW_STEPS, OVER_FITTED = "learned", "too few steps", "overfitted"
MEMORIZED, UNCHANGED, WORSE, UNKNOWN = "memorized", "nothing changed", "worse", "not measured"

ENOUGH_STEPS = 40  # updates; a LoRA that took fewer has rarely learned what it can
# Falls are shares of the first held-out loss, so that they mean the same for any tokenizer.
SMALL = 0.05  # a fall that is little: a loss of 2.5 to 2.375, 12% of perplexity
NONE = 0.002  # a fall that is none
LARGE = 0.4  # a fall after which a short run is not too short
RISE = 0.004  # a rise above the lowest held-out loss, as a share of that
RISE_SHARE = 0.05  # and the share of the fall before it that is lost again
STILL_FALLING = 0.25  # share of the whole fall in the last third of the run, from which more steps are worth it
MOST_ALIKE = 0.5  # share of held-out rows that nearly repeat training rows, from which they measure memory
AVERAGED = 3  # training reports that are compared as one, because single ones are noisy


@dataclass(frozen=True)
class Evidence:
    """What a run leaves that tells how it went.

    Attributes:
        steps: optimizer steps taken.
        losses: (step, training loss) of each report.
        held_out: (step, held-out loss) of each validation, the first before the first step.
        rows: step -> the losses of the held-out rows; may be empty.
        kept: the step of the adapter that is in the folder; None: the last validation's.
        texts: the model's texts before and after.
        held_out_rows: how many rows are held out.
        near_duplicates: held-out rows that nearly repeat a training row; None: nobody looked.
    """

    steps: int
    losses: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]
    rows: Mapping[int, RowLosses] = field(default_factory=dict)
    kept: int | None = None
    texts: Sequence[tuple[str, str]] = ()
    held_out_rows: int = 0
    near_duplicates: int | None = None

    @property
    def same_texts(self) -> int:
        """How many texts are the same before and after."""
        return sum(before.strip() == after.strip() for before, after in self.texts)


@dataclass(frozen=True)
class Diagnosis:
    """What became of a run.

    Attributes:
        name: one of the words above.
        first, last: the held-out losses that are compared; NaN without any.
        change: from one to the other, with its interval; None: there are no two validations.
        best_step: where the held-out loss was lowest, if the run is overfitted or worse; else None.
        best: that loss; NaN where `best_step` is None.
    """

    name: str
    first: float = math.nan
    last: float = math.nan
    change: Change | None = None
    best_step: int | None = None
    best: float = math.nan


def diagnose(evidence: Evidence) -> Diagnosis:
    """Return what became of a run.

    The order decides where two are true: rows that the model has seen make every held-out figure void, a rise is
    certain, and few steps explain why nothing changed.
    """
    held_out = [(step, loss) for step, loss in evidence.held_out if math.isfinite(loss)]
    if len(held_out) < 2:
        return Diagnosis(UNKNOWN, held_out[0][1] if held_out else math.nan)
    (first_step, first), (last_step, last) = held_out[0], _kept(evidence, held_out)
    change = change_between(evidence, first_step, last_step)
    found: dict[str, Any] = {"first": first, "last": last, "change": change}
    gain = -change.change / first if first > 0 else 0.0
    alike = (evidence.near_duplicates or 0) / max(1, evidence.held_out_rows)
    if alike >= MOST_ALIKE and gain > NONE:
        return Diagnosis(MEMORIZED, **found)
    best_step, best = min(held_out, key=lambda pair: pair[1])
    if last_step > best_step and _rose(evidence, best_step, last_step, first - best):
        fell, looked = _training_fell(evidence, best_step), best_step > first_step or len(held_out) < 3
        if fell and looked:
            return Diagnosis(OVER_FITTED, **found, best_step=best_step, best=best)
        if last >= first:
            return Diagnosis(WORSE, **found, best_step=best_step, best=best)
    if evidence.steps < ENOUGH_STEPS and gain < LARGE and (gain < SMALL or still_falling(held_out)):
        return Diagnosis(TOO_FEW_STEPS, **found)
    if gain < NONE or not _is_certain(change) or (evidence.texts and _all_same(evidence) and gain < SMALL):
        return Diagnosis(UNCHANGED, **found)
    if gain < SMALL and still_falling(held_out):
        return Diagnosis(TOO_FEW_STEPS, **found)
    return Diagnosis(LEARNED, **found)


def change_between(evidence: Evidence, before: int, after: int) -> Change:
    """Return the change of the held-out loss from one validation to another, by rows where their losses are known."""
    one, other = evidence.rows.get(before), evidence.rows.get(after)
    if one is not None and other is not None and len(one.tokens) == len(other.tokens):
        return paired_change(one, other)
    losses = dict(evidence.held_out)
    return Change(losses[after] - losses[before], -math.inf, math.inf, 0)


def still_falling(held_out: Sequence[tuple[int, float]]) -> bool:
    """Return whether the last third of the run brought more of the fall than a run that is nearly done would have."""
    (first_step, first), (last_step, last) = held_out[0], held_out[-1]
    earlier = [pair for pair in held_out if pair[0] <= first_step + (last_step - first_step) * 2 / 3]
    if first <= last or len(held_out) < 3:
        return False  # two validations do not say how it fell
    return (earlier[-1][1] - last) / (first - last) >= STILL_FALLING


def _kept(evidence: Evidence, held_out: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return the validation of the adapter in the folder."""
    return next((pair for pair in held_out if pair[0] == evidence.kept), held_out[-1])


def _is_certain(change: Change) -> bool:
    """Return whether a change is not chance; with too few rows for an interval nobody knows, and its size decides."""
    return change.certain or not math.isfinite(change.low)


def _rose(evidence: Evidence, best_step: int, last_step: int, fall: float) -> bool:
    """Return whether the held-out loss rose from its lowest by more than chance and by a share of the fall before."""
    rise, best = change_between(evidence, best_step, last_step), dict(evidence.held_out)[best_step]
    return rise.change >= max(RISE * best, RISE_SHARE * fall) and _is_certain(rise)


def _training_fell(evidence: Evidence, since: int) -> bool:
    """Return whether the training loss went on falling after a step."""
    losses = [(step, loss) for step, loss in evidence.losses if math.isfinite(loss)]
    before = [loss for step, loss in losses if step <= since][-AVERAGED:] or [loss for _, loss in losses[:1]]
    after = [loss for step, loss in losses if step > since][-AVERAGED:]
    return bool(after) and sum(after) / len(after) < sum(before) / len(before)


def _all_same(evidence: Evidence) -> bool:
    return evidence.same_texts == len(evidence.texts)
