"""Policy objectives (GRPO and its variants, RLOO): sample answers to prompts, reward them, and raise what is rewarded.

One step, in order (`steps` of objectives/sampled.py):

    prompts of the step's batches    `Rollouts.run`: ranks divide them, and each answers and rewards its own
    answers, rewards                 all ranks get all of them
    log-probabilities                as they were sampled, and under the reference, where the loss needs them
    advantages                       from the rewards of a prompt's answers (losses/policy.py)
    `updates_per_rollout` updates    on the same answers

The rollout's parts are in rollouts/; the loss of a batch is in objectives/policy_arrays.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.nn as nn

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits
from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.losses.policy import PolicyOptions
from mlx_lora.objectives.base import BoundObjective, FixedPrompt, RunContext
from mlx_lora.objectives.policy_arrays import at_temperature, more_reports, policy_arrays, policy_loss_of, prepared
from mlx_lora.objectives.sampled import SampledObjective
from mlx_lora.rollouts.generator import SamplingForm
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
    means_of_known,
    own_reports,
    reward_files,
    reward_names,
)
from mlx_lora.rollouts.rollout import Rollouts, fixed_prompts, greedy_answers
from mlx_lora.rollouts.tools import failures_of_calls

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
