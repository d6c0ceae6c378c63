"""Losses and measures of labels, from the scores that a head gives texts.

A problem has a loss, by transformers' names (`problem_type`), and each text has one number in the mean:

    single_label_classification   cross-entropy of the label, weighted: sum(w l) / sum(w), as torch's CrossEntropyLoss
    multi_label_classification    binary cross-entropy, mean over the labels, with w on those that a text has (pos_weight)
    regression                    squared error

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
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

SINGLE, SEVERAL, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def classification_losses(
    problem: str, scores: mx.array, labels: mx.array, weights: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Return the loss of each text and its weight in the mean, both (N,) float32.

    Args:
        problem: one of the three.
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
    return weight * nn.losses.cross_entropy(scores, own), weight


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
