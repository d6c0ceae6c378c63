"""Compute losses of distillation: how far a student's distribution of each trained token is from the teacher's.

    forward_kl   KL(teacher, student)    the student covers whatever the teacher may say
    reverse_kl   KL(student, teacher)    the student keeps to what the teacher is likely to say
    jsd          b KL(teacher, m) + (1 - b) KL(student, m), m = b teacher + (1 - b) student     arXiv 2306.13649, eq. 1
    sampled_kl   reverse_kl, estimated from the tokens that the student sampled

With b = 0 and b = 1, jsd is defined as the first two, as in TRL's GKD. Of a teacher, the probabilities of its k likeliest
tokens may be known and, as one bin, that of all others together. The divergence of the k + 1 bins is exact for them, and
a lower bound of the divergence over all tokens, because joining tokens to a bin can only hide differences.

As in the cross-entropy by rows (losses/fused.py), logits exist for a chunk of positions at a time: they are computed, compared
with what is known of the teacher, and their gradient is multiplied by the head immediately. Only the gradient of the hidden
states is kept, so a step takes about as much memory as one of imitation, plus the teacher's records of the batch.

sampled_kl is on-policy distillation as a policy gradient. The student as it was, p_old, samples a token x; the teacher q says
how likely it finds it. The token's advantage is that of itself alone (a discount of 0), and there is no baseline:

    A = log q(x) - log p_old(x)        loss = -(p(x) / p_old(x)) A

While p is p_old, the loss is an estimate of KL(p || q) at its position, and its gradient one of the gradient of KL(p || q):
both are right on average over x. A single token is a noisy estimate of a sum over the vocabulary, but needs one number of
the teacher only. Source: K. Lu, On-Policy Distillation, Thinking Machines Lab, 2025
(https://thinkingmachines.ai/blog/on-policy-distillation); the ratio is that of their loss `importance_sampling`, which does
not clip it.

Shapes: P supervised or sampled positions (then padding), R of a chunk, D width, V vocabulary, k likeliest tokens, N = k + 1
bins (N = V if every token is a bin of its own).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.losses.cross_entropy import PLAIN_LOGITS, Arrays, Loss, LossFunction, token_arrays
from mlx_lora.losses.fused import chunk_gradient, chunk_logits
from mlx_lora.models.head import Head, find_head, with_last_block
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.planner.memory import chunk_rows

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet

FORWARD_KL, REVERSE_KL, JSD = "forward_kl", "reverse_kl", "jsd"
SAMPLED_KL = "sampled_kl"  # reverse_kl, estimated from sampled tokens
# The log-probability of what is impossible: its exponential is 0, and unlike infinity it has a product with 0.
FLOOR = -1e4
PART = "last block where trained"
KL = "kl"  # what a step and a validation report: KL(teacher, student)


@dataclass(frozen=True)
class DivergenceOptions:
    """What a student is compared by.

    Attributes:
        divergence: `forward_kl`, `reverse_kl`, `jsd`, or `sampled_kl` where tokens are sampled.
        jsd_beta: b of `jsd`.
        temperature: divides the logits of both.
        top_k: how many of the teacher's likeliest tokens are known; 0: all.
        vocabulary: how many tokens both models have; logits beyond are padding of one of them, and left out. None: all.
        reports_reverse: whether KL(student, teacher) is reported, and not KL(teacher, student).
    """

    divergence: str = FORWARD_KL
    jsd_beta: float = 0.5
    temperature: float = 1.0
    top_k: int = 64
    vocabulary: int | None = None
    reports_reverse: bool = False

    @property
    def beta(self) -> float:
        """The place between forward (0) and reverse (1)."""
        return {FORWARD_KL: 0.0, REVERSE_KL: 1.0}.get(self.divergence, self.jsd_beta)


@dataclass(frozen=True)
class Known:
    """What is known of a teacher's distributions.

    Attributes:
        logps: (P, N) float32: log-probabilities of the k tokens and of all others together, or of every token.
        ids: (P, k) int32, the k tokens, the likeliest first; None: every token is known.
    """

    logps: mx.array
    ids: mx.array | None = None


# The loss of a model


def distill_arrays(batch: Batch) -> Arrays:
    """Copy a batch to the device, with the teacher's `relative` log-probabilities (P, N) float16, and `ids` (P, k)."""
    if batch.table is None or batch.numbers is None:
        raise ValueError("a batch of rows without a teacher's probabilities")
    relative, ids = batch.table.read(batch.numbers[batch.real], len(batch.positions))
    taught = {"relative": mx.array(relative)} | ({} if ids is None else {"ids": mx.array(ids)})
    return token_arrays(batch) | taught


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
        def summed(model: nn.Module, arrays: Arrays) -> tuple[mx.array, mx.array, dict[str, mx.array]]:
            taught = [arrays[name] for name in ("relative", "ids") if name in arrays]
            if head is None:
                logits = model(arrays["inputs"])
                logits = logits.reshape(-1, logits.shape[-1])[arrays["positions"]].astype(mx.float32)  # (P, V)
                losses, kl = divergence_of_logits(logits, _known(*taught), options)
            else:
                hidden = head.hidden_at(arrays["positions"], arrays["inputs"])  # (P, D)
                losses, kl = chunked_divergence(head, hidden, *taught, options=options, gradient=gradient)
            # where, not a product: what padding holds must not count, whatever it is
            real = arrays["weights"] > 0
            sums = {KL: mx.stop_gradient(mx.where(real, kl, 0.0).sum())}
            return mx.where(real, losses, 0.0).sum(), arrays["weights"].sum(), sums

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
            logits, ones = chunk_logits(head, arrays, h), mx.ones((len(h),))  # (R, V), (R,)
            if gradient:
                compared = partial(_compared, teacher, options)
                parts, [slopes] = mx.vjp(compared, [logits], [ones, mx.zeros_like(ones)])
                parts.append(chunk_gradient(head, arrays, h, logits, slopes))
            else:
                parts = _compared(teacher, options, logits)
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


def _compared(teacher: Known, options: DivergenceOptions, logits: mx.array) -> list[mx.array]:
    return list(divergence_of_logits(logits, teacher, options))


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
    arrays = token_arrays(batch)
    positions, inputs = arrays["positions"][: int(batch.weights.sum())], arrays["inputs"]
    if head is None:
        states = model(inputs)
        states = states.reshape(-1, states.shape[-1])[positions]
        columns = states.shape[-1]
    else:
        states, columns = head.hidden_at(positions, inputs), head.vocabulary
    rows = chunk_rows(len(positions), columns, loss_tile_bytes())
    for start in range(0, len(positions), rows):
        part = states[start : start + rows]
        logits = part if head is None else head.logits(part)
        yield likeliest(logits.astype(mx.float32), options)


# Divergences of distributions


def divergence_of_logits(logits: mx.array, known: Known, options: DivergenceOptions) -> tuple[mx.array, mx.array]:
    """Return the loss of a student's logits, and the KL to report, each (P,).

    Args:
        logits: (P, V) float32, of the student.
        known: of the teacher, by the same options.
        options: how the two are compared.
    """
    student = bins(_without_padding(logits, options), known.ids, options.temperature)
    shown = 1.0 if options.reports_reverse else 0.0
    reported = divergence(known.logps, student, shown)
    return (reported if options.beta == shown else divergence(known.logps, student, options.beta)), reported


def divergence(teacher: mx.array, student: mx.array, beta: float) -> mx.array:
    """Return the generalized Jensen-Shannon divergence of TRL's GKD, (P,); gradients may go through both.

    Args:
        teacher, student: (P, N) log-probabilities.
        beta: 0 is KL(teacher, student), 1 is KL(student, teacher).
    """
    if beta == 0:
        return kl(teacher, student)
    if beta == 1:
        return kl(student, teacher)
    mixed = mx.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    return beta * kl(teacher, mixed) + (1 - beta) * kl(student, mixed)


def kl(of: mx.array, to: mx.array) -> mx.array:
    """Return KL(of, to) of log-probabilities (P, N), (P,)."""
    return (mx.exp(of) * (of - to)).sum(axis=-1)


def likeliest(logits: mx.array, options: DivergenceOptions) -> Known:
    """Return the distribution that logits give, (P, V) float32, reduced to its `top_k` likeliest tokens."""
    logits, top_k = _without_padding(logits, options), options.top_k
    if not 0 < top_k < logits.shape[-1] - 1:
        return Known(bins(logits, None, options.temperature))
    found = mx.argpartition(-logits, top_k, axis=-1)[:, :top_k]
    order = mx.argsort(-mx.take_along_axis(logits, found, axis=-1), axis=-1)
    ids = mx.take_along_axis(found, order, axis=-1).astype(mx.int32)
    return Known(bins(logits, ids, options.temperature), ids)


def bins(logits: mx.array, ids: mx.array | None, temperature: float = 1.0) -> mx.array:
    """Return the log-probabilities of some tokens and of all others together, (P, N) float32.

    Args:
        logits: (P, V) float32.
        ids: (P, k) int, different tokens in each row; None: a bin for every token.
        temperature: divides the logits.
    """
    found = logits if temperature == 1 else logits / temperature
    if ids is not None:
        own = mx.take_along_axis(found, ids, axis=-1)
        # Summed over the others themselves: 1 minus the sum of the k would be all rounding where they have nearly all.
        others = mx.logsumexp(mx.put_along_axis(found, ids, mx.array(-math.inf), axis=-1), axis=-1, keepdims=True)
        found = mx.concatenate([own, others], axis=-1)
    return mx.maximum(found - mx.logsumexp(found, axis=-1, keepdims=True), FLOOR)


def _without_padding(logits: mx.array, options: DivergenceOptions) -> mx.array:
    padded = options.vocabulary is not None and options.vocabulary < logits.shape[-1]
    return logits[:, : options.vocabulary] if padded else logits


def sampled_kl(logps: mx.array, old: mx.array, teacher: mx.array) -> mx.array:
    """Return the loss of each sampled token, (P,) float32.

    Args:
        logps: (P,) float32, log-probabilities under the student that is trained.
        old: (P,) float32, under the student that sampled them.
        teacher: (P,) float32, under the teacher.
    """
    advantages = mx.stop_gradient(teacher - old)
    return -mx.exp(logps - mx.stop_gradient(old)) * advantages
