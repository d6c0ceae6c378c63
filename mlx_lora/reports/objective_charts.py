"""Curves of what single objectives report, for report.html."""

from __future__ import annotations

import math
from typing import Any

from mlx_lora.reports.charts import Series

Chart = tuple[str, list[Series], str, bool]
WHEN = {"training": "loss", "held out": "val_loss"}  # a curve's name -> the loss that its records have
OF_LABELS = ("macro_f1", "mse")  # what only a classifier reports
OF_RANKINGS = ("mrr",)  # what only a reranker reports


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


def of_labels(records: list[dict[str, Any]]) -> bool:
    """Return whether a run trains a classifier."""
    return any(name in one for one in records for name in OF_LABELS)


def of_rankings(records: list[dict[str, Any]]) -> bool:
    """Return whether a run trains a reranker."""
    return any(name in one for one in records for name in OF_RANKINGS)


def class_charts(records: list[dict[str, Any]]) -> list[Chart]:
    """Return charts of what a classifier or a reranker reports; none for other runs."""
    if not of_labels(records) and not of_rankings(records):
        return []
    titles = {
        "Queries with the best document first" if of_rankings(records) else "Texts whose labels are all right": (
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
