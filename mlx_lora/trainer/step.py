"""The compiled optimizer step: micro-batches in, one token-weighted, clipped, guarded update out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_lora.kernels.measure import left_unchanged
from mlx_lora.kernels.table import Choose, assumed, exchanging
from mlx_lora.losses.check import check_arrays, way_out
from mlx_lora.losses.cross_entropy import PLAIN, Arrays, Loss, LossFunction, token_arrays
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.load import embedding_rows
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.trainer.schedules import ELEMENTWISE, Masters, clip_scale, scaled
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.kernels.attention import AttentionCall
    from mlx_lora.trainer.schedules import Events


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


Kernels = Callable[[nn.Module], AbstractContextManager]
"""model -> the context in which it computes with other kernels than its own (kernels/table.py)."""


def own_kernels(model: nn.Module) -> AbstractContextManager:
    """Compute with the model's own kernels."""
    return nullcontext()


Differentiation = Callable[..., tuple[mx.array, mx.array, dict, dict]]
"""(arrays) -> (loss sum, tokens, sums to report, gradients of the trainable parameters)."""


def differentiation(
    model: nn.Module, loss: LossFunction, kernels: Kernels = own_kernels, strategy: Strategy = SINGLE_DEVICE
) -> Differentiation:
    """Return the loss of a micro-batch with its gradient, as `Step` takes them; not compiled."""
    gradient = strategy.value_and_grad(model, loss)

    def differentiate(arrays: Arrays) -> tuple[mx.array, mx.array, dict, dict]:
        # The kernels around the backward pass as well: checkpointed blocks run again there.
        with left_unchanged(model), kernels(model):
            (loss_sum, tokens, *reports), grads = gradient(model, arrays)
        return loss_sum, tokens, reports[0] if reports else {}, grads

    return differentiate


def compiled_over(model: nn.Module, function: Differentiation) -> Differentiation:
    """Compile a function of batches that reads the model and draws random numbers."""
    return mx.compile(function, inputs=[model.state, mx.random.state], outputs=[mx.random.state])


@dataclass(frozen=True)
class StepOptions:
    """How a step is computed.

    Attributes:
        kernels: exchanges the model's kernels (`exchanging` of kernels/table.py).
        compiled: compile the loss and its gradient; a model that computes values on its way cannot be.
        wait: wait for the device after each micro-batch, so that other programs (the display) can use it.
        rate_of: parameter name -> multiple of the learning rate (LoRA+); None: 1 for all.
        events: makes the method's own part of the step (AdaLoRA, ReLoRA), given Masters.arrays; None for none.
        prepare: brings the batches of a whole step into the form that the loss needs.
        arrays_of: returns the arguments of the loss for a batch, on the device.
        reports: names of the numbers that the loss reports besides sum and count.
    """

    kernels: Kernels = own_kernels
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
            loss_sum, tokens, reports, grads = differentiate(arrays)
            return loss_sum, tokens, reports, self.masters.gathered(grads)

        # Two functions: another batch shape traces the first again, never the optimizer.
        self._micro = compiled_over(model, micro) if options.compiled else micro
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
        self.masters.put(_choose(applied, updated, self.masters.arrays))
        # In place, because the compiled function captured this dict.
        progress = {name: optimizer.state[name] for name in ("step", "learning_rate") if name in optimizer.state}
        # A step without anything to train on is one of the run's steps: its number is that of `taken`, which a resumed run takes from it.
        optimizer.state.update(
            _choose(applied, optimizer.state, state)
            | _choose(counted, progress, {name: state[name] for name in progress})
        )
        return StepResult(loss_sum, count, norm, applied, reports)

    @property
    def learning_rate(self) -> float:
        """The rate of the last step taken."""
        return float(self.optimizer.learning_rate)


def _choose(condition: mx.array, new: dict, old: dict) -> dict:
    return tree_map(lambda a, b: mx.where(condition, a, b), new, old)


# Find the fastest form of a step that works on a model, by differentiating it on a few tokens.
#
# The graph is only built, not computed: both faults of third-party code (values computed while it is traced, kernels without a
# gradient) show there, in a fifth of the time, and losses/check.py has already computed the forward pass.

TRIAL_TOKENS = 8


@dataclass(frozen=True)
class StepVariant:
    """The loss and kernels that a step computes with.

    Attributes:
        loss: fused or plain.
        attend: our attention, None for the model's own kernels.
        choose: says which kernels are used, by shape.
        compiled: whether loss and gradient are compiled.
        notes: for the run header, about features that had to be switched off.
    """

    loss: Loss
    attend: AttentionCall | None
    choose: Choose = assumed
    compiled: bool = True
    notes: tuple[str, ...] = ()


def choose_step_variant(
    model: nn.Module,
    config: dict[str, Any],
    loss: Loss,
    attend: AttentionCall | None,
    name: str,
    choose: Choose = assumed,
    compiles: bool = True,
) -> StepVariant:
    """Return the fastest variant of the step that this model can be differentiated with.

    Args:
        model: the model to train, with adapters and checkpointing; it is not changed.
        config: its config.json.
        loss, attend: the ones that were chosen for it.
        name: of the model, for the error.
        choose: says which kernels are used, by shape.
        compiles: whether the step may be compiled.

    Raises:
        InputError: it cannot be differentiated.
    """
    batch = check_arrays(embedding_rows(model, config) or 256, TRIAL_TOKENS)
    problems: list[Exception] = []
    for variant in _variants(loss, attend, choose, (True, False) if compiles else (False,)):
        problem = _error_of(model, variant, batch)
        if problem is None:
            return replace(variant, notes=(_note(variant, loss, attend, problems[0]),)) if problems else variant
        problems.append(problem)
    raise InputError(
        f"--model {name}: mlx-lm's {config.get('model_type')} cannot be trained here ({short(problems[-1], 200)}); "
        f"{way_out(model)}"
    ) from problems[-1]


def _variants(
    loss: Loss, attend: AttentionCall | None, choose: Choose, compiles: tuple[bool, ...]
) -> Iterator[StepVariant]:
    """Yield the variants of a step, the fastest first."""
    kernels = [attend] if attend is None else [attend, None]
    choices = [(loss, own) for own in kernels]
    if loss.train is not PLAIN.train:
        choices.append((PLAIN, None))
    yield from (StepVariant(*choice, choose, compiled) for choice in choices for compiled in compiles)


def _note(variant: StepVariant, loss: Loss, attend: AttentionCall | None, problem: Exception) -> str:
    """Return a note for the header: the features that a variant does without, and the error that is the reason."""
    without = [
        words
        for words, missing in (
            ("not compiled", not variant.compiled),
            ("the model's own kernels instead of ours", variant.attend is not attend),
            ("plain instead of fused loss", variant.loss is not loss),
        )
        if missing
    ]
    return f"{', '.join(without)}, since that fails on this model ({short(problem, 160)})"


def _error_of(model: nn.Module, variant: StepVariant, batch: Arrays) -> Exception | None:
    """Differentiate the batch and return the error of foreign code, if any. The model is not changed."""
    arrays = [(name, value) for name, value in tree_flatten(model.state) if isinstance(value, mx.array)]
    high, low = mx.random.state[0].tolist()
    training = model.training
    model.train()
    step = differentiation(model, variant.loss.train, exchanging(variant.attend, variant.choose))
    try:
        (compiled_over(model, step) if variant.compiled else step)(batch)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        return error
    finally:
        # A trace that fails leaves placeholder arrays in the model.
        model.update(tree_unflatten(arrays))
        mx.random.seed(high << 32 | low)
        model.train(training)
    return None
