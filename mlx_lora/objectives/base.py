"""What an objective is: which records it reads, what its loss is, and what it reports.

An objective's loss is computed from whole answers, not from tokens. Its inputs are the log-probability of each row's answer,
summed by the fused loss, and a few numbers per row that come from the data or the reference. For a reward model, the
score of the answer replaces the log-probability. A method (LoRA, DoRA ...) decides what is trained, an objective what it
is trained toward; every method works with every objective.

    records    rows of an example     loss is a mean over
    examples   the example            tokens                imitation (sft, distill), which needs none of this
    pairs      chosen, rejected       pairs
    rated      answer, another        answers
    prompts    G sampled answers      answers, or tokens if a teacher scores them

Shapes: B rows of a batch, E = B / K examples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_lora.data.dataset import EncodedSet
from mlx_lora.losses.divergence import DivergenceOptions
from mlx_lora.losses.policy import PolicyOptions


@dataclass(frozen=True)
class AnswerSums:
    """The inputs of an objective's loss; arrays are (B,) float32.

    Attributes:
        logps: summed log-probability of each row's answer under the policy; of a reward model, its score.
        tokens: number of the answer's tokens.
        likelihood: negative log-likelihood of each row's trained tokens, weighted so that its sum over a step's rows,
            divided by the step's examples, is the mean over tokens.
        reference: the answer's log-probability under the reference, 0 without one.
        labels: from the data: the margin that a pair should have, or 1 for a good answer and 0 for a bad one.
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
        records: the kind of records that the data must have: `examples`, `pairs`, `rated` or `prompts`.
        description: for the run header.
        loss: computed from whole answers; None for imitation, which sums the loss over tokens.
        reference: whether the loss compares the policy with a reference model.
        likelihood: the tokens whose likelihood is part of the loss: `none`, `answers`, or `rows` if the prompts of the
            chosen rows count too (ORPO).
        scores: whether a score head gives each answer one number, which replaces its log-probability.
        divergence: whether the loss needs the mean log-ratio of policy to reference on each example's second row. No
            gradient goes through it, so that row is not trained (KTO).
        policy: the loss of sampled answers that are rewarded; None: it has another.
        distills: how tokens are compared with a teacher's; None: there is no teacher.
        room: how many answers are sampled to a prompt, and the most tokens of one.
        reports: names of the numbers that the loss reports.
        finish: turns the means of these numbers into the numbers that users see.
    """

    name: str
    records: str = "examples"
    description: str = ""
    loss: LossOfAnswers | None = None
    reference: bool = False
    likelihood: str = "none"
    divergence: bool = False
    scores: bool = False
    policy: PolicyOptions | None = None
    distills: DivergenceOptions | None = None
    room: tuple[int, int] = (1, 0)
    reports: tuple[str, ...] = ()
    finish: Callable[[dict[str, float]], dict[str, float]] = dict

    @property
    def samples(self) -> bool:
        """Whether the answers are sampled during the run."""
        return self.records == "prompts"

    def targets_of(self, rows: EncodedSet) -> EncodedSet:
        """Return encoded rows with the targets that this objective trains on."""
        if self.scores:
            return rows.with_end_scores()
        if self.samples:
            return rows.with_room(*self.room)
        return rows.with_whole_rows() if self.likelihood == "rows" else rows
