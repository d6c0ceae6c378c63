"""Policy objectives (GRPO and its variants, RLOO): sample answers to prompts, reward them, and raise what is rewarded.

One step, in order (`steps` of objectives/grpo.py):

    prompts of the step's batches    `Rollouts.answer`: ranks divide them, and each answers and rewards its own
    answers, rewards                 all ranks get all of them
    log-probabilities                as they were sampled, and under the reference, where the loss needs them
    advantages                       from the rewards of a prompt's answers (losses/grpo.py)
    `updates_per_rollout` updates    on the same answers

The rollout's parts are in rollouts/; the loss of a batch is in objectives/policy_arrays.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits, Seen
from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.losses.grpo import PolicyOptions
from mlx_lora.models.generator import check_rows
from mlx_lora.objectives.base import BoundObjective, Objective, RunContext
from mlx_lora.objectives.policy_arrays import at_temperature, more_reports, policy_arrays, policy_loss_of, prepared
from mlx_lora.objectives.prefix_sharing import Layout, lay_out, that_fits
from mlx_lora.planner.memory import ROLLOUT, MemoryPlan, ModelShape
from mlx_lora.rollouts.environment import failures_of_calls
from mlx_lora.rollouts.make_environment import (
    check_environment,
    check_template,
    environment_of,
    own_rewards_and_reports,
    shown_tools,
)
from mlx_lora.rollouts.reward_models import check_rewards, load_rewards
from mlx_lora.rollouts.rewards import (
    KNOWN,
    NO_SPREAD,
    SPREAD,
    Reward,
    TrainerState,
    means_of_known,
    own_reports,
    reward_files,
    reward_names,
)
from mlx_lora.rollouts.rollout import SAMPLED_BY, Rollouts, SamplingForm, choose_sampling
from mlx_lora.utils import device

if TYPE_CHECKING:
    from mlx_lora.config.settings import DataSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.trainer.guards import StepsDone


# What objectives have in common whose answers are sampled during the run: the layout of rows, and the rollouts.
#
# The planned rows have room for answers, so memory and shapes are known before the run. `steps` samples, and what rewards or
# scores the answers is the subclass's (objectives/grpo.py, objectives/on_policy.py).


@dataclass(eq=False)
class SampledObjective(Objective):
    """An objective whose answers are sampled during the run.

    Attributes:
        words: for the run header.
        layout: whether the answers to a prompt share its row.
        prompts: the rows that are trained on, with room for answers.
    """

    words: str
    layout: Layout = field(default_factory=Layout)
    prompts: EncodedSet | None = None

    def _with_targets(self, rows: EncodedSet) -> EncodedSet:
        return rows.with_room(self.options.answers_per_prompt, self.options.max_new_tokens)

    def open(self, ctx: RunContext) -> None:
        check_rows(ctx.base.model, ctx.base.model_id)
        super().open(ctx)

    def settle(self, ctx: RunContext, data: DataSplits) -> DataSplits:
        """Let the answers to a prompt share its row where that saves work."""
        self.layout = lay_out(ctx, data.train)
        ctx.settings = self.layout.settled(ctx.settings)
        return self.layout.of(super().settle(ctx, data))

    def finish_data(self, ctx: RunContext, data: DataSplits, shape: ModelShape) -> DataSplits:
        """Choose what computes the answers, by the memory that is left."""
        self.layout, memory = that_fits(self.layout, ctx.settings, shape, data.train, ctx.chosen.terms, ctx.planned)
        form, ctx.memory = form_that_fits(ctx, memory)
        self.rollouts = self.make_rollouts(ctx, ctx.chosen.loss, form)
        data = self.layout.of(data)
        self.prompts = data.train
        ctx.record.identity |= self.layout.identity | form.identity
        ctx.record.may_change |= {SAMPLED_BY}
        ctx.record.about += [form.describe(), self.layout.words]
        return data

    def make_rollouts(self, ctx: RunContext, loss: Loss, form: SamplingForm) -> Rollouts:
        """Return what samples and rewards, or scores, the answers.

        Args:
            ctx: of the run; its base is adapted.
            loss: of tokens, chosen for the base.
            form: what computes sampled tokens.
        """
        raise NotImplementedError

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        if self.rollouts is None:  # a measurement
            group = self.options.answers_per_prompt
            form = choose_sampling(ctx.base, group, device.free_bytes(), ctx.strategy.ranks)
            self.rollouts = self.make_rollouts(ctx, loss, form)
        return replace(self.bind_sampled(ctx, loss), rates=self.rollouts.spent.read)

    def bind_sampled(self, ctx: RunContext, loss: Loss) -> BoundObjective:
        """Return the loss of sampled answers; see `bind`."""
        raise NotImplementedError

    def steps(self, batches: list[Batch], done: StepsDone) -> Iterator[list[Batch]]:
        """Sample answers to the prompts of `updates` steps, and yield the same answers for each of them."""
        if self.prompts is None or self.rollouts is None:
            raise ValueError("answers are asked for before the data is finished")
        state = TrainerState(done.steps, done.of_steps, done.epochs)
        answered = self.rollouts.answer(batches, self.prompts, done.batches, state)
        for _ in range(self.options.updates):
            yield answered


def form_that_fits(ctx: RunContext, memory: MemoryPlan) -> tuple[SamplingForm, MemoryPlan]:
    """Return what computes the answers of a run, and its memory with that.

    Args:
        ctx: of the run; its base is adapted.
        memory: of the run, without float copies.

    Raises:
        InputError: see `choose_sampling`.
    """
    held = memory.phases.get(ROLLOUT, memory.phases["update"])  # or a little more than is held while sampling
    free = min(device.free_bytes(), memory.budget_bytes - held)
    form = choose_sampling(ctx.base, ctx.settings.objective.answers_per_prompt, free, ctx.strategy.ranks, ctx.resumed)
    if not form.copied_bytes:
        return form, memory
    return form, memory.with_phase(ROLLOUT, {"base, adapter, sampling": held, "float copies": form.copied_bytes})


# Policy objectives (GRPO and its variants, RLOO): sample answers to prompts, reward them, and raise what is rewarded

POLICY_REPORTS = ("reward", SPREAD, NO_SPREAD, "length", "truncated", "kl", "clipped")


@dataclass(eq=False)
class Policy(SampledObjective):
    """An objective whose sampled answers are rewarded.

    Attributes:
        loss: of the answers.
        reports: names of the numbers that the loss reports.
        rewards: judge the answers.
    """

    loss: PolicyOptions = field(default_factory=PolicyOptions)
    reports: tuple[str, ...] = ()
    rewards: Sequence[Reward] = field(default_factory=tuple)

    def check(self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]) -> None:
        if settings.has_episodes:  # a user's file that does not load is told now
            check_environment(settings, functions)
        if settings.reward or not settings.has_episodes:
            check_rewards(settings, functions)

    def open(self, ctx: RunContext) -> None:
        if self.pictures is not None:
            self.pictures.check_sampling(ctx)
        super().open(ctx)
        asked = ctx.settings.objective
        if asked.reward or not asked.environment:
            self.rewards = load_rewards(ctx.settings, ctx.base, ctx.today, ctx.functions)
        self.rewards, more = own_rewards_and_reports(asked, self.rewards, ctx.functions)
        if more:
            self.reports = all_reports([reward.name for reward in self.rewards]) + more
        ctx.record.shared |= reward_files(asked)

    def _seen(self, ctx: RunContext, data: DataSettings) -> Seen:
        return replace(super()._seen(ctx, data), tools=shown_tools(ctx.settings.objective, ctx.functions))

    def load_data(self, ctx: RunContext) -> DataSplits:
        splits = super().load_data(ctx)
        if schemas := shown_tools(ctx.settings.objective, ctx.functions):
            check_template(ctx.base.tokenizer, splits.chat_template, schemas)
        return splits

    def make_rollouts(self, ctx: RunContext, loss: Loss, form: SamplingForm) -> Rollouts:
        loss = at_temperature(loss, ctx.base.model, ctx.base.config, self.options.temp)
        env = environment_of(ctx.settings, self.rewards, ctx.base, ctx.today, ctx.functions)
        start, ranks = ctx.base.model.trainable_parameters(), ctx.strategy.ranks
        return Rollouts(
            ctx.base,
            ctx.settings,
            env,
            loss,
            start,
            form,
            joining=self.layout.joining,
            ranks=ranks,
            seeing=self.pictures,
        )

    def bind_sampled(self, ctx: RunContext, loss: Loss) -> BoundObjective:
        loss = at_temperature(loss, ctx.base.model, ctx.base.config, self.options.temp)
        more = more_reports(self.reports)
        whole = policy_loss_of(loss, self.loss, self.words, more)
        bound = BoundObjective(whole, partial(policy_arrays, more=more), prepared, self.reports, _finished)
        return bound if self.pictures is None else self.pictures.shown_to(bound, ctx.base.model)


def _finished(means: dict[str, float]) -> dict[str, float]:
    """Leave out what only a step reports, and a validation does not."""
    found = failures_of_calls(means_of_known(means))
    return {name: value for name, value in found.items() if not math.isnan(value)}


def all_reports(rewards: Sequence[str]) -> tuple[str, ...]:
    """Return what is reported of answers that these rewards judge."""
    own = own_reports(rewards)
    return (*POLICY_REPORTS, *own, *(KNOWN + one for one in own))


def policy(settings: ObjectiveSettings) -> Policy:
    name = settings.objective
    alone = settings.row.leaves_one_out
    loss = name if alone else settings.grpo_loss
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    # The penalty of rloo is taken from the reward, as in TRL; that of the others is part of the loss.
    beta = 0.0 if alone else settings.kl_beta
    options = PolicyOptions(loss, settings.epsilon, high, beta, settings.kl_beta > 0, settings.max_new_tokens)
    words = f"{name}: {'' if name == loss else f'{loss} loss, '}groups of {settings.answers_per_prompt}"
    words += f", divergence weight {settings.kl_beta:g}" if settings.kl_beta else ""
    return Policy(settings, words, loss=options, reports=all_reports(reward_names(settings)))
