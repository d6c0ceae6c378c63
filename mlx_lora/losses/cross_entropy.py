"""Compute the cross-entropy of trained tokens, as a sum and a count, with the kernel that is best for the model's head.

A mean cannot be added to another batch's mean; sums and counts can, so accumulation, validation and
several ranks all divide once, at the end.

Two kinds of loss compute the same number. `plain` uses the model's own logits of every position. A fused loss uses the
hidden states of the supervised positions only and never holds their logits (losses/fused.py); where the model allows it, the
last block computes only these positions too (models/head.py). It is used if it agrees with plain on a few tokens of this
model (losses/agree.py); otherwise plain, or the whole block, is used, and the run header says why.

Shapes: B batch, T time, P supervised positions (padded), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.kernels.measure import Kernels, left_unchanged
from mlx_lora.models.prefix_attention import shared_caches
from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch

TILES, ROWS, PLAIN_LOGITS = "tiles", "rows", "plain"
Arrays = dict[str, Any]
"""A batch on the device: what a loss reads, by name. An objective adds arrays of its own to these of `token_arrays`:

    inputs, targets  (B, T) int32
    mask             (B, T) bool, True where the target is trained
    positions        (P,) int32, flat indices of the trained targets, padded with 0
    weights          (P,) float32, 1 for a real position, 0 for padding
    starts           (B, K) int32, the column at which each answer starts; only where rows hold a prompt and several answers
"""
TokenLosses = Callable[[nn.Module, Arrays], mx.array]
"""(model, arrays) -> (P,) float32 losses of the positions, 0 for padding."""
LossFunction = Callable[[nn.Module, Arrays], tuple]
"""(model, arrays) -> (sum, count), float32 scalars, and if an objective reports more, a dict of sums. An empty mask gives
(0, 0): nothing is divided, so no NaN."""
TOKEN_ARRAYS = ("inputs", "targets", "mask", "positions", "weights")


def token_arrays(batch: Batch) -> Arrays:
    """Copy the tokens of a batch to the device."""
    names = TOKEN_ARRAYS if batch.starts is None else (*TOKEN_ARRAYS, "starts")
    return {name: mx.array(getattr(batch, name)) for name in names}


@dataclass(frozen=True)
class Loss:
    """A loss in its two uses.

    Attributes:
        train: the loss that is differentiated.
        measure: the loss for validation and evaluation, without a gradient.
        description: for the run header.
        tokens: the loss of each position, which can be differentiated; the checks compare it.
        kernel: its name; `plain` computes the model's own logits, of all positions at once.
        part_of_last: whether the model's last block computes only the supervised positions.
        measure_tokens: `tokens` without a gradient; None: use `tokens`.
        measuring: model -> context in which `measure` and `measure_tokens` are computed; it may exchange kernels of the model.
    """

    train: LossFunction
    measure: LossFunction
    description: str
    tokens: TokenLosses
    kernel: str = PLAIN_LOGITS
    part_of_last: bool = False
    measure_tokens: TokenLosses | None = None
    measuring: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext


def plain_loss(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array]:
    """Return the summed next-token cross-entropy and its token count from the model's (B, T, V) logits."""
    mask = arrays["mask"]
    # where, not a product: a masked position may hold inf, and 0 * inf is NaN.
    return mx.where(mask, _plain_losses(model, arrays), 0.0).sum(), mask.astype(mx.float32).sum()


def plain_token_losses(model: nn.Module, arrays: Arrays) -> mx.array:
    """Return the cross-entropy at the positions, (P,), from the model's logits."""
    losses, weights = _plain_losses(model, arrays).reshape(-1)[arrays["positions"]], arrays["weights"]
    return mx.where(weights > 0, losses * weights, 0.0)


def _plain_losses(model: nn.Module, arrays: Arrays) -> mx.array:
    logits = model(arrays["inputs"], **shared_caches(model, arrays)).astype(mx.float32)
    return of_logits(logits, arrays["targets"])


SUMMED = 256  # exponentials that are added up at once


def log_sum_exp(logits: mx.array) -> mx.array:
    """Return logsumexp of each row, (P, V) float32 -> (P,), in two steps: for numbers that are reported or compared.

    mlx's CPU backend adds up a row with few partial sums, which makes each log-probability too high: by about 3e-4 with
    262,144 tokens. In two steps it is right to 1e-6, for a copy of the logits.
    """
    rows, vocabulary = logits.shape
    filled = mx.pad(logits, [(0, 0), (0, -vocabulary % SUMMED)], constant_values=-mx.inf)
    return mx.logsumexp(mx.logsumexp(filled.reshape(rows, -1, SUMMED), axis=-1), axis=-1)


def of_logits(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the cross-entropy of logits (..., V) at targets (...), one number per target."""
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)


def plain(description: str) -> Loss:
    """Return the loss from the model's own logits."""
    return Loss(plain_loss, plain_loss, description, plain_token_losses)


PLAIN = plain("plain cross-entropy")


# The gradient

Differentiation = Callable[..., tuple[mx.array, mx.array, dict, dict]]
"""(arrays) -> (loss sum, tokens, sums to report, gradients of the trainable parameters)."""


def differentiation(
    model: nn.Module, loss: LossFunction, kernels: Kernels = nullcontext, strategy: Strategy = SINGLE_DEVICE
) -> Differentiation:
    """Return the loss of a micro-batch with its gradient, as `Step` takes them; not compiled."""
    gradient = strategy.value_and_grad(model, loss)

    def differentiate(arrays: Arrays) -> tuple[mx.array, mx.array, dict, dict]:
        # The kernels around the backward pass as well: checkpointed blocks run again there.
        with left_unchanged(model), kernels(model):
            (loss_sum, tokens, *reports), grads = gradient(model, arrays)
        return loss_sum, tokens, reports[0] if reports else {}, grads

    return differentiate


def compiled_over(model: nn.Module, function: Differentiation, *read: dict) -> Differentiation:
    """Compile a function of batches that reads the model and these dicts of arrays, and draws random numbers."""
    return mx.compile(function, inputs=[model.state, *read, mx.random.state], outputs=[mx.random.state])
