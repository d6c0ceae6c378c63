"""Losses and measures of labels, from the scores that a head gives texts.

A problem has a loss, by transformers' names (`problem_type`), and each text has one number in the mean:

    single_label_classification   cross-entropy of the label, weighted: sum(w l) / sum(w), as torch's CrossEntropyLoss
    multi_label_classification    binary cross-entropy, mean over the labels, with w on those that a text has (pos_weight)
    regression                    squared error

Losses are for mlx; measures are of numpy arrays, after the last batch.

Shapes: N texts, K labels; scores are (N, K), for regression (N, 1).
"""

from __future__ import annotations

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
    """Return the correlation of two (N,) arrays; NaN where one of them is constant."""
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / size) if size > 0 else float("nan")


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Return the correlation of the ranks; equal values share their mean rank."""
    return pearson(_ranks(one), _ranks(other))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place]
