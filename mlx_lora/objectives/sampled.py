"""What objectives have in common whose answers are sampled during the run: the layout of rows, and the rollouts.

The planned rows have room for answers, so memory and shapes are known before the run. `steps` samples, and what rewards or
scores the answers is the subclass's (objectives/grpo.py, objectives/on_policy.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_lora.objectives.base import HeldOutBatches, Objective, RunContext
from mlx_lora.objectives.prefix_sharing import Layout, lay_out, that_fits
from mlx_lora.planner.memory import ROLLOUT, MemoryPlan
from mlx_lora.rollouts.generator import SAMPLED_BY, SamplingForm, check_groups, choose_sampling
from mlx_lora.rollouts.rewards import TrainerState
from mlx_lora.rollouts.rollout import HeldOutRollouts, Rollouts
from mlx_lora.utils import device
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.data.sampler import BatchPlan
    from mlx_lora.losses.cross_entropy import Loss
    from mlx_lora.parallel.ranks import Ranks
    from mlx_lora.planner.shapes import ModelShape
    from mlx_lora.trainer.state import StepsDone


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
