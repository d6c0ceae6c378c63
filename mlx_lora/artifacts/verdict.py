"""What a run's metrics say about it: one headline, notes on what went wrong, and the command that mends it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_lora.artifacts.diagnosis import (
    LEARNED,
    MEMORIZED,
    OVER_FITTED,
    TOO_FEW_STEPS,
    UNCHANGED,
    UNKNOWN,
    WORSE,
    Diagnosis,
    Evidence,
    diagnose,
)
from mlx_lora.artifacts.mending import RunFacts, mending
from mlx_lora.artifacts.plots import perplexity
from mlx_lora.system.units import counted
from mlx_lora.training.held_out_rows import Change, KnownRows, RowLosses

SAME = 0.005  # a smaller relative change of a divergence is none
AVERAGED = 3  # training reports that are compared as one, because single ones are noisy
MOST_ALIKE = 0.5  # share of prompts without any spread of rewards, from which nothing is learned, that is worth a note
GOOD, BAD, PLAIN = "good", "bad", "plain"
TONES = {LEARNED: GOOD, OVER_FITTED: BAD, WORSE: BAD}


@dataclass(frozen=True)
class Verdict:
    """The beginning of a report.

    Attributes:
        headline: one sentence.
        tone: `good`, `bad` or `plain`.
        notes: what else to know, whole sentences.
        name: what became of the run, in the words of diagnosis.py; empty for objectives that have a measure of their own.
        mend: what to do, a sentence; empty: nothing is to mend.
        command: that does it; may be empty.
        change: of the held-out loss in nats per token, `change`, `low`, `high`, `rows`; None: not known.
    """

    headline: str
    tone: str = PLAIN
    notes: list[str] = field(default_factory=list)
    name: str = ""
    mend: str = ""
    command: str = ""
    change: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        change = self.change and {k: v if math.isfinite(v) else None for k, v in self.change.items()}
        return {**asdict(self), "change": change}


@dataclass(frozen=True)
class Beside:
    """What a verdict needs beside metrics and settings.

    Attributes:
        folder: of the run, for commands; None: none are given.
        rows: step -> the losses of the held-out rows.
        texts: the model's texts before and after.
        held_out_rows: how many rows are held out.
        near_duplicates: held-out rows that nearly repeat a training row; None: nobody looked.
        known: how many training rows the model answers word for word; None: nobody asked.
        seconds: that the run took.
    """

    folder: Path | None = None
    rows: Mapping[int, RowLosses] = field(default_factory=dict)
    texts: Sequence[tuple[str, str]] = ()
    held_out_rows: int = 0
    near_duplicates: int | None = None
    known: KnownRows | None = None
    seconds: float = 0.0


def verdict(
    records: list[dict[str, Any]], settings: dict[str, Any], ended: bool = True, beside: Beside | None = None
) -> Verdict:
    """Return the verdict on a run.

    Args:
        records: of metrics.jsonl.
        settings: of run.yaml.
        ended: whether all steps are done; only then has --keep-best put its adapter back.
        beside: what else is known of the run.
    """
    beside = beside or Beside()
    validations = [r for r in records if r["val_loss"] is not None]
    notes = [note for note in (_alike(records), _skipped(records)) if note]
    run = facts_of_run(records, settings, beside)
    if not validations:
        losses = [r["loss"] for r in records if r["loss"] is not None]
        words = f"Training loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "No step has been reported yet"
        mend, command = mending(Diagnosis(UNKNOWN), run) if losses else ("", "")
        nothing = "No held-out data was measured, so this run shows no effect on new text."
        return Verdict(words, PLAIN, [nothing, *notes], UNKNOWN, mend, command)
    kept = _kept(validations, settings) if ended else validations[-1]
    if kept is not validations[-1]:
        notes.append(f"--keep-best kept the adapter of step {kept['step']:,}, and the headline is about that one.")
    of_its_own = (
        (any(r.get("reward") is not None for r in validations), _of_rewards),
        (any("margin" in r for r in validations), _of_preferences),
        (settings.get("objective") == "distill", _of_divergence),
    )
    evidence = evidence_of(records, kept["step"], beside)
    for applies, words_of_objective in of_its_own:
        if applies:
            headline, tone = words_of_objective(validations, kept)
            if words_of_objective is not _of_rewards:  # the loss of sampled answers says nothing about that
                notes = [note for note in (_loss_note(diagnose(evidence), run),) if note] + notes
            return Verdict(headline, tone, notes)
    found = diagnose(evidence)
    if found.name == UNKNOWN:
        return Verdict(f"Held-out perplexity {perplexity(kept['val_loss'])}, measured once", PLAIN, notes, UNKNOWN)
    mend, command = mending(found, run, beside.known)
    change = found.change and asdict(found.change)
    return Verdict(headline_of(found, evidence), TONES.get(found.name, PLAIN), notes, found.name, mend, command, change)


def evidence_of(records: Sequence[Mapping[str, Any]], kept: int | None, beside: Beside) -> Evidence:
    """Return the evidence that a run's records and texts are.

    Args:
        records: of metrics.jsonl.
        kept: the step of the adapter that is in the folder.
        beside: what else is known.
    """
    return Evidence(
        steps=max((r["step"] for r in records), default=0),
        losses=[(r["step"], r["loss"]) for r in records if r["loss"] is not None],
        held_out=[(r["step"], r["val_loss"]) for r in records if r["val_loss"] is not None],
        rows=beside.rows,
        kept=kept,
        texts=beside.texts,
        held_out_rows=beside.held_out_rows,
        near_duplicates=beside.near_duplicates,
    )


def facts_of_run(records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], beside: Beside) -> RunFacts:
    """Return what the commands that mend a run need."""
    steps = max((r["step"] for r in records), default=0)
    epochs = max((float(r.get("epoch") or 0) for r in records), default=0.0)
    return RunFacts(beside.folder, settings, steps, epochs, beside.seconds / steps if steps else 0.0)


def headline_of(found: Diagnosis, evidence: Evidence) -> str:
    """Return a diagnosis as a sentence."""
    measured = (
        f"held-out perplexity {perplexity(found.first)} to {perplexity(found.last)}, {change_words(found.change)}"
    )
    if found.name == OVER_FITTED and not found.best_step:
        return f"Overfitted: {measured}, while the training loss fell"
    if found.name == OVER_FITTED:
        return (
            f"Overfitted from step {found.best_step:,} on: the held-out loss was lowest there ({found.best:.3f}) and rose to "
            f"{found.last:.3f}, while the training loss fell"
        )
    if found.name == MEMORIZED:
        return (
            f"Memorized: {evidence.near_duplicates} of {counted(evidence.held_out_rows, 'held-out row')} nearly repeat "
            f"training rows, so {measured}, says little about new questions"
        )
    if found.name == TOO_FEW_STEPS:
        return f"Too few steps: {counted(evidence.steps, 'update')}, {measured}"
    if found.name == UNCHANGED:
        same = evidence.same_texts
        texts = f", and {same} of {counted(len(evidence.texts), 'text')} the same as before" if same else ""
        return f"Nothing changed: {measured}{texts}"
    return f"{found.name.capitalize()}: {measured}"


def change_words(change: Change | None) -> str:
    """Return a change of the loss as one of perplexity, with its interval: `35% lower (95% interval 31% to 39%, 12 rows)`."""
    if change is None:
        return "measured once"
    ratio = math.exp(min(change.change, 700.0))
    lower = ratio <= 1
    words = f"{ratio:.3g} times as high" if ratio > 2 else f"{abs(1 - ratio):.0%} {'lower' if lower else 'higher'}"
    if not math.isfinite(change.low):
        return f"{words} ({counted(change.rows, 'row')}, too few for an interval)" if change.rows else words
    ends = sorted((math.exp(min(end, 700.0)) - 1) * (-1 if lower else 1) for end in (change.low, change.high))
    return f"{words} (95% interval {ends[0]:.0%} to {ends[1]:.0%}, {counted(change.rows, 'row')})"


def _loss_note(found: Diagnosis, run: RunFacts) -> str:
    """Return a note on the loss of an objective whose headline is about another number."""
    if found.name not in (OVER_FITTED, WORSE):
        return ""
    where = f"at step {found.best_step:,}" if found.best_step else "before training"
    mend, _ = mending(found, run)
    return f"The held-out loss was lowest {where} ({found.best:.3f}) and ended at {found.last:.3f}. {mend}"


def _kept(validations: list[dict[str, Any]], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the validation of the adapter that is in the folder."""
    later = [r for r in validations if r["step"]]
    if not settings.get("keep_best") or not later:
        return validations[-1]
    if settings.get("metric_for_best_model") == "accuracy":
        return max(later, key=lambda r: (r.get("accuracy") or 0.0, -r["val_loss"]))
    best = min(validations, key=lambda r: r["val_loss"])
    return best if best["step"] else validations[-1]


def _of_preferences(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for preference training, whose loss is no likelihood."""
    parts = []
    ranked = [r["accuracy"] for r in validations if r.get("accuracy") is not None]
    if ranked and kept.get("accuracy") is not None:
        ends = dict.fromkeys(
            [f"{ranked[0]:.0%}", f"{kept['accuracy']:.0%}"] if len(ranked) > 1 else [f"{ranked[0]:.0%}"]
        )
        parts.append(f"held-out accuracy {' to '.join(ends)}")
    # The held-out ratings of KTO may all be good or all be bad: then there is no margin, and the loss stands for it.
    name, key, better = "reward margin", "margin", 1
    if any(one.get("margin") is None for one in (validations[0], kept)):
        name, key, better = "loss", "val_loss", -1
    first, last = better * validations[0][key], better * kept[key]
    # Adding 0 makes a zero of a rounded -0.
    ends = dict.fromkeys(f"{round(better * value, 2) + 0:.2f}" for value in (first, last))
    parts.append(f"{'' if parts else 'held-out '}{name} {' to '.join(ends)}")
    words = ", ".join(parts)
    tone = PLAIN if len(validations) == 1 or abs(last - first) < 0.005 else GOOD if last > first else BAD
    return words[0].upper() + words[1:], tone


def _of_rewards(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for answers that were sampled and rewarded."""
    first, last = validations[0]["reward"], kept["reward"]
    ends = dict.fromkeys(f"{round(value, 3) + 0:.3f}" for value in (first, last))
    tone = PLAIN if len(validations) == 1 or abs(last - first) < 0.0005 else GOOD if last > first else BAD
    return f"Held-out reward {' to '.join(ends)}", tone


def _of_divergence(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for distillation, whose loss is how far the student's probabilities are from the teacher's."""
    first, last = validations[0]["val_loss"], kept["val_loss"]
    ends = dict.fromkeys(f"{round(value, 4) + 0:.4f}" for value in (first, last))
    words = f"Held-out divergence from the teacher {' to '.join(ends)} per token"
    if len(validations) == 1:
        return f"{words}, measured once", PLAIN
    if first <= 0 or abs(last / first - 1) < SAME:
        return f"{words}, unchanged", PLAIN
    change = abs(last / first - 1)
    return (f"{words}, {change:.0%} lower", GOOD) if last < first else (f"{words}, {change:.0%} higher", BAD)


def _alike(records: list[dict[str, Any]]) -> str:
    """Return a note if the answers to most prompts of the last reports all had the same reward; else an empty string."""
    shares = [r["frac_reward_zero_std"] for r in records if r["loss"] is not None and "frac_reward_zero_std" in r]
    last = shares[-AVERAGED:]
    share = sum(last) / len(last) if last else 0.0
    if share < MOST_ALIKE:
        return ""
    return (
        f"At the end, all answers to {share:.0%} of the prompts had the same reward, and nothing is learned from those. "
        "Mix easier or harder prompts in, reward more finely, or raise --group-size or --temp."
    )


def _skipped(records: list[dict[str, Any]]) -> str:
    count = max((r["skipped_steps"] for r in records), default=0)
    if not count:
        return ""
    return (
        f"{count:,} {'update was' if count == 1 else 'updates were'} skipped because loss or gradient was not finite."
    )
