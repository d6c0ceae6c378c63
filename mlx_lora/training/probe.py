"""Do two ways to compute the same agree on this very model? Losses token by token, and the gradient of what is trained.

One summed loss would hide errors that cancel, and says nothing of the backward pass.

Shapes: P positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.adapters.parts import Dropout
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign
from mlx_lora.models.unchanged import left_unchanged

# What two right answers may differ by: float32 sums in another order, or 16-bit roundings of logits of some ten.
LOSS_TOLERANCE, HALVES_LOSS_TOLERANCE = 1e-4, 1e-1
GRADIENT_TOLERANCE, HALVES_GRADIENT_TOLERANCE = 1e-3, 1e-1


@dataclass(frozen=True)
class Probe:
    """What one way gave.

    Attributes:
        losses: (P,) float32.
        gradients: by parameter; empty for a model of which nothing is trained.
    """

    losses: mx.array
    gradients: dict[str, mx.array]


def probe(model: nn.Module, token_losses: Callable[[nn.Module], mx.array], gradient: bool = True) -> Probe:
    """Return the losses and, where anything is trained, the gradient of their sum; dropout off.

    A model whose own code has no gradient gives its losses alone: whether it trains is another question (trial.py).

    Args:
        model: left as it is.
        token_losses: takes the model and returns (P,).
        gradient: whether to make one.
    """
    if gradient and tree_flatten(model.trainable_parameters()):
        try:
            return _probe(model, token_losses, trains=True)
        except FOREIGN_ERRORS as error:
            if not is_foreign(error):
                raise
    return _probe(model, token_losses, trains=False)


def _probe(model: nn.Module, token_losses: Callable[[nn.Module], mx.array], trains: bool) -> Probe:
    training = model.training
    # With a gradient as in training: some models run a kernel without one otherwise.
    model.train(trains)
    for module in model.modules():
        if isinstance(module, (nn.Dropout, Dropout)):
            module.eval()

    def total(model: nn.Module) -> tuple[mx.array, mx.array]:
        losses = token_losses(model)
        return losses.sum(), losses

    gradients: dict[str, mx.array] = {}
    try:
        with left_unchanged(model):
            if trains:
                (_, losses), tree = nn.value_and_grad(model, total)(model)
                gradients = dict(tree_flatten(tree))
            else:
                _, losses = total(model)
            mx.eval(losses)  # before the gradients: a quantized head is not dequantized for both at a time
            mx.eval(gradients)
    finally:
        model.train(training)
    return Probe(losses, gradients)


def has_halves(model: nn.Module) -> bool:
    """Tell whether anything in the model has 16 bits."""
    return any(p.dtype in (mx.bfloat16, mx.float16) for _, p in tree_flatten(model.parameters()))


def disagreement(model: nn.Module, expected: Probe, found: Probe) -> str | None:
    """Say in a few words how `found` differs from `expected`, None when it does not beyond rounding.

    Args:
        model: whose dtype says what rounding is.
        expected, found: of the same tokens.
    """
    halves = has_halves(model)
    count = len(expected.losses)
    # The worst token, in parts of the mean loss: a token that the model is sure of has hardly a loss of its own.
    size = mx.maximum(mx.abs(expected.losses).mean(), 1e-6)
    apart = (mx.abs(found.losses - expected.losses).max() / size).item()
    if not apart <= (HALVES_LOSS_TOLERANCE if halves else LOSS_TOLERANCE):  # NaN too
        return f"differs by {apart:.1e} in the worst of {count} tokens' losses"
    if not expected.gradients:
        return None
    if not found.gradients:
        return "has no gradient on it"
    # RecurrentGemma's own gradients are NaN in 16 bits, ours are not: what is not a number there is no reference.
    squares = [
        mx.where(
            mx.isfinite(one).all(), mx.stack([mx.square(found.gradients[name] - one).sum(), mx.square(one).sum()]), 0
        )
        for name, one in expected.gradients.items()
    ]
    difference, whole = mx.sqrt(mx.stack(squares).sum(axis=0)).tolist()
    apart = difference / max(whole, 1e-12)
    if not apart <= (HALVES_GRADIENT_TOLERANCE if halves else GRADIENT_TOLERANCE):
        return f"differs by {apart:.1e} in the gradient of {count} tokens"
    return None
