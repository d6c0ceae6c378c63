"""Predict the memory of several runs that are trained together on one base (`train --runs`).

    base + what each run holds: masters, optimizer, frozen factors + what the steps that are computed together need

The base is there once. Between steps a run holds its own state only; during a step there are also the activations of all rows that are
computed together, which are as many as fit. So the least that several runs need is the state of all and the largest step of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_lora.config.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from mlx_lora.planner.memory import MemoryPlan
    from mlx_lora.planner.shapes import ModelShape

SINGLE = 4  # bytes of a float32


def held_bytes(shape: ModelShape, optimizer: str) -> int:
    """Return what a run holds between its steps beside the base: masters, the optimizer's moments and frozen factors."""
    masters = SINGLE * shape.trained
    return masters * (1 + OPTIMIZERS[optimizer].state_copies) + shape.frozen_adapter_bytes


def activation_bytes(memory: MemoryPlan) -> int:
    """Return what grows with the rows of a step: the most of what any phase has beside base, adapter and optimizer."""
    fixed = sum(memory.parts.get(name, 0) for name in ("base", "adapter", "optimizer", "gradients"))
    return max(0, memory.peak_bytes - fixed)


def most_that_fit(base_bytes: int, held: Sequence[int], steps: Sequence[int], budget_bytes: int) -> int:
    """Return how many of some runs fit in memory together, taken in their order.

    Args:
        base_bytes: of the base.
        held: what each holds between its steps.
        steps: what the step of each needs in addition, computed by itself.
        budget_bytes: what all may use.
    """
    total = base_bytes
    for count, (own, step) in enumerate(zip(held, steps, strict=True)):
        total += own
        if total + max(steps[: count + 1], default=step) > budget_bytes:
            return count
    return len(held)
