"""Make what samples and rewards the answers of a run, or of a measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.cross_entropy import Loss
from mlx_lora.models.load import Base
from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.distill import Scorer
from mlx_lora.objectives.policy_task import at_temperature
from mlx_lora.objectives.prefix_sharing import Joining
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.ranks import ALONE, Ranks
from mlx_lora.planner.memory import MemoryPlan
from mlx_lora.rollouts.decode import SamplingForm, choose_sampling
from mlx_lora.rollouts.rewards import Reward
from mlx_lora.rollouts.rollout import Answering, AnyPlan, RolloutPlan
from mlx_lora.rollouts.sampler import check_groups
from mlx_lora.utils import device
from mlx_lora.utils.text import counted

ROLLOUT = "rollout"  # the plan's phase in which answers are sampled


def form_of(
    settings: TrainSettings,
    base: Base,
    memory: MemoryPlan,
    ranks: Ranks,
    identity: Mapping[str, Any] | None,
) -> tuple[SamplingForm, MemoryPlan]:
    """Return what computes the answers of a run, and its memory with that.

    Args:
        settings, base: of the run; the base is adapted.
        memory: of the run, without float copies.
        ranks: the processes of the run.
        identity: of the checkpoint to go on from; None: the run begins.

    Raises:
        InputError: see `choose_sampling`.
    """
    if not settings.objective.samples:
        return SamplingForm(), memory
    held = memory.phases.get(ROLLOUT, memory.phases["update"])  # or a little more than is held while sampling
    free = min(device.free_bytes(), memory.budget_bytes - held)
    form = choose_sampling(base, settings.objective.answers_per_prompt, free, ranks, identity)
    if not form.copied_bytes:
        return form, memory
    return form, memory.with_phase(ROLLOUT, {"base, adapter, sampling": held, "float copies": form.copied_bytes})


def answering_of(
    settings: TrainSettings,
    base: Base,
    objective: Objective,
    loss: Loss,
    rewards: Sequence[Reward],
    form: SamplingForm,
    scorer: Scorer | None = None,
    joining: Joining | None = None,
) -> Answering | None:
    """Return what samples the answers of a run, and rewards or scores them; None if its data have them.

    Args:
        settings, base, objective: of the run.
        loss: of tokens, chosen for the base.
        form: what computes sampled tokens.
        scorer: scores the answers as the teacher, if the objective has one.
        joining: when the answers to a prompt share its row.

    Raises:
        InputError: the model cannot hold several answers.
    """
    if not objective.samples:
        return None
    check_groups(base.model, base.model_id)
    if objective.distills is not None:
        if scorer is None:
            raise ValueError("sampled answers of a student without a teacher")
        return Answering.of(base, settings, (), loss, form, scorer)
    loss = at_temperature(loss, base.model, base.config, settings.objective.temp)
    return Answering.of(base, settings, rewards, loss, form, joining=joining)


def answered_by(
    answering: Answering | None, plan: BatchPlan | None, held_out: bool = False, ranks: Ranks = ALONE
) -> AnyPlan | None:
    """Return a plan whose answers are sampled, in place of a plan of prompts; without answering, the plan itself."""
    return RolloutPlan(plan, answering, held_out, ranks) if answering is not None and plan else plan


def shared_words(plan: RolloutPlan, accumulation: int, ranks: Ranks) -> list[str]:
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


def sampled_plan(
    settings: TrainSettings,
    base: Base,
    rewards: Sequence[Reward],
    ranks: Ranks = ALONE,
    scorer: Scorer | None = None,
) -> Callable[[BatchPlan, Loss], AnyPlan]:
    """Return what makes a plan with sampled answers of a plan of prompts; of other plans, the plan itself."""

    def answered(plan: BatchPlan, loss: Loss) -> AnyPlan:
        objective = objective_of(settings.objective)
        if not objective.samples:
            return plan
        form = choose_sampling(base, settings.objective.answers_per_prompt, device.free_bytes(), ranks)
        answering = answering_of(settings, base, objective, loss, rewards, form, scorer)
        return answered_by(answering, plan, held_out=True) or plan

    return answered
