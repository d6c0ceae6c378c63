"""On-policy distillation: the student samples answers, and a teacher in memory scores each of their tokens.

    --divergence forward_kl | reverse_kl | jsd    the teacher's likeliest tokens at each sampled position, compared with the
                                                  student's distribution there (GKD with lambda 1, arXiv 2306.13649); the
                                                  gradient goes through the whole distribution
    --divergence sampled_kl                       the teacher's log-probability of the sampled token alone, as the advantage
                                                  of a policy gradient (losses/divergence.py)

It is asked right after a rollout, and its numbers stay with the batch, so that further updates on the same answers do not
ask again. No gradient goes through the choice of the tokens.

Shapes: B rows, T columns, P positions, N bins, k likeliest tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.data.batch import Batch
from mlx_lora.data.dataset import EncodedSet, TableFormat
from mlx_lora.losses.cross_entropy import Arrays, Loss, LossFunction, token_arrays
from mlx_lora.losses.divergence import (
    KL,
    SAMPLED_KL,
    DivergenceOptions,
    distill_loss,
    head_of,
    known_of_batch,
    sampled_kl,
)
from mlx_lora.models.head import Head
from mlx_lora.models.load import check_token_ids
from mlx_lora.objectives.base import BoundObjective, RunContext
from mlx_lora.objectives.grpo import SampledObjective
from mlx_lora.objectives.policy_arrays import LENGTHS, OLD, TRUNCATED
from mlx_lora.objectives.teacher import TEACHER, Teacher, WithTeacher, as_seen, facts_of, teacher_key, teacher_name
from mlx_lora.parallel.ranks import Ranks
from mlx_lora.rollouts.make_environment import environment_of
from mlx_lora.rollouts.rollout import Rollouts, SamplingForm, of_own_rows
from mlx_lora.utils.errors import RunError
from mlx_lora.utils.text import gigabytes

REPORTS = ("kl", "length", "truncated", "answers")

# The objective


def on_policy(settings: ObjectiveSettings, options: DivergenceOptions, words: str) -> OnPolicyDistillation:
    """Return the objective of --objective distill --on-policy.

    Args:
        settings: its options.
        options: how student and teacher are compared.
        words: on that, for the run header.
    """
    group = settings.answers_per_prompt
    words += f", {group} sampled answer{'s' * (group > 1)} to each prompt"
    return OnPolicyDistillation(settings, words, compared=options)


@dataclass(eq=False)
class OnPolicyDistillation(WithTeacher, SampledObjective):
    """Distillation of answers that the student samples.

    Attributes:
        compared: how student and teacher are compared.
        scorer: the teacher; None: it is not loaded yet.
    """

    compared: DivergenceOptions = field(default_factory=DivergenceOptions)
    scorer: TeacherScorer | None = None

    def compare(self, ctx: RunContext, sets: dict[str, EncodedSet]) -> dict[str, EncodedSet]:
        """Load the teacher, which stays in memory; without --teacher, the base as it is now is the teacher."""
        settings, base, options = ctx.settings, ctx.plain_base, self.compared
        facts, teacher = facts_of(settings, base), Teacher.of(settings, base)
        seen = [rows.teacher or rows for rows in sets.values()]
        highest = max((int(rows.tokens.max(initial=0)) for rows in seen), default=0)
        check_token_ids(teacher.base, highest, f"--teacher {teacher.base.model_id}")
        key = ctx.strategy.ranks.from_first(
            teacher_key(settings, facts, TableFormat.of(facts.vocabulary, options.top_k))
        )
        held = "no copy of weights"
        if settings.objective.teacher:
            held = f"{gigabytes(teacher.base.size_bytes)} beside the student"
        name = teacher_name(settings, base)
        ctx.record.lines.append(f"Teacher: {name}; stays in memory ({held}) and scores each sampled token")
        ctx.record.identity[TEACHER] = key
        self.scorer = TeacherScorer.of(teacher, options, facts.vocabulary)
        return sets

    def make_rollouts(self, ctx: RunContext, loss: Loss, form: SamplingForm) -> Rollouts:
        if self.scorer is None:
            raise ValueError("sampled answers of a student without a teacher")
        env = environment_of(ctx.settings, (), ctx.base)
        start, ranks = ctx.base.model.trainable_parameters(), ctx.strategy.ranks
        return Rollouts(ctx.base, ctx.settings, env, loss, start, form, scorer=self.scorer, ranks=ranks)

    def bind_sampled(self, ctx: RunContext, loss: Loss) -> BoundObjective:
        options = self.compared if self.scorer is None else self.scorer.options
        whole = taught_loss(loss, ctx.base.model, ctx.base.config, options, self.words)
        return BoundObjective(whole, taught_arrays, reports=REPORTS, finish=_per_answer)


def _per_answer(means: dict[str, float]) -> dict[str, float]:
    """Convert means over trained tokens to means over answers, where that is what they are about."""
    answers = means.get("answers")
    return {
        "kl": means["kl"],
        **{name: means[name] / answers if answers else math.nan for name in ("length", "truncated")},
    }


# The teacher's scores

# What a batch of sampled answers has of the teacher: (B, T) of each target, or (B, T, N) and (B, T, k).
LOGP, BINS, IDS = "teacher_logp", "teacher_bins", "teacher_ids"


@dataclass(frozen=True)
class TeacherScorer:
    """A teacher that scores sampled answers.

    Attributes:
        teacher: its model.
        options: what is compared, and of how many tokens, which both models have.
        vocabulary: their number.
        head: of its model; None: its own logits are used.
    """

    teacher: Teacher
    options: DivergenceOptions
    vocabulary: int
    head: Head | None

    @classmethod
    def of(cls, teacher: Teacher, options: DivergenceOptions, vocabulary: int) -> TeacherScorer:
        """Return it for a number of tokens that teacher and student have."""
        head = head_of(teacher.loss, teacher.base.model, teacher.base.config)
        return cls(teacher, replace(options, vocabulary=vocabulary), vocabulary, head)

    @property
    def uses_old(self) -> bool:
        """Whether further updates need the probabilities with which the answers were sampled."""
        return self.options.divergence == SAMPLED_KL

    @property
    def bins(self) -> tuple[int, int]:
        """The numbers N and k of one position; k is 0 if every token is known, or the sampled one alone."""
        top_k = self.options.top_k
        if self.uses_old:
            return 1, 0
        return (top_k + 1, top_k) if 0 < top_k < self.vocabulary - 1 else (self.vocabulary, 0)

    def scored(self, batch: Batch, rows: EncodedSet, own: np.ndarray, ranks: Ranks) -> Batch:
        """Return a batch of sampled answers with what the teacher says about them.

        Args:
            batch: with answers.
            rows: the set that its row numbers are of.
            own: the rows that this rank asks about.
            ranks: that ask about the others.

        Raises:
            RunError: the student sampled a token that the teacher does not have, or the teacher's answer is not finite.
        """
        self._check(batch)
        bins, top_k = self.bins

        def ask(part: Batch) -> np.ndarray:
            return self.teacher.logps(part, rows)[..., None] if self.uses_old else self._distributions(part, rows)

        found = of_own_rows(ask, batch, own, ranks, (bins + top_k,))
        if not np.isfinite(found).all():
            raise RunError("the teacher's probabilities are not finite; try --dtype float32, or another teacher")
        sampled: dict[str, np.ndarray] = {}
        sampled[LOGP if self.uses_old else BINS] = found[..., 0] if self.uses_old else found[..., :bins]
        if top_k:
            sampled[IDS] = found[..., bins:].astype(np.int32)
        return batch.with_columns(**sampled)

    def _check(self, batch: Batch) -> None:
        """Refuse a sampled token that the teacher's embedding has no row for: MLX would read memory beyond it."""
        rows, highest = self.teacher.base.token_rows, int(batch.targets[batch.mask].max(initial=0))
        if rows is not None and highest >= rows:
            raise RunError(
                f"the model sampled token {highest}, and the teacher only has {rows} tokens; give a teacher with as many as "
                "the student, or --min-p 0.01"
            )

    def _distributions(self, batch: Batch, rows: EncodedSet) -> np.ndarray:
        """Return the log-probabilities and the ids that they are of at each trained target, (B, T, N + k) float32.

        An id is exact as a float32: there are fewer than 2^24.
        """
        seen = batch if rows.teacher is None else as_seen(batch, rows)
        parts = []
        for known in known_of_batch(self.teacher.base.model, self.head, seen, self.options):
            columns = [known.logps] if known.ids is None else [known.logps, known.ids.astype(mx.float32)]
            parts.append(np.array(mx.concatenate(columns, axis=-1)))
        found = np.zeros((*batch.mask.shape, sum(self.bins)), np.float32)
        if parts:
            found[batch.mask] = np.concatenate(parts)
        return found


def _answer_sums(arrays: Arrays) -> dict[str, mx.array]:
    """Return what is reported of a batch's answers: sums over the real ones."""
    real = arrays["real"]
    return {name: (arrays[name] * real).sum() for name in (LENGTHS, TRUNCATED)} | {"answers": real.sum()}


def taught_arrays(batch: Batch) -> Arrays:
    """Copy a batch of sampled answers with what a teacher says about them to the device.

    Returns:
        In addition to `token_arrays`: `length`, `truncated`, `real` (B,) float32; then `teacher`, its log-probability of each
        position, `old`, that of the student as it sampled it (P,), and `is_own` (1,), whether that is the student's own; or
        `relative`, the teacher's bins (P, N), and, unless it has all tokens, their `ids` (P, k).
    """
    sampled = batch.columns

    def at_positions(name: str) -> mx.array:
        values = sampled[name]
        return mx.array(values.reshape(-1, *values.shape[2:])[batch.positions])

    both = token_arrays(batch) | {name: mx.array(sampled[name]) for name in (LENGTHS, TRUNCATED)}
    both["real"] = mx.array(batch.real.astype(np.float32))
    if LOGP not in sampled:
        taught = {"relative": BINS, "ids": IDS}
        return both | {name: at_positions(source) for name, source in taught.items() if source in sampled}
    teacher, is_own = at_positions(LOGP), OLD not in sampled
    old = mx.zeros_like(teacher) if is_own else at_positions(OLD)
    return both | {"teacher": teacher, "old": old, "is_own": mx.array([float(is_own)])}


def taught_loss(loss: Loss, model: nn.Module, config: dict[str, Any], options: DivergenceOptions, words: str) -> Loss:
    """Return the loss of sampled answers that a teacher scored; a mean over tokens.

    Args:
        loss: of tokens, at the temperature of distillation.
        model, config: the model and its config.json.
        options: what is compared.
        words: on the objective, for the run header.
    """
    if options.divergence == SAMPLED_KL:
        measure = _sampled(loss.measure_tokens or loss.tokens)
        return replace(loss, train=_sampled(loss.tokens), measure=measure, description=f"{words}; {loss.description}")
    whole = distill_loss(loss, model, config, options, None, words)
    return replace(whole, train=_compared(whole.train), measure=_compared(whole.measure))


def _compared(of_tokens: LossFunction) -> LossFunction:
    """Return a loss of distributions that also reports facts about answers."""

    def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        total, count, reports = of_tokens(model, arrays)
        return total, count, reports | _answer_sums(arrays)

    return summed


def _sampled(tokens: Callable[..., mx.array]) -> LossFunction:
    """Return the loss of the sampled tokens' log-probabilities, from the losses of tokens."""

    def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
        logps, teacher, weights = -tokens(model, arrays), arrays["teacher"], arrays["weights"]  # (P,)
        old = mx.where(arrays["is_own"] > 0, mx.stop_gradient(logps), arrays["old"])
        losses, real = sampled_kl(logps, old, teacher), weights > 0
        kl = mx.where(real, mx.stop_gradient(logps) - teacher, 0.0).sum()
        return mx.where(real, losses, 0.0).sum(), weights.sum(), {KL: kl} | _answer_sums(arrays)

    return summed
