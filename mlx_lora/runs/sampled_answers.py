"""Make what samples and rewards the answers of a run, or of a measurement."""

from __future__ import annotations

from collections.abc import Callable

from mlx_lora.data.batches import BatchPlan
from mlx_lora.models.group_sampling import check_groups
from mlx_lora.models.load import Base
from mlx_lora.objectives.objective import Objective
from mlx_lora.objectives.objective_table import objective_of
from mlx_lora.objectives.user_rewards import rewards_of
from mlx_lora.settings.config import TrainSettings
from mlx_lora.training.joined_answers import Joining
from mlx_lora.training.losses import Loss
from mlx_lora.training.policy_task import at_temperature
from mlx_lora.training.rollouts import Answering, AnyPlan, RolloutPlan


def answering_of(
    settings: TrainSettings,
    base: Base,
    objective: Objective,
    loss: Loss,
    say: Callable[[str], None],
    joining: Joining | None = None,
) -> Answering | None:
    """Return what samples and rewards the answers of a run, None if its data have them.

    Args:
        settings, base, objective, loss, say: of the run.
        joining: when the answers to a prompt share its row.

    Raises:
        InputError: a reward cannot be loaded, or the model cannot hold several answers.
    """
    if objective.policy is None:
        return None
    check_groups(base.model, base.model_id)
    loss = at_temperature(loss, base.model, base.config, settings.objective.temp)
    return Answering.of(base, settings, rewards_of(settings.objective), loss, say, joining)


def sampled_plan(
    settings: TrainSettings, base: Base, say: Callable[[str], None]
) -> Callable[[BatchPlan, Loss], AnyPlan]:
    """Return what makes a plan with sampled answers of a plan of prompts; of other plans, the plan itself."""

    def answered(plan: BatchPlan, loss: Loss) -> AnyPlan:
        answering = answering_of(settings, base, objective_of(settings.objective), loss, say)
        return RolloutPlan(plan, answering, held_out=True) if answering else plan

    return answered
