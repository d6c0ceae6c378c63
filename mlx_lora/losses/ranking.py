"""Losses and measures of rankings, from the scores that a head gives the documents of a query.

    binary      cross-entropy of each document, relevant or not         mean over documents
    pairwise    RankNet: each better document above each worse one      mean over pairs
    listwise    ListNet: the scores' softmax like the grades'           mean over queries

They are sentence-transformers' BinaryCrossEntropyLoss, RankNetLoss (which takes logarithms to base 2) and ListNetLoss.
Sources: RankNet, Burges et al. 2005; ListNet, Cao et al. 2007.

Shapes: E queries, K documents of each; a grade below 0 stands for no document.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np

BINARY, PAIRWISE, LISTWISE = "binary", "pairwise", "listwise"
RANKING_LOSSES = (PAIRWISE, LISTWISE, BINARY)
LOWEST = -1e9  # in place of minus infinity, whose differences are not numbers
TOP = 10  # documents that count for nDCG and MRR


def ranking_loss(kind: str, scores: mx.array, grades: mx.array) -> tuple[mx.array, mx.array]:
    """Return the summed loss and what to divide it by, float32 scalars.

    Args:
        kind: one of RANKING_LOSSES.
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
