"""Intervals around what was measured on rows."""

from __future__ import annotations

import math

import numpy as np

CONFIDENCE = 0.95


def student_quantile(freedom: float, confidence: float = CONFIDENCE) -> float:
    """Return the two-sided quantile of Student's t.

    With t = sqrt(freedom) tan(a), the density of the angle a is proportional to cos(a)^(freedom - 1), which is summed here.

    Args:
        freedom: degrees of freedom, at least 1, and not only whole ones; more than 10,000 count as that.
        confidence: the share of t's between minus the quantile and the quantile.
    """
    freedom = min(freedom, 10_000.0)
    angle = np.pi / 2 * np.sin(np.linspace(0, np.pi / 2, 4001))  # close to each other at the end, where the far tail is
    density = np.cos(angle) ** (freedom - 1)
    below = np.append(0.0, np.cumsum(np.diff(angle) * (density[1:] + density[:-1])))
    return math.sqrt(freedom) * math.tan(np.interp(confidence, below / below[-1], angle))


def ratio_error(sums: np.ndarray, counts: np.ndarray, choices: int = 1) -> tuple[float, float]:
    """Return the standard error of a mean per token, and half of its 95% interval, with rows as the samples; NaN and inf for one row.

    The mean is a ratio of sums over rows. Its error is the jackknife's: the spread of the means without each of the rows. A few
    long rows decide the error alone, so the degrees of freedom are those of as many equal rows as weigh the same.

    Args:
        sums: (R,) of each row.
        counts: (R,) tokens of each row, above 0.
        choices: the mean is the lowest of so many on the same rows; all of their intervals together hold in 95% (Bonferroni).
    """
    if len(counts) < 2:
        return math.nan, math.inf
    total = counts.sum()
    without = (sums.sum() - sums) / (total - counts)  # (R,)
    error = math.sqrt((len(counts) - 1) * without.var())
    freedom = max(1.0, float(total**2 / (counts**2).sum()) - 1)
    return error, student_quantile(freedom, 1 - (1 - CONFIDENCE) / choices) * error
