"""Losses and measures of labels, rankings and embeddings: of labels, from the scores that a head gives texts.

A problem has a loss, by transformers' names (`problem_type`), and each text has one number in the mean:

    single_label_classification   cross-entropy of the label, weighted: sum(w l) / sum(w), as torch's CrossEntropyLoss
    multi_label_classification    binary cross-entropy, mean over the labels, with w on those that a text has (pos_weight)
    regression                    squared error
    ordinal                       cross-entropy of the label, and how far the probabilities lie from it on the scale

Losses are for mlx; measures are of numpy arrays, after the last batch.

Shapes: N texts, K labels; scores are (N, K), for regression (N, 1).

Losses and measures of rankings, from the scores that a head gives the documents of a query.

    binary      cross-entropy of each document, relevant or not         mean over documents
    pairwise    RankNet: each better document above each worse one      mean over pairs
    listwise    ListNet: the scores' softmax like the grades'           mean over queries

They are sentence-transformers' BinaryCrossEntropyLoss, RankNetLoss (which takes logarithms to base 2) and ListNetLoss.
Sources: RankNet, Burges et al. 2005; ListNet, Cao et al. 2007.

Shapes: E queries, K documents of each; a grade below 0 stands for no document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"
ORDINAL = "ordinal"  # which transformers has no name for


def classification_losses(
    problem: str, scores: mx.array, labels: mx.array, weights: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return the loss of each text and its weight in the mean, both (N,) float32.

    Args:
        problem: one of the four.
        scores: (N, K) float32.
        labels: (N,) numbers of labels, or the numbers to predict; (N, K), 1 for each label that a text has.
        weights: (K,) of the labels; None: 1.
    """
    if problem == NUMBER:
        return mx.square(scores[:, 0] - labels), mx.ones(labels.shape)
    if problem == SEVERAL:
        # log(1 + exp(-s)) for a label that the text has, log(1 + exp(s)) for any other
        having = labels * (1.0 if weights is None else weights)
        losses = having * nn.softplus(-scores) + (1 - labels) * nn.softplus(scores)
        return losses.mean(axis=-1), mx.ones(len(scores))
    own = labels.astype(mx.int32)
    weight = mx.ones(len(own)) if weights is None else weights[own]
    losses = nn.losses.cross_entropy(scores, own)
    if problem == ORDINAL:  # the ranked probability score, of the probabilities that the label is at most each one
        at_most = (own[:, None] <= mx.arange(scores.shape[1])).astype(mx.float32)
        losses = losses + mx.square(mx.cumsum(mx.softmax(scores, axis=-1), axis=-1) - at_most).sum(axis=-1)
    return weight * losses, weight


def all_right(problem: str, scores: mx.array, labels: mx.array) -> mx.array:
    """Return 1 for each text whose labels are all right, else 0, (N,) float32; of several, those above 1/2 count."""
    if problem == SEVERAL:
        return ((scores > 0) == (labels > 0.5)).all(axis=-1).astype(mx.float32)
    return (scores.argmax(axis=-1) == labels.astype(mx.int32)).astype(mx.float32)


def probabilities(problem: str, scores: np.ndarray) -> np.ndarray:
    """Return the probabilities of the labels, (N, K) float64; for regression, the numbers."""
    scores = scores.astype(np.float64)
    if problem == NUMBER:
        return scores
    if problem == SEVERAL:
        return 1 / (1 + np.exp(-scores))
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


# Measures


def class_measures(truth: np.ndarray, found: np.ndarray, names: list[str]) -> dict[str, Any]:
    """Return precision, recall and F1 of each label, with the numbers of texts that have it and that get it, as JSON values.

    What has no denominator is 0, as in scikit-learn.

    Args:
        truth, found: (N, K) bool, the labels that texts have, and those that they get.
        names: of the labels.
    """
    both, have, get = (array.sum(axis=0).astype(float) for array in (truth & found, truth, found))
    precision, recall = both / np.maximum(get, 1), both / np.maximum(have, 1)
    f1 = 2 * both / np.maximum(have + get, 1)
    return {
        name: {
            "precision": precision[i],
            "recall": recall[i],
            "f1": f1[i],
            "texts": int(have[i]),
            "predicted": int(get[i]),
        }
        for i, name in enumerate(names)
    }


def macro_f1(classes: dict[str, Any], problem: str = SINGLE) -> float:
    """Return the mean F1 of the labels, as scikit-learn's: of those that some text has or gets, or with several labels, of all."""
    seen = [one["f1"] for one in classes.values() if problem == SEVERAL or one["texts"] or one["predicted"]]
    return float(np.mean(seen)) if seen else 0.0


def confusion(truth: np.ndarray, found: np.ndarray, count: int) -> list[list[int]]:
    """Return how many texts with label i, the row, got label j, the column; (K, K).

    Args:
        truth, found: (N,) numbers of labels.
        count: K.
    """
    pairs = truth.astype(np.int64) * count + found
    return np.bincount(pairs, minlength=count * count).reshape(count, count).tolist()


def best_thresholds(chances: np.ndarray, truth: np.ndarray) -> list[float]:
    """Return for each label the threshold of its probability with the highest F1, in the middle of the gap it lies in.

    Of thresholds that are equally good, the one nearest to 1/2 is taken. A label that no text has, or that all have, keeps
    1/2: there is nothing to choose by.

    Args:
        chances: (N, K) probabilities.
        truth: (N, K) bool.
    """
    return [_best_threshold(chances[:, label], truth[:, label]) for label in range(chances.shape[1])]


def _best_threshold(chances: np.ndarray, truth: np.ndarray) -> float:
    have = int(truth.sum())
    if not 0 < have < len(truth):
        return 0.5
    order = np.argsort(-chances, kind="stable")
    sorted_chances = chances[order]
    right = np.cumsum(truth[order])
    f1 = 2 * right / (np.arange(1, len(truth) + 1) + have)
    ends = np.append(sorted_chances[1:], 0.0)  # where the next text would get the label, too
    middles = (sorted_chances + ends) / 2
    # A threshold between equal probabilities does not exist.
    f1 = np.where(sorted_chances > ends, f1, -1.0)
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    inside = [0.5 for i in best if ends[i] < 0.5 <= sorted_chances[i]]
    return float(min([*inside, *middles[best]], key=lambda value: abs(value - 0.5)))


def pearson(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of two (N,) arrays; NaN for fewer than two, or where one of them is constant."""
    if len(one) < 2:
        return float("nan")
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / size) if size > 0 else float("nan")


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of the ranks; equal values share their mean rank."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]


# Rankings

BINARY, PAIRWISE, LISTWISE = "binary", "pairwise", "listwise"
LOWEST = -1e9  # in place of minus infinity, whose differences are not numbers
TOP = 10  # documents that count for nDCG and MRR


def ranking_loss(kind: str, scores: mx.array, grades: mx.array) -> tuple[mx.array, mx.array]:
    """Return the summed loss and what to divide it by, float32 scalars.

    Args:
        kind: PAIRWISE, LISTWISE or BINARY.
        scores, grades: (E, K) float32.
    """
    there = grades >= 0
    if kind == BINARY:
        target = mx.minimum(grades, 1.0)
        losses = nn.softplus(scores) - target * scores
        return mx.where(there, losses, 0.0).sum(), there.astype(mx.float32).sum()
    if kind == PAIRWISE:
        better = (grades[:, :, None] > grades[:, None, :]) & there[:, None, :]  # (E, K, K)
        losses = nn.softplus(scores[:, None, :] - scores[:, :, None]) / math.log(2)
        return mx.where(better, losses, 0.0).sum(), better.astype(mx.float32).sum()
    real = there.any(axis=-1)
    wanted = mx.softmax(mx.where(there, grades, LOWEST), axis=-1)
    found = mx.where(there, scores, LOWEST)
    logs = found - mx.logsumexp(found, axis=-1, keepdims=True)
    losses = -mx.where(there, wanted * logs, 0.0).sum(axis=-1)
    return mx.where(real, losses, 0.0).sum(), real.astype(mx.float32).sum()


def best_first(scores: mx.array, grades: mx.array) -> tuple[mx.array, mx.array]:
    """Return of how many queries the document with the highest score has the highest grade, and the number of queries.

    Of documents with equal scores, the worst counts: a head that gives all the same score has found nothing.
    """
    there = grades >= 0
    found = mx.where(there, scores, LOWEST)
    top = there & (found == found.max(axis=-1, keepdims=True))
    right = mx.where(top, grades, mx.inf).min(axis=-1) == grades.max(axis=-1)
    real = there.any(axis=-1)
    return (right & real).astype(mx.float32).sum(), real.astype(mx.float32).sum()


def ranking_measures(scores: np.ndarray, grades: np.ndarray) -> dict[str, float]:
    """Return means over queries: `accuracy` (the best document is first), `mrr` and `ndcg`, of the first ten documents.

    A document is relevant for `mrr` if its grade is above 0; the gain of a grade g is 2^g - 1. Of documents with equal scores,
    the worse ones come first, because a head that gives all the same score has found nothing.

    Args:
        scores, grades: (E, K).
    """
    order = np.lexsort((grades, -np.where(grades >= 0, scores, -np.inf)), axis=1)
    ranked = np.take_along_axis(np.maximum(grades, 0.0), order, axis=1).astype(np.float64)
    discounts = 1 / np.log2(np.arange(2, 2 + min(TOP, ranked.shape[1])))
    ideal = -np.sort(-ranked, axis=1)
    # Divided by the power of the best grade, which nDCG does not depend on: a number of clicks as a grade would overflow.
    best = ideal[:, :1]
    gains, most = ((2 ** (one[:, :TOP] - best) - 2**-best) @ discounts for one in (ranked, ideal))
    relevant = ranked[:, :TOP] > 0
    reciprocal = np.where(relevant.any(axis=1), 1 / (1 + relevant.argmax(axis=1)), 0.0)
    return {
        "accuracy": float((ranked[:, 0] == ideal[:, 0]).mean()),
        "mrr": float(reciprocal.mean()),
        "ndcg": float((gains / np.maximum(most, 1e-12)).mean()),
    }


def random_mrr(grades: np.ndarray) -> dict[str, float]:
    """Return what `mrr` is for random orders of each query's documents: `random_mrr`, its mean, and `random_mrr_sd`.

    Of K documents with R relevant ones, the first relevant one stands at rank k with the probability C(K-k, R-1) / C(K, R).

    Args:
        grades: (E, K).
    """
    means, variances = [], []
    for own in grades:
        count, relevant = int((own >= 0).sum()), int((own > 0).sum())
        ranks = np.arange(1, min(TOP, count) + 1)
        chances = [math.comb(count - k, relevant - 1) / math.comb(count, relevant) if relevant else 0.0 for k in ranks]
        mean = float(np.dot(chances, 1 / ranks))
        means.append(mean)
        variances.append(float(np.dot(chances, 1 / ranks**2)) - mean**2)
    return {"random_mrr": float(np.mean(means)), "random_mrr_sd": math.sqrt(max(0.0, sum(variances))) / len(means)}


# Losses of embeddings: in-batch negatives (InfoNCE), triplets, and scored pairs (CoSENT, cosine), each at several widths.
#
# They are sentence-transformers' losses under the names of the field:
#
#     infonce    MultipleNegativesRankingLoss: a query's own document against all other documents of the step
#     triplet    TripletLoss with the cosine distance: against the example's own negatives alone
#     cosent     CoSENTLoss: pairs with a higher score are to be more alike than pairs with a lower one
#     cosine     CosineSimilarityLoss: the cosine is to be the score
#
# Every loss is a function of pooled embeddings that are not yet normalized, because Matryoshka (arXiv 2205.13147) takes their
# first numbers, and normalizes these. `loss_and_gradient` returns the gradient by the embeddings; a step hands it to its
# micro-batches one after the other (objectives/embed.py), so that its memory does not depend on how many examples it has
# (GradCache, arXiv 2101.06983).
#
# Shapes: E examples, K texts of each (the query, its document, its negatives), D width, C queries of a chunk, M = E (K - 1) documents.

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
