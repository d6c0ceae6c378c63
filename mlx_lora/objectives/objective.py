"""What an objective is: which records it reads, what its loss is, and what it reports.

An objective sees whole answers, not tokens: the log-probability of each row's answer, summed by the fused loss, and a few
numbers that the data or the reference add to a row. For a reward model, the score of the answer takes its
log-probability's position. Methods (LoRA, DoRA ...) say what is trained, objectives toward what;
every method works with every objective.

    records    rows of an example     loss is a mean over
    examples   the example            tokens                imitation (sft), which needs none of this
    pairs      chosen, rejected       pairs
    rated      answer, another        answers

Shapes: B rows of a batch, E = B / K examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_lora.data.encode import EncodedSet


@dataclass(frozen=True)
class AnswerSums:
    """What an objective's loss is made of; arrays are (B,) float32.

    Attributes:
        logps: summed log-probability of each row's answer under the policy; of a reward model, its score.
        tokens: number of the answer's tokens.
        likelihood: negative log-likelihood of each row's trained tokens, weighted so that its sum over a step's rows,
            divided by the step's examples, is the mean over tokens.
        reference: the answer's log-probability under the reference, 0 without one.
        labels: of the data: a pair's margin, or whether an answer is good.
        real: 1 for a row, 0 for padding.
        divergence: scalar, see `Objective.divergence`.
    """

    logps: mx.array
    tokens: mx.array
    likelihood: mx.array
    reference: mx.array
    labels: mx.array
    real: mx.array
    divergence: mx.array

    def side(self, number: int, group: int = 2) -> AnswerSums:
        """Return the sums of each example's row `number`, (E,)."""
        names = ("logps", "tokens", "likelihood", "reference", "labels", "real")
        return replace(self, **{name: getattr(self, name)[number::group] for name in names})


LossOfAnswers = Callable[[AnswerSums], tuple[mx.array, dict[str, mx.array]]]
"""AnswerSums -> ((E,) losses, name -> (E,) numbers to report as means)."""


@dataclass(frozen=True)
class Objective:
    """One objective, with its options bound.

    Attributes:
        name: as in --objective.
        records: `examples`, `pairs` or `rated`: what the data must hold.
        description: for the run header.
        loss: of whole answers; None: the sum over tokens that imitation takes.
        reference: whether the loss compares with a reference.
        likelihood: `none`, `answers`, or `rows` where the chosen rows' prompts count too (ORPO).
        scores: whether the model gives each answer one number, by a score head, in place of its log-probability.
        divergence: whether the loss takes the mean log-ratio of policy to reference on each example's second row, with
            no gradient through it; that row is then not trained (KTO).
        reports: names of what the loss reports.
        finish: from the means of what the loss reports to what people read.
    """

    name: str
    records: str = "examples"
    description: str = ""
    loss: LossOfAnswers | None = None
    reference: bool = False
    likelihood: str = "none"
    divergence: bool = False
    scores: bool = False
    reports: tuple[str, ...] = ()
    finish: Callable[[dict[str, float]], dict[str, float]] = dict

    def targets_of(self, rows: EncodedSet) -> EncodedSet:
        """Return encoded rows with the targets that this objective takes."""
        if self.scores:
            return rows.with_end_scores()
        return rows.with_whole_rows() if self.likelihood == "rows" else rows
