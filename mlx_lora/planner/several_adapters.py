"""Predict the memory of several adapters that are trained at a time on one base, which is there once.

Runs in one pass (`train --runs`):

    base + what each run holds: masters, optimizer, frozen factors + what the steps that are computed together need

Between steps a run holds its own state only; during a step there are also the activations of all rows that are computed together, which
are as many as fit. So the least that several runs need is the state of all and the largest step of one.

Clients of a server (`serve --training`):

    base + for each client: masters, Adam's moments, a gradient that waits for its step + what one request needs

Requests are computed one at a time, so the activations are those of one micro-batch whatever the number of clients. Between two requests
each client's model holds its factors and their moments in float32, and, from its first forward_backward to its optim_step, a sum of
gradients. Answers are sampled between requests, from copies of the factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_lora.config.optimizers import OPTIMIZERS
from mlx_lora.planner.memory import ROLLOUT, SINGLE, largest_phase, phase_parts, rollout_parts

if TYPE_CHECKING:
    from mlx_lora.planner.memory import MemoryPlan
    from mlx_lora.planner.shapes import Machine, ModelShape, Rollout, RunShape

# Arrays like a model's masters that a step of Adam makes before it can let go of the old ones: the scaled gradient, new masters and
# moments, and what is computed ahead of them. Fitted on a CPU.
STEP_COPIES = 6.0


# Runs in one pass


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


# Clients of a server


def plan_clients(
    shape: ModelShape, clients: int, run: RunShape, rollout: Rollout, sets: int, machine: Machine, budget_bytes: int
) -> MemoryPlan:
    """Return the memory plan of a training server.

    Args:
        shape: the model with one client's adapter.
        clients: models that are trained at a time, each of that shape.
        run: the largest micro-batch of a request.
        rollout: the answers that are sampled at a time.
        sets: of weights that the server keeps in memory to sample from, at most.
        machine: that it runs on.
        budget_bytes: what it may use.
    """
    masters = SINGLE * shape.trained
    saved = min(clients, sets) * shape.trained * machine.number_bytes
    others = {
        "other clients": (clients - 1) * 3 * masters,
        "gradients that wait": (clients - 1) * masters,
        "weights to sample from": saved,
    }
    # A server compiles no step. The sum of a request's gradients is there from its second micro-batch on.
    phases = phase_parts(shape, replace(run, steps=0, optimizer="adamw", accumulates=True), machine)
    phases = {name: parts if name == "load" else parts | others for name, parts in phases.items()}
    phases["update"]["new state"] = int(STEP_COPIES * masters)
    held = {"base": shape.base_bytes, "adapter": masters, "optimizer": 2 * masters, "gradients": masters}
    sampled = rollout_parts(shape, rollout, machine)
    # While rows join the batch, all their keys and values are copied, and the weights in use are in the layers as well.
    sampled["copies of them"] = sampled["keys and values"]
    phases[ROLLOUT] = held | others | {"weights to sample from": 2 * saved} | sampled
    return largest_phase(phases, machine, min(budget_bytes, machine.working_set_bytes), shape.not_known)
