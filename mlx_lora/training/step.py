"""The compiled optimizer step: micro-batches in, one token-weighted, clipped, guarded update out."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_lora.data.batches import Batch
from mlx_lora.models.attention import AttentionCall
from mlx_lora.models.kernels import training_kernels
from mlx_lora.training.losses import Arrays, LossFunction
from mlx_lora.training.optim import clip_scale, scaled


class StepResult(NamedTuple):
    """What one optimizer step reports; lazy scalars, so that asking costs nothing until they are read.

    Attributes:
        loss_sum: summed loss of the trained tokens.
        tokens: trained tokens.
        grad_norm: global norm of the mean gradient before the clip.
        applied: False when the update was skipped because loss or gradient was not finite.
    """

    loss_sum: mx.array
    tokens: mx.array
    grad_norm: mx.array
    applied: mx.array


class Step:
    """Runs optimizer steps on `model`; compiled once per batch shape."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: optim.Optimizer,
        loss: LossFunction,
        max_grad_norm: float,
        attend: AttentionCall | None = None,
    ):
        """Set up the step.

        Args:
            model: its trainable parameters are what is trained.
            optimizer: initialised here on those parameters.
            loss: returns (sum, count).
            max_grad_norm: global-norm clip; 0 for none.
            attend: computes the model's attention, with our other training kernels; None leaves all to mlx.
        """
        self.model = model
        self.optimizer = optimizer
        optimizer.init(model.trainable_parameters())
        self._state = [model.state, optimizer.state, mx.random.state]
        gradient = nn.value_and_grad(model, loss)

        def micro(*arrays: mx.array):
            # Around the backward pass as well: checkpointed blocks run again there.
            with training_kernels(model, attend) if attend else nullcontext():
                return gradient(model, *arrays)

        def apply(loss_sum: mx.array, tokens: mx.array, grads: dict) -> StepResult:
            grads = scaled(grads, 1 / mx.maximum(tokens, 1))
            norm, factor = clip_scale(grads, max_grad_norm)
            # No token means no gradient: momentum and decay alone must not move the factors.
            applied = mx.isfinite(loss_sum) & mx.isfinite(norm) & (tokens > 0)
            parameters, state = model.trainable_parameters(), tree_map(lambda a: a, optimizer.state)
            optimizer.update(model, scaled(grads, factor))
            # Chosen on the device: the host need not wait for the answer.
            model.update(_choose(applied, model.trainable_parameters(), parameters))
            # In place: the compiled function captured this very dict.
            optimizer.state.update(_choose(applied, optimizer.state, state))
            return StepResult(loss_sum, tokens, norm, applied)

        def whole(*arrays: mx.array) -> StepResult:
            (loss_sum, tokens), grads = micro(*arrays)
            return apply(loss_sum, tokens, grads)

        compiled = partial(mx.compile, inputs=self._state, outputs=self._state)
        self._whole, self._micro, self._apply = compiled(whole), compiled(micro), compiled(apply)

    def __call__(self, batches: list[Batch]) -> StepResult:
        """Take one optimizer step over `batches`, weighted by their trained tokens.

        Returns:
            Lazy results; the update is already under way on the device.
        """
        if len(batches) == 1:
            result = self._whole(*Arrays.of(batches[0]))
        else:
            total = None
            for batch in batches:
                (loss_sum, tokens), grads = self._micro(*Arrays.of(batch))
                part = [loss_sum, tokens, grads]
                total = part if total is None else tree_map(mx.add, total, part)
                mx.async_eval(total)  # one micro-batch's activations at a time, and short command buffers
            result = self._apply(*total)
        mx.async_eval(self._state, result)
        return result

    @property
    def learning_rate(self) -> float:
        """The rate of the last step taken."""
        return float(self.optimizer.learning_rate)


def _choose(condition: mx.array, new: dict, old: dict) -> dict:
    return tree_map(lambda a, b: mx.where(condition, a, b), new, old)
