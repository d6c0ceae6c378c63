"""The loss of a plan's tokens: that of an objective, or with a teacher, the divergence from it."""

from __future__ import annotations

from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.losses.divergence import distill_loss
from mlx_lora.models.load import Base
from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.distill import taught_loss
from mlx_lora.rollouts.rollout import AnyPlan, RolloutPlan


def loss_of_plan(objective: Objective, loss: Loss, base: Base, plan: AnyPlan) -> Loss:
    """Return the loss that an objective computes of a plan's tokens.

    Args:
        objective: of the run.
        loss: of tokens, chosen for the model.
        base: the model that is trained or measured.
        plan: its batches; what a teacher says about them is in the data, or comes with the answers.
    """
    if objective.distills is None:
        return loss
    if isinstance(plan, RolloutPlan) and plan.scorer is not None:
        return taught_loss(loss, base.model, base.config, plan.scorer.options, objective.description)
    return distill_loss(loss, base.model, base.config, objective.distills, plan.rows, objective.description)
