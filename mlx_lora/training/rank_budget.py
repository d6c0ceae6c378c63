"""AdaLoRA's rank budget: unimportant ranks are switched off until the average rank is the target.

    D = scale B diag(e) A,  and a rank i of a layer is the triplet (A_i, e_i, B_i)
    importance of a number   I = EMA(|w g|),  uncertainty  U = EMA(| |w g| - I |),  s = I U
    importance of a triplet  s(e_i) + mean_j s(A_ij) + mean_j s(B_ji)
    penalty                  gamma * mean over factors of |A A^T - 1|_F and |B^T B - 1|_F

A rank is off if its gain e_i is zero, so shapes do not change and nothing is compiled again. Until the final phase a
rank that is off may be switched on again.

Source: AdaLoRA, arXiv 2303.10512, eq. 4, 7 to 11 and algorithm 1; order of operations as in PEFT's RankAllocator.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.training.optim import Masters

BETA = 0.85  # of both averages, as in the paper's section 4.1 and PEFT


@dataclass(frozen=True)
class BudgetSchedule:
    """The number of ranks that are on after each step: all, then fewer along a cubic, then the target.

    Attributes:
        initial, target: the number of ranks in all layers together.
        total_steps: of the run.
        warmup: first steps without a cut.
        final: last steps without a change.
        every: steps between cuts.
    """

    initial: int
    target: int
    total_steps: int
    warmup: int
    final: int
    every: int

    def budget(self, step: int) -> int:
        """Return the number of ranks after step `step` (from 1)."""
        if step <= self.warmup:
            return self.initial
        if step > self.total_steps - self.final:
            return self.target
        left = 1 - (step - self.warmup) / (self.total_steps - self.final - self.warmup)
        return int((self.initial - self.target) * left**3 + self.target)

    def cuts(self, step: int) -> bool:
        """Tell whether ranks are chosen again after this step."""
        last = self.total_steps - self.final
        return step == last or (self.warmup < step < last and step % self.every == 0)


class RankBudget:
    """Tracks the importance of every parameter and switches ranks off by it."""

    def __init__(self, model: nn.Module, masters_like: dict, schedule: BudgetSchedule, orthogonality: float):
        """Set up.

        Args:
            model: adapted with gains (`lora_e`).
            masters_like: Masters.arrays, for the shapes of the averages.
            schedule: of the budget.
            orthogonality: gamma, weight of the penalty.
        """
        self._paths = list(adapter_layers(model))
        self.schedule = schedule
        self._orthogonality = orthogonality
        self.state = {
            "importance": tree_map(mx.zeros_like, masters_like),
            "uncertainty": tree_map(mx.zeros_like, masters_like),
        }
        self._off: dict[str, mx.array] = {}

    def penalty(self, parameters: dict[str, mx.array]) -> mx.array | None:
        """Return gamma times the factors' mean distance from orthogonality."""
        if self._orthogonality == 0:
            return None
        distances = [_distance(gram) for path in self._paths for gram in _grams(parameters, path)]
        return self._orthogonality * mx.stack(distances).mean()

    def observe(self, arrays: dict, gradients: dict, applied: mx.array) -> None:
        """Update both averages, unless the step was skipped."""
        sensitivity = tree_map(lambda w, g: mx.abs(w * g), arrays, gradients)
        old_i, old_u = self.state["importance"], self.state["uncertainty"]
        new_i = tree_map(lambda i, s: BETA * i + (1 - BETA) * s, old_i, sensitivity)
        new_u = tree_map(lambda u, s, i: BETA * u + (1 - BETA) * mx.abs(s - i), old_u, sensitivity, new_i)
        for name, new, old in (("importance", new_i, old_i), ("uncertainty", new_u, old_u)):
            self.state[name].update(tree_map(lambda n, o: mx.where(applied, n, o), new, old))

    def after(self, step: int, masters: Masters, optimizer: optim.Optimizer) -> None:
        """Choose the ranks that are on, or in the final phase keep the others off."""
        if self.schedule.cuts(step):
            self._off = self._least(self.schedule.budget(step), masters)
        elif step <= self.schedule.total_steps - self.schedule.final:
            return
        if not self._off:
            return
        parameters = masters.by_name()
        for name, off in self._off.items():
            parameters[name] = mx.where(off, 0.0, parameters[name])
        masters.put_by_name(parameters)

    def extras(self) -> dict[str, mx.array]:
        """Return which ranks are off, by name of gains."""
        return dict(self._off)

    def restore(self, extras: dict[str, mx.array]) -> None:
        """Restore which ranks are off."""
        self._off = dict(extras)

    def _least(self, budget: int, masters: Masters) -> dict[str, mx.array]:
        """Return, by name of gains, which ranks exceed the budget; empty if all fit."""
        beyond = self.schedule.initial - budget
        if beyond <= 0:
            return {}
        scores = tree_map(mx.multiply, self.state["importance"], self.state["uncertainty"])
        by_name = masters.by_name(scores)
        triplets = {f"{path}.lora_e": _triplets(by_name, path) for path in self._paths}
        every = mx.concatenate([score.reshape(-1) for score in triplets.values()])
        threshold = mx.sort(every)[beyond - 1]
        return {name: score <= threshold for name, score in triplets.items()}


def _factors(parameters: dict[str, mx.array], path: str) -> tuple[mx.array, mx.array]:
    """Return a layer's factors with the rank first in A and last in B: (..., r, in), (..., out, r)."""
    a, b = parameters[f"{path}.lora_a"], parameters[f"{path}.lora_b"]
    # Experts' factors are stored like this, (E, r, in) and (E, out, r); those of other layers are the transposes.
    return (a, b) if a.ndim == 3 else (a.T, b.T)


def _grams(parameters: dict[str, mx.array], path: str) -> Iterator[mx.array]:
    a, b = _factors(parameters, path)
    yield a @ a.swapaxes(-1, -2)  # (..., r, r)
    yield b.swapaxes(-1, -2) @ b


def _distance(gram: mx.array) -> mx.array:
    """Return |gram - 1|_F, taking all experts of a layer as one matrix."""
    # The tiny term keeps the root's gradient finite at zero.
    return mx.sqrt(mx.square(gram - mx.eye(gram.shape[-1])).sum() + 1e-30)


def _triplets(scores: dict[str, mx.array], path: str) -> mx.array:
    """Return each rank's importance, in the shape of the gains."""
    a, b = _factors(scores, path)
    return scores[f"{path}.lora_e"] + a.mean(axis=-1) + b.mean(axis=-2)
