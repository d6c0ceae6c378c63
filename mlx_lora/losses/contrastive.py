"""Losses of embeddings: in-batch negatives (InfoNCE), triplets, and scored pairs (CoSENT, cosine), each at several widths.

They are sentence-transformers' losses under the names of the field:

    infonce    MultipleNegativesRankingLoss: a query's own document against all other documents of the step
    triplet    TripletLoss with the cosine distance: against the example's own negatives alone
    cosent     CoSENTLoss: pairs with a higher score are to be more alike than pairs with a lower one
    cosine     CosineSimilarityLoss: the cosine is to be the score

Every loss is a function of pooled embeddings that are not yet normalized, because Matryoshka (arXiv 2205.13147) takes their
first numbers, and normalizes these. `loss_and_gradient` returns the gradient by the embeddings; a step hands it to its
micro-batches one after the other (objectives/embed.py), so that its memory does not depend on how many examples it has
(GradCache, arXiv 2101.06983).

Shapes: E examples, K texts of each (the query, its document, its negatives), D width, C queries of a chunk, M = E (K - 1) documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import numpy as np

INFONCE, TRIPLET, COSENT, COSINE = "infonce", "triplet", "cosent", "cosine"
SCORED = (COSENT, COSINE)  # losses of pairs with a score
ABSENT = -1.0  # the number of a text that an example does not have
CHUNK = (
    256  # queries that are compared with all documents at a time: few enough that their similarities take little memory
)
SMALLEST_NORM = 1e-12  # below which a vector is not made longer, as in torch


@dataclass(frozen=True)
class ContrastiveOptions:
    """How embeddings are compared.

    Attributes:
        loss: one of the names above.
        temperature: cosines are divided by it (infonce, cosent).
        margin: by which a negative is to be farther away than the document, as a cosine distance (triplet).
        dims: the widths at which the loss is computed and added up; empty: the whole width alone.
    """

    loss: str = INFONCE
    temperature: float = 0.05
    margin: float = 0.5
    dims: tuple[int, ...] = ()


class Texts(NamedTuple):
    """What is known of the texts of a step's examples.

    Attributes:
        numbers: (E, K) float32, the number of each text, the same one for equal texts, ABSENT where there is none. For a
            scored pair, the first is its score.
        real: (E,) float32, 1 for an example, 0 for padding.
    """

    numbers: mx.array
    real: mx.array


def normalized(embeddings: mx.array) -> mx.array:
    """Return vectors (..., D) of length one; a vector of zeros, which padding has, stays one and gets no gradient."""
    squares = mx.square(embeddings).sum(axis=-1, keepdims=True)
    return embeddings * mx.rsqrt(mx.maximum(squares, SMALLEST_NORM**2))


def excluded(texts: Texts, first: int, count: int) -> mx.array:
    """Return which documents are no negatives of some queries, (C, M) bool; a query's own document is among the others.

    These are padding, absent negatives, other copies of the query's own document or of the query itself, and the documents
    of other examples with the same query.

    Args:
        texts: of all examples.
        first, count: the queries, C.
    """
    numbers = texts.numbers
    queries, documents = numbers[:, 0], numbers[:, 1:]  # (E,), (E, K - 1)
    mine = slice(first, first + count)
    found = (documents == documents[mine, :1][:, :, None]) | (
        documents == queries[mine][:, None, None]
    )  # (C, E, K - 1)
    same_query = (queries[mine][:, None] == queries[None, :])[:, :, None]
    found = found | (same_query & (mx.arange(documents.shape[1]) == 0))
    found = found | (documents == ABSENT) | (texts.real == 0)[None, :, None]
    own = (mx.arange(first, first + count)[:, None] == mx.arange(len(numbers))[None, :])[:, :, None]
    found = found & ~(own & (mx.arange(documents.shape[1]) == 0))
    return found.reshape(count, -1)


def info_nce(
    queries: mx.array, documents: mx.array, own: mx.array, no_negatives: mx.array, temperature: float
) -> tuple[mx.array, mx.array]:
    """Return the loss of each query, and the rank of its document among the candidates, from 0; both (C,).

    Args:
        queries: (C, D), normalized.
        documents: (M, D), normalized.
        own: (C,) int, each query's document.
        no_negatives: (C, M) bool, see `excluded`.
        temperature: of the cosines.

    Source: arXiv 1807.03748, eq. 4; sentence-transformers' MultipleNegativesRankingLoss.
    """
    similarities = queries @ documents.T / temperature  # (C, M)
    similarities = mx.where(no_negatives, -mx.inf, similarities)
    mine = mx.take_along_axis(similarities, own[:, None], axis=1)  # (C, 1)
    losses = mx.logsumexp(similarities, axis=1) - mine.squeeze(1)
    return losses, (similarities >= mine).sum(axis=1) - 1  # equal ones count against it: vectors may have collapsed


def triplet(embeddings: mx.array, present: mx.array, margin: float) -> tuple[mx.array, mx.array]:
    """Return the loss of each example, and whether all its negatives are farther away than its document; both (E,).

    Args:
        embeddings: (E, K, D), normalized.
        present: (E, K - 2) float32, 1 where the example has this negative.
        margin: of the cosine distance.

    Source: arXiv 1503.03832, eq. 1; sentence-transformers' TripletLoss with TripletDistanceMetric.COSINE.
    """
    cosines = (embeddings[:, :1] * embeddings[:, 1:]).sum(axis=-1)  # (E, K - 1)
    nearer = cosines[:, 1:] - cosines[:, :1]  # of the negatives
    losses = (mx.maximum(nearer + margin, 0) * present).sum(axis=1) / mx.maximum(present.sum(axis=1), 1)
    return losses, ((nearer < 0) | (present == 0)).all(axis=1)


def co_sent(cosines: mx.array, scores: mx.array, real: mx.array, temperature: float) -> mx.array:
    """Return the loss of scored pairs, the same number for each, (E,).

    Args:
        cosines, scores, real: (E,) float32.
        temperature: of the cosines.

    Source: Su, "CoSENT" (2022), https://kexue.fm/archives/8847; sentence-transformers' CoSENTLoss.
    """
    counts = (scores[:, None] < scores[None, :]) & (
        real[:, None] * real[None, :] > 0
    )  # (E, E): the first is scored lower
    apart = mx.where(counts, (cosines[:, None] - cosines[None, :]) / temperature, -mx.inf)
    together = mx.concatenate([mx.zeros((1,)), apart.reshape(-1)])
    return mx.broadcast_to(mx.logsumexp(together), cosines.shape)


class Found(NamedTuple):
    """A loss of embeddings, and its gradient.

    Attributes:
        losses: (E,) float32.
        gradient: (E, K, D) float32, of the sum of the losses.
        ranks: (E,) float32, how many candidates are nearer to the query than its document, by all numbers of the
            embeddings; of a scored pair, its cosine.
    """

    losses: mx.array
    gradient: mx.array
    ranks: mx.array


def losses_of(
    embeddings: mx.array, texts: Texts, options: ContrastiveOptions, first: int = 0, count: int | None = None
) -> tuple[mx.array, mx.array]:
    """Return the losses of some examples among all of a step, and what is reported of each (`Found.ranks`); both (C,).

    Args:
        embeddings: (E, K, D) float32, pooled and not normalized.
        texts: of these.
        options: the loss.
        first, count: the examples; None: all. The losses of scored pairs are always those of all.
    """
    total, told = None, None
    for dim in options.dims or (embeddings.shape[-1],):
        part = normalized(embeddings[..., :dim])
        losses, ranks = _at_width(part, texts, options, first, len(part) if count is None else count)
        total = losses if total is None else total + losses
        # Told of the largest width, whatever the order.
        told = ranks if told is None or dim == max(options.dims) else told
    if total is None or told is None:
        raise ValueError("a loss at no width")
    return total, mx.stop_gradient(told.astype(mx.float32))


def _at_width(
    embeddings: mx.array, texts: Texts, options: ContrastiveOptions, first: int, count: int
) -> tuple[mx.array, mx.array]:
    """Return `losses_of` of normalized embeddings."""
    if options.loss in SCORED:
        cosines, scores = (embeddings[:, 0] * embeddings[:, 1]).sum(axis=-1), texts.numbers[:, 0]
        if options.loss == COSINE:
            return mx.square(cosines - scores), cosines
        return co_sent(cosines, scores, texts.real, options.temperature), cosines
    mine = slice(first, first + count)
    if options.loss == TRIPLET:
        present = (texts.numbers[mine, 2:] != ABSENT).astype(mx.float32)
        losses, right = triplet(embeddings[mine], present, options.margin)
        return losses, 1 - right
    others = embeddings.shape[1] - 1
    documents = embeddings[:, 1:].reshape(-1, embeddings.shape[-1])  # (M, D)
    own = mx.arange(first, first + count) * others
    return info_nce(embeddings[mine, 0], documents, own, excluded(texts, first, count), options.temperature)


def loss_and_gradient(embeddings: mx.array, texts: Texts, options: ContrastiveOptions) -> Found:
    """Return the losses of a step's examples, with the gradient of their sum; computed when this returns.

    Queries are compared with all documents a chunk at a time, so that the memory of the similarities does not grow with the
    square of the examples. Scored pairs have one cosine each, and are compared all at once.

    Args:
        embeddings: (E, K, D) float32, pooled and not normalized.
        texts: of these.
        options: the loss.
    """
    count = len(embeddings)
    size = count if options.loss in SCORED else CHUNK
    gradient, losses, ranks = mx.zeros_like(embeddings), [], []

    def summed(all_of_them: mx.array, first: int, wanted: int) -> tuple[mx.array, tuple[mx.array, mx.array]]:
        found, told = losses_of(all_of_them, texts, options, first, wanted)
        real = texts.real if options.loss in SCORED else texts.real[first : first + wanted]
        return (found * real).sum(), (found, told)

    differentiate: Callable[..., tuple[tuple[mx.array, tuple[mx.array, mx.array]], mx.array]] = mx.value_and_grad(
        summed
    )
    for first in range(0, count, size):
        (_, (found, told)), part = differentiate(embeddings, first, min(size, count - first))
        gradient = gradient + part
        mx.eval(gradient, found, told)
        losses.append(found)
        ranks.append(told)
    return Found(mx.concatenate(losses), gradient, mx.concatenate(ranks))


# Measures of ranking


def retrieval(ranks: Iterable[np.ndarray], at: int = 10) -> dict[str, float]:
    """Return how well queries find their documents: means over the queries.

    Args:
        ranks: of each query, the ranks of its documents, from 0; at least one.
        at: results that count.

    Returns:
        `accuracy` (the first result is one of them), `recall_at_10` (their share among the first ten), `mrr_at_10` (one over
        the rank of the first, from 1) and `ndcg_at_10`.

    Source: sentence-transformers' InformationRetrievalEvaluator.
    """
    rows = []
    for own in ranks:
        shown = np.sort(own[own < at])
        gain = float((1 / np.log2(shown + 2)).sum())
        ideal = float((1 / np.log2(np.arange(min(at, len(own))) + 2)).sum())
        reciprocal = 1 / (1 + int(shown[0])) if len(shown) else 0.0
        rows.append((float((own == 0).any()), len(shown) / len(own), reciprocal, gain / ideal))
    means = np.mean(rows, axis=0) if rows else np.full(4, np.nan)
    names = ("accuracy", f"recall_at_{at}", f"mrr_at_{at}", f"ndcg_at_{at}")
    return dict(zip(names, map(float, means), strict=True))
