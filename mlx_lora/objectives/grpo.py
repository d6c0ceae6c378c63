"""Policy objectives (GRPO and its variants, RLOO): sample answers to prompts, reward them, and raise what is rewarded.

One step, in order (`steps` of objectives/grpo.py):

    prompts of the step's batches    `Rollouts.run`: ranks divide them, and each answers and rewards its own
    answers, rewards                 all ranks get all of them
    log-probabilities                as they were sampled, and under the reference, where the loss needs them
    advantages                       from the rewards of a prompt's answers (losses/policy.py)
    `updates_per_rollout` updates    on the same answers

The rollout's parts are in rollouts/; the loss of a batch is in objectives/policy_arrays.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits
from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.losses.policy import PolicyOptions
from mlx_lora.objectives.base import BoundObjective, FixedPrompt, HeldOutBatches, Objective, RunContext
from mlx_lora.objectives.policy_arrays import at_temperature, more_reports, policy_arrays, policy_loss_of, prepared
from mlx_lora.objectives.prefix_sharing import Layout, lay_out, that_fits
from mlx_lora.planner.memory import ROLLOUT, MemoryPlan
from mlx_lora.rollouts.generator import SAMPLED_BY, SamplingForm, check_groups, choose_sampling
from mlx_lora.rollouts.make_environment import (
    check_environment,
    check_template,
    environment_of,
    own_rewards_and_reports,
    shown_tools,
)
from mlx_lora.rollouts.reward_models import beside_bytes, check_rewards, load_rewards
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
from mlx_lora.rollouts.rollout import HeldOutRollouts, Rollouts, fixed_prompts, greedy_answers
from mlx_lora.rollouts.tools import failures_of_calls
from mlx_lora.utils import device
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.parallel.ranks import Ranks
    from mlx_lora.planner.shapes import ModelShape
    from mlx_lora.trainer.guards import StepsDone


# What objectives have in common whose answers are sampled during the run: the layout of rows, and the rollouts.
#
# The planned rows have room for answers, so memory and shapes are known before the run. `steps` samples, and what rewards or
# scores the answers is the subclass's (objectives/grpo.py, objectives/on_policy.py).


@dataclass(eq=False)
class SampledObjective(Objective):
    """An objective whose answers are sampled during the run.

    Attributes:
        layout: whether the answers to a prompt share its row.
        rollouts: samples answers; None: the run has not got that far.
        prompts: the rows that are trained on, with room for answers.
    """

    layout: Layout = field(default_factory=Layout)
    rollouts: Rollouts | None = None
    prompts: EncodedSet | None = None

    @property
    def shares_prompts(self) -> bool:
        return self.policy is not None

    def lay_out(self, ctx: RunContext, rows: EncodedSet) -> None:
        self.layout = lay_out(ctx, self, rows)

    def settled(self, settings: TrainSettings) -> TrainSettings:
        return self.layout.settled(settings)

    def arrange(self, data: DataSplits) -> DataSplits:
        data = self.layout.of(data)
        self.prompts = data.train
        return data

    def after_fit(self, ctx: RunContext, data: DataSplits, shape: ModelShape) -> DataSplits:
        if ctx.memory is None:
            raise ValueError("answers are sampled in a run without a memory plan")
        self.layout, memory = that_fits(self.layout, ctx.settings, shape, data.train, ctx.chosen.terms, ctx.memory)
        form, ctx.memory = form_that_fits(ctx, memory)
        self.begin_sampling(ctx, ctx.chosen.loss, form)
        ctx.record.identity |= self.layout.identity | form.identity
        return data

    def begin_measuring(self, ctx: RunContext, loss: Loss) -> None:
        group = ctx.settings.objective.answers_per_prompt
        self.begin_sampling(ctx, loss, choose_sampling(ctx.base, group, device.free_bytes(), ctx.strategy.ranks))

    def begin_sampling(self, ctx: RunContext, loss: Loss, form: SamplingForm) -> None:
        """Make what samples the answers.

        Args:
            ctx: of the run; its base is adapted.
            loss: of tokens, chosen for the base.
            form: what computes sampled tokens.

        Raises:
            InputError: the model cannot hold several answers.
        """
        check_groups(ctx.base.model, ctx.base.model_id)
        self.rollouts = self.make_rollouts(ctx, loss, form)

    def make_rollouts(self, ctx: RunContext, loss: Loss, form: SamplingForm) -> Rollouts:
        """Return what samples and rewards, or scores, the answers; see `begin_sampling`."""
        raise NotImplementedError

    @property
    def sampling(self) -> Rollouts:
        """What samples the answers.

        Raises:
            ValueError: the run has not got that far.
        """
        if self.rollouts is None:
            raise ValueError("answers are asked for before anything can sample them")
        return self.rollouts

    def held_out(self, plan: BatchPlan) -> HeldOutBatches:
        return HeldOutRollouts(plan, self.sampling)

    def header_words(self, plan: BatchPlan, ctx: RunContext) -> list[str]:
        shared = shared_words(plan, ctx.settings.loop.grad_accumulation_steps, ctx.strategy.ranks)
        return [self.sampling.form.describe(), *shared, self.layout.words]

    def kept_choices(self, identity: Mapping[str, Any]) -> dict[str, Any]:
        return {SAMPLED_BY: identity[SAMPLED_BY]} if SAMPLED_BY in identity else {}

    def steps(self, batches: list[Batch], done: StepsDone) -> Iterator[list[Batch]]:
        """Sample answers to the prompts of `updates` steps, and yield the same answers for each of them."""
        if self.prompts is None:
            raise ValueError("answers are asked for before the data is arranged")
        state = TrainerState(done.steps, done.of_steps, done.epochs)
        answered = self.sampling.run(batches, self.prompts, done.batches, state)
        for _ in range(self.updates):
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


def shared_words(plan: BatchPlan, accumulation: int, ranks: Ranks) -> list[str]:
    """Return what the run header says of processes that answer prompts together, none for a single process.

    Args:
        plan: of the run.
        accumulation: batches of a step.
        ranks: the processes.
    """
    if ranks.size == 1:
        return []
    prompts = accumulation * min(rows // plan.rows.group for rows, _, _ in plan.shapes)
    words = f"prompts answered by {ranks.size} processes"
    if prompts < ranks.size:
        words += (
            f", of which {counted(ranks.size - prompts, 'one')} may wait, because a step can have only "
            f"{counted(prompts, 'prompt')}; raise --batch-size or --grad-accumulation-steps"
        )
    return [words]


# Policy objectives (GRPO and its variants, RLOO): sample answers to prompts, reward them, and raise what is rewarded

POLICY_REPORTS = ("reward", SPREAD, NO_SPREAD, "length", "truncated", "kl", "clipped")


@dataclass(eq=False)
class Policy(SampledObjective):
    """An objective whose sampled answers are rewarded."""

    rewards: Sequence[Reward] = field(default_factory=tuple)

    def check(self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]) -> None:
        if settings.has_episodes:  # a user's file that does not load is told now
            check_environment(settings, functions)
        if settings.reward or not settings.has_episodes:
            check_rewards(settings, functions)

    def open(self, ctx: RunContext) -> None:
        asked = ctx.settings.objective
        if asked.reward or not asked.environment:
            self.rewards = load_rewards(ctx.settings, ctx.base, ctx.today, ctx.functions)
        self.rewards, more = own_rewards_and_reports(asked, self.rewards, ctx.functions)
        if more:
            self.reports = all_reports([reward.name for reward in self.rewards]) + more
        ctx.record.shared |= reward_files(asked)

    def shown_tools(
        self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]
    ) -> list[dict[str, Any]] | None:
        return shown_tools(settings, functions)

    def load_data(self, ctx: RunContext) -> DataSplits:
        splits = super().load_data(ctx)
        if schemas := self.shown_tools(ctx.settings.objective, ctx.functions):
            check_template(ctx.base.tokenizer, splits.chat_template, schemas)
        return splits

    def make_rollouts(self, ctx: RunContext, loss: Loss, form: SamplingForm) -> Rollouts:
        loss = self.token_loss(ctx, loss)
        env = environment_of(ctx.settings, self.rewards, ctx.base, ctx.today, ctx.functions)
        start = ctx.base.model.trainable_parameters()
        joining, ranks = self.layout.joining, ctx.strategy.ranks
        return Rollouts(ctx.base, ctx.settings, env, loss, start, form, joining=joining, ranks=ranks)

    def token_loss(self, ctx: RunContext, loss: Loss, rows: EncodedSet | None = None) -> Loss:
        return at_temperature(loss, ctx.base.model, ctx.base.config, ctx.settings.objective.temp)

    def bind(self, loss: Loss, model: nn.Module) -> BoundObjective:
        if self.policy is None:
            raise ValueError(f"{self.name} without a policy loss")
        more = more_reports(self.reports)
        whole = policy_loss_of(loss, self.policy, self.description, more)
        bound = BoundObjective(whole, partial(policy_arrays, more=more), prepared, self.reports, self._finished)
        return replace(bound, rates=self.rollouts.spent.read) if self.rollouts else bound

    def fixed_prompts(self, rows: EncodedSet, most: int) -> list[FixedPrompt]:
        return fixed_prompts(rows, most)

    def greedy_answers(self, prompts: Sequence[FixedPrompt]) -> list[dict[str, Any]]:
        return greedy_answers(self.sampling, prompts)

    def other_models_bytes(self, settings: TrainSettings) -> int:
        return beside_bytes(settings)

    def _finished(self, means: dict[str, float]) -> dict[str, float]:
        """Leave out what only a step reports, and a validation does not."""
        found = failures_of_calls(self.finish(means))
        return {name: value for name, value in found.items() if not math.isnan(value)}


def all_reports(rewards: Sequence[str]) -> tuple[str, ...]:
    """Return what is reported of answers that these rewards judge."""
    own = own_reports(rewards)
    return (*POLICY_REPORTS, *own, *(KNOWN + one for one in own))


def policy(settings: ObjectiveSettings) -> Policy:
    name = settings.objective
    loss = name if name == "rloo" else settings.grpo_loss
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    # The penalty of rloo is taken from the reward, as in TRL; that of the others is part of the loss.
    beta = 0.0 if name == "rloo" else settings.kl_beta
    options = PolicyOptions(loss, settings.epsilon, high, beta, settings.kl_beta > 0, settings.max_new_tokens)
    words = f"{name}: {'' if name == loss else f'{loss} loss, '}groups of {settings.answers_per_prompt}"
    words += f", divergence weight {settings.kl_beta:g}" if settings.kl_beta else ""
    room, reports = (settings.answers_per_prompt, settings.max_new_tokens), all_reports(reward_names(settings))
    return Policy(
        name,
        "prompts",
        words,
        reports=reports,
        policy=options,
        room=room,
        finish=means_of_known,
        updates=settings.updates_per_rollout,
    )
