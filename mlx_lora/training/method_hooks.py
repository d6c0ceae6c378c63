"""The code that a method runs between the gradient and the next step: AdaLoRA's rank budget, ReLoRA's restarts.

The step calls a method three times: for a penalty to add to the gradient, to observe an update (both inside the
compiled function), and after the step (on the host, before the model gets its parameters).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.training.optim import Masters


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
        """Restore what `extras` returned."""


class Restarts:
    """ReLoRA: at regular intervals, freezes the factors and starts new ones.

    The base's weight is not changed: each cycle adds a pair of frozen factors, so the sum of all cycles is a LoRA of
    rank n * r. The optimizer's moments are pruned by magnitude, as in the paper; the learning rate warms up again after
    each restart (optim.restarted).

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
        self.cycles = int(extras["cycles"].item())

    def _pruned(self, name: str, entry: dict, masters: Masters) -> dict:
        """Return one array's moments with all but the largest of each parameter set to zero.

        Both of Adam's moments are pruned at the same indices, chosen by the second moment: a first moment that stays
        where the second is zero would make a step 1 / sqrt(1 - beta2) = 30 times too large.
        """
        guide = entry.get("v")
        if guide is None:
            return entry
        parts = masters.by_name({name: guide}) if masters.is_flat else {name: guide}
        kept = mx.concatenate([self._largest(mx.abs(part).reshape(-1)) for part in parts.values()])
        return {
            key: mx.where(kept.reshape(value.shape), value, 0.0) if value.shape == guide.shape else value
            for key, value in entry.items()
        }

    def _largest(self, sizes: mx.array) -> mx.array:
        """Return which of these numbers are kept, (n,) bool."""
        count = round(sizes.size * (1 - self._prune_ratio))
        return sizes >= mx.sort(sizes)[-count] if count else mx.zeros(sizes.shape, mx.bool_)
