"""Divergences between a teacher's distribution of the next token and a student's.

    forward_kl   KL(teacher, student)    the student covers whatever the teacher may say
    reverse_kl   KL(student, teacher)    the student keeps to what the teacher is likely to say
    jsd          b KL(teacher, m) + (1 - b) KL(student, m), m = b teacher + (1 - b) student     arXiv 2306.13649, eq. 1

With b = 0 and b = 1, jsd is defined as the first two, as in TRL's GKD. Of a teacher, the probabilities of its k likeliest
tokens may be known and, as one bin, that of all others together. The divergence of the k + 1 bins is exact for them, and
a lower bound of the divergence over all tokens, because joining tokens to a bin can only hide differences.

Shapes: P positions, V vocabulary, k likeliest tokens, N = k + 1 bins (N = V if every token is a bin of its own).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx

FORWARD_KL, REVERSE_KL, JSD = "forward_kl", "reverse_kl", "jsd"
SAMPLED_KL = "sampled_kl"  # reverse_kl, estimated from sampled tokens (sampled_kl.py)
# The log-probability of what is impossible: its exponential is 0, and unlike infinity it has a product with 0.
FLOOR = -1e4


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


def kl(of: mx.array, to: mx.array) -> mx.array:
    """Return KL(of, to) of log-probabilities (P, N), (P,)."""
    return (mx.exp(of) * (of - to)).sum(axis=-1)


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


def _without_padding(logits: mx.array, options: DivergenceOptions) -> mx.array:
    padded = options.vocabulary is not None and options.vocabulary < logits.shape[-1]
    return logits[:, : options.vocabulary] if padded else logits
