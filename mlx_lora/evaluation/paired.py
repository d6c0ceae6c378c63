"""Compare the scores of two models on the same rows: the difference, its 95% interval, and a sentence.

Both models answer the same rows, so the difference is taken row by row: how hard the rows are cancels, and far fewer rows
show a difference than two separate intervals would need.

    0 or 1 a row       Tango's score interval; it excludes 0 exactly where McNemar's test without continuity correction says so
    other numbers      Student's t over the rows' differences
    one number of all  (perplexity, F1, BLEU) the jackknife: the number without each of up to 100 groups of rows, and t

Exact tests (McNemar's binomial, the sign test) are not used: with few rows on which the models differ they call true equality
different in 1 to 2 % of comparisons and not in 5 %, so they overlook differences that are there.

Source: Tango, Statistics in Medicine 17 (1998), 891; Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014), 2850.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import NormalDist
from typing import Any

import numpy as np

from mlx_lora.evaluation.models import BASE
from mlx_lora.utils.statistics import CONFIDENCE, ratio_error, student_quantile

Aggregate = Callable[[Sequence[Any]], float]
"""All rows' values -> one number."""
FEWEST_ROWS = 5  # an interval of fewer rows says nothing
MOST_GROUPS = 100  # of rows that the jackknife leaves out one after another
HALVINGS = 60
MOST_EXAMPLES = 200  # rows of a task that are kept for the page and --json


@dataclass(frozen=True)
class Comparison:
    """How one model's score differs from another's on the same rows.

    Attributes:
        difference: of the scores, above 0 if the second model's is higher.
        low, high: of its 95% interval; infinite where there are too few rows.
        rows: that both answered.
        better: whether a higher score is better.
        share: whether scores are shares, which are told in points (hundredths).
    """

    difference: float
    low: float
    high: float
    rows: int
    better: bool = True
    share: bool = True

    @property
    def certain(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.low > 0 or self.high < 0

    @property
    def verdict(self) -> str:
        """`better`, `worse` or `no difference shown`."""
        if not self.certain:
            return "no difference shown"
        return "better" if (self.difference > 0) == self.better else "worse"

    def words(self) -> str:
        """Return a sentence for a person, without its full stop."""
        if math.isinf(self.low):
            return f"no difference shown: {self.rows} rows are too few"
        scale, unit, digits = (100, " points", 1) if self.share else (1, "", _digits(self.low, self.high))
        if not self.certain:
            low, high = (f"{scale * value:.{digits}f}" for value in (self.low, self.high))
            return f"no difference shown: {scale * self.difference:+.{digits}f}{unit}, 95% interval {low} to {high}"
        low, high = sorted(abs(scale * value) for value in (self.low, self.high))
        by = f"{abs(scale * self.difference):.{digits}f}{unit}"
        return f"{self.verdict} by {by}, 95% interval {low:.{digits}f} to {high:.{digits}f}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        ends = {"low": self.low, "high": self.high} if math.isfinite(self.low) else {"low": None, "high": None}
        return {
            "difference": self.difference, **ends, "rows": self.rows, "verdict": self.verdict, "words": self.words(),
        }  # fmt: skip


def compare(
    before: Sequence[Any], after: Sequence[Any], better: bool = True, aggregate: Aggregate | None = None
) -> Comparison:
    """Compare the values of two models on the same rows.

    Args:
        before, after: a value for each row, in the same order.
        better: whether higher is better.
        aggregate: makes the score of all values; None: their mean.

    Raises:
        ValueError: the rows are not the same ones.
    """
    if len(before) != len(after):
        raise ValueError(f"{len(before)} and {len(after)} rows")
    rows = len(before)
    if aggregate is not None:
        difference, half = aggregate(after) - aggregate(before), math.inf

        def without(kept: Sequence[int]) -> float:
            return aggregate([after[number] for number in kept]) - aggregate([before[number] for number in kept])

        if rows >= FEWEST_ROWS:
            half = student_quantile(min(rows, MOST_GROUPS) - 1) * _jackknife_error(without, rows)
        return Comparison(difference, difference - half, difference + half, rows, better, share=False)
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    both = np.concatenate([first, second])
    share = bool(((both >= 0) & (both <= 1)).all())
    difference = float((second - first).mean()) if rows else 0.0
    if rows < FEWEST_ROWS:
        return Comparison(difference, -math.inf, math.inf, rows, better, share)
    if np.isin(both, (0, 1)).all():
        gained, lost = int((second > first).sum()), int((second < first).sum())
        return Comparison(difference, *score_interval(gained, lost, rows), rows, better, share)
    half = ratio_error(second - first, np.ones(rows))[1]
    return Comparison(difference, difference - half, difference + half, rows, better, share)


def compare_weighted(parts: Sequence[tuple[float, Comparison]]) -> Comparison:
    """Return how a weighted sum of scores differs, as that of a group of tasks.

    Args:
        parts: weight and comparison of each task; the weights add up to 1.
    """
    z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
    difference = sum(weight * part.difference for weight, part in parts)
    error = math.sqrt(sum((weight * (part.high - part.low) / (2 * z)) ** 2 for weight, part in parts))
    first = parts[0][1]
    rows, share = sum(part.rows for _, part in parts), all(part.share for _, part in parts)
    return Comparison(difference, difference - z * error, difference + z * error, rows, first.better, share)


def score_interval(gained: int, lost: int, rows: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the ends of Tango's interval of a difference of shares.

    Args:
        gained: rows that only the second model has right.
        lost: rows that only the first has right.
        rows: all.
        confidence: of the interval.
    """
    z = NormalDist().inv_cdf(0.5 + confidence / 2)

    def statistic(shift: float) -> float:
        """How many standard errors the counts are from those of a true difference."""
        b = (2 * rows - gained + lost) * shift - gained - lost
        c = -lost * shift * (1 - shift)
        losing = (math.sqrt(max(b * b - 8 * rows * c, 0.0)) - b) / (4 * rows)
        variance = rows * (2 * losing + shift * (1 - shift))
        distance = gained - lost - rows * shift
        return distance / math.sqrt(variance) if variance > 1e-12 else math.copysign(math.inf, distance)

    middle = (gained - lost) / rows

    def end(outer: float, wanted: float) -> float:
        inner = middle
        for _ in range(HALVINGS):
            half = (inner + outer) / 2
            if abs(statistic(half)) < wanted:
                inner = half
            else:
                outer = half
        return inner

    return end(-1.0, z), end(1.0, z)


def standard_error(values: Sequence[Any], aggregate: Aggregate | None = None) -> float | None:
    """Return the standard error of a score, None where there are too few rows."""
    if len(values) < 2:
        return None
    if aggregate is None:
        return float(np.std(np.asarray(values, np.float64), ddof=1)) / math.sqrt(len(values))
    return _jackknife_error(lambda kept: aggregate([values[number] for number in kept]), len(values))


def _jackknife_error(of: Callable[[Sequence[int]], float], rows: int) -> float:
    """Return the standard error of a number of rows, from the numbers that leave out one group each."""
    count = min(rows, MOST_GROUPS)
    found = [of([row for row in range(rows) if row % count != group]) for group in range(count)]
    spread = np.asarray(found) - np.mean(found)
    return math.sqrt((count - 1) / count * float((spread**2).sum()))


def _digits(low: float, high: float) -> int:
    """Return after how many digits a number is cut whose interval is so wide."""
    width = high - low
    return 2 if width <= 0 or width >= 1 else min(6, 2 + math.ceil(-math.log10(width)))


# What a measurement found: scores by task and model, comparisons with the base, and what the models answered


@dataclass(frozen=True)
class ModelScore:
    """A model's score, and its standard error; None where it has none."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task.

    Attributes:
        task: its name.
        metric: its name, with the filter of lm-eval where it is not `none`.
        better: whether higher is better.
        rows: that every model answered.
        scores: by model.
        compared: with the base, by adapter; None for what cannot be compared.
    """

    task: str
    metric: str
    better: bool
    rows: int
    scores: dict[str, ModelScore]
    compared: dict[str, Comparison | None] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        task: str,
        metric: str,
        values: Mapping[str, Sequence[Any]],
        better: bool = True,
        aggregate: Aggregate | None = None,
    ) -> TaskScore:
        """Return the scores of values.

        Args:
            task, metric: names.
            values: model -> a value for each row, in one order for all models.
            better: whether higher is better.
            aggregate: makes the score of all values; None: their mean.
        """
        scores, compared = {}, {}
        for name, own in values.items():
            value = aggregate(own) if aggregate else float(sum(map(float, own)) / max(1, len(own)))
            scores[name] = ModelScore(value, standard_error(own, aggregate))
            if name != BASE and BASE in values:
                compared[name] = compare(values[BASE], own, better, aggregate)
        return cls(task, metric, better, len(next(iter(values.values()))), scores, compared)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        compared = {name: one.to_dict() if one else None for name, one in self.compared.items()}
        models = {
            name: {"score": one.value if math.isfinite(one.value) else None, "standard_error": one.error}
            for name, one in self.scores.items()
        }
        return {
            "task": self.task, "metric": self.metric, "higher_is_better": self.better, "rows": self.rows,
            "models": models, "compared": compared,
        }  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """A row of a task, what each model answered, and the value of each metric.

    Attributes:
        question: or its end, if it is long.
        expected: the right answer, as text.
        answers: model -> its answer.
        values: metric -> model -> its value, of metrics with one number for each row.
    """

    question: str
    expected: str
    answers: dict[str, str]
    values: dict[str, dict[str, float]]

    @property
    def changed(self) -> bool:
        """Whether an adapter's value differs from the base's."""
        return any(value != own[BASE] for own in self.values.values() if BASE in own for value in own.values())


@dataclass
class TaskResults:
    """All that was found.

    Attributes:
        scores: of all tasks and metrics.
        answers: task -> its rows.
        notes: lines about what was left out, or cannot be trusted.
    """

    scores: list[TaskScore] = field(default_factory=list)
    answers: dict[str, list[Answered]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; of the rows, those whose value changed come first."""
        examples = {
            task: [
                asdict(one) | {"changed": one.changed}
                for one in sorted(rows, key=lambda row: not row.changed)[:MOST_EXAMPLES]
            ]
            for task, rows in self.answers.items()
        }
        return {"tasks": [one.to_dict() for one in self.scores], "answers": examples, "notes": self.notes}
