"""Sample the answers that a step trains on: prompts in, a batch with answers, rewards and advantages out.

Or, in place of rewards, with what a teacher says about the answers (objectives/on_policy.py).

A planned batch has G rows for each prompt, with room for answers (EncodedSet.with_room), so memory and shapes are known
before the run. At the beginning of a step (`steps` of objectives/sampled.py) the model as it is then answers the prompts of
the step's batches, of which several ranks divide the prompts; the answers are put into the rows, and
their rewards are computed. What is sampled depends on the adapter, the seed and the batch's number only, so a resumed run
samples the same answers. With several updates per rollout, a run is only saved and ended between rollouts.

Several ranks divide the prompts of a step: each answers some of them, rewards its answers, and all get everything. What is
exchanged is small: tokens and one number for each answer. Afterwards every rank has the same batches as a single
process, so all that depends on a whole step (advantages, tokens of the step, the division of the training pass) is
computed from them as by a single process. The random streams belong to the answers, not to the ranks that sample them.

Shapes: G answers to one prompt, B rows, T columns; A = N G rows of N prompts.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import numpy as np

from mlx_lora.data.batch import EMPTY, Batch, share_of
from mlx_lora.data.prompts import example_with_answer
from mlx_lora.losses.policy import group_advantages, leave_one_out_advantages
from mlx_lora.objectives.policy_arrays import ADVANTAGES, LENGTHS, OLD, REFERENCE, REWARDS, TRUNCATED, token_logps
from mlx_lora.objectives.prefix_sharing import Joining, apart, by_answer, slots_of, sums_of_answers
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.rollouts.decode import SamplingForm
from mlx_lora.rollouts.rewards import Reward, SilentRewards, TrainerState, reports_of, rewards_for, summed
from mlx_lora.rollouts.sampler import SamplingOptions, answer_keys, sample_groups

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.losses.cross_entropy import Loss
    from mlx_lora.models.load import Base

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Planned:
    """A planned batch whose prompts are to be answered.

    Attributes:
        batch: with room for the answers.
        facts: what rewards see of each prompt.
        rollout: its number, which decides the random streams.
        rows: the set that the batch is of.
    """

    batch: Batch
    facts: Sequence[dict[str, Any]]
    rollout: int
    rows: EncodedSet


@dataclass(frozen=True)
class Answered:
    """The answers to some prompts, one group after the other.

    Attributes:
        answers: tokens of each answer.
        rewards: (answers, functions) float64, NaN without one.
        notes: lines on rewards that failed and were skipped.
    """

    answers: list[list[int]]
    rewards: np.ndarray
    notes: list[str] = field(default_factory=list)


def deal_prompts(counts: Sequence[int], size: int) -> list[list[list[int]]]:
    """Deal the prompts of a step's batches to ranks in turn, on from one batch to the next.

    Args:
        counts: prompts of each batch.
        size: N.

    Returns:
        For each batch, for each rank, the numbers of its prompts.
    """
    dealt, begin = [], 0
    for count in counts:
        dealt.append([[prompt for prompt in range(count) if (begin + prompt) % size == rank] for rank in range(size)])
        begin += count
    return dealt


def gathered(own: Sequence[Answered], dealt: Sequence[list[list[int]]], group: int, ranks: Ranks) -> list[Answered]:
    """Return the answers to all prompts of each batch, the same on every rank.

    Args:
        own: this rank's, for each batch.
        dealt: from `deal_prompts`.
        group: G.
        ranks: all ranks of the run.
    """
    every = ranks.everyone([[one.answers, one.rewards.tolist(), one.notes] for one in own])
    whole = []
    for number, prompts_of in enumerate(dealt):
        count = group * sum(map(len, prompts_of))
        found = Answered([[] for _ in range(count)], np.zeros((count, own[number].rewards.shape[1])))
        for rank, prompts in enumerate(prompts_of):
            answers, rewards, notes = every[rank][number]
            rows = [group * prompt + place for prompt in prompts for place in range(group)]
            for row, answer, reward in zip(rows, answers, rewards, strict=True):
                found.answers[row], found.rewards[row] = answer, reward
            found.notes.extend(f"rank {rank}: {note}" if rank else note for note in notes)
        whole.append(found)
    return whole


def of_own_rows(
    compute: Callable[[Batch], np.ndarray],
    batch: Batch,
    rows: np.ndarray,
    ranks: Ranks,
    depth: tuple[int, ...] = (),
) -> np.ndarray:
    """Return float32 numbers for each target of a batch, (B, T, *depth), of which this rank computes only its own rows.

    Args:
        compute: returns the numbers of a batch's targets.
        batch: the same on every rank.
        rows: of this rank; every row belongs to one rank, or to none if its numbers are 0.
        ranks: all ranks of the run.
        depth: the shape of the numbers of one target.
    """
    if ranks.size == 1:
        return compute(batch)
    found = np.zeros((*batch.mask.shape, *depth), np.float32)
    if len(rows):
        found[rows] = compute(share_of(batch, rows))
    return np.array(ranks.sum(mx.array(found)))


WIDTH_STEP = 32  # widths of batches of sampled answers are a multiple of this, so that few shapes occur
HELD_OUT_STREAM = 1 << 40  # the numbers of rollouts on held-out prompts start here


@dataclass
class Spent:
    """What rollouts have taken since this was last read."""

    seconds: float = 0.0
    tokens: int = 0
    began_s: float = field(default_factory=time.perf_counter)

    def read(self) -> dict[str, float]:
        """Return sampled tokens per second of sampling, and its share of all time; then start again."""
        now = time.perf_counter()
        found = {
            "rollout_tokens_per_s": self.tokens / self.seconds if self.seconds else math.nan,
            "rollout_share": self.seconds / max(now - self.began_s, 1e-9),
        }
        self.seconds, self.tokens, self.began_s = 0.0, 0, now
        return found


class Scorer(Protocol):
    """A teacher that scores sampled answers (objectives/on_policy.py)."""

    @property
    def uses_old(self) -> bool:
        """Whether further updates need the probabilities with which the answers were sampled."""
        ...

    def scored(self, batch: Batch, rows: EncodedSet, own: np.ndarray, ranks: Ranks) -> Batch:
        """Return a batch of sampled answers with what the teacher says about them."""
        ...


@dataclass(frozen=True)
class Rollouts:
    """Samples answers to the prompts of planned batches, and rewards or scores them.

    Attributes:
        base: with the adapter as it is trained.
        settings: of the run.
        rewards: what rewards answers.
        loss: of tokens, for the log-probabilities before the first update and those of the reference.
        start: the adapter's parameters as the run began, with which the model is the reference.
        form: what computes sampled tokens.
        scorer: scores answers as the teacher; None: they are rewarded.
        joining: when the answers to a prompt share its row; None: never.
        spent: time and tokens of sampling.
        state: where the run is, for rewards that take it.
        silent: counts rewards that gave nothing to a batch.
        ranks: that answer the prompts of a step together.
    """

    base: Base
    settings: TrainSettings
    rewards: Sequence[Reward]
    loss: Loss
    start: dict[str, Any]
    form: SamplingForm = field(default_factory=SamplingForm)
    scorer: Scorer | None = None
    joining: Joining | None = None
    spent: Spent = field(default_factory=Spent)
    state: TrainerState = field(default_factory=TrainerState)
    silent: SilentRewards = field(default_factory=SilentRewards)
    ranks: Ranks = ALONE

    @classmethod
    def of(
        cls,
        base: Base,
        settings: TrainSettings,
        rewards: Sequence[Reward],
        loss: Loss,
        form: SamplingForm,
        scorer: Scorer | None = None,
        joining: Joining | None = None,
        ranks: Ranks = ALONE,
    ) -> Rollouts:
        """Return it for an adapted base that is not yet trained."""
        start = base.model.trainable_parameters()
        return cls(base, settings, rewards, loss, start, form, scorer, joining, ranks=ranks)

    def run(self, batches: Sequence[Batch], rows: EncodedSet, first: int, state: TrainerState) -> list[Batch]:
        """Return the batches of a step with sampled answers in their rows; all ranks get all of them.

        Args:
            batches: planned, of rows with room for answers.
            rows: the set that they are of.
            first: the number of the first one in the run; it decides the random streams, so that a resumed run samples the
                same answers.
            state: where the run is, for rewards that take it.

        Raises:
            RunError: a reward failed.
        """
        self.state.global_step, self.state.max_steps, self.state.epoch = state.global_step, state.max_steps, state.epoch
        planned = [planned_rollout(batch, rows, first + place) for place, batch in enumerate(batches)]
        return self.answer(planned, True, self.ranks)

    def answer(self, planned: Sequence[Planned], trains: bool, ranks: Ranks = ALONE) -> list[Batch]:
        """Return planned batches with sampled answers in their rows.

        Args:
            planned: batches that are trained on together.
            trains: whether they will be trained on; else only rewards are computed.
            ranks: that divide the prompts among themselves; each returns all batches.

        Raises:
            RunError: a reward failed.
        """
        model = self.base.model
        training = model.training
        model.eval()
        try:
            planned = [replace(one, batch=apart(one.batch)) for one in planned]
            dealt = deal_prompts([len(one.facts) for one in planned], ranks.size)
            own = [self._answered(one, prompts[ranks.rank]) for one, prompts in zip(planned, dealt, strict=True)]
            start = time.perf_counter()
            every = gathered(own, dealt, self.settings.objective.answers_per_prompt, ranks)
            self.spent.seconds += time.perf_counter() - start  # until the slowest rank has sampled
            for note in (note for answered in every for note in answered.notes):
                log.info(note)
            mine = [prompts[ranks.rank] for prompts in dealt]
            return [self._trained(*of, trains, ranks) for of in zip(planned, every, mine, strict=True)]
        finally:
            model.train(training)

    def _answered(self, planned: Planned, prompts: list[int]) -> Answered:
        """Sample answers to some prompts of a batch, and reward them."""
        answers = self._sample(planned.batch, np.flatnonzero(planned.batch.real), planned.rollout, prompts)
        if self.scorer is not None:
            return Answered(answers, np.zeros((len(answers), 0)))
        notes: list[str] = []
        rewards = self.rewards_of([planned.facts[prompt] for prompt in prompts], answers, notes.append)
        return Answered(answers, rewards, notes)

    def _trained(self, planned: Planned, answered: Answered, prompts: list[int], trains: bool, ranks: Ranks) -> Batch:
        """Return the batch that is trained on, or measured; its log-probabilities of `prompts` are computed by this rank."""
        batch, objective = planned.batch, self.settings.objective
        rows = np.flatnonzero(batch.real)
        self.spent.tokens += sum(map(len, answered.answers))
        filled = self._filled(batch, rows, answered.answers)
        if trains and self.joining is not None:
            filled = self.joining(filled, batch.mask.argmax(axis=1))
        own = np.flatnonzero(filled.real).reshape(-1, filled.group)[prompts].ravel()
        of_old = self.scorer is None or self.scorer.uses_old
        if trains and of_old and (objective.updates_per_rollout > 1 or objective.kl_beta):
            filled = self._with_logps(filled, own, ranks)
        if self.scorer is not None:
            return self.scorer.scored(filled, planned.rows, own, ranks)
        return self._with_rewards(filled, rows, answered.rewards)

    def _sample(self, batch: Batch, rows: np.ndarray, rollout: int, chosen: list[int]) -> list[list[int]]:
        """Return the tokens of the answers to chosen prompts; the random streams are those of all rows' answers."""
        objective, group = self.settings.objective, batch.group
        if not chosen:
            return []
        first = rows[::group][chosen]
        begins = batch.mask[first].argmax(axis=1)  # the prompt's last token predicts the first target
        prompts = [batch.inputs[row, : begin + 1].tolist() for row, begin in zip(first, begins, strict=True)]
        options = SamplingOptions(group, objective.max_new_tokens, objective.temp, objective.top_p, objective.min_p)
        start = time.perf_counter()
        ends = frozenset(self.base.tokenizer.eos_token_ids)
        keys = answer_keys(self.settings.loop.seed, rollout, len(rows)).reshape(-1, group, 2)
        own = keys[mx.array(chosen)].reshape(-1, 2)
        with self.form.model_of(self.base) as model:
            answers, _ = sample_groups(model, prompts, options, ends, own)
        self.spent.seconds += time.perf_counter() - start
        return answers

    def _filled(self, batch: Batch, rows: np.ndarray, answers: list[list[int]]) -> Batch:
        """Put answers into the rows of a planned batch, and cut columns that none of them needs."""
        begins = batch.mask.argmax(axis=1)  # the column of each row's first target
        longest = max(begins[row] + len(answer) for row, answer in zip(rows, answers, strict=True))
        width = min(batch.inputs.shape[1], -(-int(longest) // WIDTH_STEP) * WIDTH_STEP)
        inputs, targets = batch.inputs[:, :width].copy(), batch.targets[:, :width].copy()
        mask = np.zeros_like(inputs, bool)
        ends, most = frozenset(self.base.tokenizer.eos_token_ids), self.settings.objective.max_new_tokens
        lengths, truncated = np.zeros(len(inputs), np.float32), np.zeros(len(inputs), np.float32)
        for row, answer in zip(rows, answers, strict=True):
            begin, end = begins[row], begins[row] + len(answer)
            inputs[row, begin + 1 :], targets[row, begin:] = 0, 0
            targets[row, begin:end] = answer
            inputs[row, begin + 1 : end] = answer[:-1]
            lengths[row] = len(answer)
            truncated[row] = len(answer) == most and answer[-1] not in ends
            mask[row, begin:end] = not (truncated[row] and self.settings.objective.mask_truncated)
        real_tokens = int(begins[rows].sum()) + sum(map(len, answers))
        slots = slots_of(int(mask.sum()), len(batch.positions), mask.size)
        sampled = {LENGTHS: lengths, TRUNCATED: truncated}
        return Batch.of(
            inputs, targets, mask, real_tokens, slots, group=batch.group, numbers=batch.numbers, sampled=sampled
        )

    def rewards_of(
        self,
        facts: Sequence[dict[str, Any]],
        answers: Sequence[list[int]],
        note: Callable[[str], None] = log.info,
    ) -> np.ndarray:
        """Return what every reward gives every answer, (A, F) float64, NaN for none.

        Args:
            facts: what rewards see of each prompt, (N,).
            answers: the tokens of each answer; those to one prompt are neighbors, as many to each.
            note: called with a line if a reward fails and is skipped.

        Raises:
            RunError: a reward failed.
        """
        if not answers:
            return np.zeros((0, len(self.rewards)))
        of_rows = [fact for fact in facts for _ in range(len(answers) // len(facts))]
        texts = [self.text_of(answer) for answer in answers]
        completions = [
            [{"role": "assistant", "content": text}] if fact["chat"] else text
            for fact, text in zip(of_rows, texts, strict=True)
        ]
        names = dict.fromkeys(name for fact in facts for name in fact["columns"])
        columns = {name: [fact["columns"].get(name) for fact in of_rows] for name in names}
        for name in ("prompt", "completion", "prompts", "completions", "completion_ids"):
            columns.pop(name, None)
        arguments = {"prompts": [fact["prompt"] for fact in of_rows], "completions": completions}
        arguments = {**columns, **arguments, "completion_ids": answers}
        whole = [example_with_answer(fact["example"], text) for fact, text in zip(of_rows, texts, strict=True)]
        found = rewards_for(self.rewards, arguments, self.settings.objective, note, whole, self.state)
        self.silent.watch([reward.name for reward in self.rewards], found, note)
        return found

    def text_of(self, answer: list[int]) -> str:
        """Return an answer's text, as rewards see it."""
        return str(self.base.hf_tokenizer.decode(answer, skip_special_tokens=True))

    def _with_logps(self, batch: Batch, own: np.ndarray, ranks: Ranks) -> Batch:
        """Add the log-probabilities of the sampled tokens under the policy, and under the reference.

        Args:
            batch: with answers.
            own: the rows that this rank computes.
            ranks: that compute the others.
        """
        objective, model, sampled = self.settings.objective, self.base.model, dict(batch.sampled or {})

        def logps(rows: Batch) -> np.ndarray:
            return token_logps(model, self.loss, rows)

        if objective.updates_per_rollout > 1 or objective.objective == "rloo":
            sampled[OLD] = of_own_rows(logps, batch, own, ranks)
        if objective.kl_beta:
            now = model.trainable_parameters()
            model.update(self.start)
            sampled[REFERENCE] = of_own_rows(logps, batch, own, ranks)
            model.update(now)
        return replace(batch, sampled=sampled)

    def _with_rewards(self, batch: Batch, rows: np.ndarray, found: np.ndarray) -> Batch:
        """Add rewards and advantages, those of an answer without a reward being 0, as in TRL.

        Args:
            batch: in any layout.
            rows: (A,) the numbers of the real answers.
            found: (A, F) what each reward gives them.
        """
        objective, sampled = self.settings.objective, dict(batch.sampled or {})
        rewards, group = summed(found, self.rewards), objective.answers_per_prompt
        if objective.objective == "rloo" and objective.kl_beta and REFERENCE in sampled:
            away = sums_of_answers(batch, sampled[OLD] - sampled[REFERENCE])[rows]
            advantages = leave_one_out_advantages(rewards - objective.kl_beta * away, group)
        elif objective.objective == "rloo":
            advantages = leave_one_out_advantages(rewards, group)
        else:
            advantages = group_advantages(rewards, group, objective.scale_rewards)
        known = np.isfinite(rewards)
        shown = np.where(known, rewards, rewards[known].mean() if known.any() else 0.0)  # does not change the mean
        more = reports_of(found, self.rewards, group)
        for name, values in ({ADVANTAGES: advantages, REWARDS: shown} | more).items():
            sampled[name] = by_answer(batch, rows, values)
        return replace(batch, sampled=sampled)


class HeldOutRollouts:
    """Held-out batches whose answers are sampled when they are measured; each prompt has the same random streams every time."""

    def __init__(self, plan: BatchPlan, rollouts: Rollouts):
        """Set up.

        Args:
            plan: of rows with room for answers.
            rollouts: answers and rewards, or scores, them; a batch is answered by the rank that asks for it.
        """
        self.rows, self.rollouts, self._plan = plan.rows, rollouts, plan

    def __len__(self) -> int:
        return len(self._plan)

    def batches(self, limit: int = -1, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """Yield the first `limit` batches (-1: all), answered; see `BatchPlan.batches`."""
        count = len(self) if limit < 0 else min(limit, len(self))
        for index in range(first, count, every):
            planned = planned_rollout(self._plan.batch(0, index), self.rows, HELD_OUT_STREAM + index)
            yield self.rollouts.answer([planned], trains=False)[0]


def planned_rollout(batch: Batch, rows: EncodedSet, number: int) -> Planned:
    """Return a planned batch with what rewards see of its prompts.

    Args:
        batch: of rows with room for answers.
        rows: the set that it is of.
        number: of the rollout, which decides the random streams.
    """
    if batch.numbers is None or rows.facts is None:
        raise ValueError("a batch of other rows than prompts")
    numbers = batch.numbers[:: batch.group]
    facts = [rows.facts[example // batch.group] for example in numbers if example != EMPTY]
    return Planned(batch, facts, number, rows)
