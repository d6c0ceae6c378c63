"""The paired test: it calls true equality different in 5 of 100 comparisons, and its intervals are the published ones."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from mlx_lora.evaluation.paired import Comparison, compare, compare_weighted, score_interval, standard_error

SIMULATED = 2000


@cache
def called(gained: int, lost: int, rows: int) -> bool:
    low, high = score_interval(gained, lost, rows)
    return low > 0 or high < 0


@pytest.mark.parametrize("rows", [30, 100, 500])
@pytest.mark.parametrize(
    ("accuracy", "alike"), [(0.3, 0.0), (0.5, 0.5), (0.7, 0.5), (0.8, 0.0), (0.8, 0.5), (0.9, 0.0)]
)
def test_equal_models_are_called_different_in_three_to_seven_of_a_hundred(rows, accuracy, alike):
    """`alike` is the share of rows on which two models always answer the same."""
    rng = np.random.default_rng([rows, int(100 * accuracy), int(10 * alike)])
    first = rng.random((SIMULATED, rows)) < accuracy
    second = np.where(rng.random((SIMULATED, rows)) < alike, first, rng.random((SIMULATED, rows)) < accuracy)
    gained, lost = (second & ~first).sum(1).tolist(), (first & ~second).sum(1).tolist()
    share = np.mean([called(a, b, rows) for a, b in zip(gained, lost, strict=True)])
    assert 0.03 <= share <= 0.07


@pytest.mark.parametrize("rows", [30, 100, 500])
@pytest.mark.parametrize("kind", ["normal", "skewed", "thirds"])
def test_equal_models_with_other_numbers(rows, kind):
    rng = np.random.default_rng(rows)
    draw = {
        "normal": lambda: rng.normal(size=rows),
        "skewed": lambda: rng.beta(0.5, 1.5, size=rows),
        "thirds": lambda: rng.choice([0, 1 / 3, 2 / 3, 1], size=rows, p=[0.4, 0.1, 0.1, 0.4]),
    }[kind]
    assert 0.03 <= np.mean([compare(draw(), draw()).certain for _ in range(SIMULATED)]) <= 0.07


def test_a_difference_that_is_there_is_found():
    rng = np.random.default_rng(1)
    first, second = rng.random((300, 400)) < 0.5, rng.random((300, 400)) < 0.65
    found = [compare(a.astype(float), b.astype(float)) for a, b in zip(first, second, strict=True)]
    assert np.mean([one.certain for one in found]) > 0.95
    assert np.mean([one.low <= 0.15 <= one.high for one in found]) > 0.9


def test_the_interval_is_the_published_one():
    """Fagerland, Lydersen and Laake (2014), table 4: Tango's interval for 7 and 1 of 21 pairs."""
    low, high = score_interval(1, 7, 21)
    assert (low, high) == pytest.approx((-0.517, -0.026), abs=6e-4)
    assert score_interval(7, 1, 21) == pytest.approx((-high, -low))


@pytest.mark.parametrize("lost", range(9))
@pytest.mark.parametrize("gained", range(9))
def test_the_interval_leaves_out_zero_where_mcnemars_test_says_so(gained, lost):
    differing = gained + lost
    statistic = abs(gained - lost) / math.sqrt(differing) if differing else 0.0
    assert called(gained, lost, 40) == (statistic > 1.959964)


@pytest.mark.parametrize("rows", [5, 40])
def test_nothing_differs(rows):
    found = compare([1] * rows, [1] * rows)
    z = 1.959964
    assert (found.low, found.high) == pytest.approx((-(z**2) / (rows + z**2), z**2 / (rows + z**2)))
    assert found.verdict == "no difference shown"


def test_the_jackknife_of_a_mean_is_students_t():
    rng = np.random.default_rng(2)
    first, second = rng.normal(size=60).tolist(), rng.normal(0.3, size=60).tolist()
    plain, other = compare(first, second), compare(first, second, aggregate=lambda values: float(np.mean(values)))
    assert (other.low, other.high) == pytest.approx((plain.low, plain.high))
    assert standard_error(first) == pytest.approx(standard_error(first, lambda values: float(np.mean(values))))
    assert standard_error(first) == pytest.approx(np.std(first, ddof=1) / math.sqrt(60))
    many = rng.normal(size=1000).tolist()
    assert standard_error(many, lambda values: float(np.mean(values))) == pytest.approx(standard_error(many), rel=0.3)


def test_sentences():
    better = Comparison(0.031, 0.004, 0.058, 500)
    assert better.words() == "better by 3.1 points, 95% interval 0.4 to 5.8"
    assert Comparison(-0.031, -0.058, -0.004, 500).words() == "worse by 3.1 points, 95% interval 0.4 to 5.8"
    assert Comparison(-0.01, -0.03, 0.01, 500).words().startswith("no difference shown: -1.0 points")
    lower = Comparison(-1.5, -2.25, -0.75, 50, better=False, share=False)
    assert lower.words() == "better by 1.50, 95% interval 0.75 to 2.25"
    few = compare([0, 1], [1, 1])
    assert few.verdict == "no difference shown"
    assert "2 rows" in few.words()
    assert few.to_dict()["low"] is None


def test_a_group_is_the_weighted_sum():
    parts = [(0.25, Comparison(0.2, 0.1, 0.3, 10)), (0.75, Comparison(0.0, -0.1, 0.1, 30))]
    whole = compare_weighted(parts)
    assert whole.difference == pytest.approx(0.05)
    assert whole.rows == 40
    assert (whole.high - whole.low) / 2 == pytest.approx(0.1 * math.hypot(0.25, 0.75))


def test_the_rows_must_be_the_same():
    with pytest.raises(ValueError, match="2 and 1 rows"):
        compare([1, 0], [1])
