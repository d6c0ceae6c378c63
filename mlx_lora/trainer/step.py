"""The compiled optimizer step: micro-batches in, one token-weighted, clipped, guarded update out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_lora.losses.cross_entropy import Arrays, Kernels, LossFunction, compiled_over, differentiation, token_arrays
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.trainer.optimizer import ELEMENTWISE, Masters, clip_scale, scaled

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.trainer.method_events import Events


class StepResult(NamedTuple):
    """The report of one optimizer step, as lazy scalars, which cost nothing until they are read.

    Attributes:
        loss_sum: summed loss.
        count: the number of trained tokens, or of examples for an objective whose loss is a mean over examples.
        grad_norm: global norm of the mean gradient before the clip.
        applied: False when the update was skipped because loss or gradient was not finite, or nothing was trained.
        reports: sums of the numbers that the objective reports.
        asked: how many ranks had been asked to stop when they took the step; None for a single process.
    """

    loss_sum: mx.array
    count: mx.array
    grad_norm: mx.array
    applied: mx.array
    reports: dict[str, mx.array]
    asked: mx.array | None = None

    @property
    def idle(self) -> bool:
        """Whether no token was trained and all is finite: there was nothing to update by. Waits for the device."""
        return not self.count.item() and math.isfinite(self.loss_sum.item() + self.grad_norm.item())


class StepSums(NamedTuple):
    """The sums of an optimizer step's micro-batches, of all ranks.

    Attributes:
        loss_sum, count: as in `StepResult`.
        reports: sums of the numbers that the objective reports.
        gradients: of the masters, by name or flat.
        asked: as in `StepResult`.
    """

    loss_sum: mx.array
    count: mx.array
    reports: dict[str, mx.array]
    gradients: dict[str, mx.array]
    asked: mx.array | None = None


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed.

    Attributes:
        kernels: exchanges the model's kernels (`exchanging` of kernels/choose.py).
        compiled: compile the loss and its gradient; a model that computes values on its way cannot be.
        wait: wait for the device after each micro-batch, so that other programs (the display) can use it.
        rate_of: parameter name -> multiple of the learning rate (LoRA+); None: 1 for all.
        events: makes the method's own part of the step (AdaLoRA, ReLoRA), given Masters.arrays; None for none.
        prepare: brings the batches of a whole step into the form that the loss needs.
        arrays_of: returns the arguments of the loss for a batch, on the device.
        reports: names of the numbers that the loss reports besides sum and count.
    """

    kernels: Kernels = nullcontext
    compiled: bool = True
    wait: bool = False
    rate_of: Callable[[str], float] | None = None
    events: Callable[[dict], Events] | None = None
    prepare: Callable[[list[Batch]], list[Batch]] = list
    arrays_of: Callable[[Batch], Arrays] = token_arrays
    reports: tuple[str, ...] = ()


class Step:
    """Runs optimizer steps on `model`; compiled once per batch shape.

    `step(batches)` is `step.optim_step(step.forward_backward(batches))`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        loss: LossFunction,
        max_grad_norm: float,
        options: StepOptions = StepOptions(),
        strategy: Strategy = SINGLE_DEVICE,
    ):
        """Set up the step.

        Args:
            model: its trainable parameters are what is trained.
            optimizer: initialized here on those parameters.
            loss: returns (sum, count), and if an objective reports more, a dict of sums.
            max_grad_norm: global-norm clip; 0 for none.
            options: how it is computed.
            strategy: divides steps among ranks.
        """
        self._options = options
        self.model = model
        self._submit = mx.eval if options.wait else mx.async_eval
        self.optimizer = optimizer
        self.masters = Masters(model, flat=isinstance(optimizer, ELEMENTWISE))
        optimizer.init(self.masters.arrays)
        self._rates = None if options.rate_of is None else self.masters.rates(options.rate_of)
        self._max_grad_norm = max_grad_norm
        self.events = None if options.events is None else options.events(self.masters.arrays)
        self.taken = 0
        self._strategy = strategy
        mx.eval(self._rates or {})
        differentiate = differentiation(model, loss, options.kernels, strategy)

        def micro(arrays: Arrays) -> tuple[mx.array, mx.array, dict, dict]:
            with self.masters.cast() as factor:
                loss_sum, tokens, reports, grads = differentiate(arrays)
            grads = self.masters.gathered(grads)
            return loss_sum, tokens, reports, grads if factor == 1 else tree_map(lambda g: factor * g, grads)

        # Two functions: another batch shape traces the first again, never the optimizer.
        self._micro = compiled_over(model, micro, self.masters.arrays) if options.compiled else micro
        self.state = [self.masters.arrays, optimizer.state, {} if self.events is None else self.events.state]
        self._apply = mx.compile(self._update, inputs=self.state, outputs=self.state)

    def __call__(
        self,
        batches: list[Batch],
        asked: bool = False,
        divide: Callable[[list[Batch]], list[Batch]] = list,
    ) -> StepResult:
        """Take one optimizer step over `batches`, weighted by their trained tokens.

        Args:
            batches: micro-batches, all ranks' together.
            asked: whether this rank, one of several, has been asked to stop; the result tells every rank.
            divide: cuts the part of this rank, one of several, into smaller batches.

        Returns:
            Lazy results; the update is already under way on the device (with `wait`, done).
        """
        return self.optim_step(self.forward_backward(batches, asked, divide))

    def forward_backward(
        self,
        batches: list[Batch],
        asked: bool = False,
        divide: Callable[[list[Batch]], list[Batch]] = list,
    ) -> StepSums:
        """Return the summed loss and gradients of an optimizer step's micro-batches; arguments as for a call."""
        batches, arrays_of = self._options.prepare(batches), self._options.arrays_of
        self._strategy.reseed(self.taken)
        own = map(arrays_of, self._strategy.own(batches, divide))
        several = len(batches) > 1 or self._strategy.ranks.size > 1
        total, said = self._strategy.reduce(self._sum(own, several) or self._nothing(), asked)
        loss_sum, count, reports, grads = total
        return StepSums(loss_sum, count, reports, grads, said)

    def optim_step(self, sums: StepSums) -> StepResult:
        """Update the parameters by summed gradients; the update is under way on the device when this returns."""
        result = self._apply(sums.loss_sum, sums.count, sums.reports, sums.gradients)._replace(asked=sums.asked)
        self.taken += 1
        if self.events is not None:
            self.events.after(self.taken, self.masters, self.optimizer)
        self.masters.hand_out()
        self._submit(self.state, result)
        return result

    def _sum(self, micro_batches: Iterable[Arrays], several: bool) -> list | None:
        """Return summed loss, tokens and gradients of micro-batches, None without any."""
        total = None
        for arrays in micro_batches:
            part = list(self._micro(arrays))
            total = part if total is None else tree_map(mx.add, total, part)
            if several:
                self._submit(total)  # one micro-batch's activations at a time
        return total

    def _nothing(self) -> list:
        """Return what a rank without rows adds to a step."""
        zero = mx.array(0.0)
        return [zero, zero, dict.fromkeys(self._options.reports, zero), tree_map(mx.zeros_like, self.masters.arrays)]

    def _with_penalty(self, grads: dict) -> dict:
        """Return the gradients with that of the method's penalty. The reported loss stays the data's own."""
        parameters = self.masters.by_name()
        if self.events is None or self.events.penalty(parameters) is None:
            return grads
        # By name: the gradient of cutting up a flat array is as large as the array, once for each parameter.
        own = mx.grad(self.events.penalty)(parameters)
        return tree_map(mx.add, grads, self.masters.from_names(own))

    def _update(self, loss_sum: mx.array, count: mx.array, reports: dict, grads: dict) -> StepResult:
        """Update masters and optimizer by summed gradients; traced once."""
        optimizer, rates = self.optimizer, self._rates
        grads = scaled(grads, 1 / mx.where(count > 0, count, 1))  # weights may add up to less than 1
        if self.events is not None:
            grads = self._with_penalty(grads)
        norm, factor = clip_scale(grads, self._max_grad_norm)
        # Nothing to count means no gradient: momentum and decay alone must not move the factors.
        finite = mx.isfinite(loss_sum) & mx.isfinite(norm)
        applied, counted = finite & (count > 0), finite & (count >= 0)
        state = tree_map(lambda a: a, optimizer.state)
        grads = scaled(grads, factor)
        updated = optimizer.apply_gradients(grads, self.masters.arrays)
        if rates is not None:
            # Each of our optimizers changes a number in proportion to its rate, weight decay included.
            updated = tree_map(lambda new, old, rate: old + rate * (new - old), updated, self.masters.arrays, rates)
        if self.events is not None:
            self.events.observe(updated, grads, applied)
        # Chosen on the device: the host need not wait for the answer.
        chosen = _choose(applied, updated, self.masters.arrays)
        # In place, because the compiled function captured this dict.
        progress = {name: optimizer.state[name] for name in ("step", "learning_rate") if name in optimizer.state}
        # A step without anything to train on is one of the run's steps: its number is that of `taken`, which a resumed run takes from it.
        optimizer.state.update(
            _choose(applied, optimizer.state, state)
            | _choose(counted, progress, {name: state[name] for name in progress})
        )
        # Adam's parameters come from its new moments as they are before the choice. Reading those after it too makes MLX compile all
        # three into one pass over memory.
        for name, new in list(chosen.items()):
            moments: Any = optimizer.state[name]
            if "m" in moments:
                chosen[name] = mx.where((moments["m"] == moments["m"]) & (moments["v"] == moments["v"]), new, new)
        self.masters.put(chosen)
        return StepResult(loss_sum, count, norm, applied, reports)

    @property
    def learning_rate(self) -> float:
        """The rate of the last step taken."""
        return float(self.optimizer.learning_rate)


def _choose(condition: mx.array, new: dict, old: dict) -> dict:
    return tree_map(lambda a, b: mx.where(condition, a, b), new, old)
