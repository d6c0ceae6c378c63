"""The loss of distillation: how far a student's distribution of each trained token is from the teacher's.

As for the cross-entropy (row_loss.py), logits exist for a chunk of positions at a time: they are computed, compared with
what is known of the teacher, and their gradient is multiplied by the head immediately. Only the gradient of the hidden
states is kept, so a step takes about as much memory as one of imitation, plus the teacher's records of the batch.

Shapes: P supervised positions, R of a chunk, D width, V vocabulary, N bins, k likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.data.batches import Batch
from mlx_lora.data.encoded_set import EncodedSet
from mlx_lora.models.head import Head, find_head, with_last_block
from mlx_lora.objectives.divergences import DivergenceOptions, Known, divergence_of_logits, likeliest
from mlx_lora.planner.memory import chunk_rows
from mlx_lora.planner.this_machine import loss_tile_bytes
from mlx_lora.training.loss_choice import PLAIN_LOGITS
from mlx_lora.training.losses import Arrays, Loss, LossFunction
from mlx_lora.training.row_loss import chunk_gradient, chunk_logits

PART = "last block where trained"
KL = "kl"  # what a step and a validation report: KL(teacher, student)


def distill_arrays(batch: Batch) -> tuple[mx.array, ...]:
    """Copy a batch to the device: `Arrays`, the teacher's relative log-probabilities (P, N) float16, and ids (P, k)."""
    if batch.table is None or batch.numbers is None:
        raise ValueError("a batch of rows without a teacher's probabilities")
    relative, ids = batch.table.read(batch.numbers[batch.real], len(batch.positions))
    return (*Arrays.of(batch), mx.array(relative), *(() if ids is None else (mx.array(ids),)))


def distill_loss(
    loss: Loss,
    model: nn.Module,
    config: dict[str, Any],
    options: DivergenceOptions,
    rows: EncodedSet | None,
    words: str,
) -> Loss:
    """Return the loss of distillation on a model.

    Args:
        loss: of tokens, chosen for this model: it says whether the head can be computed apart, and the last block in part.
        model, config: the model and its config.json.
        options: how student and teacher are compared.
        rows: the set that is trained on, or measured, with what the teacher says about it; None: it comes with the batches,
            and the options have the vocabulary.
        words: on the objective, for the run header.
    """
    head = head_of(loss, model, config)
    if rows is not None and rows.table is not None:
        options = replace(options, vocabulary=rows.table.form.vocabulary)

    def of(gradient: bool) -> LossFunction:
        def summed(model: nn.Module, *batch: mx.array) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            arrays, relative, ids = Arrays(*batch[:5]), batch[5], batch[6:]
            if head is None:
                losses, kl = _of_whole_logits(model, arrays, relative, *ids, options=options)
            else:
                hidden = head.hidden_at(arrays.positions, arrays.inputs)  # (P, D)
                losses, kl = chunked_divergence(head, hidden, relative, *ids, options=options, gradient=gradient)
            # where, not a product: what padding holds must not count, whatever it is
            real = arrays.weights > 0
            sums = {KL: mx.stop_gradient(mx.where(real, kl, 0.0).sum())}
            return mx.where(real, losses, 0.0).sum(), arrays.weights.sum(), sums

        return summed

    how = "whole logits" if head is None else f"logits by chunks; {'whole last block' if head.last is None else PART}"
    return replace(loss, train=of(True), measure=of(False), description=f"{words}; {how}")


def head_of(loss: Loss, model: nn.Module, config: dict[str, Any]) -> Head | None:
    """Return the head that a loss of tokens computes with; None: it uses the model's own logits."""
    head = None if loss.kernel == PLAIN_LOGITS else find_head(model, config)
    if not isinstance(head, Head):
        return None
    return with_last_block(head, model)[0] if loss.part_of_last else head


def chunked_divergence(
    head: Head,
    hidden: mx.array,
    relative: mx.array,
    *ids: mx.array,
    options: DivergenceOptions,
    gradient: bool = True,
) -> tuple[mx.array, mx.array]:
    """Return the loss at each position and KL(teacher, student), each (P,) float32, holding R logits at a time.

    Args:
        head: W and what is applied to its logits.
        hidden: (P, D); the losses are differentiable in it alone.
        relative: (P, N) float16, the teacher's log-probabilities relative to the likeliest token's.
        ids: (P, k) int32; left out if every token is known.
        options: how student and teacher are compared.
        gradient: also compute the gradient, for a call that is differentiated; without it the vjp is zero.
    """
    rows = chunk_rows(len(hidden), head.vocabulary, loss_tile_bytes())

    @mx.custom_function
    def forward(hidden: mx.array, relative: mx.array, *rest: mx.array):
        known, arrays = rest[: len(ids)], list(rest[len(ids) :])
        found: list[list[mx.array]] = [[], [], []]  # losses, KL, gradients
        for start in range(0, len(hidden), rows):
            stop = start + rows
            h = hidden[start:stop]
            if found[0]:  # one chunk at a time
                h = mx.depends(h, [column[-1] for column in found if column])
            teacher = _known(relative[start:stop], *(one[start:stop] for one in known))
            parts = _chunk(head, arrays, h, teacher, options, gradient)
            for column, part in zip(found, parts, strict=False):
                column.append(part)
        losses, kl, pulled = found
        if not losses:
            return mx.zeros((0,)), mx.zeros((0,)), mx.zeros_like(hidden)
        of_hidden = mx.concatenate(pulled) if gradient else mx.zeros_like(hidden)
        return mx.concatenate(losses), mx.concatenate(kl), of_hidden

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        hidden, *rest = primals
        dh = (cotangents[0][:, None] * outputs[2]).astype(hidden.dtype)
        return (dh, *(mx.zeros_like(array) for array in rest))

    losses, kl, _ = forward(hidden, relative, *ids, *head.arrays)
    return losses, kl


def _chunk(
    head: Head, arrays: list[mx.array], h: mx.array, teacher: Known, options: DivergenceOptions, gradient: bool
) -> tuple[mx.array, ...]:
    """Return these positions' losses (R,), KL (R,), and with `gradient` the hidden states' gradient (R, D)."""
    logits = chunk_logits(head, arrays, h)  # (R, V)
    if not gradient:
        return divergence_of_logits(logits, teacher, options)
    zeros, ones = mx.zeros((len(h),)), mx.ones((len(h),))
    [losses, kl], [d_logits] = mx.vjp(
        lambda logits: list(divergence_of_logits(logits, teacher, options)), [logits], [ones, zeros]
    )
    return losses, kl, chunk_gradient(head, arrays, h, logits, d_logits)


def _of_whole_logits(
    model: nn.Module, arrays: Arrays, relative: mx.array, *ids: mx.array, options: DivergenceOptions
) -> tuple[mx.array, mx.array]:
    """Return the same from the model's own logits of all positions."""
    logits = model(arrays.inputs)
    logits = logits.reshape(-1, logits.shape[-1])[arrays.positions].astype(mx.float32)  # (P, V)
    return divergence_of_logits(logits, _known(relative, *ids), options)


def _known(relative: mx.array, *ids: mx.array) -> Known:
    """Return what relative log-probabilities say: with their sum divided out, they are a distribution."""
    relative = relative.astype(mx.float32)
    logps = relative - mx.logsumexp(relative, axis=-1, keepdims=True)
    return Known(logps, *ids)


def known_of_batch(model: nn.Module, head: Head | None, batch: Batch, options: DivergenceOptions) -> Iterator[Known]:
    """Yield what a teacher says about the trained targets of a batch, a chunk of positions at a time.

    Args:
        model: the teacher, in eval mode.
        head: its head, see `head_of`.
        batch: rows as the teacher sees them.
        options: how many tokens are kept, and the temperature.
    """
    arrays = Arrays.of(batch)
    positions = arrays.positions[: int(batch.weights.sum())]
    if head is None:
        states = model(arrays.inputs)
        states = states.reshape(-1, states.shape[-1])[positions]
        columns = states.shape[-1]
    else:
        states, columns = head.hidden_at(positions, arrays.inputs), head.vocabulary
    rows = chunk_rows(len(positions), columns, loss_tile_bytes())
    for start in range(0, len(positions), rows):
        part = states[start : start + rows]
        logits = part if head is None else head.logits(part)
        yield likeliest(logits.astype(mx.float32), options)
