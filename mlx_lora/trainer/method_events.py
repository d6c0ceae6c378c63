"""Run what a method does between the gradient and the next step: AdaLoRA's rank budget, ReLoRA's restarts, LoRA+'s rates.

The step calls a method's `Events` three times: for a penalty to add to the gradient, to observe an update (both inside the
compiled function), and after the step (on the host, before the model gets its parameters).

AdaLoRA's rank budget switches unimportant ranks off until the average rank is the target:

    D = scale B diag(e) A,  and a rank i of a layer is the triplet (A_i, e_i, B_i)
    importance of a number   I = EMA(|w g|),  uncertainty  U = EMA(| |w g| - I |),  s = I U
    importance of a triplet  s(e_i) + mean_j s(A_ij) + mean_j s(B_ji)
    penalty                  gamma * mean over factors of |A A^T - 1|_F and |B^T B - 1|_F

A rank is off if its gain e_i is zero, so shapes do not change and nothing is compiled again. Until the final phase a
rank that is off may be switched on again.

Source: AdaLoRA, arXiv 2303.10512, eq. 4, 7 to 11 and algorithm 1; order of operations as in PEFT's RankAllocator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_lora.adapters.inject import adapter_layers, fresh_factors
from mlx_lora.config.presets import PRESETS
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.config.settings import AdapterSettings
    from mlx_lora.trainer.optimizer import Masters


class Events(Protocol):
    """A method's part in the step.

    Attributes:
        state: arrays that `observe` changes in place, and that a resumed run needs.
    """

    state: dict

    def penalty(self, parameters: dict[str, mx.array]) -> mx.array | None:
        """Return what is added to the mean loss, or None; a pure function of the parameters by name."""

    def observe(self, arrays: dict, gradients: dict, applied: mx.array) -> None:
        """Observe an update: the new parameters and clipped gradients, both laid out like Masters.arrays."""

    def after(self, step: int, masters: Masters, optimizer: optim.Optimizer) -> None:
        """Act after step `step` (from 1); may change the parameters in `masters`."""

    def extras(self) -> dict[str, mx.array]:
        """Return the arrays that a resumed run needs in addition to `state`."""
        ...

    def restore(self, extras: dict[str, mx.array]) -> None:
        """Restore what `extras` returned; what is not there is as before the first step."""


# From a run's settings


def make_events(
    settings: AdapterSettings, model: nn.Module, total_steps: int, seed: int
) -> Callable[[dict], Events] | None:
    """Return a function that creates the method's events for a step, or None if the method has none.

    Args:
        settings: of the adapter.
        model: adapted.
        total_steps: of the run.
        seed: for the new factors after ReLoRA's restarts.
    """
    kind = PRESETS[settings.method].events
    if every := restart_every(settings, total_steps):
        prune = 0.99 if settings.relora_prune_ratio is None else settings.relora_prune_ratio

        def fresh(path: str, layer: Any, cycle: int) -> tuple[mx.array, mx.array]:
            return fresh_factors(f"{path}#{cycle}", layer, seed)

        return lambda arrays: Restarts(model, every, total_steps, prune, fresh)
    if kind == "rank-budget":
        schedule = budget_schedule(settings, model, total_steps)
        weight = 0.5 if settings.orth_reg_weight is None else settings.orth_reg_weight
        return lambda arrays: RankBudget(model, arrays, schedule, weight)
    return None


def budget_schedule(settings: AdapterSettings, model: nn.Module, total_steps: int) -> BudgetSchedule:
    """Return AdaLoRA's budget schedule for the run.

    Args:
        settings: give the phases in steps, or in fractions of the run.
        model: adapted with gains.
        total_steps: of the run.

    Raises:
        InputError: no step is left between the first and the final phase for reducing the rank.
    """
    gains = [layer.lora_e for layer in adapter_layers(model).values()]
    initial = sum(gain.size for gain in gains)
    target = sum(settings.rank * gain.size // gain.shape[-1] for gain in gains)

    def steps(value: float | None, default: float) -> int:
        value = default if value is None else value
        return round(value * total_steps) if value < 1 else round(value)

    warmup, final = steps(settings.adalora_tinit, 0.1), steps(settings.adalora_tfinal, 0.3)
    if warmup + final >= total_steps:
        raise InputError(
            f"--adalora-tinit and --adalora-tfinal: {warmup} and {final} of {total_steps} steps leave none to reduce the rank; "
            "lower them, or train longer"
        )
    every = settings.adalora_delta_t or max(1, total_steps // 100)
    return BudgetSchedule(initial, target, total_steps, warmup, final, every)


def restart_every(settings: AdapterSettings, total_steps: int) -> int | None:
    """Return the steps between ReLoRA's restarts, by default a quarter of the run; None for other methods."""
    if PRESETS[settings.method].events != "restarts":
        return None
    return settings.relora_every or max(1, -(-total_steps // 4))


def restart_warmup(settings: AdapterSettings, total_steps: int) -> int:
    """Return the warm-up steps after each restart, by default a tenth of a cycle; 0 for other methods."""
    if settings.relora_warmup is not None:
        return settings.relora_warmup
    return (restart_every(settings, total_steps) or 0) // 10


def rates_of(adapter: AdapterSettings, of_head: float = 1.0) -> Callable[[str], float] | None:
    """Return a function that gives each parameter's multiple of the learning rate by name, None if all are equal; `of_head`: a score head's."""
    preset = PRESETS[adapter.method]
    ratio = preset.rate_of_b if adapter.loraplus_lr_ratio is None else adapter.loraplus_lr_ratio
    of_b = lambda name: ratio if name.endswith("lora_b") else 1.0  # noqa: E731
    return None if ratio == of_head == 1 else lambda name: of_head if name.startswith("score.") else of_b(name)


# ReLoRA


class Restarts:
    """ReLoRA: at regular intervals, freezes the factors and starts new ones.

    The base's weight is not changed: each cycle adds a pair of frozen factors, so the sum of all cycles is a LoRA of
    rank n * r. The optimizer's moments are pruned by magnitude, as in the paper; the learning rate warms up again after
    each restart (`restarted` in trainer/optimizer.py).

    Source: ReLoRA, arXiv 2307.05695, algorithm 1 and section 3 (pruning of the optimizer's state).
    """

    def __init__(
        self,
        model: nn.Module,
        every: int,
        total_steps: int,
        prune_ratio: float,
        fresh: Callable[[str, nn.Module, int], tuple[mx.array, mx.array]],
    ):
        """Set up.

        Args:
            model: adapted with plain LoRA layers; their `fixed_a` and `fixed_b` grow.
            every: steps between restarts.
            total_steps: of the run; there is no restart after the last.
            prune_ratio: fraction of each parameter's moments, the smallest ones, that become zero.
            fresh: (path, layer, cycle) -> initial factors in the layer's own orientation.
        """
        self.state: dict = {}
        self.cycles = 1
        self._model = model
        self._every = every
        self._total_steps = total_steps
        self._prune_ratio = prune_ratio
        self._fresh = fresh

    def penalty(self, parameters: dict[str, mx.array]) -> None:
        """Return None: restarts add nothing to the loss."""

    def observe(self, arrays: dict, gradients: dict, applied: mx.array) -> None:
        """Do nothing: restarts need no observations."""

    def after(self, step: int, masters: Masters, optimizer: optim.Optimizer) -> None:
        """Restart if a cycle ends with this step."""
        if step % self._every or step >= self._total_steps:
            return
        parameters = masters.by_name()
        for path, layer in adapter_layers(self._model).items():
            a, b = (parameters[f"{path}.{name}"] for name in ("lora_a", "lora_b"))
            layer.merge(a, b)
            fresh_a, fresh_b = self._fresh(path, layer, self.cycles)
            parameters[f"{path}.lora_a"], parameters[f"{path}.lora_b"] = fresh_a, fresh_b
        self.cycles += 1
        masters.put_by_name(parameters)
        for name, entry in optimizer.state.items():
            if isinstance(entry, dict):
                entry.update(self._pruned(name, entry, masters))  # in place: the compiled step captured this dict
        mx.eval(self._model.parameters(), masters.arrays, optimizer.state)

    def extras(self) -> dict[str, mx.array]:
        """Return the count of cycles, from which the next cycle's random factors follow."""
        return {"cycles": mx.array(self.cycles)}

    def restore(self, extras: dict[str, mx.array]) -> None:
        """Restore the count of cycles."""
        self.cycles = int(extras["cycles"].item()) if "cycles" in extras else 1

    def _pruned(self, name: str, entry: dict, masters: Masters) -> dict:
        """Return one array's moments with all but the largest of each parameter set to zero.

        Both of Adam's moments are pruned at the same indices, chosen by the second moment: a first moment that stays
        where the second is zero would make a step 1 / sqrt(1 - beta2) = 30 times too large.
        """
        guide = entry.get("v")
        if guide is None:
            return entry
        parts = masters.by_name({name: guide}).values()
        kept = mx.concatenate([self._largest(mx.abs(part).reshape(-1)) for part in parts])
        return {
            key: mx.where(kept.reshape(value.shape), value, 0.0) if value.shape == guide.shape else value
            for key, value in entry.items()
        }

    def _largest(self, sizes: mx.array) -> mx.array:
        """Return which of these numbers are kept, (n,) bool."""
        count = round(sizes.size * (1 - self._prune_ratio))
        return sizes >= mx.sort(sizes)[-count] if count else mx.zeros(sizes.shape, mx.bool_)


# AdaLoRA

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
        """Return gamma times the factors' mean distance from orthogonality, |gram - 1|_F."""
        if self._orthogonality == 0:
            return None
        grams = [
            gram for path in self._paths for gram in _grams(parameters, path)
        ]  # all experts of a layer are one matrix
        # The tiny term keeps the root's gradient finite at zero.
        distances = [mx.sqrt(mx.square(gram - mx.eye(gram.shape[-1])).sum() + 1e-30) for gram in grams]
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


def _triplets(scores: dict[str, mx.array], path: str) -> mx.array:
    """Return each rank's importance, in the shape of the gains."""
    a, b = _factors(scores, path)
    return scores[f"{path}.lora_e"] + a.mean(axis=-1) + b.mean(axis=-2)
