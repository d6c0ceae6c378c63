"""What reports show of single objectives: how a run went in one sentence, and charts of what only they measure.

A headline's function takes the validations of metrics.jsonl and the one of the adapter that was kept, and returns (headline,
tone). A number that guessing reaches as well is not called good. A chart's function takes all records of metrics.jsonl, and
returns no chart for a run of another objective.
"""

from __future__ import annotations

import math
from typing import Any

from mlx_lora.reports.charts import OF_TOOLS, Series

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
        return words, tone  # several labels, numbers, or a run of an earlier version
    if most == 1:
        return f"{words}; all held-out texts have the same label, so this shows nothing", PLAIN
    if kept["accuracy"] > most:
        return f"{words}; the most frequent label alone has {most:.0%}", tone
    return f"No better than giving every text the most frequent label, which is right in {most:.0%}: {words}", BAD


def of_rankings(validations: list[dict[str, Any]], kept: dict[str, Any]) -> tuple[str, str]:
    """Return headline and tone for a reranker: its mean reciprocal rank, and that of a random order."""
    ends, tone = compared(validations, kept, "mrr", ".3f")
    words = f"Held-out MRR {ends}, best document first in {kept['accuracy']:.0%} of the queries"
    if (chance := kept.get("random_mrr")) is None:
        return words, tone  # a run of an earlier version
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


def both_curves(records: list[dict[str, Any]], key: str, ending: str = "") -> list[Series]:
    """Return the curves of a metric over training and over validations, those that there are."""
    having = [r for r in records if r.get(key) is not None]
    parts = {when: [r for r in having if r[loss] is not None] for when, loss in WHEN.items()}
    return [curve(f"{when}{ending}", key, rows) for when, rows in parts.items() if rows]


def teacher_charts(records: list[dict[str, Any]]) -> list[Chart]:
    """Return a chart of KL(teacher, student) where the loss is another divergence; none for other runs."""
    having = [r for r in records if r.get("kl") is not None and "reward" not in r]
    if all(abs(r["kl"] - (r["val_loss"] if r["loss"] is None else r["loss"] or 0.0)) < 1e-6 for r in having):
        return []
    return [("KL of teacher and student per token", both_curves(having, "kl"), "", True)]


def preference_charts(records: list[dict[str, Any]]) -> list[Chart]:
    """Return charts of what an objective on preferences reports; none for other runs."""
    titles = {
        "Pairs preferred as labeled": ("accuracy",),
        "Margin of rewards": ("margin",),
        "Rewards": ("chosen_rewards", "rejected_rewards"),
        "Divergence from the reference": ("divergence",),
    }
    # Rounded, so that a first value that is 0 but for rounding does not open the axis below 0.
    reported = [
        {**r, **{name: round(r[name], 4) for names in titles.values() for name in names if r.get(name) is not None}}
        for r in records
        if "margin" in r
    ]
    charts = []
    for title, names in titles.items():
        endings = {name: f", {name.split('_')[0]}" if len(names) > 1 else "" for name in names}
        series = [one for name in names for one in both_curves(reported, name, endings[name])]
        charts += [(title, series, "", False)] if series else []
    return charts


def trains_classifier(records: list[dict[str, Any]]) -> bool:
    """Return whether a run trains a classifier."""
    return any(name in one for one in records for name in OF_LABELS)


def trains_reranker(records: list[dict[str, Any]]) -> bool:
    """Return whether a run trains a reranker."""
    return any(name in one for one in records for name in OF_RANKINGS)


def class_charts(records: list[dict[str, Any]]) -> list[Chart]:
    """Return charts of what a classifier or a reranker reports; none for other runs."""
    if not trains_classifier(records) and not trains_reranker(records):
        return []
    titles = {
        "Queries with the best document first" if trains_reranker(records) else "Texts whose labels are all right": (
            "accuracy",
        ),
        "Rank of the first relevant document (MRR), and all grades (nDCG)": ("mrr", "ndcg"),
        "Mean F1 of the labels": ("macro_f1",),
        "Correlation with the labels": ("pearson", "spearman"),
    }
    charts = []
    for title, names in titles.items():
        series = [one for name in names for one in both_curves(records, name, f", {name}" if len(names) > 1 else "")]
        charts += [(title, series, "", True)] if series else []
    return charts


def rollout_charts(records: list[dict[str, Any]]) -> list[Chart]:
    """Return charts of what an objective reports that samples answers; none for other runs."""
    sampled = [r for r in records if "length" in r]
    rewarded = any("reward" in r for r in sampled)
    own = dict.fromkeys(name for r in records for name in r if name.startswith("reward/"))
    wanted = [("Reward", "reward", False)]
    wanted += [(f"Reward: {name.removeprefix('reward/')}", name, False) for name in list(own)[:MOST_REWARDS]]
    wanted += [
        ("Spread of a prompt's rewards", "reward_std", True),
        ("Prompts whose answers all have the same reward", "frac_reward_zero_std", True),
        ("Tokens of an answer", "length", True),
        ("Answers cut at --max-new-tokens", "truncated", True),
        *([("Divergence from the untrained model", "kl", True)] if rewarded else []),  # else from a teacher
        ("Ratios beyond --epsilon", "clipped", True),
        *((title, name, True) for title, name in OF_TOOLS),
        ("Share of the time in rollouts", "rollout_share", True),
    ]
    charts = []
    for title, name, from_zero in wanted:
        if from_zero and not any(r.get(name) for r in sampled):
            continue  # nothing but zeros, as of a divergence that is not measured
        series = both_curves(sampled, name)
        charts += [(title, series, "", from_zero)] if series else []
    return charts


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
