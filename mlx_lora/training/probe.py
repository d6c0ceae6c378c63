"""Check whether two computations agree on a model: in each token's loss, and in the gradient of its parameters.

A summed loss alone would hide errors that cancel, and those of the backward pass.

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

# The most by which two correct results may differ: float32 sums in another order, or logits near ten rounded to 16 bits.
LOSS_TOLERANCE, HALVES_LOSS_TOLERANCE = 1e-4, 1e-1
GRADIENT_TOLERANCE, HALVES_GRADIENT_TOLERANCE = 1e-3, 1e-1


@dataclass(frozen=True)
class Probe:
    """The results of one computation.

    Attributes:
        losses: (P,) float32.
        gradients: by parameter; empty if nothing is trained.
    """

    losses: mx.array
    gradients: dict[str, mx.array]


def probe(model: nn.Module, token_losses: Callable[[nn.Module], mx.array], gradient: bool = True) -> Probe:
    """Return the losses and, if anything is trained, the gradient of their sum, without dropout.

    If the model's own code has no gradient, only losses are returned; trial.py decides whether the model trains.

    Args:
        model: is not changed.
        token_losses: takes the model and returns (P,).
        gradient: whether to compute the gradient.
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
    # In training mode for a gradient, because some models otherwise run a kernel without one.
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
            mx.eval(losses)  # separately, so that a quantized head is not dequantized for both at a time
            mx.eval(gradients)
    finally:
        model.train(training)
    return Probe(losses, gradients)


def has_halves(model: nn.Module) -> bool:
    """Tell whether anything in the model has 16 bits."""
    return any(p.dtype in (mx.bfloat16, mx.float16) for _, p in tree_flatten(model.parameters()))


def disagreement(model: nn.Module, expected: Probe, found: Probe) -> str | None:
    """Return in a few words how `found` differs from `expected`, None if only by rounding.

    Args:
        model: its dtype decides the size of rounding.
        expected, found: results for the same tokens.
    """
    halves = has_halves(model)
    count = len(expected.losses)
    # Relative to the mean loss, because a token that the model is sure of has nearly no loss.
    size = mx.maximum(mx.abs(expected.losses).mean(), 1e-6)
    apart = (mx.abs(found.losses - expected.losses).max() / size).item()
    if not apart <= (HALVES_LOSS_TOLERANCE if halves else LOSS_TOLERANCE):  # NaN too
        return f"differs by {apart:.1e} in the worst of {count} tokens' losses"
    if not expected.gradients:
        return None
    if not found.gradients:
        return "has no gradient on this model"
    # RecurrentGemma's own gradients are NaN in 16 bits, ours are not; such gradients are not compared.
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
