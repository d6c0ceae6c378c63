"""What a run's metrics say about it: one headline, and notes on what went wrong and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.artifacts.plots import perplexity

UNCHANGED = 0.005  # a smaller relative change of perplexity is none
RISE = 0.01  # of the held-out loss in nats, above its lowest, that counts as a rise
AVERAGED = 3  # training reports that are compared as one, because single ones are noisy
MOST_ALIKE = 0.5  # share of prompts without any spread of rewards, from which nothing is learned, that is worth a note
GOOD, BAD, PLAIN = "good", "bad", "plain"


@dataclass(frozen=True)
class Verdict:
    """The beginning of a report.

    Attributes:
        headline: one sentence.
        tone: `good`, `bad` or `plain`.
        notes: what else to know, whole sentences.
    """

    headline: str
    tone: str = PLAIN
    notes: list[str] = field(default_factory=list)


def verdict(records: list[dict[str, Any]], settings: dict[str, Any], ended: bool = True) -> Verdict:
    """Return the verdict on a run.

    Args:
        records: of metrics.jsonl.
        settings: of run.yaml.
        ended: whether all steps are done; only then has --keep-best put its adapter back.
    """
    validations = [r for r in records if r["val_loss"] is not None]
    notes = [note for note in (overfitting(records, settings), _alike(records), _skipped(records)) if note]
    if not validations:
        losses = [r["loss"] for r in records if r["loss"] is not None]
        words = f"Training loss {losses[0]:.3f} to {losses[-1]:.3f}" if losses else "No step has been reported yet"
        return Verdict(
            words, PLAIN, ["No held-out data was measured, so this run shows no effect on new text.", *notes]
        )
    kept = _kept(validations, settings) if ended else validations[-1]
    if kept is not validations[-1]:
        notes.append(f"--keep-best kept the adapter of step {kept['step']:,}, and the headline is about that one.")
    if any(r.get("reward") is not None for r in validations):
        headline, tone = _of_rewards(validations, kept)
        return Verdict(headline, tone, notes)
    if any("margin" in r for r in validations):
        headline, tone = _of_preferences(validations, kept)
        return Verdict(headline, tone, notes)
    if settings.get("objective") == "distill":
        headline, tone = _of_divergence(validations, kept)
        return Verdict(headline, tone, notes)
    if len(validations) == 1:
        return Verdict(f"Held-out perplexity {perplexity(kept['val_loss'])}, measured once", PLAIN, notes)
    first = validations[0]["val_loss"]
    words, tone = _change(kept["val_loss"] - first)
    return Verdict(f"Held-out perplexity {perplexity(first)} to {perplexity(kept['val_loss'])}, {words}", tone, notes)


def overfitting(records: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """Return a note if the held-out loss rose while the training loss went on falling; else an empty string."""
    if any("reward" in r for r in records):
        return ""  # the loss of sampled answers says nothing about that
    validations = [(r["step"], r["val_loss"]) for r in records if r["val_loss"] is not None]
    trained = [(r["step"], r["loss"]) for r in records if r["loss"] is not None]
    if len(validations) < 2 or not trained:
        return ""
    best_at, lowest = min(validations, key=lambda pair: pair[1])
    last_at, last = validations[-1]
    if last_at == best_at or last - lowest < RISE:
        return ""
    before = [loss for step, loss in trained if step <= best_at][-AVERAGED:] or [trained[0][1]]
    after = [loss for step, loss in trained if step > best_at][-AVERAGED:]
    falling = bool(after) and sum(after) / len(after) < sum(before) / len(before)
    if not best_at:
        return (
            f"The held-out loss was lowest before training ({lowest:.3f}) and ended at {last:.3f}. "
            "Try a lower --learning-rate, and check that the held-out rows are like the training rows."
        )
    if not falling:
        return ""
    told = (
        f"This run overfits: the held-out loss was lowest at step {best_at:,} ({lowest:.3f}) and rose to {last:.3f} "
        "while the training loss kept falling."
    )
    if settings.get("keep_best"):
        return told
    return f"{told} Train again with --iters {best_at}, or with --keep-best, which keeps the adapter of the best validation."


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
    if first <= 0 or abs(last / first - 1) < UNCHANGED:
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


def _change(rise: float) -> tuple[str, str]:
    """Return a change of the loss as a change of perplexity in words, and its tone."""
    ratio = math.exp(min(rise, 700.0))
    if abs(ratio - 1) < UNCHANGED:
        return "unchanged", PLAIN
    if ratio > 2:
        return f"{ratio:.3g} times as high", BAD
    return (f"{1 - ratio:.0%} lower", GOOD) if ratio < 1 else (f"{ratio - 1:.0%} higher", BAD)


def _skipped(records: list[dict[str, Any]]) -> str:
    count = max((r["skipped_steps"] for r in records), default=0)
    if not count:
        return ""
    return (
        f"{count:,} {'update was' if count == 1 else 'updates were'} skipped because loss or gradient was not finite."
    )
