"""Divide the prompts of a step among ranks: each answers some of them, rewards its answers, and all get everything.

What is exchanged is small: tokens and a few numbers for each answer. Afterwards every rank has the same batches as a single
process, so all that depends on a whole step (advantages, tokens of the step, the division of the training pass) is
computed from them as by a single process. The random streams belong to the answers, not to the ranks that sample them.

Shapes: G answers to one prompt, B rows, T columns; N ranks.

Sample the answers that a step trains on: prompts in, a batch with answers, rewards and advantages out.

Or, in place of rewards, with what a teacher says about the answers (objectives/on_policy.py).

A planned batch has G rows for each prompt, with room for answers (EncodedSet.with_room), so memory and shapes are known
before the run. At the beginning of a step (`steps` of objectives/grpo.py) the model as it is then answers the prompts of
the step's batches, of which several ranks divide the prompts; the answers are put into the rows, and
their rewards are computed. What is sampled depends on the adapter, the seed and the batch's number only, so a resumed run
samples the same answers. With several updates per rollout, a run is only saved and ended between rollouts.

Shapes: A = N G rows, T columns.

Answer a few held-out prompts greedily at every validation, so that a person sees how the answers change.

Sample answers to prompts with pictures.

A prompt is computed at once, with what the tower sees of its pictures, and its keys and values are copied for each of its
answers. Nothing of it is shared with other prompts, whose image tokens are the same and stand for other pictures. From the
last token of the prompt on, sampling is that of text (models/generator.py).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.batch import EMPTY, Batch, share_of
from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.losses.grpo import group_advantages, leave_one_out_advantages
from mlx_lora.models.generator import (
    ANSWERS,
    AUTO,
    IN_FULL,
    PACKED,
    DecodeWeights,
    Held,
    KeptCaches,
    SamplingOptions,
    TokenSteps,
    answer_keys,
    cast_factors,
    choose_weights,
    copied_bytes,
    copy_weights,
    merge_rows,
    release_weights,
    sample_groups,
)
from mlx_lora.models.image_inputs import ModelWithImages
from mlx_lora.models.load import Base
from mlx_lora.objectives.policy_arrays import ADVANTAGES, LENGTHS, OLD, REFERENCE, REWARDS, TRUNCATED, token_logps
from mlx_lora.objectives.prefix_sharing import Joining, apart, by_answer, slots_of, sums_of_answers
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.rollouts.environment import Agent, Episode, Facts, Played, SingleTurnEnv, VectorEnv, play, seeds_of
from mlx_lora.rollouts.rewards import TrainerState, reports_of, summed
from mlx_lora.utils.errors import InputError

log = logging.getLogger(__name__)


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


def gathered(own: Sequence[Played], dealt: Sequence[list[list[int]]], group: int, ranks: Ranks) -> list[Played]:
    """Return the episodes of all prompts of each batch, the same on every rank.

    Args:
        own: this rank's, for each batch.
        dealt: from `deal_prompts`.
        group: G.
        ranks: all ranks of the run.
    """
    every = ranks.everyone([[one.prompts, one.written, one.rewards.tolist(), one.notes] for one in own])
    whole = []
    for number, prompts_of in enumerate(dealt):
        prompts = sum(map(len, prompts_of))
        shape = group * prompts, own[number].rewards.shape[1]
        found = Played([[] for _ in range(prompts)], [Episode() for _ in range(shape[0])], np.zeros(shape))
        for rank, dealt_to in enumerate(prompts_of):
            begun, episodes, rewards, notes = every[rank][number]
            for prompt, tokens in zip(dealt_to, begun, strict=True):
                found.prompts[prompt] = tokens
            rows = [group * prompt + place for prompt in dealt_to for place in range(group)]
            for row, episode, reward in zip(rows, episodes, rewards, strict=True):
                found.episodes[row], found.rewards[row] = Episode(*episode), reward
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


# What computes sampled tokens. Only frozen weights may have a float copy, which is made for a rollout
# and dropped after it, so that a training step has the memory to itself. A run chooses once and keeps
# its choice in its checkpoints, because products in another form round differently: a resumed run must
# sample the same answers. All ranks use one form.

SAMPLED_BY = "sampled_by"  # the key in a checkpoint
FLOATS = "floats"  # its value for a model without quantized layers


@dataclass(frozen=True)
class SamplingForm:
    """What computes sampled tokens: the form of quantized weights, None if there are none, and short steps of one token."""

    weights: DecodeWeights | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        return {SAMPLED_BY: FLOATS if self.weights is None else self.weights.form}

    @property
    def copied_bytes(self) -> int:
        """What float copies take while answers are sampled."""
        return self.weights.copied_bytes if self.weights is not None and self.weights.form == IN_FULL else 0

    def describe(self) -> str:
        """Return a few words for the run header; empty where there is no choice."""
        return "" if self.weights is None else f"answers sampled by {self.weights.describe()}"

    @contextmanager
    def model_of(self, base: Base) -> Iterator[Any]:
        """Yield what is called as the model while answers are sampled; float copies end with the block."""
        if self.copied_bytes:
            copy_weights(base)
        try:
            with cast_factors(base.model):
                yield TokenSteps(base.model)
        finally:
            if self.copied_bytes:
                release_weights(base.model)


def choose_sampling(
    base: Base,
    rows: int,
    free_bytes: int,
    ranks: Ranks,
    identity: Mapping[str, Any] | None = None,
) -> SamplingForm:
    """Return what computes the answers of a run.

    Args:
        base: adapted, not yet trained.
        rows: answers that are sampled at a time.
        free_bytes: of memory, while nothing is trained.
        ranks: the processes of the run; copies are used if all of them choose so.
        identity: of the checkpoint to go on from, whose form is kept; None: the run begins.

    Raises:
        InputError: the form to keep, or that is asked for, does not fit the memory of one rank.
    """
    known = None if identity is None else identity.get(SAMPLED_BY)
    asked = base.decode_weights
    if known in (PACKED, IN_FULL) and asked in (AUTO, known):
        copied = copied_bytes(base)
        weights = DecodeWeights(known, "as the run began", copied) if copied else None
    else:
        weights = choose_weights(base, min(rows, ANSWERS), free_bytes)
        if known is not None and weights is not None:
            log.info(
                f"--decode-weights {asked}: not the form in which answers were sampled before, so not to the last bit"
            )
    if weights is not None and weights.form == IN_FULL and weights.copied_bytes > free_bytes:
        raise InputError(
            f"--resume: the run samples its answers by dense copies of {weights.copied_bytes / 1e9:.1f} GB, and "
            f"{max(0, free_bytes) / 1e9:.1f} GB are free; free some, or give --decode-weights packed"
        )
    forms = ranks.everyone(weights and weights.form)
    if weights is not None and weights.form == IN_FULL and set(forms) != {IN_FULL}:
        other = next(rank for rank, form in enumerate(forms) if form != IN_FULL)
        weights = DecodeWeights(PACKED, f"as rank {other} chose", weights.copied_bytes)
    return SamplingForm(weights)


# Sample the answers that a step trains on

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


LIKELIEST = 1.0  # min-p that leaves only the likeliest token


@dataclass(frozen=True)
class FixedPrompt:
    """A held-out prompt.

    Attributes:
        tokens: up to where the answer begins.
        fact: what rewards see of it.
    """

    tokens: list[int]
    fact: dict[str, Any]


@dataclass(frozen=True)
class Rollouts:
    """Samples answers to the prompts of planned batches, in episodes of an environment, and rewards or scores them.

    Attributes:
        base: with the adapter as it is trained.
        settings: of the run.
        env: answers the model in episodes, and rewards them.
        loss: of tokens, for the log-probabilities before the first update and those of the reference.
        start: the adapter's parameters as the run began, with which the model is the reference.
        form: what computes sampled tokens.
        scorer: scores answers as the teacher (objectives/on_policy.py); None: the rewards count.
        joining: when the answers to a prompt share its row; None: never.
        spent: time and tokens of sampling.
        ranks: that answer the prompts of a step together.
        seeing: shows the pictures of prompts: the objective's, with `table`, `vision` and `shown`; None: they have none.
    """

    base: Base
    settings: TrainSettings
    env: VectorEnv
    loss: Loss
    start: dict[str, Any]
    form: SamplingForm = field(default_factory=SamplingForm)
    scorer: Any = None
    joining: Joining | None = None
    spent: Spent = field(default_factory=Spent)
    ranks: Ranks = ALONE
    seeing: Any = None

    def held_out(self, plan: BatchPlan) -> HeldOutRollouts:
        """Return the batches of held-out rows, whose answers are sampled when they are measured."""
        return HeldOutRollouts(plan, self)

    def answer(
        self, batches: Sequence[Batch], rows: EncodedSet, first: int, state: TrainerState | None = None
    ) -> list[Batch]:
        """Return planned batches with sampled answers in their rows; all ranks get all of them.

        Args:
            batches: planned, of rows with room for answers; they are trained on together.
            rows: the set that they are of.
            first: the number of the first one in the run; it decides the random streams, so that a resumed run samples the
                same answers.
            state: where the run is, for rewards that take it; None: the answers are only measured, by this rank alone.

        Raises:
            RunError: a reward failed.
        """
        ranks = ALONE if state is None else self.ranks
        if state is not None:
            self.env.state = state
        model = self.base.model
        training = model.training
        model.eval()
        try:
            batches = [apart(batch) for batch in batches]
            facts = [facts_of(batch, rows) for batch in batches]
            dealt = deal_prompts([len(one) for one in facts], ranks.size)
            mine = [prompts[ranks.rank] for prompts in dealt]
            own = [self._played(*of) for of in zip(batches, facts, range(first, first + len(facts)), mine, strict=True)]
            start = time.perf_counter()
            every = gathered(own, dealt, self.settings.objective.answers_per_prompt, ranks)
            self.spent.seconds += time.perf_counter() - start  # until the slowest rank has sampled
            for note in (note for played in every for note in played.notes):
                log.info(note)
            step = None if self.scorer else np.concatenate([summed(one.rewards, self.env.rewards) for one in every])
            found = []
            for batch, played, prompts in zip(batches, every, mine, strict=True):
                numbers = np.flatnonzero(batch.real)
                filled, begins, ends = self._filled(batch, numbers, played)
                if state is not None and self.joining is not None:
                    filled = self.joining(filled, begins, ends)
                asked = np.flatnonzero(filled.real).reshape(-1, filled.group)[prompts].ravel()
                if state is not None:
                    filled = self._with_log_probabilities(filled, asked, ranks)
                found.append(
                    self._with_rewards(filled, numbers, played.rewards, step)
                    if self.scorer is None
                    else self.scorer.scored(filled, rows, asked, ranks)
                )
            return found
        finally:
            model.train(training)

    def _played(self, batch: Batch, facts: Sequence[Facts], rollout: int, chosen: list[int]) -> Played:
        """Play the episodes of chosen prompts; the random streams are those of all prompts' episodes."""
        objective, group, seed = self.settings.objective, batch.group, self.settings.loop.seed
        rows = np.flatnonzero(batch.real)
        first = rows[::group][chosen]
        begins = batch.mask[first].argmax(axis=1)  # the prompt's last token predicts the first target
        prompts = [batch.inputs[row, : begin + 1].tolist() for row, begin in zip(first, begins, strict=True)]
        options = SamplingOptions(group, objective.max_new_tokens, objective.temp, objective.top_p, objective.min_p)

        def keys(turn: int) -> mx.array:
            every = answer_keys(seed, rollout, len(rows), turn).reshape(-1, group, 2)
            return every[mx.array(chosen)].reshape(-1, 2)

        facts, seeds = [facts[prompt] for prompt in chosen], seeds_of(seed, rollout, chosen)
        return play(self.env, self.agent(options, keys, facts), prompts, facts, seeds, group)

    @staticmethod
    def fixed_prompts(rows: EncodedSet, most: int) -> list[FixedPrompt]:
        """Return up to `most` different prompts of rows with room for answers, spaced evenly by length."""
        found: list[FixedPrompt] = []
        for example in spaced_by_length(rows, min(most, rows.examples)).tolist():
            tokens, mask = rows.row(example * rows.group)
            begun = tokens[: int(np.argmax(mask))].tolist()
            if rows.facts is None:
                continue
            prompt = FixedPrompt(begun, rows.facts[example])
            # The same question may be asked about several pictures.
            if all((one.tokens, one.fact.get("pictures")) != (begun, prompt.fact.get("pictures")) for one in found):
                found.append(prompt)
        return found

    def greedy_answers(self, prompts: Sequence[FixedPrompt]) -> list[dict[str, Any]]:
        """Return an answer to each prompt with its rewards, as plain values; no random stream of the run is used.

        Each has `prompt` (as rewards see it), `answer`, `length` in tokens, `truncated`, `reward` (the weighted sum, None
        without one) and `rewards` by name; of an episode with tools also `messages`, and `answer` shows calls and results.

        Raises:
            RunError: a reward failed.
        """
        base, env = self.base, self.env
        training, count = base.model.training, len(prompts)
        tokens, facts = [prompt.tokens for prompt in prompts], [prompt.fact for prompt in prompts]
        options = SamplingOptions(1, self.settings.objective.max_new_tokens, min_p=LIKELIEST)
        greedy = self.agent(options, lambda turn: answer_keys(0, 0, count, turn), facts)
        base.model.eval()
        try:
            played = play(env, greedy, tokens, facts, seeds_of(0, 0, range(count)), group=1)
        finally:
            base.model.train(training)
        for note in played.notes:
            log.info(note)
        names, totals = [reward.name for reward in env.rewards], summed(played.rewards, env.rewards)
        return [
            {
                "prompt": prompt.fact["prompt"],
                "answer": talk_text(episode.messages) if episode.messages else env.text_of(episode.tokens),
                **({"messages": episode.messages} if episode.messages else {}),
                "length": int(episode.sampled.sum()),
                "truncated": episode.truncated,
                "reward": total if math.isfinite(total) else None,
                "rewards": {name: v if math.isfinite(v) else None for name, v in zip(names, own, strict=True)},
            }
            for prompt, episode, total, own in zip(
                prompts, played.episodes, totals.tolist(), played.rewards.tolist(), strict=True
            )
        ]

    def agent(self, options: SamplingOptions, keys: Callable[[int], mx.array], facts: Sequence[Facts]) -> Agent:
        """Return the model as it acts in episodes.

        Args:
            options: how it samples.
            keys: returns those of all episodes at a turn, (E, 2) uint32.
            facts: of each prompt.
        """

        held: dict[int, Held] = {}
        ends = frozenset(self.base.tokenizer.eos_token_ids)
        several = not isinstance(self.env, SingleTurnEnv)

        def completions(turn: int, episodes: list[int], before: list[list[int]], left: list[int]) -> list[list[int]]:
            nonlocal held
            start = time.perf_counter()
            group = 1 if turn else options.group  # a prompt is computed once for its episodes
            own = keys(turn)[mx.array(episodes)] if turn else keys(turn)
            begun = [held[number] for number in episodes if number in held]
            kept: KeptCaches | None = KeptCaches(begun) if several else None
            if self.seeing is not None:  # an episode with pictures is a single answer
                digests = [self.seeing.table.rows[fact["pictures"]] for fact in facts]
                kept = PromptsWithPictures(vision=self.seeing.vision, digests=digests, group=group)
            held = {}
            with self.form.model_of(self.base) as model:
                found, _ = sample_groups(
                    model, before[::group], replace(options, group=group), ends, own, limits=left, kept=kept
                )
            held |= {episodes[row]: one for row, one in kept.ended.items()} if kept else {}
            self.spent.seconds += time.perf_counter() - start
            return found

        return Agent(completions, options.max_new_tokens, ends)

    def token_logps(self, batch: Batch) -> np.ndarray:
        """Return the log-probabilities of a batch's trained targets under the model as it is, (B, T) float32."""
        with self.seeing.shown(self.base.model, batch) if self.seeing is not None else nullcontext():
            return token_logps(self.base.model, self.loss, batch)

    def _with_log_probabilities(self, batch: Batch, own: np.ndarray, ranks: Ranks) -> Batch:
        """Add those under the policy that sampled and under the reference, where the loss needs them.

        Args:
            batch: with answers.
            own: the rows that this rank computes.
            ranks: that compute the others.
        """
        objective, model, found = self.settings.objective, self.base.model, {}
        if self.scorer is not None and not self.scorer.uses_old:
            return batch
        if objective.updates_per_rollout > 1 or (objective.kl_beta and objective.row.leaves_one_out):
            found[OLD] = of_own_rows(self.token_logps, batch, own, ranks)
        if objective.kl_beta:
            now = model.trainable_parameters()
            model.update(self.start)
            found[REFERENCE] = of_own_rows(self.token_logps, batch, own, ranks)
            model.update(now)
        return batch.with_columns(**found)

    def _filled(self, batch: Batch, rows: np.ndarray, played: Played) -> tuple[Batch, np.ndarray, np.ndarray]:
        """Put episodes into the rows of a planned batch, and cut columns that none of them needs.

        Returns:
            The batch; (B,) the column of each row's first target after the prompt, and the one after its last, 0 in padding.
        """
        begins, ends = np.zeros(len(batch.inputs), np.int64), np.zeros(len(batch.inputs), np.int64)
        for place, (row, episode) in enumerate(zip(rows, played.episodes, strict=True)):
            begins[row] = len(played.prompts[place // batch.group]) - 1
            ends[row] = begins[row] + len(episode.tokens)
        width = min(batch.inputs.shape[1], -(-int(ends.max()) // WIDTH_STEP) * WIDTH_STEP)
        inputs, targets = np.zeros((len(ends), width), np.int32), np.zeros((len(ends), width), np.int32)
        mask = np.zeros_like(inputs, bool)
        lengths, truncated = np.zeros(len(inputs), np.float32), np.zeros(len(inputs), np.float32)
        counts: dict[str, np.ndarray] = {}
        for place, (row, episode) in enumerate(zip(rows, played.episodes, strict=True)):
            tokens = played.prompts[place // batch.group] + episode.tokens
            inputs[row, : len(tokens) - 1], targets[row, : len(tokens) - 1] = tokens[:-1], tokens[1:]
            lengths[row], truncated[row] = episode.sampled.sum(), episode.truncated
            for name, value in episode.counts.items():
                counts.setdefault(name, np.zeros(len(inputs), np.float32))[row] = value
            kept = not (episode.truncated and self.settings.objective.mask_truncated)
            mask[row, begins[row] : ends[row]] = kept & episode.sampled
        self.spent.tokens += int(lengths.sum())
        slots = slots_of(int(mask.sum()), batch.slots, mask.size)
        columns = {"lengths": ends, LENGTHS: lengths, TRUNCATED: truncated} | counts
        columns |= {name: batch.columns[name] for name in ("pictures",) if name in batch.columns}
        filled = Batch(inputs, targets, mask, slots, batch.group, batch.numbers, columns)
        return filled, begins, ends

    def _with_rewards(self, batch: Batch, rows: np.ndarray, found: np.ndarray, step: np.ndarray | None) -> Batch:
        """Add rewards and advantages, those of an answer without a reward being 0, as in TRL.

        Args:
            batch: in any layout.
            rows: (A,) the numbers of the real answers.
            found: (A, F) what each reward gives them.
            step: rewards of all answers of the step.
        """
        objective, sampled = self.settings.objective, batch.columns
        rewards, group = summed(found, self.env.rewards), objective.answers_per_prompt
        if objective.row.leaves_one_out and objective.kl_beta and REFERENCE in sampled:
            away = sums_of_answers(batch, sampled[OLD] - sampled[REFERENCE])[rows]
            advantages = leave_one_out_advantages(rewards - objective.kl_beta * away, group)
        elif objective.row.leaves_one_out:
            advantages = leave_one_out_advantages(rewards, group)
        else:
            advantages = group_advantages(rewards, group, objective.scale_rewards, step)
        known = np.isfinite(rewards)
        shown = np.where(known, rewards, rewards[known].mean() if known.any() else 0.0)  # does not change the mean
        more = reports_of(found, self.env.rewards, group)
        known = {ADVANTAGES: advantages, REWARDS: shown} | more
        return batch.with_columns(**{name: by_answer(batch, rows, values) for name, values in known.items()})


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
            yield self.rollouts.answer([self._plan.batch(0, index)], self.rows, HELD_OUT_STREAM + index)[0]


def facts_of(batch: Batch, rows: EncodedSet) -> list[dict[str, Any]]:
    """Return what rewards see of each prompt of a planned batch, which is of rows with room for answers."""
    if batch.numbers is None or rows.facts is None:
        raise ValueError("a batch of other rows than prompts")
    return [rows.facts[one // batch.group] for one in batch.numbers[:: batch.group] if one != EMPTY]


def talk_text(messages: Sequence[dict[str, Any]]) -> str:
    """Return the turns of an episode with tools as a person reads them: a call after an arrow, its result or a reply after another."""
    lines = []
    for message in messages:
        if message["role"] in ("tool", "user"):
            lines.append(f"← {message['content']}")
            continue
        lines += [message["content"]] if message["content"].strip() else []
        for call in message.get("tool_calls", ()):
            function = call["function"]
            lines.append(f"→ {function['name']} {json.dumps(function['arguments'], ensure_ascii=False, default=str)}")
    return "\n".join(lines)


@dataclass
class PromptsWithPictures(KeptCaches):
    """Computes prompts with pictures for the sampler, which asks for caches that hold them; it keeps nothing of them.

    Attributes:
        vision: sees the pictures.
        digests: of the pictures of each prompt.
        group: answers to each prompt.
    """

    vision: Any = None
    digests: Sequence[tuple[str, ...]] = ()
    group: int = 1

    def joined(self, model: Any, prompts: Sequence[Sequence[int]]) -> list[Any]:
        """Return caches of a row for each answer, which hold its prompt without the last token.

        Args:
            model: that computes single tokens (models/generator.py); the one in it computes the prompts.
            prompts: token ids.
        """
        found = []
        for prompt, digests in zip(prompts, self.digests, strict=True):
            arrays = self.vision.prompt_arrays(prompt, digests)
            shown = ModelWithImages(model.model, self.vision.spec, arrays)
            found.append(shown.prefilled(prompt[:-1]))
        return merge_rows(model, [caches for caches in found for _ in range(self.group)])

    def keep(self, row: int, place: int, tokens: int, caches: Sequence[Any]) -> None:
        """Keep nothing: an episode is one answer."""
