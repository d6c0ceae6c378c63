"""The choice of the loss kernel, by measurements of the model's head, once per (device, mlx, dtype, head).

    tiles   our kernel: some rows by a slice of the vocabulary at a time (fused.py)
    polynomial  the same, with polynomials for exponentials (system/exponentials.py); on a CPU
    rows    mx.fast.cross_entropy on whole rows of logits (row_loss.py)
    plain   all logits at once, as the model computes them (losses.py)

Shapes: P positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_lora.models.head import QUANTIZED_HEADS, Head
from mlx_lora.models.kernel_choice import figures_key
from mlx_lora.models.kernel_row import POLYNOMIAL, ShapeClass
from mlx_lora.models.kernel_table import polynomial_candidates
from mlx_lora.planner.this_machine import loss_tile_bytes
from mlx_lora.system import device
from mlx_lora.system.measuring import Figures, Trial, choose, keep_figures, may_measure, measure, read_figures
from mlx_lora.training.fused import fused_token_losses
from mlx_lora.training.row_loss import row_token_losses

TILES, ROWS, PLAIN_LOGITS = "tiles", "rows", "plain"
NAME = "cross-entropy"
FEWEST, MOST = 32, 1024  # positions in a measurement

TokenLosses = Callable[..., mx.array]
"""(head, hidden (P, D), targets (P,), weights (P,), tile_bytes=, gradient=) -> (P,) weighted losses."""
LOSS_KERNELS: Mapping[str, TokenLosses] = {
    TILES: fused_token_losses,
    POLYNOMIAL: partial(fused_token_losses, polynomial=True),
    ROWS: row_token_losses,
}


def loss_kernels() -> Mapping[str, TokenLosses]:
    """Return those of LOSS_KERNELS that this device may use, the assumed one first."""
    left_out = {POLYNOMIAL} - set(polynomial_candidates())
    return {name: kernel for name, kernel in LOSS_KERNELS.items() if name not in left_out}


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


def loss_figures(head: Head, dtype: mx.Dtype, say: Callable[[str], None] | None) -> Mapping[str, Figures] | None:
    """Return the kernels' figures for a head, None if they are not known and must not be measured.

    Args:
        head: the measurement uses its weight.
        dtype: of the hidden states.
        say: called with one line before measuring; None: nothing is measured.
    """
    shape = head_class(head)
    key = figures_key(NAME, shape, dtype)
    found = read_figures(key)
    if found is not None and found.keys() - {PLAIN_LOGITS} == {*loss_kernels()}:
        return found
    if say is None or not may_measure():
        return None
    say(f"Measuring {NAME} for {head_words(shape)}, once on this machine")
    figures = measure_loss(head, dtype)
    keep_figures(key, figures)
    return figures


def choose_kernel(figures: Mapping[str, Figures] | None) -> str:
    """Return the kernel to use: `tiles` if nothing was measured.

    `plain` is used only if all others are wrong: its memory grows with all positions of a batch, trained or not, and the
    measurement covers only a few positions.
    """
    if figures is None:
        return TILES
    return choose({name: figures[name] for name in loss_kernels()}, layers=1) or PLAIN_LOGITS  # a model has one head


def measure_loss(head: Head, dtype: mx.Dtype) -> dict[str, Figures]:
    """Measure the kernels on a head; `plain` too on a GPU, for comparison, and anywhere if no other kernel is right."""
    vocabulary, width, _ = head_class(head)
    positions = int(min(max(device.trial_flops() / (4 * vocabulary * width), FEWEST), MOST))
    hidden = mx.random.normal((positions, width), key=mx.random.key(0)).astype(dtype)
    targets = mx.random.randint(0, vocabulary, (positions,), key=mx.random.key(1))
    weights, tile_bytes = mx.ones((positions,)), loss_tile_bytes()

    def exactly(hidden: mx.array) -> mx.array:
        dense = head.dense(head.arrays, mx.float32)
        return _plain(head.finish(hidden.astype(mx.float32) @ dense.T, slice(None)), targets)

    candidates: dict[str, Any] = {
        name: lambda hidden, kernel=kernel: kernel(head, hidden, targets, weights, tile_bytes=tile_bytes)
        for name, kernel in loss_kernels().items()
    }
    plain = {PLAIN_LOGITS: lambda hidden: _plain(head.logits(hidden), targets)}
    trial = Trial([hidden], [mx.ones((positions, 1))], lambda function: lambda h: [function(h)[:, None]])
    compiled = device.compiling_is_cheap()
    if compiled:  # a GPU: it takes no time there, and seconds of a CPU if the vocabulary is large
        candidates |= plain

    def measured(some: dict[str, Any]) -> dict[str, Figures]:
        return measure(some, trial, lambda h: [exactly(h)[:, None]], compiled, [POLYNOMIAL])

    figures = measured(candidates)
    return figures if any(one.correct for one in figures.values()) else {**figures, **measured(plain)}


def _plain(logits: mx.array, targets: mx.array) -> mx.array:
    return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1).squeeze(-1)
