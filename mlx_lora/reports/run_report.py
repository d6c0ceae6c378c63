"""Tell what became of a run, and write its report.html: the verdict, tiles, curves and sampled answers, without network or script.

`diagnose` is a pure function of `Evidence`, which a run folder holds. Right answers count first. Where they cannot be checked, the
losses of the held-out rows tell. docs/development/measured.md says how often a run is named rightly. A verdict has one
headline, notes on what went wrong, and the command that mends it.

The page is made from metrics.jsonl, run.yaml and report.json, which has what the other two do not: the command, the machine,
the data, and texts before and after training. It is written at every save, so a killed run has one as well.

answers.jsonl has one line for each fixed prompt at each validation: `step`, `number`, `prompt`, `answer`, `length`,
`truncated`, `reward`, `rewards`; after an episode with tools also `messages`.

evaluation.json has what `evaluate --json` prints, and `date`, `held_out` (the rows are those that the run held out) and
`adapter` (the SHA-256 of the weights that were measured). A run that trains further has another adapter, and the results of
the earlier one are shown no more.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np

from mlx_lora.config.objectives import LABELED, RANKED, TAUGHT, UNITS, VECTORS
from mlx_lora.config.rules import OWNERS
from mlx_lora.config.sweep import SWEEP_FILE, TRIALS, WINNER
from mlx_lora.data.chat_template import spoken_turns, without_markers
from mlx_lora.data.notes import SeenRows
from mlx_lora.exporters.adapter_folder import WEIGHTS_FILE
from mlx_lora.reports.charts import COMMON, OF_TOOLS, WIDE, Series, line_chart, number, perplexity, render_page
from mlx_lora.trainer.checkpoint import lock_holder, numbered
from mlx_lora.trainer.evaluate import SOUND_ROWS, Change, RowLosses, paired_change
from mlx_lora.utils.console import finite_values
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import replace_text, sha256_of
from mlx_lora.utils.parsing import parse_json, parse_yaml
from mlx_lora.utils.text import command_line, counted, format_duration, model_flags

# What reports show of single objectives: how a run went in one sentence, and charts of what only they measure.
#
# A headline's function takes the validations of metrics.jsonl and the one of the adapter that was kept, and returns (headline,
# tone). A number that guessing reaches as well is not called good. A chart's function takes all records of metrics.jsonl, and
# returns no chart for a run of another objective.

GOOD, BAD, PLAIN = "good", "bad", "plain"
SAME = 0.005  # a smaller relative change of a divergence is none
# Nothing is learned from a prompt whose rewards have no spread; from this share of such prompts on, a note says so.
MOST_WITHOUT_SPREAD = 0.5
AVERAGED = 3  # training reports that are compared as one, because single ones are noisy
CERTAIN = 1.645  # standard deviations above the mean, which 95% of random orders do not exceed
Chart = tuple[str, list[Series], str, bool]
WHEN = {"training": "loss", "held out": "val_loss"}  # a curve's name -> the loss that its records have
OF_LABELS = ("macro_f1", "mse")  # what only a classifier reports
MOST_REWARDS = 12  # charts of single rewards
OF_RANKINGS = ("mrr",)  # what only a reranker reports


# Headlines


def compared(
    validations: list[dict[str, Any]], kept: dict[str, Any], key: str, form: str, least: float = 0.0, better: int = 1
) -> tuple[str, str]:
    """Return the first and the kept value of a metric as text, once if they are written alike, and the tone of their difference.

    Args:
        validations, kept: of metrics.jsonl.
        key: of the metric.
        form: how it is written; with z, a rounded -0 is 0.
        least: a smaller difference is none.
        better: 1 if more of it is better, -1 if less.
    """
    first, last = (one.get(key) or 0.0 for one in (validations[0], kept))
    ends, change = dict.fromkeys(format(value, form) for value in (first, last)), better * (last - first)
    same = len(validations) == 1 or not change or abs(change) < least
    return " to ".join(ends), PLAIN if same else GOOD if change > 0 else BAD


def of_preferences(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for preference training, whose loss is no likelihood."""
    parts, ranked = [], [r for r in validations if r.get("accuracy") is not None]
    if ranked and kept.get("accuracy") is not None:
        ends, _ = compared(ranked, kept if len(ranked) > 1 else ranked[0], "accuracy", ".0%")
        parts.append(f"held-out accuracy {ends}")
    # The held-out ratings of KTO may all be good or all be bad: then there is no margin, and the loss stands for it.
    name, key, better = "reward margin", "margin", 1
    if any(one.get("margin") is None for one in (validations[0], kept)):
        name, key, better = "loss", "val_loss", -1
    ends, tone = compared(validations, kept, key, "z.2f", 0.005, better)
    parts.append(f"{'' if parts else 'held-out '}{name} {ends}")
    words = ", ".join(parts)
    return words[0].upper() + words[1:], tone


def of_search(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for embeddings: how often the first held-out document is the right one, or how scores agree."""
    name = next((name for name in ("accuracy", "spearman") if kept.get(name) is not None), "val_loss")
    names = {"accuracy": "first result right", "spearman": "rank correlation with the scores", "val_loss": "loss"}
    form, better = ".0%" if name == "accuracy" else ".3f", -1 if name == "val_loss" else 1
    ends, tone = compared(validations, kept, name, form, 0.005, better)
    return f"Held out: {names[name]} {ends}", tone


def of_rewards(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for answers that were sampled and rewarded."""
    ends, tone = compared(validations, kept, "reward", "z.3f", 0.0005)
    return f"Held-out reward {ends}", tone


def of_labels(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for a classifier: its accuracy, or for numbers the squared error."""
    if "accuracy" in kept:
        ends, tone = compared(validations, kept, "accuracy", ".0%")
        words = f"Held-out accuracy {ends}"
    else:
        ends, tone = compared(validations, kept, "val_loss", ".4g", better=-1)
        words = f"Held-out squared error {ends}"
    words += f", mean F1 of the labels {kept['macro_f1']:.3f}" if "macro_f1" in kept else ""
    if (most := kept.get("majority")) is None:
        return words, tone  # several labels, or numbers
    if most == 1:
        return f"{words}; all held-out texts have the same label, so this shows nothing", PLAIN
    if kept["accuracy"] > most:
        return f"{words}; the most frequent label alone has {most:.0%}", tone
    return f"No better than giving every text the most frequent label, which is right in {most:.0%}: {words}", BAD


def of_rankings(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for a reranker: its mean reciprocal rank, and that of a random order."""
    ends, tone = compared(validations, kept, "mrr", ".3f")
    words = f"Held-out MRR {ends}, best document first in {kept['accuracy']:.0%} of the queries"
    chance = kept["random_mrr"]
    most = chance + CERTAIN * kept["random_mrr_sd"]
    if most >= 1:
        return f"{words}; too few held-out queries to tell this from a random order, which has {chance:.3f}", PLAIN
    if kept["mrr"] > most:
        return f"{words}; a random order has {chance:.3f}", tone
    return (
        f"No better than a random order: {words}, while random orders have {chance:.3f} and often up to {most:.3f}",
        BAD,
    )


def of_divergence(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for distillation, whose loss is how far the student's probabilities are from the teacher's."""
    first, last = validations[0]["val_loss"], kept["val_loss"]
    words = f"Held-out divergence from the teacher {compared(validations, kept, 'val_loss', 'z.4f')[0]} per token"
    if len(validations) == 1:
        return f"{words}, measured once", PLAIN
    if first <= 0 or abs(last / first - 1) < SAME:
        return f"{words}, unchanged", PLAIN
    change = abs(last / first - 1)
    return (f"{words}, {change:.0%} lower", GOOD) if last < first else (f"{words}, {change:.0%} higher", BAD)


# Charts


def curve(name: str, key: str, rows: list[dict[str, Any]], scale: float = 1.0) -> Series:
    """Return a metric over the steps."""
    points = [(r["step"], math.nan if r[key] is None else r[key] * scale) for r in rows]
    return Series(name, points, markers=name.startswith("held out"))


# Title, names of the metrics in metrics.jsonl, and whether the axis begins at zero.
ChartRow = tuple[str, tuple[str, ...], bool]
OF_PREFERENCES: tuple[ChartRow, ...] = (
    ("Pairs preferred as labeled", ("accuracy",), False),
    ("Margin of rewards", ("margin",), False),
    ("Rewards", ("chosen_rewards", "rejected_rewards"), False),
    ("Divergence from the reference", ("divergence",), False),
)
OF_CLASSES: tuple[ChartRow, ...] = (
    ("Rank of the first relevant document (MRR), and all grades (nDCG)", ("mrr", "ndcg"), True),
    ("Mean F1 of the labels", ("macro_f1",), True),
    ("Correlation with the labels", ("pearson", "spearman"), True),
)


def trains_classifier(records: list[dict[str, Any]]) -> bool:
    """Return whether a run trains a classifier."""
    return any(name in one for one in records for name in OF_LABELS)


def trains_reranker(records: list[dict[str, Any]]) -> bool:
    """Return whether a run trains a reranker."""
    return any(name in one for one in records for name in OF_RANKINGS)


def drawn(records: list[dict[str, Any]], rows: Iterable[ChartRow]) -> list[Chart]:
    """Return the charts of some rows, those that there is something of."""
    charts = []
    for title, names, from_zero in rows:
        endings = {name: f", {name.split('_')[0]}" if len(names) > 1 else "" for name in names}
        series = []  # over training and over validations
        for name in names:
            for when, loss in WHEN.items():
                having = [r for r in records if r.get(name) is not None and r[loss] is not None]
                series += [curve(f"{when}{endings[name]}", name, having)] if having else []
        charts += [(title, series, "", from_zero)] if series else []
    return charts


def objective_charts(records: list[dict[str, Any]]) -> list[Chart]:
    """Return charts of what distillation, objectives on preferences, classifiers and rerankers report beside their loss."""
    having = [r for r in records if r.get("kl") is not None and "reward" not in r]
    losses = (r["val_loss"] if r["loss"] is None else r["loss"] or 0.0 for r in having)
    same = all(abs(r["kl"] - loss) < 1e-6 for r, loss in zip(having, losses, strict=True))
    charts = [] if same else drawn(having, [("KL of teacher and student per token", ("kl",), True)])
    # Rounded, so that a first value that is 0 but for rounding does not open the axis below 0.
    metrics = [name for _, names, _ in OF_PREFERENCES for name in names]
    compared = [r | {name: round(r[name], 4) for name in metrics if r.get(name) is not None} for r in records]
    charts += drawn([r for r in compared if "margin" in r], OF_PREFERENCES)
    if trains_classifier(records) or trains_reranker(records):
        first = (
            "Queries with the best document first" if trains_reranker(records) else "Texts whose labels are all right"
        )
        charts += drawn(records, [(first, ("accuracy",), True), *OF_CLASSES])
    return charts


def rollout_charts(records: list[dict[str, Any]]) -> list[Chart]:
    """Return charts of what an objective reports that samples answers; none for other runs."""
    sampled = [r for r in records if "length" in r]
    own = dict.fromkeys(name for r in records for name in r if name.startswith("reward/"))
    rewarded = any("reward" in r for r in sampled)  # else the divergence is from a teacher
    rows: list[ChartRow] = [
        ("Reward", ("reward",), False),
        *((f"Reward: {name.removeprefix('reward/')}", (name,), False) for name in list(own)[:MOST_REWARDS]),
        ("Spread of a prompt's rewards", ("reward_std",), True),
        ("Prompts whose answers all have the same reward", ("frac_reward_zero_std",), True),
        ("Tokens of an answer", ("length",), True),
        ("Answers cut at --max-new-tokens", ("truncated",), True),
        *([("Divergence from the untrained model", ("kl",), True)] if rewarded else []),
        ("Ratios beyond --epsilon", ("clipped",), True),
        *((title, (name,), True) for title, name in OF_TOOLS),
        ("Share of the time in rollouts", ("rollout_share",), True),
    ]
    # Not those with nothing but zeros, as of a divergence that is not measured.
    return drawn(sampled, [row for row in rows if not row[2] or any(r.get(row[1][0]) for r in sampled)])


def of_equal_rewards(records: list[dict[str, Any]]) -> str:
    """Return a note if the answers to most prompts of the last reports all had the same reward; else an empty string."""
    shares = [r["frac_reward_zero_std"] for r in records if r["loss"] is not None and "frac_reward_zero_std" in r]
    last = shares[-AVERAGED:]
    share = sum(last) / len(last) if last else 0.0
    if share < MOST_WITHOUT_SPREAD:
        return ""
    return (
        f"At the end, all answers to {share:.0%} of the prompts had the same reward, and nothing is learned from those. "
        "Mix easier or harder prompts in, reward more finely, or raise --group-size or --temp."
    )


# Tell which validation measured the adapter that is in a run's folder, and among how many it was chosen.
#
# The trainer knows its step and writes it into report.json.

Record = dict[str, Any]


def compared_validations(validations: list[Record], rounded_from: int) -> list[Record]:
    """Return the validations among which the best is looked for: once there are some with rounding, only those."""
    return [r for r in validations if r["step"] >= rounded_from] or validations


def measured_adapter(records: Sequence[Record], ended: bool, kept_step: int | None) -> Record | None:
    """Return the last validation, after a run's end that of the adapter in the folder; None: there is none.

    Args:
        records: of metrics.jsonl.
        ended: whether the run has.
        kept_step: of the adapter in the folder; None: that of the last validation.
    """
    validations = [r for r in records if r["val_loss"] is not None]
    if not ended or kept_step is None or not validations:
        return validations[-1] if validations else None
    found = next((r for r in validations if r["step"] == kept_step), None)
    return validations[-1] if found is None and kept_step > validations[-1]["step"] else found


def choices(validations: list[Record], settings: Mapping[str, Any], rounded_from: int, folder: Path | None) -> int:
    """Return among how many measurements of the held-out rows the adapter was chosen; 1: it was not.

    With --keep-best, all validations after the first count. The other rates of `--learning-rate auto` and the other candidates
    of a sweep count as well.

    Args:
        validations: in order.
        settings: of run.yaml; `keep_best` counts only once the run has ended.
        rounded_from: as of `Evidence`.
        folder: of the run; None: not known.
    """
    later = [r for r in compared_validations(validations, rounded_from) if r is not validations[0]]
    count = max(1, len(later)) if settings.get("keep_best") else 1
    if folder is not None:
        sweep = folder.parent if folder.name == WINNER else folder / TRIALS
        with suppress(OSError, ValueError, KeyError, TypeError):
            count += len(parse_json((sweep / SWEEP_FILE).read_bytes())["candidates"]) - 1
    return count


# Show what a classifier gets right: a table of its labels, and which label is taken for which.
#
# classes.jsonl in a run folder has a line for each validation: `step`, `classes` (label -> precision, recall, f1, texts, predicted), and either
# `confusion` (rows: the labels that texts have, columns: those that they get) or `thresholds` (label -> probability), and if the run
# calibrated, `confidence` (objectives/questions.py). Of several questions, `questions` has all this by their names.

CLASSES_FILE = "classes.jsonl"
ROWS_FILE = "held_out_rows.jsonl"
MOST_NAMED = 5  # labels in a sentence
SURE = 0.9  # the confidence that a sentence is about
MOST_IN_TABLE = 24  # labels of a confusion matrix that a page or a terminal has room for


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file such as metrics.jsonl, without an incomplete line after a kill; none without the file."""
    records = []
    # Not splitlines(), which also splits at characters that JSON strings may hold.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []:
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict)]


def begin_lines(file: Path, resumed_at: int | None) -> None:
    """Begin a run's file of lines with steps; of a resumed one keep the lines up to its step."""
    records = [] if resumed_at is None else [one for one in read_records(file) if type(one.get("step")) is int]
    file.unlink(missing_ok=True)
    add_lines(file, [one for one in records if one["step"] <= (resumed_at or 0)])


def add_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Append records to a run's file of lines."""
    lines = [json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records]
    if lines:
        with file.open("a", encoding="utf-8", errors="replace") as out:
            out.writelines(lines)


def add_classes(file: Path, step: int, details: Mapping[str, Any]) -> None:
    """Append what a validation found; nothing if it found no labels."""
    add_lines(file, [{"step": step, **details}] if _of_questions(details) else [])


def read_classes(file: Path, step: int | None) -> dict[str, Any] | None:
    """Return what the validation after a step found; None if it is not known."""
    of_step = [one for one in read_records(file) if one.get("step") == step and _of_questions(one)]
    return of_step[-1] if of_step else None


def _of_questions(details: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return name -> tables of each question with labels; the only question has no name."""
    found = details.get("questions") or {"": details}
    return {name: one for name, one in found.items() if isinstance(one.get("classes"), dict)}


def add_rows(file: Path, step: int, rows: RowLosses | None) -> None:
    """Append the losses of a validation's rows, unless there are none or one is not finite."""
    if rows is not None and np.isfinite(rows.sums).all():
        line = {"step": step, "loss_sums": np.round(rows.sums, 5).tolist(), "tokens": rows.tokens.tolist()}
        add_lines(file, [line])


def read_rows(file: Path) -> dict[int, RowLosses]:
    """Return the losses of each validation's rows by its step, without lines that are not whole."""
    found: dict[int, RowLosses] = {}
    for record in read_records(file):
        with suppress(ValueError, KeyError, TypeError):
            sums, tokens = np.array(record["loss_sums"], np.float64), np.array(record["tokens"], np.int64)
            if sums.ndim == 1 and sums.shape == tokens.shape and len(sums) and (tokens > 0).all():
                found[int(record["step"])] = RowLosses(sums, tokens)
    return found


def class_rows(details: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row of cells for each label, those with the lowest F1 first; labels that no text has come last, without figures."""
    thresholds = details.get("thresholds") or {}
    rows = []
    for name, one in sorted(
        details["classes"].items(), key=lambda item: (not item[1]["texts"], item[1]["f1"], item[0])
    ):
        row = {"label": name, "texts": str(one["texts"]), "predicted": str(one["predicted"])}
        row |= {measure: f"{one[measure]:.3f}" if one["texts"] else "–" for measure in ("precision", "recall", "f1")}
        rows.append(row | ({"threshold": f"{thresholds[name]:.3f}"} if name in thresholds else {}))
    return rows


def measured_words(details: Mapping[str, Any] | None) -> list[str]:
    """Return on how many texts a validation measured, which labels none of them has, and how good confidences are, as sentences."""
    sentences = []
    for question, one in _of_questions(details or {}).items():
        texts, of = sum(map(sum, one.get("confusion") or [])), f"{question}: " if question else ""
        without = [name for name, own in one["classes"].items() if not own["texts"]]
        words = f"{of}Measured on {counted(texts, 'held-out text')}" if texts else ""
        if without:
            named = ", ".join(without[:MOST_NAMED]) + (" and others" if len(without) > MOST_NAMED else "")
            labels = f"the {'label' if len(without) == 1 else 'labels'} {named}"
            words += (
                f", none of them with {labels}" if words else f"{of}No held-out text that was measured has {labels}"
            )
        sure = one.get("confidence")
        if words and (without or not sure):
            sentences.append(f"{words}; `evaluate` with a labeled file measures more.")
        if sure:
            before, (after, low, high) = sure["before"]["ece"][0], sure["after"]["ece"]
            words = (
                f"{of}A confidence is off by {before:.2f} as trained and by {after:.2f} ({low:.2f} to {high:.2f}) as calibrated, on "
                f"{counted(sure['answers'], 'held-out answer')} that chose nothing."
            )
            acting = next((level for level in sure["decided"] if level["above"] >= SURE), None)
            if acting:
                words += (
                    f" Above {acting['above']:g} it decides {acting['decided']:.0%} of the texts and is wrong in {acting['wrong']:.0%} "
                    "of these (--answer-above)."
                )
            sentences.append(words)
    return sentences


def label_tables(details: Mapping[str, Any]) -> list[tuple[str, list[dict[str, str]]]]:
    """Return the tables of a classifier, each with a title: labels, confusions, confidences, and what answering above each means."""
    found = []
    for question, one in _of_questions(details).items():
        of = f"{question}: " if question else ""
        found += [(f"{of}labels", class_rows(one)), (f"{of}confusions", confusion_rows(one))]
        if sure := one.get("confidence"):
            ends = [
                {
                    "confidence": name,
                    "off by (ECE)": _spread(sure[when]["ece"]),
                    "Brier score": _spread(sure[when]["brier"]),
                }
                for when, name in (("before", "as trained"), ("after", "calibrated"))
            ]
            levels = [
                {
                    "--answer-above": f"{level['above']:g}",
                    "decided": f"{level['decided']:.0%}",
                    "wrong among these": f"{level['wrong']:.1%} ({level['low']:.1%} to {level['high']:.1%})",
                }
                for level in sure["decided"]
            ]
            found += [(f"{of}confidence", ends), (f"{of}what it decides", levels)]
    return [(title, rows) for title, rows in found if rows]


def _spread(values: Sequence[float]) -> str:
    """Return a value with the ends of its interval."""
    return "{:.3f} ({:.3f} to {:.3f})".format(*values)


def reliability_charts(details: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return for each question how often answers are right against their confidence, in percent; calibrated ones lie on the diagonal."""
    charts = []
    for question, one in _of_questions(details).items():
        if sure := one.get("confidence"):
            series = [Series("as good as it says", [(0, 0), (100, 100)], dashed=True)]
            for when, name in (("before", "as trained"), ("after", "calibrated")):
                points = [(100 * each["confidence"], 100 * each["right"]) for each in sure[when]["bins"]]
                series.append(Series(name, points, markers=True))
            title = f"{question}{': ' if question else ''}right answers by confidence"
            drawn = {"title": title, "series": series, "wide": "", "note": ""}
            charts.append({**drawn, "svg": line_chart(title, series, "%", True, along="confidence in percent")})
    return charts


def confusion_rows(details: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row for each label that texts have, with a column for each that they get; none for many labels."""
    names, counts = list(details["classes"]), details.get("confusion") or []
    if not counts or len(names) > MOST_IN_TABLE:
        return []
    return [
        {"is, taken for": name, **dict(zip(names, map(str, row), strict=True))}
        for name, row in zip(names, counts, strict=True)
    ]


# Count the right answers of a run: to trained questions, and to questions in new words.
#
# An answer is a mapping, as trainer/ask.py makes it and report.json keeps it: `question`, `expected`, `base` and `adapter` (the
# models' texts), `base_right` and `right` (None: nobody can tell, see trainer/ask.py). A run's answers also have `new_words`, and
# `ticked`: what a person said of the adapter's answer, which counts more.

# What became of a run

LEARNED, TOO_FEW_STEPS, OVER_FITTED = "learned", "too few steps", "overfitted"
MEMORIZED, UNCHANGED, WORSE, UNKNOWN = "memorized", "nothing changed", "worse", "not measured"
YOUR_WORDS, LITTLE, AS_BASE = "your words only", "little", "as the base"
# How a headline about answers begins, where not by the name itself.
HEADS = {YOUR_WORDS: "Knows mostly your wording", LITTLE: "Learned little", AS_BASE: "No better than the base"}

MODELS = ("base", "adapter")
HALF = 0.5  # share of right answers from which a run has learned
CLEAR = 0.1  # of all answers, by so many more than the base's: 17 of 32 instead of 16 are no skill
CHANCE = 0.05

Answer = Mapping[str, Any]


@dataclass(frozen=True)
class Count:
    """How many of some questions are answered right.

    Attributes:
        right: by the adapter.
        of: questions whose answers can be checked.
        base: by the base; None: it was not asked.
        fell: whether the adapter answers fewer than the base by more than chance (one-sided sign test over the questions
            that one of the two alone answers right; five lost and none gained are the fewest).
    """

    right: int
    of: int
    base: int | None = None
    fell: bool = False

    @property
    def half(self) -> bool:
        """Whether at least half of the answers are right."""
        return self.right >= HALF * self.of

    @property
    def gain(self) -> int:
        """How many more are right than the base's."""
        return self.right - (self.base or 0)

    @classmethod
    def over(cls, answers: Iterable[Answer]) -> Count | None:
        """Count some answers; None: none of them can be checked."""
        pairs = [(judged(one), one.get("base_right")) for one in answers if judged(one) is not None]
        if not pairs:
            return None
        asked = any(base is not None for _, base in pairs)
        lost, gained = (sum(pair == one for pair in pairs) for one in ((False, True), (True, False)))
        chance = sum(math.comb(lost + gained, n) for n in range(lost, lost + gained + 1)) / 2 ** (lost + gained)
        base = sum(base is True for _, base in pairs) if asked else None
        return cls(sum(right is True for right, _ in pairs), len(pairs), base, lost > gained and chance < CHANCE)


def judged(answer: Answer) -> bool | None:
    """Return whether an adapter's answer is right: as a person said, or else as the expected answer tells."""
    return answer.get("right") if answer.get("ticked") is None else answer["ticked"]


def counts_of(
    answers: Iterable[Answer], evaluation: Mapping[str, Any] | None = None
) -> tuple[Count | None, Count | None]:
    """Return the counts of right answers in the words of the training rows, and in new words.

    Args:
        answers: of a run.
        evaluation: what `evaluate` measured later; its questions count instead of the run's own in new words, unless they are
            the run's own held-out rows, or most of them repeat training rows.
    """
    own, new = (Count.over(one for one in answers if one["new_words"] is is_new) for is_new in (False, True))
    if evaluation and not evaluation.get("held_out"):
        seen = evaluation.get("near_training") or {"rows": 0, "of_rows": 1}
        if 2 * seen["rows"] <= seen["of_rows"]:
            new = Count.over(evaluation.get("examples") or ()) or new
    return own, new


def counts_words(own: Count | None, new: Count | None) -> str:
    """Return two counts as words: `30 of 32 right in your words, 14 of 20 in new words (the base: 0 and 1)`."""
    named = [(own, "in your words"), (new, "in new words")]
    counts = [(count, where) for count, where in named if count is not None]
    words = [f"{count.right} of {count.of}{'' if n else ' right'} {where}" for n, (count, where) in enumerate(counts)]
    bases = [str(count.base) for count, _ in counts if count.base is not None]
    base = f" (the base: {' and '.join(bases)})" if bases else ""
    return f"{', '.join(words)}{base}{'' if new else ', not tried in new words'}"


def shown_rows(examples: Sequence[Answer]) -> dict[str, Any]:
    """Return what pages show of questions and answers: `models`, the names of those that were asked, and `rows`.

    A row has `question`, `expected`, and `said`: the text of each model, and whether it is right, or None where nobody can tell.
    """
    models = [name for name in MODELS if examples and name in examples[0]]
    rows = [
        {
            "question": str(one["question"]),
            "expected": str(one["expected"]),
            "said": [(str(one[name]), one["base_right"] if name == MODELS[0] else judged(one)) for name in models],
        }
        for one in examples
    ]
    return {"models": models, "rows": rows}


def right_words(examples: Sequence[Answer]) -> str:
    """Return how many answers of each model are right; empty if none can be checked."""
    said = [row["said"] for row in shown_rows(examples)["rows"]]
    checked = [[right for _, right in one] for one in said if any(right is not None for _, right in one)]
    if not checked:
        return ""
    counts = ", ".join(
        f"{name} {sum(map(bool, column))}" for name, column in zip(MODELS, zip(*checked, strict=True), strict=False)
    )
    return f"right answers to the {counted(len(checked), 'question')} that can be checked: {counts}"


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
        name: one of the words of the verdict.
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
    main = counts[-1]  # in new words, if there are any
    if any(count.fell for count in counts):
        own_rose = len(counts) == 2 and not counts[0].fell and counts[0].gain > 0
        name = OVER_FITTED if own_rose and not main.half else WORSE
    elif any(count.half for count in counts):
        clear = any(count.gain >= CLEAR * count.of for count in counts)
        name = AS_BASE if not clear else LEARNED if main.half else YOUR_WORDS
    elif begun:
        name = TOO_FEW_STEPS
    else:  # with not one more right, the form of the answers may have been learned
        name = LITTLE if fell or any(count.gain > 0 for count in counts) else UNCHANGED
    return replace(found, name=name)


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
    # By a share of the fall before, and if rows can tell, beyond chance.
    rise = change_between(evidence, best_step, last_step)
    sure = _is_certain(rise) or rise.rows < SOUND_ROWS
    rose = last_step > best_step and sure and rise.change >= max(RISE * best, RISE_SHARE * (first - best))
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
            "Each question has one wording, or few: --rephrase 3 adds three to each, and tests others. The better the writer, the more "
            "the model finds: name a large one with --rephrase-model, or the address of a server such as LM Studio's or Ollama's."
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
    validations = [r for r in records if r["val_loss"] is not None]
    skipped, steps = (max((r[name] for r in records), default=0) for name in ("skipped_steps", "step"))
    were = "update was" if skipped == 1 else "updates were"
    lost = f"{skipped:,} {were} skipped because loss or gradient was not finite." if skipped else ""
    notes = [note for note in (of_equal_rewards(records), lost) if note]
    epochs, timed = max((float(r.get("epoch") or 0) for r in records), default=0.0), steps - context.begins_at
    run = FinishedRun(context.folder, settings, steps, epochs, context.seconds / timed if timed > 0 else 0.0)
    first = max(context.begins_at, validations[0]["step"] if validations else 0)
    why = "because the checkpoint was not in its run folder" if context.begins_at else "the first validation"
    begins = f"; counted from step {first:,}, {why}" if first else ""
    own, new = counts_of(context.answers, context.evaluation)
    if not validations and not (own or new):
        losses = [r["loss"] for r in records if r["loss"] is not None]
        loss = f"Training loss {losses[0]:.3f} to {losses[-1]:.3f}{begins}" if losses else ""
        mend, command = mending(Diagnosis(UNKNOWN), run) if losses else ("", "")
        nothing = "No held-out data was measured, so this run shows no effect on new text."
        return Verdict(loss or "No step has been reported yet", PLAIN, [nothing, *notes], UNKNOWN, mend, command)
    kept = measured_adapter(records, ended, context.kept_step)
    if kept is None and validations:
        words = f"The adapter is that of step {context.kept_step:,}, for which no validation was recorded"
        return Verdict(words, PLAIN, notes, UNKNOWN)
    kept_step = kept["step"] if kept else steps
    rounded_from = context.rounded_from or 0
    if 0 < rounded_from <= kept_step and validations:
        notes.append(f"Rounding began after step {rounded_from:,}; validations are compared from there on.")
    if kept and kept is not validations[-1]:
        notes.append(f"--keep-best kept the adapter of step {kept['step']:,}, and the headline is about that one.")
    if context.folder is not None:
        notes = [*measured_words(read_classes(context.folder / CLASSES_FILE, kept_step)), *notes]
    of_its_own = (
        (any(r.get("reward") is not None for r in validations), of_rewards),
        (any("margin" in r for r in validations), of_preferences),
        (settings.get("objective") in TAUGHT, of_divergence),
        (settings.get("objective") in LABELED, of_labels),
        (settings.get("objective") in RANKED, of_rankings),
        (settings.get("objective") in VECTORS, of_search),
    )
    chosen = choices(validations, settings if ended else {}, rounded_from, context.folder)
    evidence = Evidence(
        steps, [(r["step"], r["loss"]) for r in records if r["loss"] is not None],
        [(r["step"], r["val_loss"]) for r in validations], context.rows, kept_step, context.texts, context.held_out_rows,
        context.near_duplicates, rounded_from, chosen, own, new,
    )  # fmt: skip
    for applies, words_of_objective in of_its_own:
        if applies and kept:
            headline, tone = words_of_objective(validations, kept)
            found = diagnose(evidence)
            # The loss of sampled answers says nothing about that.
            if words_of_objective is not of_rewards and found.name in (OVER_FITTED, WORSE):
                where = f"at step {found.best_step:,}" if found.best_step else "before training"
                lowest = f"The held-out loss was lowest {where} ({found.best:.3f}) and ended at {found.last:.3f}."
                notes.insert(0, f"{lowest} {mending(found, run)[0]}")
            return Verdict(headline + begins, tone, notes)
    found = diagnose(evidence)
    mend, command = mending(found, run, own, new)
    change, tone = found.change and asdict(found.change), TONES.get(found.name, PLAIN)
    if own or new:
        head = HEADS.get(found.name, found.name.capitalize())
        if found.name == LEARNED and new is None:  # what it says to other wordings is not known
            head, tone = "Knows your wording", PLAIN
        headline = f"{head}: {counts_words(own, new)}"
        figures = f"{_perplexities(found, evidence)}{begins}." if validations else ""
        return Verdict(headline, tone, notes, found.name, mend, command, change, figures, own, new)
    return Verdict(headline_of(found, evidence) + begins, tone, notes, found.name, mend, command, change)


def _perplexities(found: Diagnosis, evidence: Evidence) -> str:
    """Return the perplexities of a run's held-out rows, with their change, as the beginning of a sentence."""
    if found.change is None:
        return f"Held-out perplexity {perplexity(found.first)}, measured once"
    ends = f"{perplexity(found.first)} to {perplexity(found.last)}"
    (before, _), (after, _) = evidence.held_out[0], _kept(evidence, evidence.held_out)
    rows = ""
    if rows_differ(evidence, before, after):
        counts = [len(evidence.rows[step].tokens) for step in (before, after)]
        rows = f" (on other rows: {counted(counts[0], 'row')} at step {before:,}, {counts[1]:,} at step {after:,})"
    return f"Held-out perplexity {ends}, {found.change.words()}{rows}"


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


# The page

REPORT_FILE, FACTS_FILE = "report.html", "report.json"
MEMORY_NOTE = "The plan is for MLX's buffers alone. The process also holds Python, its libraries, and freed buffers that MLX keeps."


@dataclass
class Sample:
    """The beginning of a row, and its greedy continuations before and after training (None: not yet).

    Attributes:
        prompt: with the template's markers.
        before, after: the model's texts.
        specials: the tokenizer's special tokens in them.
        teacher: the text of a teacher that the model learns from; None: there is no teacher, or its text is not known.
        expected: the row's own answer, cut like the model's; None: not known.
        pictures: the digests of those in the prompt, in order (`RunReport.pictures`).
    """

    prompt: str
    before: str
    after: str | None = None
    specials: list[str] = field(default_factory=list)
    teacher: str | None = None
    expected: str | None = None
    pictures: list[str] = field(default_factory=list)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """The prompt as (role, content) of each turn, without markers."""
        return spoken_turns(self.prompt, self.specials)

    def said(self, text: str) -> str:
        """Return one of the model's texts without markers."""
        return without_markers(text, self.specials) or "(empty text)"


@dataclass
class RunReport:
    """The facts on a page that are not in metrics and settings.

    Attributes:
        command: the run's command; empty if it was started in a notebook or an interactive session.
        device, base, adapter, versions: a line each.
        data: DataReport.to_dict().
        planned_peak_bytes: the planner's prediction, None if nothing was planned.
        samples: texts.
        step: what computes a step, a line.
        held_out: whether the texts' beginnings are from rows that are not trained on.
        ended: whether all steps are done.
        answers: what the model was asked at the run's end, and said (the verdict); empty: nothing.
        verdict: `Verdict.to_dict()` of the last `write`; the studio reads it.
        date: the day of the run, as in 2026-11-28; empty: today.
        pictures: digest -> data URL of a small JPEG, of the pictures in the prompts of texts and answers.
        kept_step: the step of the adapter in the folder; None: the run has not ended.
        rounded_from: the step from which validations are with rounding (--qat); None: none is, or it was not written.
        begins_at: the step before which nothing is on record, because the run went on from a checkpoint alone.
        drafts: tokens a pass of the model with a head that drafts, `before` and `after` it was trained; empty: it was not.
        next_commands: that use the adapter; empty before the end.
    """

    command: str
    device: str
    base: str
    adapter: str
    versions: str
    data: dict[str, Any]
    planned_peak_bytes: int | None = None
    samples: list[Sample] = field(default_factory=list)
    step: str = ""
    held_out: bool = True
    ended: bool = False
    answers: list[Record] = field(default_factory=list)
    verdict: dict[str, Any] = field(default_factory=dict)
    date: str = ""
    pictures: dict[str, str] = field(default_factory=dict)
    kept_step: int | None = None
    rounded_from: int | None = None
    begins_at: int = 0
    drafts: dict[str, float] = field(default_factory=dict)
    next_commands: list[str] = field(default_factory=list)

    def goes_on(self, run: Path | None, step: int) -> bool:
        """Take over the texts of the run that this one resumes, and what is on record of it.

        Args:
            run: its folder; None: nobody knows.
            step: that this run goes on from.

        Returns:
            Whether there are texts.
        """
        earlier = read_facts(run) if run else {}
        known = run is not None and (run / "metrics.jsonl").exists()
        begins_at = earlier.get("begins_at", 0) if known else step
        self.begins_at = begins_at if type(begins_at) is int else 0
        with suppress(KeyError, TypeError):
            self.samples = [Sample(**one) for one in earlier["samples"]]
        return bool(self.samples)

    def write(self, folder: Path) -> None:
        """Write report.json and report.html into a run folder that has metrics.jsonl and run.yaml."""
        self.date = self.date or date.today().isoformat()
        page = self._page(folder)
        replace_text(folder / FACTS_FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")
        replace_text(folder / REPORT_FILE, page)

    def _page(self, folder: Path) -> str:
        """Return the page's text, and keep the verdict that is on it."""
        settings = parse_yaml((folder / "run.yaml").read_text(encoding="utf-8"))
        records = without_untrained_accuracy(read_records(folder / "metrics.jsonl"), settings)
        evaluation, valid = read_evaluation(folder), self.data.get("splits", {}).get("valid")
        context = VerdictContext(
            folder=folder,
            rows=read_rows(folder / ROWS_FILE),
            texts=[(one.before, one.after) for one in self.samples if one.after is not None],
            held_out_rows=int(valid["rows"]) if valid else 0,
            near_duplicates=(self.data.get("near_duplicates") or {}).get("held_out_rows"),
            answers=self.answers,
            evaluation=evaluation,
            seconds=elapsed_s(records),
            kept_step=self.kept_step,
            rounded_from=self.rounded_from,
            begins_at=self.begins_at,
        )
        found = verdict(records, settings, self.ended, context)
        kept = measured_adapter(records, self.ended, self.kept_step)
        self.verdict = found.to_dict()
        details = read_classes(folder / CLASSES_FILE, kept["step"] if kept else None)
        drafted = (
            [("tokens a pass, drafted", "{before:.2f} → {after:.2f}".format(**self.drafts))] if self.drafts else []
        )
        return render_page(
            COMMON,
            "run_report.html",
            name=folder.resolve().name,
            facts=self,
            verdict=found,
            unit=UNITS[self.data.get("records", "examples")],
            tiles=[*tiles(records), *drafted],
            charts=[*reliability_charts(details or {}), *charts(records, self.planned_peak_bytes)],
            answers=shown_answers(read_answers(folder / ANSWERS_FILE)),
            asked=[shown_rows([one for one in self.answers if one["new_words"] is new]) for new in (False, True)],
            evaluation=shown_evaluation(evaluation) if evaluation else None,
            classes={"step": details["step"], "tables": label_tables(details)} if details else None,
            settings=settings,
        )


def read_facts(folder: Path) -> dict[str, Any]:
    """Return what a run's report.json says; nothing for a folder without one."""
    try:
        facts = parse_json((folder / FACTS_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def has_ended(folder: Path) -> bool:
    """Return whether the run of a folder took all its steps; False for a folder without a report."""
    return read_facts(folder).get("ended") is True


def read_report(folder: Path) -> RunReport | None:
    """Return the report of a run as it was written last; None: there is none, or another version wrote it."""
    facts = read_facts(folder)
    try:
        samples = [Sample(**one) for one in facts.get("samples", [])]
        report = RunReport(**{**facts, "samples": samples})
        report.date = report.date or date.fromtimestamp((folder / FACTS_FILE).stat().st_mtime).isoformat()
    except (OSError, TypeError):
        return None
    return report


def read_result(folder: Path) -> dict[str, Any]:
    """Return what is known of a run, which may go on, as `train --json` and `status --json` print it (cli/forms.py).

    Raises:
        InputError: the folder holds no run.
    """
    if not (folder / "run.yaml").is_file():
        raise InputError(
            f"--adapter-path {folder}: no run there (run.yaml); give the folder that `mlx-lora train` writes"
        )
    report, records = read_report(folder), read_records(folder / "metrics.jsonl")
    found, ended = (report.verdict, report.ended) if report else ({}, False)
    held_out = [one["val_loss"] for one in records if one["val_loss"] is not None]
    kept = measured_adapter(records, ended, report and report.kept_step)
    return {
        "adapter_path": str(folder),
        "state": "running" if lock_holder(folder) is not None else "ended" if ended else "stopped",
        "steps": max((one["step"] for one in records), default=0),
        "verdict": found.get("name"),
        **{name: found.get(name) for name in ("headline", "tone", "notes", "mend")},
        "mend_command": found.get("command"),
        **{name: found.get(name) for name in ("right_in_your_words", "right_in_new_words")},
        "loss_before": held_out[0] if held_out else None,
        "loss_after": kept["val_loss"] if kept and kept["step"] else None,
        "peak_bytes": max((one["peak_memory_bytes"] for one in records), default=0),
        "seconds": elapsed_s(records),
        "report": str(folder / REPORT_FILE),
        "next_commands": report.next_commands if report else [],
    }


def without_untrained_accuracy(records: list[dict[str, Any]], settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Leave out the accuracy before the first step if the model is then its own reference: it would only show rounding."""
    if settings.get("reference_adapter") or settings.get("objective") not in OWNERS["reference_adapter"]:
        return records
    return [{k: v for k, v in one.items() if one["step"] or k != "accuracy"} for one in records]


def tiles(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the run's main numbers, (label, value): eight, once a step has been reported."""
    trained = [r for r in records if r["loss"] is not None or r["supervised_tokens"]]
    steps = ("steps", f"{max((r['step'] for r in records), default=0):,}")
    if not trained:
        return [steps]
    held_out = [r for r in records if r["val_loss"] is not None]
    # Of a run that samples answers the rewards are shown, because a loss there is no measure.
    name, key, other = ("reward",) * 3 if any("reward" in r for r in records) else ("loss", "loss", "val_loss")
    # The first report includes compilations.
    speed = statistics.median(r["supervised_tokens_per_s"] for r in trained[1:] or trained)
    return [
        steps,
        ("time", format_duration(elapsed_s(records))),
        ("trained tokens", f"{sum(r['supervised_tokens'] for r in trained):,}"),
        ("trained tokens/s, median", number(speed)),
        (f"training {name}", _ends(trained, key) or "not measured"),
        (f"held-out {name}", _ends(held_out, other) or "not measured"),
        ("peak memory, MLX", f"{max(r['peak_memory_bytes'] for r in records) / 1e9:.2f} GB"),
        ("peak memory, process", f"{max(r['process_peak_bytes'] for r in records) / 1e9:.2f} GB"),
    ]


def _ends(records: list[dict[str, Any]], key: str) -> str:
    """Return the first and the last value of a metric as text; an empty string without any."""
    values = [r[key] for r in records if r.get(key) is not None]
    return " → ".join(f"{value:.3f}" for value in values[:1] + values[1:][-1:])


def elapsed_s(records: list[dict[str, Any]]) -> float:
    """Return the time of all the run's parts, because each resumed process counts from zero."""
    total = last = 0.0
    for record in records:
        if record["elapsed_s"] < last:
            total += last
        last = record["elapsed_s"]
    return total + last


def charts(records: list[dict[str, Any]], planned_peak_bytes: int | None) -> list[dict[str, Any]]:
    """Return the page's charts: title, series, and SVG text."""
    trained = [r for r in records if r["loss"] is not None or r["supervised_tokens"]]
    held_out = [r for r in records if r["val_loss"] is not None]
    memory = [
        curve("MLX's buffers, peak", "peak_memory_bytes", trained, 1e-9),
        curve("process, peak", "process_peak_bytes", trained, 1e-9),
    ]
    if planned_peak_bytes and trained:
        ends = (trained[0]["step"], trained[-1]["step"])
        memory.append(
            Series("MLX's buffers, planned", [(step, planned_peak_bytes / 1e9) for step in ends], dashed=True)
        )
    tokens = [
        curve("trained tokens", "supervised_tokens_per_s", trained),
        curve("all real tokens", "tokens_per_s", trained),
    ]
    losses = [curve("training", "loss", trained), curve("held out", "val_loss", held_out)]
    preferences, sampled = any("margin" in r for r in records), any("reward" in r for r in records)
    if sampled:
        # Held-out answers have only a reward. Rounded, because equal rewards give a loss of 0 but for rounding.
        losses = [Series("training", [(step, round(loss, 6)) for step, loss in losses[0].points])]
        while_sampling = [r for r in trained if r.get("rollout_tokens_per_s") is not None]
        tokens.append(curve("sampled, while sampling", "rollout_tokens_per_s", while_sampling))
    counted = "rated answer" if any("divergence" in r for r in records) else "pair" if preferences else "trained token"
    counted = "text" if trains_classifier(records) else "query" if trains_reranker(records) else counted
    wanted = [
        *rollout_charts(records),
        (f"Loss per {'answer' if sampled else counted}", losses, "", False),
        *objective_charts(records),
        ("Tokens per second", tokens, "", True),
        ("Memory", memory, " GB", True),
        ("Learning rate", [curve("learning rate", "learning_rate", trained)], "", True),
        ("Gradient norm, before the clip", [curve("gradient norm", "grad_norm", trained)], "", True),
    ]
    drawn = [
        {
            "title": title,
            "series": series,
            "svg": line_chart(title, series, unit, from_zero),
            "wide": "",
            "note": MEMORY_NOTE if title == "Memory" else "",
        }
        for title, series, unit, from_zero in wanted
    ]
    # The first chart has the page's whole width; on a phone its usual shape is shown instead.
    title, series, unit, from_zero = wanted[0]
    drawn[0]["wide"] = line_chart(title, series, unit, from_zero, size=WIDE)
    return drawn


# Sampled answers: their curves, and those to fixed prompts at every validation

ANSWERS_FILE = "answers.jsonl"
MOST_PROMPTS, MOST_VALIDATIONS = 3, 10  # on the page
MOST_CHARACTERS, MOST_OF_TURN = 600, 800  # of an answer, and of a prompt's turn, on the page


def add_answers(file: Path, step: int, answers: Sequence[Record]) -> None:
    """Append the answers of one validation."""
    add_lines(file, ({"step": step, "number": place, **one} for place, one in enumerate(answers)))


def read_answers(file: Path) -> list[Record]:
    """Return the lines of answers.jsonl that are whole; none without the file."""
    return [one for one in read_records(file) if type(one.get("step")) is int and {"prompt", "answer"} <= one.keys()]


def shown_answers(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what the page shows: of each prompt at most ten validations, the first and the last among them.

    Returns:
        Of each prompt `turns`, (role, content) of each; `pictures`, the digests of those in it; and `answers`: `step`, `reward`,
        `own` (name and value of each reward, if there are several), `text`, and `about`, how long the whole answer is.
    """
    by_prompt: dict[str, list[Record]] = {}
    for record in records:
        by_prompt.setdefault(json.dumps(_asked(record), default=str), []).append(record)
    # A resumed run whose data differ has other prompts; the last ones are shown.
    latest = sorted(by_prompt.values(), key=lambda one: one[-1]["step"])[-MOST_PROMPTS:]
    latest.sort(key=lambda one: one[-1].get("number", 0))
    prompts = []
    for all_of in latest:
        prompt, pictures = _asked(all_of[0])
        if pictures and isinstance(prompt, str):
            prompt = prompt.replace("<image>", "")  # the places of pictures, which are shown beside it
        turns = []
        for turn in prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]:
            content = turn.get("content", "")
            if isinstance(content, list):
                content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
            turns.append((str(turn.get("role", "")).capitalize(), _cut(str(content), MOST_OF_TURN)))
        last, answers = len(all_of) - 1, []
        for place in range(min(len(all_of), MOST_VALIDATIONS)):
            record = all_of[place if last < MOST_VALIDATIONS else round(place * last / (MOST_VALIDATIONS - 1))]
            own = record.get("rewards") or {}
            answers.append({
                "step": f"{record['step']:,}", "reward": _value(record.get("reward")),
                "own": [(name, _value(value)) for name, value in own.items()] if len(own) > 1 else [],
                "text": _cut(record["answer"].strip(), MOST_CHARACTERS) or "(empty text)",
                "about": counted(record.get("length", 0), "token") + (", cut off" if record.get("truncated") else ""),
            })  # fmt: skip
        prompts.append({"turns": turns, "pictures": pictures, "answers": answers})
    return prompts


def _asked(record: Record) -> tuple[Any, list[str]]:
    """Return what tells prompts apart: their texts, and the pictures in them."""
    pictures = record.get("pictures")
    return record["prompt"], [str(one) for one in pictures] if isinstance(pictures, list) else []


def _value(value: float | None) -> str:
    return "–" if value is None else number(round(value, 3))


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most].rstrip()} ..."


def first_and_kept(records: Sequence[Record], kept_step: int | None) -> list[tuple[Record, Record]]:
    """Return the first answer to each prompt, and the one at the step whose adapter is kept; None: at the last step."""
    last_step = records[-1]["step"] if records else 0  # a run may end a few steps after its last validation
    step = last_step if kept_step is None else min(kept_step, last_step)
    last = [record for record in records if record["step"] == step]
    return [(next(one for one in records if _asked(one) == _asked(end)), end) for end in last]


# What evaluate measured

EVALUATION_FILE = "evaluation.json"


def keep_evaluation(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write evaluation.json; a measurement without questions does not replace one of the same adapter that asked some.

    Args:
        folder: of the run.
        facts: what `evaluate --json` prints, and `held_out`.

    Raises:
        OSError: it cannot be written.
    """
    earlier = read_evaluation(folder)
    if earlier and earlier.get("examples") and not facts.get("examples"):
        return
    date, adapter = datetime.now().astimezone().isoformat(timespec="seconds"), sha256_of(folder / WEIGHTS_FILE)
    text = json.dumps(finite_values({**facts, "date": date, "adapter": adapter}), indent=1, ensure_ascii=False)
    replace_text(folder / EVALUATION_FILE, text + "\n")


def read_evaluation(folder: Path) -> dict[str, Any] | None:
    """Return what evaluation.json says of a run's adapter; None: nothing, or it is about another adapter."""
    try:
        facts = parse_json((folder / EVALUATION_FILE).read_bytes())
        if not isinstance(facts, dict) or facts.get("adapter") != sha256_of(folder / WEIGHTS_FILE):
            return None
        shown_evaluation(facts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return facts


def shown_evaluation(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return what pages show of an evaluation.

    Args:
        facts: what `evaluate --json` prints; `held_out` and `date` where they are known.

    Returns:
        `source`, `date`, `loss`, `right` and `seen` (sentences, empty where there is nothing to say), and what `shown_rows`
        returns.
    """
    examples = facts.get("examples") or []
    whose = "that the run held out of" if facts.get("held_out") else "of"
    return {
        "source": f"{counted(facts['rows'], 'row')} {whose} {facts['data']}",
        "date": str(facts.get("date") or "")[:10],
        "loss": loss_words(facts).replace("->", "→").capitalize(),
        "right": right_words(examples).capitalize(),
        "seen": SeenRows(**facts["near_training"]).words() if facts.get("near_training") else "",
        **shown_rows(examples),
    }


def tick(folder: Path, index: int, right: bool | None) -> None:
    """Say that an adapter's answer is right or wrong, and write the run's report anew.

    Args:
        folder: of the run.
        index: of the answer among report.json's `answers`, and after these evaluation.json's `examples`.
        right: what a person says; None: takes back what was said.

    Raises:
        IndexError: there is no such answer.
        OSError: it cannot be written.
    """
    report, evaluation = read_report(folder), read_evaluation(folder)
    answers = report.answers if report else []
    [*answers, *(evaluation or {}).get("examples", [])][index]["ticked"] = right
    if evaluation:
        replace_text(folder / EVALUATION_FILE, json.dumps(evaluation, indent=1, ensure_ascii=False) + "\n")
    if report:
        report.write(folder)


def loss_words(facts: Mapping[str, Any]) -> str:
    """Return the losses of base and adapter as text; that of the base alone where nothing is compared."""
    if "base_loss" not in facts:
        return f"base {facts['loss']:.4f}"
    change: dict[str, Any] = {name: math.nan if value is None else value for name, value in facts["change"].items()}
    return f"base {facts['base_loss']:.4f} -> adapter {facts['loss']:.4f}, perplexity {Change(**change).words()}"


def write_evaluation_page(path: Path, facts: Mapping[str, Any], command: str, device: str) -> None:
    """Write an evaluation as a page of its own, without network or script.

    Args:
        path: its file; replaced atomically.
        facts: as for `shown_evaluation`, and `model`, `adapter_path` and `partial`.
        command: the command that measured it.
        device: a line about the machine.
    """
    page = render_page(
        COMMON, "evaluation.html", facts=facts, evaluation=shown_evaluation(facts), command=command, device=device
    )
    replace_text(path, page)
