"""Tell what became of a run: one headline, notes on what went wrong, and the command that mends it.

`diagnose` is a pure function of `Evidence`, which a run folder holds. Right answers count first (reports/answers.py). Where they
cannot be checked, the losses of the held-out rows tell. docs/overfitting.md says how often a run is named rightly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora.config.objectives import LABELED, RANKED
from mlx_lora.reports.answers import (
    HEADS,
    LEARNED,
    LITTLE,
    MEMORIZED,
    OVER_FITTED,
    TOO_FEW_STEPS,
    UNCHANGED,
    UNKNOWN,
    WORSE,
    YOUR_WORDS,
    Answer,
    Count,
    counts_of,
    counts_words,
    named_by,
)  # fmt: skip
from mlx_lora.reports.charts import perplexity
from mlx_lora.reports.classes import CLASSES_FILE, measured_words, read_classes
from mlx_lora.reports.kept import choices, measured_adapter, rounding_begins
from mlx_lora.reports.objectives import (
    AVERAGED,
    BAD,
    GOOD,
    PLAIN,
    of_divergence,
    of_equal_rewards,
    of_labels,
    of_preferences,
    of_rankings,
    of_rewards,
    of_search,
)
from mlx_lora.trainer.checkpoint import numbered
from mlx_lora.trainer.evaluate import SOUND_ROWS, Change, RowLosses, paired_change
from mlx_lora.utils.text import command_line, counted, format_duration, model_flags

# What became of a run

ENOUGH_STEPS = 40  # updates; a LoRA that took fewer has rarely learned what it can
# Falls are shares of the first held-out loss, so that they mean the same for any tokenizer.
SMALL = 0.05  # a fall that is little: a loss of 2.5 to 2.375, 12% of perplexity
NONE = 0.002  # a fall that is none
LARGE = 0.4  # a fall after which a short run is not too short
RISE = 0.004  # a rise above the lowest held-out loss, as a share of that
RISE_SHARE = 0.05  # and the share of the fall before it that is lost again
BY_HEART = 0.6  # share of the training loss that is left, from which the training rows are learned by heart
LOST = 0.5  # share of the fall before rounding that its beginning takes back, from which it is to blame
STILL_FALLING = 0.25  # share of the whole fall in the last third of the run, from which more steps are worth it
FEWEST_AGREEING = 6  # fewer rows than `SOUND_ROWS` tell if the loss of each fell: of six, by chance once in 64 runs
MOST_ALIKE = 0.5  # share of held-out rows that nearly repeat training rows, from which they measure memory


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
        rounded_from: the step from which validations are with rounding (--qat 0.3); 0: all of them are, or none.
        choices: among how many measurements of the held-out rows the adapter was chosen.
        own, new: right answers in the words of the training rows, and in new words; None: nobody asked, or nobody can tell.
    """

    steps: int
    losses: Sequence[tuple[int, float]]
    held_out: Sequence[tuple[int, float]]
    rows: Mapping[int, RowLosses] = field(default_factory=dict)
    kept: int | None = None
    texts: Sequence[tuple[str, str]] = ()
    held_out_rows: int = 0
    near_duplicates: int | None = None
    rounded_from: int = 0
    choices: int = 1
    own: Count | None = None
    new: Count | None = None

    @property
    def same_texts(self) -> int:
        """How many texts are the same before and after."""
        return sum(before.strip() == after.strip() for before, after in self.texts)


@dataclass(frozen=True)
class Diagnosis:
    """What became of a run.

    Attributes:
        name: one of the words of reports/answers.py.
        first, last: the held-out losses that are compared; NaN without any.
        change: from one to the other, with its interval; None: there are no two validations.
        best_step: where the held-out loss was lowest, if the run is overfitted or worse; else None.
        best: that loss; NaN where `best_step` is None.
        undone: whether the beginning of rounding took back most of the fall before it.
    """

    name: str
    first: float = math.nan
    last: float = math.nan
    change: Change | None = None
    best_step: int | None = None
    best: float = math.nan
    undone: bool = False


def diagnose(evidence: Evidence) -> Diagnosis:
    """Return what became of a run: by its answers if they can be checked, or else by its losses."""
    found, counts = _by_losses(evidence), [count for count in (evidence.own, evidence.new) if count is not None]
    if not counts:
        return found
    fell = _training_left(evidence, 0) <= 1 - SMALL
    begun = evidence.steps < ENOUGH_STEPS or (fell and still_falling(evidence.losses))
    return replace(found, name=named_by(counts, begun, fell))


def _by_losses(evidence: Evidence) -> Diagnosis:
    """Return what became of a run by the losses of its held-out rows.

    The order decides where two are true: rows that the model has seen make every held-out figure void, a rise is
    certain, and few steps explain why nothing changed. A rise is one among validations that measure the same: rounding
    makes the loss rise, and so may other rows.
    """
    held_out = [(step, loss) for step, loss in evidence.held_out if math.isfinite(loss)]
    if len(held_out) < 2:
        return Diagnosis(UNKNOWN, held_out[0][1] if held_out else math.nan)
    (first_step, first), (last_step, last) = held_out[0], _kept(evidence, held_out)
    change = change_between(evidence, first_step, last_step, evidence.choices)
    rounded_from = evidence.rounded_from if last_step >= evidence.rounded_from else 0
    same = [pair for pair in held_out if pair[0] >= rounded_from and not rows_differ(evidence, pair[0], last_step)]
    evidence = replace(evidence, losses=[pair for pair in evidence.losses if pair[0] > rounded_from])
    fall_before = first - min((loss for step, loss in held_out if step < rounded_from), default=first)
    undone = fall_before >= SMALL * first and first - last < LOST * fall_before
    found: dict[str, Any] = {"first": first, "last": last, "change": change, "undone": undone}
    gain, few = -change.change / first if first > 0 else 0.0, 0 < change.rows < SOUND_ROWS
    alike = (evidence.near_duplicates or 0) / max(1, evidence.held_out_rows)
    if alike >= MOST_ALIKE and gain > NONE:
        return Diagnosis(MEMORIZED, **found)
    best_step, best = min([held_out[0], *same], key=lambda pair: pair[1])
    rose = last_step > best_step and _rose(evidence, best_step, last_step, first - best)
    if rose and not few:
        looked = best_step > first_step or (len(held_out) < 3 and same[0] == held_out[0])
        if looked and _training_left(evidence, best_step) < 1:
            return Diagnosis(OVER_FITTED, **found, best_step=best_step, best=best)
        if last >= first:
            return Diagnosis(WORSE, **found, best_step=best_step, best=best)
    if evidence.steps < ENOUGH_STEPS and gain < LARGE and (gain < SMALL or still_falling(same)):
        return Diagnosis(TOO_FEW_STEPS, **found)
    same_texts = bool(evidence.texts) and evidence.same_texts == len(evidence.texts) and gain < SMALL
    if few:
        unchanged = same_texts or abs(gain) < NONE
        each_fell = evidence.rows[last_step].sums < evidence.rows[first_step].sums
        learned = gain >= SMALL and not rose and change.rows >= FEWEST_AGREEING and each_fell.all()
        return Diagnosis(UNCHANGED if unchanged else LEARNED if learned else UNKNOWN, **found)
    if gain < NONE or not _is_certain(change) or same_texts:
        # What it learned is in its own rows only.
        if gain < SMALL and not undone and _training_left(evidence, first_step) <= BY_HEART:
            return Diagnosis(YOUR_WORDS, **found, best_step=first_step, best=first)
        return Diagnosis(UNCHANGED, **found)
    if gain < SMALL and still_falling(same):
        return Diagnosis(TOO_FEW_STEPS, **found)
    return Diagnosis(LEARNED, **found)


def change_between(evidence: Evidence, before: int, after: int, choices: int = 1) -> Change:
    """Return the change of the held-out loss from one validation to another, by rows where their losses are known."""
    one, other = evidence.rows.get(before), evidence.rows.get(after)
    if one is not None and other is not None and not rows_differ(evidence, before, after):
        return paired_change(one, other, choices)
    losses = dict(evidence.held_out)
    return Change(losses[after] - losses[before], -math.inf, math.inf, 0)


def rows_differ(evidence: Evidence, one: int, other: int) -> bool:
    """Return whether two validations are known to have measured other rows, as after `--resume --val-batches -1`."""
    rows = evidence.rows
    return one in rows and other in rows and not np.array_equal(rows[one].tokens, rows[other].tokens)


def still_falling(held_out: Sequence[tuple[int, float]]) -> bool:
    """Return whether the last third of the losses brought more of the fall than a run that is nearly done would have."""
    if len(held_out) < 3:
        return False  # two validations do not say how it fell
    (first_step, first), (last_step, last) = held_out[0], held_out[-1]
    earlier = [pair for pair in held_out if pair[0] <= first_step + (last_step - first_step) * 2 / 3]
    return first > last and (earlier[-1][1] - last) / (first - last) >= STILL_FALLING


def _kept(evidence: Evidence, held_out: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """Return the validation of the adapter in the folder."""
    return next((pair for pair in held_out if pair[0] == evidence.kept), held_out[-1])


def _is_certain(change: Change) -> bool:
    """Return whether a change is not chance; without the losses of rows nobody knows, and its size decides."""
    return change.certain or not math.isfinite(change.low)


def _rose(evidence: Evidence, best_step: int, last_step: int, fall: float) -> bool:
    """Return whether the held-out loss rose from its lowest, by a share of the fall before, and if rows can tell, beyond chance."""
    rise, best = change_between(evidence, best_step, last_step), dict(evidence.held_out)[best_step]
    certain = _is_certain(rise) or rise.rows < SOUND_ROWS
    return rise.change >= max(RISE * best, RISE_SHARE * fall) and certain


def _training_left(evidence: Evidence, since: int) -> float:
    """Return the training loss at the end as a share of that around a step; 1 if there was no report after it."""
    losses = [(step, loss) for step, loss in evidence.losses if math.isfinite(loss)]
    before = [loss for step, loss in losses if step <= since][-AVERAGED:] or [loss for _, loss in losses[:1]]
    after = [loss for step, loss in losses if step > since][-AVERAGED:]
    if not after or not sum(before) > 0:
        return 1.0
    return (sum(after) / len(after)) / (sum(before) / len(before))


# What mends it: a sentence, and a command

AIM_STEPS = 60  # updates that a mending run of a small set gets at least
VALIDATIONS = 8  # in a run that looks for the lowest held-out loss
LOW_RATE = 1e-4  # below this, a run that changed nothing had too low a rate
FACTOR = 5  # between the rate that was wrong and the one to try, and between epochs for a form and for facts
FEWEST_EPOCHS, MOST_EPOCHS = 10, 40  # of a run over facts


@dataclass(frozen=True)
class FinishedRun:
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


def mending(found: Diagnosis, run: FinishedRun, own: Count | None = None, new: Count | None = None) -> tuple[str, str]:
    """Return what mends a run as a sentence, and as a command; both empty if nothing is to mend.

    Args:
        found: what became of it.
        run: for the command.
        own, new: right answers, as in `Evidence`.
    """
    asked = own is not None or new is not None
    if found.undone and found.name in (TOO_FEW_STEPS, UNCHANGED, WORSE):
        return (
            "The cause is that rounding in the last steps alone took back most of what was learned before. With --qat and no share, all "
            "steps are rounded.",
            run.train_again("--qat"),
        )
    if asked and not run.settings.get("rephrase") and (found.name == YOUR_WORDS or (found.name == LEARNED and not new)):
        words = (
            "Each question has one wording, or few: --rephrase 3 adds three to each, and tests others. For a model below a billion "
            "parameters, name a larger one to write them, with --rephrase-model."
        )
        return words, run.train_again("--rephrase", "3")
    if asked and found.name == LEARNED and not new:
        words = (
            "Try it in other words than those of the rows: write questions of your own, and their answers, into a file."
        )
        return words, _new_questions(run, "--show", "20")
    if found.name in (TOO_FEW_STEPS, LITTLE, YOUR_WORDS) and asked:
        epochs = min(MOST_EPOCHS, max(FEWEST_EPOCHS, math.ceil(FACTOR * run.epochs)))
        if epochs <= run.epochs:
            return "More epochs would hardly help; a larger model, or a higher --rank, remembers more.", ""
        flags = ["--epochs", str(epochs), "--no-keep-best", "--early-stopping-patience", "0"]
        return "Facts take more epochs than the form of the answers:", run.train_again(*flags)
    if found.name == TOO_FEW_STEPS:
        return _more_steps(run)
    if found.name == UNKNOWN and found.change is not None:
        few = counted(found.change.rows, "held-out row")
        words = f"{few} cannot tell: look at the answers to questions that are not in the training rows."
        return words, _new_questions(run, "--show", "10")
    if found.name in (OVER_FITTED, YOUR_WORDS):
        return _earlier(found, run)
    if found.name == MEMORIZED:
        return "Measure on questions that are not in the training rows.", _new_questions(run)
    if found.name == UNCHANGED:
        if run.rate < LOW_RATE:
            rate = f"{min(2e-4, run.rate * FACTOR * 20):.0e}"
            words = f"The learning rate of {run.rate:g} is low; try {float(rate):g}."
            return words, run.train_again("--learning-rate", rate)
        return _more_steps(run)
    if found.name == WORSE:
        rate = f"{run.rate / FACTOR:.1g}"
        words = (
            f"Try a lower learning rate, such as {rate}, and check that the held-out rows are like the training rows."
        )
        return words, run.train_again("--learning-rate", rate)
    if found.name == UNKNOWN and math.isnan(found.first):
        return "Hold some rows out to see it.", run.train_again("--valid-fraction", "0.1")
    return "", ""


def _new_questions(run: FinishedRun, *flags: str) -> str:
    """Return the command that measures an adapter on another file; nothing without a folder."""
    if run.folder is None:
        return ""
    words = ["evaluate", *model_flags(run.settings), "--adapter-path", str(run.folder)]
    return command_line([*words, "--data", "new-questions.jsonl", *flags])


def _more_steps(run: FinishedRun) -> tuple[str, str]:
    """Return advice to train longer: enough epochs for the aim, and at least twice as many as now."""
    per_epoch = run.steps / run.epochs if run.epochs else float(max(1, run.steps))
    least = 2 * run.steps if run.steps >= ENOUGH_STEPS else max(AIM_STEPS, 2 * run.steps)
    epochs = max(1, math.ceil(least / max(per_epoch, 1e-9)))
    steps = max(1, round(epochs * per_epoch))
    time = f", about {format_duration(steps * run.step_s)}" if run.step_s else ""
    return f"--epochs {epochs} gives {counted(steps, 'step')}{time}.", run.train_again("--epochs", str(epochs))


def _earlier(diagnosis: Diagnosis, run: FinishedRun) -> tuple[str, str]:
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


# The verdict, with which a report begins

TONES = {LEARNED: GOOD, OVER_FITTED: BAD, WORSE: BAD}


@dataclass(frozen=True)
class Verdict:
    """The beginning of a report.

    Attributes:
        headline: one sentence.
        tone: `good`, `bad` or `plain`.
        notes: what else to know, whole sentences.
        name: what became of the run, as in `Diagnosis`; empty for objectives that have a measure of their own.
        mend: what to do, a sentence; empty: nothing is to mend.
        command: that does it; may be empty.
        change: of the held-out loss in nats per token, the fields of `Change`; None: not known.
        figures: the perplexity, one sentence, where the headline is about answers; else empty.
        right_in_your_words, right_in_new_words: right answers; None: nobody asked, or nobody can tell.
    """

    headline: str
    tone: str = PLAIN
    notes: list[str] = field(default_factory=list)
    name: str = ""
    mend: str = ""
    command: str = ""
    change: dict[str, float] | None = None
    figures: str = ""
    right_in_your_words: Count | None = None
    right_in_new_words: Count | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        change = self.change and {k: v if math.isfinite(v) else None for k, v in self.change.items()}
        return {**asdict(self), "change": change}


@dataclass(frozen=True)
class VerdictContext:
    """What a verdict needs in addition to metrics and settings.

    Attributes:
        folder: of the run, for commands; None: none are given.
        rows: step -> the losses of the held-out rows.
        texts: the model's texts before and after.
        held_out_rows: how many rows are held out.
        near_duplicates: held-out rows that nearly repeat a training row; None: nobody looked.
        answers: of the model, as report.json has them.
        evaluation: what `evaluate` measured since; None: nothing.
        seconds: that the run took.
        kept_step, rounded_from, begins_at: see `RunReport`.
    """

    folder: Path | None = None
    rows: Mapping[int, RowLosses] = field(default_factory=dict)
    texts: Sequence[tuple[str, str]] = ()
    held_out_rows: int = 0
    near_duplicates: int | None = None
    answers: Sequence[Answer] = ()
    evaluation: Mapping[str, Any] | None = None
    seconds: float = 0.0
    kept_step: int | None = None
    rounded_from: int | None = None
    begins_at: int = 0


def _begins(begins_at: int, validations: Sequence[Mapping[str, Any]]) -> str:
    """Return from which step a headline counts, if not from the first."""
    first = validations[0]["step"] if validations else begins_at
    if begins_at:
        return f"; counted from step {max(begins_at, first):,}, because the checkpoint was not in its run folder"
    return f"; counted from step {first:,}, the first validation" if first else ""


def verdict(
    records: list[dict[str, Any]], settings: dict[str, Any], ended: bool = True, context: VerdictContext | None = None
) -> Verdict:
    """Return the verdict on a run.

    Args:
        records: of metrics.jsonl.
        settings: of run.yaml.
        ended: whether all steps are done; only then has --keep-best put its adapter back.
        context: what else is known of the run.
    """
    context = context or VerdictContext()
    context = replace(context, rounded_from=rounding_begins(records, settings, context.rounded_from))
    validations = [r for r in records if r["val_loss"] is not None]
    skipped, steps = (max((r[name] for r in records), default=0) for name in ("skipped_steps", "step"))
    were = "update was" if skipped == 1 else "updates were"
    lost = f"{skipped:,} {were} skipped because loss or gradient was not finite." if skipped else ""
    notes = [note for note in (of_equal_rewards(records), lost) if note]
    epochs, timed = max((float(r.get("epoch") or 0) for r in records), default=0.0), steps - context.begins_at
    run = FinishedRun(context.folder, settings, steps, epochs, context.seconds / timed if timed > 0 else 0.0)
    begins = _begins(context.begins_at, validations)
    own, new = counts_of(context.answers, context.evaluation)
    if not validations and not (own or new):
        losses = [r["loss"] for r in records if r["loss"] is not None]
        loss = f"Training loss {losses[0]:.3f} to {losses[-1]:.3f}{begins}" if losses else ""
        mend, command = mending(Diagnosis(UNKNOWN), run) if losses else ("", "")
        nothing = "No held-out data was measured, so this run shows no effect on new text."
        return Verdict(loss or "No step has been reported yet", PLAIN, [nothing, *notes], UNKNOWN, mend, command)
    kept = measured_adapter(records, settings if ended else None, context.kept_step, context.rounded_from)
    if kept is None and validations:
        words = f"The adapter is that of step {context.kept_step:,}, for which no validation was recorded"
        return Verdict(words, PLAIN, notes, UNKNOWN)
    kept_step = kept["step"] if kept else steps
    if 0 < (context.rounded_from or 0) <= kept_step and validations:
        notes.append(f"Rounding began after step {context.rounded_from:,}; validations are compared from there on.")
    if kept and kept is not validations[-1]:
        notes.append(f"--keep-best kept the adapter of step {kept['step']:,}, and the headline is about that one.")
    if context.folder is not None and (words := measured_words(read_classes(context.folder / CLASSES_FILE, kept_step))):
        notes.insert(0, words)
    of_its_own = (
        (any(r.get("reward") is not None for r in validations), of_rewards),
        (any("margin" in r for r in validations), of_preferences),
        (settings.get("objective") == "distill", of_divergence),
        (settings.get("objective") in LABELED, of_labels),
        (settings.get("objective") in RANKED, of_rankings),
        (settings.get("objective") == "embed", of_search),
    )
    chosen = choices(validations, settings if ended else {}, context.rounded_from or 0, context.folder)
    evidence = Evidence(
        steps, [(r["step"], r["loss"]) for r in records if r["loss"] is not None],
        [(r["step"], r["val_loss"]) for r in validations], context.rows, kept_step, context.texts, context.held_out_rows,
        context.near_duplicates, context.rounded_from or 0, chosen, own, new,
    )  # fmt: skip
    for applies, words_of_objective in of_its_own:
        if applies and kept:
            headline, tone = words_of_objective(validations, kept)
            if words_of_objective is not of_rewards:  # the loss of sampled answers says nothing about that
                notes = [note for note in (_loss_note(diagnose(evidence), run),) if note] + notes
            return Verdict(headline + begins, tone, notes)
    found = diagnose(evidence)
    mend, command = mending(found, run, own, new)
    change, tone = found.change and asdict(found.change), TONES.get(found.name, PLAIN)
    if own or new:
        headline = f"{HEADS.get(found.name, found.name.capitalize())}: {counts_words(own, new)}"
        figures = f"{_perplexities(found, evidence)}{begins}." if validations else ""
        return Verdict(headline, tone, notes, found.name, mend, command, change, figures, own, new)
    return Verdict(headline_of(found, evidence) + begins, tone, notes, found.name, mend, command, change)


def _perplexities(found: Diagnosis, evidence: Evidence) -> str:
    """Return the perplexities of a run's held-out rows, with their change, as the beginning of a sentence."""
    if found.change is None:
        return f"Held-out perplexity {perplexity(found.first)}, measured once"
    ends = f"{perplexity(found.first)} to {perplexity(found.last)}"
    return f"Held-out perplexity {ends}, {found.change.words()}{_rows_words(evidence)}"


def headline_of(found: Diagnosis, evidence: Evidence) -> str:
    """Return a diagnosis by losses as a sentence."""
    measured = _perplexities(found, evidence)
    if found.name == UNKNOWN:
        return measured
    measured = measured[0].lower() + measured[1:]
    if found.name in (YOUR_WORDS, OVER_FITTED) and not found.best_step:
        head = "Overfitted" if found.name == OVER_FITTED else "Knows its own rows only"
        return f"{head}: {measured}, while the training loss fell"
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
        return f"Nothing changed: {measured}" + (
            f", and {same} of {counted(len(evidence.texts), 'text')} as before" if same else ""
        )
    return f"{found.name.capitalize()}: {measured}"


def _rows_words(evidence: Evidence) -> str:
    """Return on how many rows the two validations of a headline were measured, if not on the same ones; else an empty string."""
    first, last = evidence.held_out[0][0], _kept(evidence, evidence.held_out)[0]
    if not rows_differ(evidence, first, last):
        return ""
    counts = [len(evidence.rows[step].tokens) for step in (first, last)]
    return f" (on other rows: {counted(counts[0], 'row')} at step {first:,}, {counts[1]:,} at step {last:,})"


def _loss_note(found: Diagnosis, run: FinishedRun) -> str:
    """Return a note on the loss of an objective whose headline is about another number."""
    if found.name not in (OVER_FITTED, WORSE):
        return ""
    where = f"at step {found.best_step:,}" if found.best_step else "before training"
    mend, _ = mending(found, run)
    return f"The held-out loss was lowest {where} ({found.best:.3f}) and ended at {found.last:.3f}. {mend}"
