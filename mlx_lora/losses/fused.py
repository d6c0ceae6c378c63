"""Compute the linear cross-entropy without an array of all logits: loss and gradient of the hidden states in one forward pass.

The input has only the supervised positions. The head is frozen, a quantized one is dequantized a slice at a time, and of the
forward pass only the gradient of the hidden states, dh, is kept; the backward pass scales it. There are two kernels, and
measurements decide between them (`loss_figures`).

`fused_token_losses` computes logits a tile at a time: some rows by a slice of the vocabulary. Each tile is exponentiated
once, relative to the largest logit so far, added to both the loss and the gradient, and freed before the next tile starts.
Neither probabilities nor a one-hot array are computed. The target's own logit x is not in these sums:

    m' = max(m, max l),  a = exp(m - m'),  e = exp(l - m'), 0 for the target
    s' = a s + sum e,    g' = a g + e W
    at the end           loss = log(1 + exp(log s + m - x)),  dh = (g - s W[target]) / (s + exp(x - m))

x is computed separately, in float32, from the target's row. The tiles' logits are rounded if h has 16 bits: with
the target among them, the loss of a token that the model is sure of would be mostly rounding error, often below zero.
This way no loss is negative, and loss and gradient of a sure token have a small relative error.

With `polynomial`, the exponentials are those of kernels/activations.py, and a tile's logits are scaled for them. If ranks
share the head (parallel/sharded_base.py), the outer loop is over the parts of the vocabulary that are at hand one after the
other, and all positions keep their sums from one part to the next, so that each part is gathered once.

`row_token_losses` uses `mx.fast.cross_entropy`, mlx's kernel, fused on Metal and CUDA, which takes finished logits. So a
chunk has logits of whole rows of the vocabulary, computed once; the kernel returns the losses and their gradient, which is
multiplied by the head immediately.

The kernel is chosen by measurements of the model's head, once per (device, mlx, dtype, head):

    tiles        `fused_token_losses`
    polynomial   the same, with polynomials for exponentials (kernels/activations.py); on a CPU
    rows         `row_token_losses`
    plain        all logits at once, as the model computes them

Shapes: P supervised positions, R rows of a tile or a chunk, S columns of a tile, D width, V vocabulary.
Source: online softmax, arXiv 1805.02867, algorithm 3; the loss in chunks, arXiv 2410.10989 (Liger Kernel).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.kernels import activations as exponentials
from mlx_lora.kernels.choose import polynomial_candidates
from mlx_lora.kernels.measure import (
    POLYNOMIAL,
    Figures,
    ShapeClass,
    TimingInputs,
    choose,
    figures_key,
    keep_figures,
    may_measure,
    measure,
    read_figures,
)
from mlx_lora.losses.cross_entropy import PLAIN_LOGITS, ROWS, TILES, Arrays, Loss, of_logits
from mlx_lora.models.head import QUANTIZED_HEADS, Head
from mlx_lora.models.prefix_attention import shared_caches
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.planner.memory import MAX_SLICE, chunk_rows, tile_shape
from mlx_lora.utils import device

log = logging.getLogger(__name__)

# Tiles

Powers = Callable[..., tuple[mx.array, mx.array]]
"""(logits, before, own) -> exponentials and the largest logit; see `_exact_powers`."""


def fused_token_losses(
    head: Head,
    hidden: mx.array,
    targets: mx.array,
    weights: mx.array,
    tile_bytes: int,
    gradient: bool = True,
    polynomial: bool = False,
) -> mx.array:
    """Return weights[p] * cross_entropy(hidden[p], targets[p]) for every p, without holding P x V logits.

    Args:
        head: W and what is applied to its logits.
        hidden: (P, D).
        targets: (P,) int.
        weights: (P,) float32; 0 for padding.
        tile_bytes: bound on one tile's float32 logits.
        gradient: also compute the gradient, for a call that is differentiated; without it the vjp is zero.
        polynomial: compute exponentials by polynomials where mlx compiles them.

    Returns:
        (P,) float32, differentiable only in `hidden`: the head is frozen.
    """
    parts = head.parts()

    def computed(hidden: mx.array, targets: mx.array, weights: mx.array) -> tuple[mx.array, mx.array]:
        powers_of, unit = _exact_powers, 1.0
        if polynomial and exponentials.usable(hidden):
            # Scaling the hidden states spares a pass over the logits, if those are nothing but products.
            unit = exponentials.SCALE if head.bias is None and head.soft_cap is None else 1.0
            powers_of = partial(_polynomial_powers, unit)
        count = tile_shape(len(targets), head.vocabulary, tile_bytes)[0]
        ends = [slice(start, start + count) for start in range(0, len(targets), count)]
        chunks = [_Rows(hidden[kept], targets[kept], weights[kept]) for kept in ends]
        results: list[tuple[mx.array, mx.array]] = []
        done: list[mx.array] = []
        for kept, at_hand in parts:
            with at_hand(done or [hidden]):
                columns = tile_shape(len(targets), kept.stop - kept.start, tile_bytes)[1]
                part = _Part(head, head.arrays, kept, columns, len(parts) == 1)
                for rows in chunks:
                    # Wait for everything that is computed from the tiles before, because they are kept until then.
                    rows.h = mx.depends(rows.h, done) if done else rows.h
                    rows.add(part, gradient, powers_of, unit)
                    done = rows.sums()
                    if kept is parts[-1][0]:
                        results.append(rows.result(head, gradient, unit))
                        done = list(results[-1]) if gradient else [results[-1][0]]
        if not results:
            return mx.zeros((0,)), mx.zeros_like(hidden)
        losses, slopes = zip(*results, strict=True)
        return mx.concatenate(losses), mx.concatenate(slopes) if gradient else mx.zeros_like(hidden)

    forward = mx.custom_function(head.at_once(computed))

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        slopes = (cotangents[0][:, None] * outputs[1]).astype(hidden.dtype)
        return (slopes, *(mx.zeros_like(array) for array in primals[1:]))

    return forward(hidden, targets, weights)[0]


@dataclass(frozen=True)
class _Part:
    """A part of the vocabulary whose weights are at hand.

    Attributes:
        head: of the model.
        arrays: its weight's rows for these tokens, as they are stored.
        kept: the tokens.
        columns: of a tile.
        whole: whether these are all tokens.
    """

    head: Head
    arrays: list[mx.array]
    kept: slice
    columns: int
    whole: bool


class _Rows:
    """Some positions on their way through the vocabulary.

    Attributes:
        h, targets, weights: (R, D), (R,), (R,), of these positions.
        largest, total: (R, 1), the largest logit m so far and the sum s of exponentials relative to it.
        pulled: (R, D), the sum g; None before the first tile, or without a gradient.
        own: (R, 1), the target's logit x; None until a part is done.
        own_rows: (R, D) in h's dtype, the target's row of W.
    """

    def __init__(self, h: mx.array, targets: mx.array, weights: mx.array):
        self.h, self.targets, self.weights = h, targets, weights
        self.largest: Any = None
        self.total: Any = None
        self.pulled: Any = None
        self.own: Any = None
        self.own_rows: Any = None

    def sums(self) -> list[mx.array]:
        """Return what the next part starts from."""
        return [a for a in (self.total, self.pulled, self.own, self.own_rows) if a is not None]

    def add(self, part: _Part, gradient: bool, powers_of: Powers, unit: float) -> None:
        """Add a part of the vocabulary to the sums.

        Args:
            part: of the vocabulary.
            gradient: also add to `pulled`.
            powers_of: returns a tile's exponentials, and the largest logit.
            unit: a power of two by which the tiles' logits are scaled; `powers_of` knows it.
        """
        head, h, size = part.head, self.h, part.kept.stop - part.kept.start
        for start in range(0, size, part.columns):
            if self.total is not None:
                # Force the order, or all tiles may be in memory at once.
                h = mx.depends(h, [self.total, self.pulled] if gradient else [self.total])
            kept = slice(start, start + part.columns)
            dense = head.dense([mx.depends(array, h)[kept] for array in part.arrays], h.dtype)  # (S, D)
            logits = head.finish(((h * unit if unit != 1 else h) @ dense.T).astype(mx.float32), kept)  # (R, S)
            before = self.largest
            powers, self.largest = powers_of(logits, before, self.targets[:, None] - (part.kept.start + start))
            shrink: Any = None if before is None else mx.exp((before - self.largest) / unit)  # (R, 1)
            mass = device.row_sums(powers)
            self.total = mass if shrink is None else self.total * shrink + mass
            if gradient:
                slopes = powers if head.soft_cap is None else powers * head.slope(logits)
                pull = (slopes.astype(h.dtype) @ dense).astype(mx.float32)  # (R, D)
                self.pulled = pull if shrink is None else self.pulled * shrink + pull
        self._find_targets(part, gradient)

    def _find_targets(self, part: _Part, gradient: bool) -> None:
        """Take the logit of each target that is in a part of the vocabulary, and its row for the gradient."""
        head, local = part.head, self.targets
        if not part.whole:
            local = mx.clip(self.targets - part.kept.start, 0, part.kept.stop - part.kept.start - 1)
        rows = head.dense([array[local] for array in part.arrays], self.h.dtype)  # (R, D)
        products = (self.h.astype(mx.float32) * rows.astype(mx.float32)).sum(axis=-1, keepdims=True)
        own = head.finish(products, local[:, None])  # (R, 1)
        if self.own is not None:
            inside = (local == self.targets - part.kept.start)[:, None]
            own, rows = mx.where(inside, own, self.own), mx.where(inside, rows, self.own_rows) if gradient else rows
        self.own, self.own_rows = own, rows if gradient else None

    def result(self, head: Head, gradient: bool, unit: float) -> tuple[mx.array, mx.array]:
        """Return the weighted losses (R,), and their gradient (R, D) in h's dtype (empty without `gradient`)."""
        largest, total, own = self.largest / unit, self.total, self.own
        losses = mx.logaddexp(mx.array(0.0), mx.log(total) + largest - own)
        loss = (losses * self.weights[:, None]).squeeze(-1)  # (R,)
        if not gradient:
            return loss, mx.zeros((0,))
        others = total if head.soft_cap is None else total * head.slope(own)
        # If all others underflow, rounding may also put x far below m; the smallest float prevents 0 / 0.
        floor = mx.finfo(mx.float32).smallest_normal
        dh = (self.pulled - others * self.own_rows.astype(mx.float32)) / (total + mx.exp(own - largest) + floor)
        return loss, (dh * (head.scale * self.weights[:, None])).astype(self.h.dtype)


def _exact_powers(logits: mx.array, before: mx.array | None, own: mx.array) -> tuple[mx.array, mx.array]:
    """Return exp(logits - m), with 0 at each row's target, and m (R, 1), the largest logit so far.

    Args:
        logits: (R, S) of a tile.
        before: (R, 1), the m of the tiles before; None for the first.
        own: (R, 1) int, the target's column; outside of 0..S-1 if it is in another tile.
    """
    largest = logits.max(axis=-1, keepdims=True)
    if before is not None:
        largest = mx.maximum(before, largest)
    return _other_powers(logits, largest, own), largest


def _polynomial_powers(
    unit: float, logits: mx.array, before: mx.array | None, own: mx.array
) -> tuple[mx.array, mx.array]:
    """Return the same for logits that were multiplied by `unit`; here, m is the largest logit of all but the target."""
    column = mx.clip(own, 0, logits.shape[1] - 1)
    inside = column == own
    there = mx.take_along_axis(logits, column, axis=1)
    others = mx.put_along_axis(logits, column, mx.where(inside, -mx.inf, there), axis=1)
    # The smallest float: a tile of nothing but the target has no largest other logit.
    largest = mx.maximum(others.max(axis=-1, keepdims=True), mx.finfo(mx.float32).min)
    if before is not None:
        largest = mx.maximum(before, largest)
    below = largest - others
    return exponentials.exp_minus(below if unit == exponentials.SCALE else below * (exponentials.SCALE / unit)), largest


@mx.compile
def _other_powers(logits: mx.array, largest: mx.array, own: mx.array) -> mx.array:
    """Return exp(logits - largest) with 0 at each row's target, in one kernel.

    Args:
        logits: (R, S).
        largest: (R, 1).
        own: (R, 1) int, the target's column; outside of 0..S-1 if it is in another tile.
    """
    return mx.where(mx.arange(logits.shape[1]) == own, 0.0, mx.exp(logits - largest))


# Rows


def row_token_losses(
    head: Head, hidden: mx.array, targets: mx.array, weights: mx.array, tile_bytes: int, gradient: bool = True
) -> mx.array:
    """Return weights[p] * cross_entropy(hidden[p], targets[p]) for every p, holding the logits of R positions at a time.

    Args:
        head: W and what is applied to its logits.
        hidden: (P, D).
        targets: (P,) int.
        weights: (P,) float32; 0 for padding.
        tile_bytes: bound on a chunk's float32 logits; a single row may exceed it.
        gradient: also compute the gradient, for a call that is differentiated; without it the vjp is zero.

    Returns:
        (P,) float32, differentiable only in `hidden`: the head is frozen.
    """
    rows = chunk_rows(len(targets), head.vocabulary, tile_bytes)

    @mx.custom_function
    def forward(hidden: mx.array, targets: mx.array, weights: mx.array, *arrays: mx.array):
        losses, parts = [], []
        for start in range(0, len(targets), rows):
            stop = start + rows
            h, t, w = hidden[start:stop], targets[start:stop], weights[start:stop]
            if losses:  # one chunk at a time
                h = mx.depends(h, [losses[-1], *parts[-1:]])
            logits = chunk_logits(head, list(arrays), h)  # (R, V)
            if gradient:
                [own], [slopes] = mx.vjp(lambda x, t=t: [mx.fast.cross_entropy(x, t)], [logits], [w])
                losses.append(own * w)
                parts.append(chunk_gradient(head, list(arrays), h, logits, slopes))
            else:
                losses.append(mx.fast.cross_entropy(logits, t) * w)
        if not losses:
            return mx.zeros((0,)), mx.zeros_like(hidden)
        return mx.concatenate(losses), mx.concatenate(parts) if gradient else mx.zeros_like(hidden)

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        hidden, *rest = primals
        dh = (cotangents[0][:, None] * outputs[1]).astype(hidden.dtype)
        return (dh, *(mx.zeros_like(array) for array in rest))

    return forward(hidden, targets, weights, *head.arrays)[0]


def chunk_logits(head: Head, arrays: list[mx.array], h: mx.array) -> mx.array:
    """Return the logits of some positions, (R, V) float32.

    Args:
        head: what is applied to its logits.
        arrays: its weight.
        h: (R, D) hidden states.
    """
    parts: list[mx.array] = []
    for kept in _slices(head):
        after = [mx.depends(array, [h, *parts[-1:]])[kept] for array in arrays]  # one slice at a time
        parts.append(head.finish((h @ head.dense(after, h.dtype).T).astype(mx.float32), kept))
    return mx.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]


def chunk_gradient(head: Head, arrays: list[mx.array], h: mx.array, logits: mx.array, d_logits: mx.array) -> mx.array:
    """Return the gradient of the hidden states, (R, D) in h's dtype, from that of the logits, (R, V); see `chunk_logits`."""
    if head.soft_cap is not None:
        d_logits = d_logits * head.slope(logits)
    # After the logits, so that a quantized slice is dequantized again and not kept.
    pulls: list[mx.array] = []
    for kept in _slices(head):
        after = [mx.depends(array, [d_logits, *pulls[-1:]])[kept] for array in arrays]
        pulls.append((d_logits[:, kept].astype(h.dtype) @ head.dense(after, h.dtype)).astype(mx.float32))
    return (sum(pulls[1:], pulls[0]) * head.scale).astype(h.dtype)


def _slices(head: Head) -> list[slice]:
    """Return slices of the vocabulary.

    In them, a quantized head is dequantized a slice at a time, and no matrix has a side of 262k (Gemma's vocabulary).
    """
    return [slice(start, start + MAX_SLICE) for start in range(0, head.vocabulary, MAX_SLICE)]


# The loss of a head

NAME = "cross-entropy"
FEWEST, MOST = 32, 1024  # positions in a measurement
HeadLosses = Callable[..., mx.array]
"""(head, hidden (P, D), targets (P,), weights (P,), tile_bytes=, gradient=) -> (P,) weighted losses."""
LOSS_KERNELS: Mapping[str, HeadLosses] = {
    TILES: fused_token_losses,
    POLYNOMIAL: partial(fused_token_losses, polynomial=True),
    ROWS: row_token_losses,
}


def head_loss(head: Head, kernel: str, tile_bytes: int, whole_because: str = "") -> Loss:
    """Return a loss that is computed only from the hidden states of the supervised positions.

    Args:
        head: turns hidden states into logits.
        kernel: a name in `loss_kernels()`.
        tile_bytes: the most bytes of logits at a time.
        whole_because: why the head has no last block of which some positions can be computed alone.
    """
    tiles = f"fused cross-entropy, {tile_bytes / 2**20:.0f} MiB tiles"
    words = {TILES: tiles, POLYNOMIAL: f"{tiles}, polynomial", ROWS: "mx.fast.cross_entropy by rows"}
    block = (
        "last block where trained" if head.last is not None else f"whole last block ({whole_because or 'not asked'})"
    )
    token_losses = partial(loss_kernels()[kernel], tile_bytes=tile_bytes)

    def tokens(gradient: bool, model: nn.Module, arrays: Arrays) -> mx.array:
        positions = arrays["positions"]
        chosen = head.hidden_at(positions, arrays["inputs"], **shared_caches(model, arrays))  # (P, D)
        targets = arrays["targets"].reshape(-1)[positions]
        return token_losses(head, chosen, targets, arrays["weights"], gradient=gradient)

    def loss(gradient: bool, model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array]:
        return tokens(gradient, model, arrays).sum(), arrays["weights"].sum()

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

    def exact(kept: slice, after: list[mx.array], hidden: mx.array) -> mx.array:
        # No gradient goes through the order: 4-bit floats are looked up by their codes, which have none.
        waiting = mx.depends(list(head.arrays), [hidden, *after])
        arrays = [mx.stop_gradient(array[kept]) for array in waiting]
        return head.finish(hidden.astype(mx.float32) @ head.dense(arrays, mx.float32).T, kept)

    def exactly(hidden: mx.array) -> mx.array:
        logits: list[mx.array] = []
        rows = max(1, tile_bytes // (4 * width))  # a large head as floats would be more than the run takes
        for start in range(0, vocabulary, rows):
            # One slice after the other, whose weight is dequantized again for the gradient.
            logits.append(mx.checkpoint(partial(exact, slice(start, start + rows), logits[-1:]))(hidden))
        return of_logits(mx.concatenate(logits, axis=-1), targets)

    candidates: dict[str, Any] = {
        name: lambda hidden, kernel=kernel: kernel(head, hidden, targets, weights, tile_bytes=tile_bytes)
        for name, kernel in loss_kernels().items()
    }
    all_logits = {PLAIN_LOGITS: lambda hidden: of_logits(head.logits(hidden), targets)}
    trial = TimingInputs([hidden], [mx.ones((positions, 1))], lambda function: lambda h: [function(h)[:, None]])
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
