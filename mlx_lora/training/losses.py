"""The loss: a sum over trained tokens and their count, never a mean.

A mean cannot be added to another batch's mean; sums and counts can, so accumulation, validation and
several ranks all divide once, at the end.

Two forms compute the same number. `plain` takes the model's own logits of every position. `fused` takes
hidden states of the supervised positions only and never holds their logits (fused.py). Fused is used when
it agrees with plain on a few tokens of this very model; otherwise plain is, and the run header says why.

Shapes: B batch, T time, P supervised positions (padded), D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora import device
from mlx_lora.data.batches import Batch
from mlx_lora.errors import InputError
from mlx_lora.memory import CHECK_TOKENS
from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.kernels import training_kernels
from mlx_lora.training.fused import fused_cross_entropy


class Arrays(NamedTuple):
    """A batch on the device.

    Attributes:
        inputs, targets: (B, T) int32.
        mask: (B, T) bool, True where the target is trained.
        positions: (P,) int32, flat indices of the trained targets, padded with 0.
        weights: (P,) float32, 1 for a real position, 0 for padding.
    """

    inputs: mx.array
    targets: mx.array
    mask: mx.array
    positions: mx.array
    weights: mx.array

    @classmethod
    def of(cls, batch: Batch) -> Arrays:
        """Copy a batch to the device."""
        return cls(*(mx.array(getattr(batch, name)) for name in cls._fields))


LossFunction = Callable[..., tuple[mx.array, mx.array]]
"""(model, *Arrays) -> (sum, count), float32 scalars. An empty mask gives (0, 0): nothing is divided, so no NaN."""


@dataclass(frozen=True)
class Loss:
    """A loss in its two uses.

    Attributes:
        train: to be differentiated.
        measure: for validation and evaluation; makes no gradient.
        description: for the run header.
        checked: what `measure` gave on the check tokens, where that is known.
    """

    train: LossFunction
    measure: LossFunction
    description: str
    checked: float | None = None


def plain_loss(
    model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array, positions: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the summed next-token cross-entropy and its token count from the model's (B, T, V) logits."""
    logits = model(inputs).astype(mx.float32)  # (B, T, V)
    losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)
    # where, not a product: a masked position may hold inf, and 0 * inf is NaN.
    return mx.where(mask, losses, 0.0).sum(), mask.astype(mx.float32).sum()


PLAIN = Loss(plain_loss, plain_loss, "plain cross-entropy")


def fused_loss(head: Head, tile_bytes: int) -> Loss:
    """Return the loss that brings only supervised positions to `head`, a tile of logits at a time."""

    def make(gradient: bool) -> LossFunction:
        def loss(
            model: nn.Module,
            inputs: mx.array,
            targets: mx.array,
            mask: mx.array,
            positions: mx.array,
            weights: mx.array,
        ) -> tuple[mx.array, mx.array]:
            hidden = head.hidden(inputs)  # (B, T, D)
            chosen = hidden.reshape(-1, hidden.shape[-1])[positions]  # (P, D)
            total = fused_cross_entropy(head, chosen, targets.reshape(-1)[positions], weights, tile_bytes, gradient)
            return total, weights.sum()

        return loss

    return Loss(make(True), make(False), f"fused cross-entropy, {tile_bytes / 2**20:.0f} MiB tiles")


def choose_loss(model: nn.Module, config: dict[str, Any]) -> Loss:
    """Return the fused loss when it can be had and agrees with the plain one on this model, else plain.

    Args:
        model: the model to train, adapters in place.
        config: its config.json.

    Raises:
        InputError: the model's own forward pass fails.
    """
    head = find_head(model, config)
    if isinstance(head, str):
        return Loss(plain_loss, plain_loss, f"plain cross-entropy ({head})")
    fused = fused_loss(head, device.loss_tile_bytes())
    expected = _own_value(model, config, plain_loss, head.vocabulary)
    try:
        found = _check_value(model, fused.measure, head.vocabulary)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        reason = f"fused fails on it: {short(error, 100)}"
        return Loss(plain_loss, plain_loss, f"plain cross-entropy ({reason})", expected)
    difference = _difference(expected, found)
    if difference > _tolerance(model):
        reason = f"fused differs by {difference:.1e} on {CHECK_TOKENS} tokens"
        return Loss(plain_loss, plain_loss, f"plain cross-entropy ({reason})", expected)
    return replace(fused, checked=found)


def choose_kernels(model: nn.Module, config: dict[str, Any], loss: Loss) -> tuple[bool, str]:
    """Return whether our training kernels give this model the loss that its own do, and a note for the header.

    Args:
        model: the model to train, adapters in place.
        config: its config.json.
        loss: any that was chosen for it.

    Raises:
        InputError: the model's own forward pass fails.
    """
    head = find_head(model, config)
    vocabulary = config.get("vocab_size", 256) if isinstance(head, str) else head.vocabulary
    try:
        with training_kernels(model) as exchanged:
            ours = _check_value(model, loss.measure, vocabulary)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        _own_value(model, config, loss.measure, vocabulary)
        return False, f"the model's own attention (tiled fails on it: {short(error, 100)})"
    if not exchanged:
        return False, "the model's own attention"
    own = _own_value(model, config, loss.measure, vocabulary) if loss.checked is None else loss.checked
    difference = _difference(own, ours)
    if difference > _tolerance(model):
        return False, f"the model's own attention (tiled differs by {difference:.1e} on {CHECK_TOKENS} tokens)"
    return True, "tiled attention"


def _check_value(model: nn.Module, loss: LossFunction, vocabulary: int) -> float:
    """Return the loss on a few tokens, always the same ones, dropout off."""
    training = model.training
    model.eval()
    try:
        value, _ = loss(model, *check_arrays(vocabulary, CHECK_TOKENS))
        return value.item()
    finally:
        model.train(training)


def _own_value(model: nn.Module, config: dict[str, Any], loss: LossFunction, vocabulary: int) -> float:
    """Return the loss with nothing of ours in the model's way: what fails then has no fallback."""
    try:
        return _check_value(model, loss, vocabulary)
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        raise InputError(
            f"mlx-lm's {config.get('model_type')}: its forward pass fails here ({short(error, 200)}); {way_out(model)}"
        ) from error


def check_arrays(vocabulary: int, tokens: int) -> Arrays:
    """Return a row of so many random tokens, always the same ones, all of them trained."""
    ids = mx.random.randint(0, vocabulary, (1, tokens + 1), key=mx.random.key(0))
    return Arrays(ids[:, :-1], ids[:, 1:], mx.ones((1, tokens), mx.bool_), mx.arange(tokens), mx.ones((tokens,)))


def way_out(model: nn.Module) -> str:
    """Return what to do about a model that fails: on a CPU mlx lacks a few products in 16 bits."""
    if _has_halves(model) and not device.multiplies_16_bit_experts():
        return "give --dtype float32, or choose another model"
    return "choose another model"


def _difference(one: float, other: float) -> float:
    return abs(other - one) / max(abs(one), 1e-6)


def _tolerance(model: nn.Module) -> float:
    """float32 sums in another order, or 16-bit logits: what two right answers may differ by."""
    return 1e-2 if _has_halves(model) else 1e-4


def _has_halves(model: nn.Module) -> bool:
    return any(p.dtype in (mx.bfloat16, mx.float16) for _, p in tree_flatten(model.parameters()))
