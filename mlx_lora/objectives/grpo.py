"""Policy objectives (GRPO and its variants, RLOO): sample answers to prompts, reward them, and raise what is rewarded.

One step, in order (`steps` of objectives/sampled.py):

    prompts of the step's batches    `Rollouts.run`: ranks divide them, and each answers and rewards its own
    answers, rewards                 all ranks get all of them
    log-probabilities                as they were sampled, and under the reference, where the loss needs them
    advantages                       from the rewards of a prompt's answers (losses/policy.py)
    `updates_per_rollout` updates    on the same answers

The rollout's parts are in rollouts/; the loss of a batch is in objectives/policy_arrays.py.

A few held-out prompts are answered greedily at every validation, so that a person sees how the answers change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.nn as nn
import numpy as np

from mlx_lora.data.dataset import EncodedSet, spaced_by_length
from mlx_lora.losses.policy import PolicyOptions
from mlx_lora.objectives.base import BoundObjective, FixedPrompt, RunContext
from mlx_lora.objectives.policy_arrays import at_temperature, more_reports, policy_arrays, policy_loss_of, prepared
from mlx_lora.objectives.sampled import SampledObjective
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
    summed,
)
from mlx_lora.rollouts.rollout import Rollouts
from mlx_lora.rollouts.sampler import SamplingOptions, answer_keys, sample_groups
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.losses.cross_entropy import Loss
    from mlx_lora.rollouts.decode import SamplingForm

POLICY_REPORTS = ("reward", SPREAD, NO_SPREAD, "length", "truncated", "kl", "clipped")


@dataclass(eq=False)
class Policy(SampledObjective):
    """An objective whose sampled answers are rewarded."""

    rewards: Sequence[Reward] = field(default_factory=tuple)

    def check(self, settings: ObjectiveSettings, functions: Mapping[str, Callable[..., Any]]) -> None:
        check_rewards(settings, functions)  # a user's file that does not load is told now

    def open(self, ctx: RunContext) -> None:
        self.rewards = load_rewards(ctx.settings, ctx.base, ctx.today, ctx.functions)
        ctx.record.shared |= reward_files(ctx.settings.objective)

    def make_rollouts(self, ctx: RunContext, loss: Loss, form: SamplingForm) -> Rollouts:
        loss = self.token_loss(ctx, loss)
        return Rollouts.of(
            ctx.base, ctx.settings, self.rewards, loss, form, joining=self.layout.joining, ranks=ctx.strategy.ranks
        )

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
        return {name: value for name, value in self.finish(means).items() if not math.isnan(value)}


def policy(settings: ObjectiveSettings) -> Policy:
    name = settings.objective
    if settings.group_size == 1:
        raise InputError(
            f"--group-size 1 with --objective {name}: it compares the answers to a prompt; give at least 2"
        )
    loss = name if name == "rloo" else settings.grpo_loss
    high = settings.epsilon if settings.epsilon_high is None else settings.epsilon_high
    # The penalty of rloo is taken from the reward, as in TRL; that of the others is part of the loss.
    beta = 0.0 if name == "rloo" else settings.kl_beta
    options = PolicyOptions(loss, settings.epsilon, high, beta, settings.kl_beta > 0, settings.max_new_tokens)
    words = f"{name}: {'' if name == loss else f'{loss} loss, '}groups of {settings.answers_per_prompt}"
    words += f", divergence weight {settings.kl_beta:g}" if settings.kl_beta else ""
    room, own = (settings.answers_per_prompt, settings.max_new_tokens), own_reports(reward_names(settings))
    reports = (*POLICY_REPORTS, *own, *(KNOWN + one for one in own))
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


# Held-out prompts that are answered at every validation

LIKELIEST = 1.0  # min-p that leaves only the likeliest token


def fixed_prompts(rows: EncodedSet, most: int) -> list[FixedPrompt]:
    """Return up to `most` different prompts of rows with room for answers, spaced evenly by length."""
    found: list[FixedPrompt] = []
    for example in spaced_by_length(rows, min(most, rows.examples)).tolist():
        tokens, mask = rows.row(example * rows.group)
        begun = tokens[: int(np.argmax(mask))].tolist()
        if rows.facts is not None and begun not in [one.tokens for one in found]:
            found.append(FixedPrompt(begun, rows.facts[example]))
    return found


def greedy_answers(rollouts: Rollouts, prompts: Sequence[FixedPrompt]) -> list[dict[str, Any]]:
    """Return an answer to each prompt with its rewards, as plain values; no random stream of the run is used.

    Each has `prompt` (as rewards see it), `answer`, `length` in tokens, `truncated`, `reward` (the weighted sum, None
    without one) and `rewards` by name.

    Raises:
        RunError: a reward failed.
    """
    base, most = rollouts.base, rollouts.settings.objective.max_new_tokens
    ends, training = frozenset(base.tokenizer.eos_token_ids), base.model.training
    options = SamplingOptions(1, most, min_p=LIKELIEST)
    base.model.eval()
    try:
        tokens = [prompt.tokens for prompt in prompts]
        with rollouts.form.model_of(base) as model:
            answers, _ = sample_groups(model, tokens, options, ends, answer_keys(0, 0, len(prompts)))
    finally:
        base.model.train(training)
    found = rollouts.rewards_of([prompt.fact for prompt in prompts], answers)
    names, totals = [reward.name for reward in rollouts.rewards], summed(found, rollouts.rewards)
    return [
        {
            "prompt": prompt.fact["prompt"],
            "answer": rollouts.text_of(answer),
            "length": len(answer),
            "truncated": len(answer) == most and answer[-1] not in ends,
            "reward": _finite_or_none(total),
            "rewards": {name: _finite_or_none(value) for name, value in zip(names, own, strict=True)},
        }
        for prompt, answer, total, own in zip(prompts, answers, totals.tolist(), found.tolist(), strict=True)
    ]


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
