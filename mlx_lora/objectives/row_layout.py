"""How the answers to a prompt lie in a run's rows: each in its own, or all behind the prompt in one.

The rows of pairs are joined before the run. Those of sampled answers are planned with room for answers, joined where answers
of full length would save work; if only shorter ones may, they are planned apart, and each batch is joined or not when its
answers are there (objectives/prefix_sharing.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mlx_lora.config.settings import TrainSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import DataSplits
from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.prefix_sharing import Joining, joined, saved_share, work_of
from mlx_lora.planner.memory import MemoryPlan
from mlx_lora.planner.shapes import KernelTerms, ModelShape
from mlx_lora.trainer.fit import joined_memory
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


def asked_before(identity: dict[str, Any]) -> str:
    """Return the --shared-prefix that a checkpoint's run goes on with."""
    return {True: "on", BY_BATCH: "auto"}.get(identity.get(KEY), "off")


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
