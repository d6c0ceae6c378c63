"""Compare models on the same rows: token by token, and by their scores: the difference, its 95% interval, and a sentence.

Both models answer the same rows, so the difference is taken row by row: how hard the rows are cancels, and far fewer rows
show a difference than two separate intervals would need.

    0 or 1 a row       Tango's score interval; it excludes 0 exactly where McNemar's test without continuity correction says so
    other numbers      Student's t over the rows' differences
    one number of all  (perplexity, F1, BLEU) the jackknife: the number without each of up to 100 groups of rows, and t

Token by token, the losses of each model are measured, and how far their distributions are apart:

    rows -> hidden states of each model at the trained positions -> logits, a few positions at a time -> (P,) numbers of each

Shapes: B rows, T columns, P trained positions, R of them at a time, D width, V vocabulary.

Exact tests (McNemar's binomial, the sign test) are not used: with few rows on which the models differ they call true equality
different in 1 to 2 % of comparisons and not in 5 %, so they overlook differences that are there.

Source: Tango, Statistics in Medicine 17 (1998), 891; Fagerland, Lydersen, Laake, Statistics in Medicine 33 (2014), 2850.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import NormalDist
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batch import Batch
from mlx_lora.evaluation.models import BASE
from mlx_lora.kernels.choose import long_row_kernels
from mlx_lora.losses.cross_entropy import log_sum_exp
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.load import Base
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.utils.statistics import CONFIDENCE, ratio_error, student_quantile

Aggregate = Callable[[Sequence[Any]], float]
"""All rows' values -> one number."""
FEWEST_ROWS = 5  # an interval of fewer rows says nothing
MOST_GROUPS = 100  # of rows that the jackknife leaves out one after another
HALVINGS = 60
MOST_QUESTION = 2000  # characters of a question that are shown
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


# Token by token

CHECK_TOKENS = 16
FEWEST_READ = 64  # positions; of fewer, most of the time on a CPU is spent on making a quantized head dense


class Readout:
    """Reads a model's hidden states at trained positions, and their logits a few at a time."""

    def __init__(self, base: Base):
        """Split the model, which is in eval mode, at its head, if that gives the model's own logits."""
        head = find_head(base.model, base.config)
        self._model, self._body, self._head = base.model, base.model, None
        if isinstance(head, Head):
            ids = mx.arange(CHECK_TOKENS)[None]  # (1, T)
            own, cut = base.model(ids).astype(mx.float32), head.logits(head.hidden(ids))
            if mx.allclose(cut, own, rtol=1e-2, atol=1e-2 * mx.abs(own).max().item()).item():
                self._body, self._head = head.hidden, head

    def head_alone(self) -> Readout:
        """Return a readout that only has `logits`, so that the model's blocks may be let go."""
        alone = copy.copy(self)
        if self._head is not None:
            alone._model = nn.Module()
            alone._head = replace(self._head, body=nn.Module(), last=None)
            alone._body = alone._head.hidden
        return alone

    def read(self, batch: Batch) -> States:
        """Return the states of a batch at its trained positions; nothing is computed yet."""
        at = np.flatnonzero(batch.mask)
        with long_row_kernels(self._model):
            out = self._body(mx.array(batch.inputs))
        return States(self, out.reshape(-1, out.shape[-1])[mx.array(at)], mx.array(batch.targets.reshape(-1)[at]))

    def logits(self, states: mx.array) -> mx.array:
        """Return (R, V) float32."""
        return states.astype(mx.float32) if self._head is None else self._head.logits(states)


@dataclass(frozen=True)
class States:
    """A model's hidden states of a batch at its trained positions: (P, D), or (P, V) if the head cannot be split off."""

    readout: Readout
    states: mx.array
    targets: mx.array


def token_losses(first: States, others: Sequence[States] = ()) -> tuple[np.ndarray, list[np.ndarray]]:
    """Return the first model's loss of each token, and beside it what others have of the same tokens.

    Args:
        first: the model that the others are compared with.
        others: of the same batch.

    Returns:
        (P,) nats, and for each other model (3, P): its loss, its KL from the first one, and whether both have the same most
        likely token; NaN in the last two where the vocabularies differ.
    """
    mx.eval(first.states, [other.states for other in others])
    vocabulary = first.readout.logits(first.states[:1]).shape[-1]
    step = max(FEWEST_READ, loss_tile_bytes() // (4 * vocabulary))
    losses, columns = [np.zeros(0)], [[np.zeros((3, 0))] for _ in others]
    for start in range(0, len(first.targets), step):
        tile = slice(start, start + step)
        targets = first.targets[tile, None]
        logs = [one.readout.logits(one.states[tile]) for one in (first, *others)]
        logs = [one - log_sum_exp(one)[:, None] for one in logs]  # (R, V)
        of_first, *own = [-mx.take_along_axis(one, targets, axis=-1).squeeze(-1) for one in logs]
        losses.append(np.array(of_first))
        for found, loss, other in zip(columns, own, logs[1:], strict=True):
            kl = same = mx.full(loss.shape, mx.nan)
            if other.shape == logs[0].shape:
                kl = (mx.exp(logs[0]) * (logs[0] - other)).sum(axis=-1)
                same = (logs[0].argmax(axis=-1) == other.argmax(axis=-1)).astype(mx.float32)
            found.append(np.array(mx.stack([loss, kl, same])))
    return np.concatenate(losses), [np.concatenate(found, axis=1) for found in columns]
