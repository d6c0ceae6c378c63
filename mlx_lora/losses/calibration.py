"""Calibrate the confidence of answers on held-out rows, measure how far it is off, and return sets that cover the truth.

Scores are divided by a temperature (arXiv 1706.04599), and where that predicts held-out answers better, labels also get an offset
each, which is Dirichlet calibration with one scale for all (arXiv 1910.12656). A share of the answers is taken to be as likely as
any other, whatever the scores (ensemble temperature scaling without its middle part, arXiv 2003.07329): people label some rows
wrong, and one temperature cannot have both a confidence of 0.95 at most and sure answers that are sure. All are fitted by
likelihood, with a prior around leaving the scores as they are, so that rows which are all right do not make the confidence 1.

What is measured of a calibration is cross-fitted: the confidence of each row is that of a fit on the other folds.

A conformal set (arXiv 2107.07511, section 1) has the true answer with the probability that is asked for, whatever the model:
it has each label whose probability is not lower than that of the true label is for almost all held-out rows.

Shapes: N texts, K labels, F numbers of a fit, M bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_lora.losses.scores import NUMBER, SEVERAL, SINGLE, probabilities

FEWEST = 40  # held-out answers that a calibration is fitted on
FOLDS = 5
PER_LABEL = 20  # held-out answers for each label, from which on labels may get offsets of their own
BINS = 15
RESAMPLES = 200
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # of the table of coverage against accuracy
STEPS, LEAST_SCALE = 50, 0.02
PRIOR_OF_OFFSETS = 0.5  # their standard deviation
ROUNDS, FIRST_GUESSED, PRIOR_OF_GUESSED = (
    8,
    0.02,
    20,
)  # of finding the share; the prior counts as so many answers that are not in it
LEVEL, Z = 0.95, 1.96  # of intervals, and the normal distribution's quantile


@dataclass(frozen=True)
class Calibration:
    """What held-out rows say about a question's scores.

    Attributes:
        rows: how many answers it was fitted on; 0: none, and scores are taken as they are.
        scale: of the scores, 1 / temperature.
        offsets: (K,) added to the scores; empty: none.
        guessed: the share of answers that any label is as likely for.
        misfits: how badly each of these answers fits, in rising order: 1 - the probability of the truth, or for a number the
            absolute error.
        slope, intercept: of the log odds that all of several labels are right, because labels depend on each other.
    """

    rows: int = 0
    scale: float = 1.0
    offsets: tuple[float, ...] = ()
    guessed: float = 0.0
    misfits: tuple[float, ...] = ()
    slope: float = 1.0
    intercept: float = 0.0

    @classmethod
    def of(cls, kept: Mapping[str, Any]) -> Calibration:
        """Return it from JSON values, as `asdict` gives them."""
        own: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in kept.items()}
        return cls(**own)

    def scaled(self, problem: str, scores: np.ndarray) -> np.ndarray:
        """Return the scores, (N, K), as calibrated: those that the losses and probabilities of the problem take."""
        scaled = scores * self.scale + (np.array(self.offsets) if self.offsets else 0.0)
        if not self.guessed:
            return scaled
        even = 1 / 2 if problem == SEVERAL else 1 / scores.shape[1]
        chances = (1 - self.guessed) * probabilities(problem, scaled) + self.guessed * even
        return np.log(chances / (1 - chances) if problem == SEVERAL else chances)

    def chances(self, problem: str, scores: np.ndarray) -> np.ndarray:
        """Return the probabilities of the labels, (N, K) float64; for numbers, the numbers."""
        return probabilities(problem, self.scaled(problem, scores))

    def confidence(self, problem: str, chances: np.ndarray, told: np.ndarray) -> np.ndarray:
        """Return the probability that answers are right, (N,).

        Args:
            problem: of the question.
            chances: of its labels, (N, K).
            told: the labels that are answered, (N, K) bool.
        """
        if problem != SEVERAL:
            return (chances * told).sum(axis=1)
        return 1 / (1 + np.exp(-self.slope * _log_odds(chances, told) - self.intercept))

    def most_misfit(self, coverage: float) -> float | None:
        """Return the misfit that the truth has at most, with the probability `coverage`; None: there are too few rows to say."""
        place = math.ceil((len(self.misfits) + 1) * coverage)
        return self.misfits[place - 1] if 0 < place <= len(self.misfits) else None


def calibrate(
    problem: str, scores: np.ndarray, targets: np.ndarray, told: np.ndarray | None = None
) -> tuple[Calibration, np.ndarray, np.ndarray]:
    """Return the calibration of a question on held-out rows, and cross-fitted probabilities of labels, (N, K), and confidences, (N,).

    Args:
        problem: by the names of losses/scores.py.
        scores: (N, K).
        targets: (N,) numbers of labels, or the numbers; (N, K) of 0 and 1 for several labels.
        told: of several labels those that are answered, (N, K) bool; None: those with a probability above 1/2.
    """
    if problem == NUMBER:
        errors = np.sort(np.abs(scores[:, 0].astype(np.float64) - targets))
        return Calibration(len(scores), misfits=_rounded(errors)), scores, errors
    told = scores > 0 if told is None else told
    fold = np.arange(len(scores)) % FOLDS
    ways = [False, True] if problem != SEVERAL and len(scores) >= PER_LABEL * scores.shape[1] else [False]
    found = []
    for offsets in ways:
        chances, sure = np.empty(scores.shape, np.float64), np.empty(len(scores), np.float64)
        for part in range(FOLDS):
            own = fold == part
            fitted = _fit(problem, scores[~own], targets[~own], told[~own], offsets)
            chances[own] = fitted.chances(problem, scores[own])
            best = np.eye(scores.shape[1], dtype=bool)[chances[own].argmax(axis=1)]
            sure[own] = fitted.confidence(problem, chances[own], told[own] if problem == SEVERAL else best)
        truth = of_truth(problem, chances, targets)
        found.append((-np.log(np.maximum(truth, 1e-12)).mean(), offsets, chances, sure))
    _, offsets, chances, sure = min(found, key=lambda one: one[0])
    misfits = np.sort(1 - of_truth(problem, chances, targets, lowest=True))
    return replace(_fit(problem, scores, targets, told, offsets), misfits=_rounded(misfits)), chances, sure


def _log_odds(chances: np.ndarray, told: np.ndarray) -> np.ndarray:
    """Return the log odds that all of several labels are right, if labels did not depend on each other, (N,)."""
    right = np.clip(of_truth(SEVERAL, chances, told), 1e-9, 1 - 1e-9)
    return np.log(right / (1 - right))


def of_truth(problem: str, chances: np.ndarray, targets: np.ndarray, lowest: bool = False) -> np.ndarray:
    """Return the probability of each text's true answer, (N,).

    Args:
        problem, targets: as for `calibrate`.
        chances: (N, K).
        lowest: of several labels, return the lowest one among those that the text has, and not that of all labels together.
    """
    if problem != SEVERAL:
        return chances[np.arange(len(chances)), targets.astype(int)]
    if lowest:
        return np.where(targets > 0.5, chances, 1.0).min(axis=1)
    return np.where(targets > 0.5, chances, 1 - chances).prod(axis=1)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f"{value:.5g}") for value in values)


def _fit(problem: str, scores: np.ndarray, targets: np.ndarray, told: np.ndarray, with_offsets: bool) -> Calibration:
    """Return a calibration without misfits; arguments as for `calibrate`."""
    if problem != SEVERAL:
        return _most_likely(scores, targets, with_offsets)
    flat = scores.reshape(-1)  # each label is a choice between having it and not
    found = _most_likely(np.stack([np.zeros_like(flat), flat], axis=1), targets.reshape(-1), False)
    odds = _log_odds(found.chances(SEVERAL, scores), told)
    right = (told == (targets > 0.5)).all(axis=1)
    sure = _most_likely(np.stack([np.zeros_like(odds), odds], axis=1), right, True, rounds=0)
    return replace(found, rows=len(scores), slope=sure.scale, intercept=sure.offsets[1] - sure.offsets[0])


def _most_likely(scores: np.ndarray, targets: np.ndarray, with_offsets: bool, rounds: int = ROUNDS) -> Calibration:
    """Return what has the highest posterior for a choice: scale and offsets by Newton's method, which a share of guessed answers
    alternates with (expectation maximization), or none with 0 rounds.
    """
    scores, own = scores.astype(np.float64), targets.astype(int)
    count, labels = scores.shape
    parts = [scores[:, :, None]]
    if with_offsets:
        parts.append(np.broadcast_to(np.eye(labels), (count, labels, labels)))
    design = np.concatenate(parts, axis=2)  # (N, K, F)
    values, weights, guessed = np.eye(1, design.shape[2])[0], np.ones(count), FIRST_GUESSED if rounds else 0.0
    for _ in range(max(1, rounds)):
        values = _newton(design, own, weights, values)
        if guessed:
            truth = (1 - guessed) * probabilities(SINGLE, design @ values)[np.arange(count), own]
            weights = truth / (truth + guessed / labels)  # that an answer was not guessed
            guessed = (count - float(weights.sum())) / (count + PRIOR_OF_GUESSED)
    return Calibration(count, max(LEAST_SCALE, float(values[0])), tuple(map(float, values[1:])), guessed)


def _newton(design: np.ndarray, own: np.ndarray, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the values with the least loss, which is convex, of weighted answers to a choice, (F,).

    Args:
        design: (N, K, F) of which the values make scores.
        own: (N,) numbers of the true labels.
        weights: (N,) of the answers.
        values: to start from.
    """
    start, rows = np.eye(1, len(values))[0], np.arange(len(own))
    prior = np.where(start > 0, 1.0, PRIOR_OF_OFFSETS**-2)

    def lost(values: np.ndarray) -> float:
        truth = probabilities(SINGLE, design @ values)[rows, own]
        return float(-(weights * np.log(np.maximum(truth, 1e-300))).sum() + 0.5 * (prior * (values - start) ** 2).sum())

    loss = lost(values)
    for _ in range(STEPS):
        chances = probabilities(SINGLE, design @ values)
        mean = np.einsum("nk,nkf->nf", chances, design)
        gradient = (mean - design[rows, own]).T @ weights + prior * (values - start)
        apart = design - mean[:, None]
        curvature = np.einsum("nk,nkf,nkg->fg", chances * weights[:, None], apart, apart) + np.diag(prior)
        step, share = np.linalg.solve(curvature, gradient), 1.0
        while share > 1e-6 and lost(values - share * step) > loss:
            share /= 2
        before, values = loss, values - share * step
        loss = lost(values)
        if before - loss < 1e-9 * max(1.0, abs(before)):
            break
    return values


# Measures


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the expected calibration error over equally wide bins: the mean distance of confidence and share of right answers.

    Args:
        confidence: (N,) between 0 and 1.
        right: (N,) bool.

    Source: arXiv 1706.04599, eq. 3.
    """
    sums = _in_bins(confidence, right)
    return float(np.abs(sums[0] - sums[1]).sum() / max(1, len(right)))


def _in_bins(confidence: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return (3, M): sums of confidence and of right answers, and the number of answers, of each bin."""
    own = np.minimum((confidence * BINS).astype(int), BINS - 1)
    weights = (confidence, right.astype(np.float64), np.ones(len(right)))
    return np.stack([np.bincount(own, values, BINS) for values in weights])


def brier(problem: str, chances: np.ndarray, targets: np.ndarray) -> float:
    """Return the mean squared distance of probabilities and truth: summed over the labels of a choice, a mean over several labels."""
    if problem == SEVERAL:
        return float(((chances - targets) ** 2).mean())
    return float(((chances - np.eye(chances.shape[1])[targets.astype(int)]) ** 2).sum(axis=1).mean())


def interval(measure: Callable[[np.ndarray], float], count: int) -> list[float]:
    """Return the measure of all rows, and the ends of its 95% interval by resampled rows.

    The noise of a calibration error adds to it in squares, once in what was measured and twice in what was resampled, so it is
    taken out: an error that noise alone explains has an interval from about 0. The change is negligible for a mean of rows.

    Args:
        measure: of the rows with some numbers, (N,) int; not negative.
        count: N.
    """
    draw, found = np.random.default_rng(0), measure(np.arange(count))
    squares = np.square([measure(draw.integers(0, count, count)) for _ in range(RESAMPLES)])
    noise = max(0.0, float(squares.mean()) - found**2)
    ends = np.quantile(squares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) - 2 * noise
    return [found, *map(float, np.sqrt(np.maximum(0.0, ends)))]


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Return the bins that have answers: mean `confidence`, share `right` and number of `answers`."""
    sums = _in_bins(confidence, right)
    return [
        {"confidence": sums[0, i] / sums[2, i], "right": sums[1, i] / sums[2, i], "answers": int(sums[2, i])}
        for i in np.flatnonzero(sums[2])
    ]


def decided(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Return what answering above each level of confidence means: share `decided` and, among these, share `wrong` with
    Wilson's interval, from `low` to `high`.
    """
    found = []
    for level in LEVELS:
        above = confidence >= level
        answers, wrong = int(above.sum()), int((above & ~right).sum())
        if answers:
            found.append({"above": level, "decided": answers / len(right), "wrong": wrong / answers})
            share, spread = found[-1]["wrong"], Z**2 / answers
            half = Z * math.sqrt(share * (1 - share) / answers + spread / (4 * answers))
            found[-1] |= {
                "low": (share + spread / 2 - half) / (1 + spread),
                "high": (share + spread / 2 + half) / (1 + spread),
            }
    return found
