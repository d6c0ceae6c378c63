"""Compute the cross-entropy of trained tokens, as a sum and a count, with the kernel that is best for the model's head.

A mean cannot be added to another batch's mean; sums and counts can, so accumulation, validation and
several ranks all divide once, at the end.

Two kinds of loss compute the same number. `plain` uses the model's own logits of every position. A fused loss uses the
hidden states of the supervised positions only and never holds their logits (losses/fused.py); where the model allows it, the
last block computes only these positions too (models/head.py). It is used if it agrees with plain on a few tokens of this
model (losses/check.py); otherwise plain, or the whole block, is used, and the run header says why.

The kernel of the fused loss is chosen by measurements of the model's head, once per (device, mlx, dtype, head):

    tiles        our kernel: some rows by a slice of the vocabulary at a time (losses/fused.py)
    polynomial   the same, with polynomials for exponentials (kernels/activations.py); on a CPU
    rows         mx.fast.cross_entropy on whole rows of logits (losses/fused.py)
    plain        all logits at once, as the model computes them

Shapes: B batch, T time, P supervised positions (padded), D width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import Wire
from mlx_lora.data.batch import Batch
from mlx_lora.kernels.measure import (
    POLYNOMIAL,
    Figures,
    ShapeClass,
    Trial,
    choose,
    keep_figures,
    may_measure,
    measure,
    read_figures,
)
from mlx_lora.kernels.table import figures_key, polynomial_candidates
from mlx_lora.losses.fused import fused_token_losses, row_token_losses
from mlx_lora.models.head import QUANTIZED_HEADS, Head
from mlx_lora.models.prefix_attention import shared_caches
from mlx_lora.parallel.tensor import divided
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.utils import device

log = logging.getLogger(__name__)

TILES, ROWS, PLAIN_LOGITS = "tiles", "rows", "plain"
NAME = "cross-entropy"
FEWEST, MOST = 32, 1024  # positions in a measurement
HeadLosses = Callable[..., mx.array]
"""(head, hidden (P, D), targets (P,), weights (P,), tile_bytes=, gradient=) -> (P,) weighted losses."""
LOSS_KERNELS: Mapping[str, HeadLosses] = {
    TILES: fused_token_losses,
    POLYNOMIAL: partial(fused_token_losses, polynomial=True),
    ROWS: row_token_losses,
}
TokenLosses = Callable[..., mx.array]
"""(model, *Arrays) -> (P,) float32 losses of the positions, 0 for padding. If a row holds a prompt and several answers,
`Batch.starts` is a sixth array."""
LossFunction = Callable[..., tuple]
"""(model, *arrays) -> (sum, count), float32 scalars, and if an objective reports more, a dict of sums. An empty mask gives
(0, 0): nothing is divided, so no NaN."""


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
    """

    train: LossFunction
    measure: LossFunction
    description: str
    tokens: TokenLosses
    kernel: str = PLAIN_LOGITS
    part_of_last: bool = False
    measure_tokens: TokenLosses | None = None


def plain_loss(
    model: nn.Module, inputs: mx.array, targets: mx.array, mask: mx.array, positions: mx.array, weights: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the summed next-token cross-entropy and its token count from the model's (B, T, V) logits."""
    losses = _plain_losses(model, inputs, targets)
    # where, not a product: a masked position may hold inf, and 0 * inf is NaN.
    return mx.where(mask, losses, 0.0).sum(), mask.astype(mx.float32).sum()


def plain_token_losses(
    model: nn.Module,
    inputs: mx.array,
    targets: mx.array,
    mask: mx.array,
    positions: mx.array,
    weights: mx.array,
    *starts: mx.array,
) -> mx.array:
    """Return the cross-entropy at the positions, (P,), from the model's logits."""
    losses = _plain_losses(model, inputs, targets, *starts).reshape(-1)[positions]
    return mx.where(weights > 0, losses * weights, 0.0)


def _plain_losses(model: nn.Module, inputs: mx.array, targets: mx.array, *starts: mx.array) -> mx.array:
    return _of_logits(model(inputs, **shared_caches(model, inputs, *starts)).astype(mx.float32), targets)


def _of_logits(logits: mx.array, targets: mx.array) -> mx.array:
    """Return the cross-entropy of logits (..., V) at targets (...), one number per target."""
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[..., None], axis=-1).squeeze(-1)


def plain(description: str) -> Loss:
    """Return the loss from the model's own logits."""
    return Loss(plain_loss, plain_loss, description, plain_token_losses)


PLAIN = plain("plain cross-entropy")


def head_loss(head: Head, kernel: str, tile_bytes: int, whole_because: str = "", wire: Wire | None = None) -> Loss:
    """Return a loss that is computed only from the hidden states of the supervised positions.

    Args:
        head: turns hidden states into logits.
        kernel: a name in `loss_kernels()`.
        tile_bytes: the most bytes of logits at a time.
        whole_because: why the head has no last block of which some positions can be computed alone.
        wire: connects ranks that each compute some of the positions.
    """
    tiles = f"fused cross-entropy, {tile_bytes / 2**20:.0f} MiB tiles"
    words = {TILES: tiles, POLYNOMIAL: f"{tiles}, polynomial", ROWS: "mx.fast.cross_entropy by rows"}
    block = (
        "last block where trained" if head.last is not None else f"whole last block ({whole_because or 'not asked'})"
    )
    token_losses = partial(loss_kernels()[kernel], tile_bytes=tile_bytes)
    if wire is not None:
        token_losses, block = divided(token_losses, wire), f"{block}; positions divided by {wire.size} processes"

    def tokens(gradient: bool, model: nn.Module, *batch: mx.array) -> mx.array:
        inputs, targets, _mask, positions, weights, *starts = batch
        chosen = head.hidden_at(positions, inputs, **shared_caches(model, inputs, *starts))  # (P, D)
        return token_losses(head, chosen, targets.reshape(-1)[positions], weights, gradient=gradient)

    def loss(gradient: bool, model: nn.Module, *batch: mx.array) -> tuple[mx.array, mx.array]:
        return tokens(gradient, model, *batch).sum(), batch[-1].sum()

    of_tokens = partial(tokens, True), kernel, head.last is not None, partial(tokens, False)
    return Loss(partial(loss, True), partial(loss, False), f"{words[kernel]}; {block}", *of_tokens)


# The choice of the kernel


def loss_kernels() -> Mapping[str, HeadLosses]:
    """Return those of LOSS_KERNELS that this device may use, the assumed one first."""
    left_out = {POLYNOMIAL} - set(polynomial_candidates())
    return {name: kernel for name, kernel in LOSS_KERNELS.items() if name not in left_out}


def choose_kernel(figures: Mapping[str, Figures] | None) -> str:
    """Return the kernel to use: `tiles` if nothing was measured.

    `plain` is used only if all others are wrong: its memory grows with all positions of a batch, trained or not, and the
    measurement covers only a few positions.
    """
    if figures is None:
        return TILES
    return choose({name: figures[name] for name in loss_kernels()}, layers=1) or PLAIN_LOGITS  # a model has one head


def loss_figures(head: Head, dtype: mx.Dtype, measure: bool) -> Mapping[str, Figures] | None:
    """Return the kernels' figures for a head, None if they are not known and must not be measured.

    Args:
        head: the measurement uses its weight.
        dtype: of the hidden states.
        measure: measure them if they are not known.
    """
    shape = head_class(head)
    key = figures_key(NAME, shape, dtype)
    found = read_figures(key)
    if found is not None and found.keys() - {PLAIN_LOGITS} == {*loss_kernels()}:
        return found
    if not (measure and may_measure()):
        return None
    log.info(f"Measuring {NAME} for {head_words(shape)}, once on this machine")
    figures = measure_loss(head, dtype)
    keep_figures(key, figures)
    return figures


def measure_loss(head: Head, dtype: mx.Dtype) -> dict[str, Figures]:
    """Measure the kernels on a head; `plain` too on a GPU, for comparison, and anywhere if no other kernel is right."""
    vocabulary, width, _ = head_class(head)
    positions = int(min(max(device.trial_flops() / (4 * vocabulary * width), FEWEST), MOST))
    hidden = mx.random.normal((positions, width), key=mx.random.key(0)).astype(dtype)
    targets = mx.random.randint(0, vocabulary, (positions,), key=mx.random.key(1))
    weights, tile_bytes = mx.ones((positions,)), loss_tile_bytes()

    def exactly(hidden: mx.array) -> mx.array:
        dense = head.dense(head.arrays, mx.float32)
        return _of_logits(head.finish(hidden.astype(mx.float32) @ dense.T, slice(None)), targets)

    candidates: dict[str, Any] = {
        name: lambda hidden, kernel=kernel: kernel(head, hidden, targets, weights, tile_bytes=tile_bytes)
        for name, kernel in loss_kernels().items()
    }
    all_logits = {PLAIN_LOGITS: lambda hidden: _of_logits(head.logits(hidden), targets)}
    trial = Trial([hidden], [mx.ones((positions, 1))], lambda function: lambda h: [function(h)[:, None]])
    compiled = device.compiling_is_cheap()
    if compiled:  # a GPU: it takes no time there, and seconds of a CPU if the vocabulary is large
        candidates |= all_logits

    def measured(some: dict[str, Any]) -> dict[str, Figures]:
        return measure(some, trial, lambda h: [exactly(h)[:, None]], compiled, [POLYNOMIAL])

    figures = measured(candidates)
    return figures if any(one.correct for one in figures.values()) else {**figures, **measured(all_logits)}


def head_class(head: Head) -> ShapeClass:
    """Return the key of a head's figures: V, D, how its weight is stored, and what is applied to its logits."""
    layer, width = head.layer, 0
    stored = "float"
    if isinstance(layer, QUANTIZED_HEADS):
        stored = f"{layer.bits}-bit/{layer.group_size} {layer.mode}"
        width = layer.weight.shape[-1] * 32 // layer.bits
    extras = [name for name, has in (("cap", head.soft_cap is not None), ("bias", head.bias is not None)) if has]
    return head.vocabulary, width or layer.weight.shape[-1], " ".join([stored, *extras])


def head_words(shape: ShapeClass) -> str:
    """Return a head's class as text."""
    return f"a vocabulary of {shape[0]:,} and width {shape[1]:,} ({shape[2]})"
