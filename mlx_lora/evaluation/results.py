"""What a measurement found: scores by task and model, comparisons with the base, and what the models answered."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lora.evaluation.models import BASE
from mlx_lora.evaluation.paired import Aggregate, Comparison, compare, standard_error

MOST_EXAMPLES = 200  # rows of a task that are kept for the page and --json


@dataclass(frozen=True)
class ModelScore:
    """A model's score, and its standard error; None where it has none."""

    value: float
    error: float | None

    def to_dict(self) -> dict[str, float | None]:
        """Return JSON values."""
        return {"score": self.value if math.isfinite(self.value) else None, "standard_error": self.error}


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
        scores = {
            name: ModelScore(
                aggregate(own) if aggregate else float(sum(map(float, own)) / max(1, len(own))),
                standard_error(own, aggregate),
            )
            for name, own in values.items()
        }
        compared: dict[str, Comparison | None] = {
            name: compare(values[BASE], own, better, aggregate)
            for name, own in values.items()
            if name != BASE and BASE in values
        }
        return cls(task, metric, better, len(next(iter(values.values()))), scores, compared)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        compared = {name: one.to_dict() if one else None for name, one in self.compared.items()}
        models = {name: score.to_dict() for name, score in self.scores.items()}
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

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "question": self.question, "expected": self.expected, "answers": self.answers, "values": self.values,
            "changed": self.changed,
        }  # fmt: skip


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
            task: [one.to_dict() for one in sorted(rows, key=lambda row: not row.changed)[:MOST_EXAMPLES]]
            for task, rows in self.answers.items()
        }
        return {"tasks": [one.to_dict() for one in self.scores], "answers": examples, "notes": self.notes}

    @property
    def comparisons(self) -> int:
        """How many comparisons were made."""
        return sum(one is not None for score in self.scores for one in score.compared.values())
