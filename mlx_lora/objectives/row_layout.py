"""How the answers to a prompt lie in a run's rows: each in its own, or all behind the prompt in one.

The rows of pairs are joined before the run. Those of sampled answers are planned with room for answers, joined where answers
of full length would save work; if only shorter ones may, they are planned apart, and each batch is joined or not when its
answers are there (objectives/prefix_sharing.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS, TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits
from mlx_lora.models.meta import model_shape
from mlx_lora.models.prefix_attention import rotate_by_token
from mlx_lora.objectives.base import Objective, RunContext
from mlx_lora.objectives.compute import choose_compute
from mlx_lora.objectives.prefix_sharing import Joining, joined, layout_problem, saved_share, sharing_problem, work_of
from mlx_lora.planner.fit import budget_of, largest_batch, run_of
from mlx_lora.planner.machine import this_machine
from mlx_lora.planner.memory import MemoryPlan, plan_memory
from mlx_lora.planner.shapes import KernelTerms, ModelShape
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import gigabytes

KEY, BY_BATCH = "shared_prefix", "where it saves work"  # in a checkpoint; True: every row is joined


@dataclass(frozen=True)
class Layout:
    """How the answers to a prompt lie in rows.

    Attributes:
        shared: whether every row holds a prompt and all its answers.
        words: for the run header; empty where no prompt has several answers.
        joining: puts sampled answers into one row; None: there are none, or each has its own.
    """

    shared: bool = False
    words: str = ""
    joining: Joining | None = None

    def of(self, splits: DataSplits) -> DataSplits:
        """Return the data with the rows to train on in this layout."""
        return replace(splits, train=joined(splits.train)) if self.shared else splits

    def settled(self, settings: TrainSettings) -> TrainSettings:
        """Return the settings with --shared-prefix on where it is."""
        return replace(settings, objective=replace(settings.objective, shared_prefix="on")) if self.shared else settings

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with its checkpoint."""
        if self.shared:
            return {KEY: True}
        return {KEY: BY_BATCH} if self.joining else {}


def asked_before(identity: Mapping[str, Any]) -> str:
    """Return the --shared-prefix that a checkpoint's run goes on with."""
    return {True: "on", BY_BATCH: "auto"}.get(identity.get(KEY), "off")


def lay_out(ctx: RunContext, objective: Objective, rows: EncodedSet) -> Layout:
    """Choose loss and kernels (`ctx.compute`), and return whether a prompt is computed once for its answers.

    Args:
        ctx: of the run; a checkpoint's layout is kept.
        objective: of the run.
        rows: to train on, apart.

    Raises:
        InputError: --shared-prefix asks for what the model or the checkpoint does not allow.
    """
    settings, base = ctx.settings, ctx.base
    asked = settings.objective.shared_prefix
    if ctx.resumed is not None:
        before = asked_before(ctx.resumed)
        if asked not in (before, "auto"):
            raise InputError(f"--shared-prefix {asked}: the run that you resume has it {before}; leave the flag out")
        asked = before
    sampled = objective.policy is not None
    if objective.records != "pairs" and not sampled:
        ctx.compute = choose_compute(settings, base, rows, ctx.strategy)
        return Layout()
    shape = model_shape(base.model, base.config)
    problem = layout_problem(asked, base.model, shape, rows)
    # Sampled answers may be shorter than their room, so that sharing saves more work than is known here.
    little = problem if sampled and asked == "auto" and layout_problem("on", base.model, shape, rows) is None else None
    if problem is None or little is not None:
        planned, also = (joined(rows), None) if little is None else (rows, joined(rows))
        rotate_by_token(base.model)  # before kernels are recorded on such rows
        ctx.compute = choose_compute(settings, base, planned, ctx.strategy, also)
        problem = sharing_problem(base.model, base.config, ctx.compute.loss, ctx.compute.kernels)
        if problem is None:
            return shared_layout(objective, shape, rows, little)
    if asked == "on":
        raise InputError(f"--shared-prefix on: {problem}; leave the flag out")
    words = f"{'a row for each answer' if sampled else 'separate rows for both answers'} ({problem})"
    ctx.compute = choose_compute(settings, base, rows, ctx.strategy)
    return Layout(words=words)


def shared_layout(objective: Objective, shape: ModelShape, rows: EncodedSet, little: str | None) -> Layout:
    """Return the layout of a run whose model can share prompts.

    Args:
        objective: of the run.
        shape: of the model.
        rows: to train on, apart.
        little: why answers of full length should stay apart, which shorter ones may not; None: they share a row too.
    """
    share = saved_share(rows)
    if objective.policy is None:
        return Layout(True, f"prompts shared ({share:.0%} fewer positions)")
    joining = Joining(work_of(shape), little is None)
    if little is None:
        return Layout(
            True, f"a prompt shared by its {rows.group} answers (at least {share:.0%} fewer positions)", joining
        )
    return Layout(False, f"a prompt shared by its answers where that saves work ({little} with full answers)", joining)


def that_fits(
    layout: Layout, settings: TrainSettings, shape: ModelShape, rows: EncodedSet, terms: KernelTerms, memory: MemoryPlan
) -> tuple[Layout, MemoryPlan]:
    """Return the layout, and the memory that its rows need; rows that are joined by batch stay apart if they would not fit.

    Args:
        layout: that was chosen.
        settings: of the run, with everything chosen.
        shape, terms: of the model and its kernels.
        rows: to train on, as they are planned.
        memory: that these need.
    """
    if layout.joining is None or layout.shared:
        return layout, memory
    needed = joined_memory(settings, shape, rows, terms)
    if needed.fits or not settings.loop.memory_check:
        return layout, max(memory, needed, key=lambda one: one.needed_bytes)
    return Layout(words=f"a row for each answer (one for all would need {gigabytes(needed.needed_bytes)})"), memory


def joined_memory(settings: TrainSettings, shape: ModelShape, rows: EncodedSet, kernels: KernelTerms) -> MemoryPlan:
    """Return the memory of a run's largest batch if the answers to a prompt share a row.

    Args:
        settings: of the run, with everything chosen for rows with one answer each.
        shape: the adapted model.
        rows: training data, with room for an answer in each row.
        kernels: the memory of the chosen kernels.
    """
    machine = replace(this_machine(settings.model.dtype), kernels=kernels)
    width, tokens = max(1, int(rows.lengths.max(initial=2)) - 1), settings.loop.batch_tokens or DEFAULT_BATCH_TOKENS
    prompts = largest_batch(width, settings, tokens, len(rows))[0] // rows.group
    together = replace(settings, objective=replace(settings.objective, shared_prefix="on"))
    columns = int(joined(rows).lengths.max(initial=2)) - 1
    run = run_of(together, prompts, columns, settings.loop.grad_checkpoint)
    return plan_memory(shape, run, machine, budget_of(settings.loop, machine))
