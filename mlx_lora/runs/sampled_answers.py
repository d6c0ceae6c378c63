"""Make what samples and rewards the answers of a run, or of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlx_lora.data.batches import BatchPlan
from mlx_lora.models.group_sampling import check_groups
from mlx_lora.models.load import Base
from mlx_lora.objectives.objective import Objective
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.objectives.rewards import Reward
from mlx_lora.settings.config import TrainSettings
from mlx_lora.training.losses import Loss
from mlx_lora.training.policy_task import at_temperature
from mlx_lora.training.rollouts import Answering, AnyPlan, RolloutPlan


def answering_of(
    settings: TrainSettings,
    base: Base,
    objective: Objective,
    loss: Loss,
    say: Callable[[str], None],
    rewards: Sequence[Reward],
) -> Answering | None:
    """Return what samples and rewards the answers of a run, None if its data have them.

    Raises:
        InputError: the model cannot hold several answers.
    """
    if objective.policy is None:
        return None
    check_groups(base.model, base.model_id)
    loss = at_temperature(loss, base.model, base.config, settings.objective.temp)
    return Answering.of(base, settings, rewards, loss, say)


def answered_by(answering: Answering | None, plan: BatchPlan | None, held_out: bool = False) -> AnyPlan | None:
    """Return a plan whose answers are sampled, in place of a plan of prompts; without answering, the plan itself."""
    return RolloutPlan(plan, answering, held_out) if answering is not None and plan else plan


def sampled_plan(
    settings: TrainSettings, base: Base, say: Callable[[str], None], rewards: Sequence[Reward]
) -> Callable[[BatchPlan, Loss], AnyPlan]:
    """Return what makes a plan with sampled answers of a plan of prompts; of other plans, the plan itself."""

    def answered(plan: BatchPlan, loss: Loss) -> AnyPlan:
        answering = answering_of(settings, base, objective_of(settings.objective), loss, say, rewards)
        return answered_by(answering, plan, held_out=True) or plan

    return answered
