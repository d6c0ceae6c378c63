"""The choice of widths: no better one exists, and a shape must earn what it costs."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from mlx_lora.data.sampler import ShapePrice, choose_widths


def positions(lengths, widths, budget):
    """Positions when classes are filled from the widest down, the rest of all with empty rows."""
    ordered = sorted(lengths, reverse=True)
    total, start = 0, 0
    for narrower in [*sorted(widths)[-2::-1], 0]:
        end = sum(n > narrower for n in ordered)
        if end > start:
            width = ordered[start]
            count = min(max(1, budget // width), len(ordered) - start)
            batches = -(-(end - start) // count)
            total, start = total + batches * count * width, start + batches * count
    return total


@pytest.mark.parametrize("seed", range(8))
def test_no_other_set_of_widths_needs_fewer_positions(seed):
    random = np.random.default_rng(seed)
    lengths, budget = random.integers(3, 15, 14), int(random.integers(16, 60))
    free = ShapePrice(retrace_s=0.0, max_shapes=3)
    found = choose_widths(lengths, budget, price=free)
    assert len(found) <= 3
    assert found[-1] == lengths.max()
    distinct = [int(n) for n in np.unique(lengths)[:-1]]
    others = [[*c, int(lengths.max())] for k in range(3) for c in itertools.combinations(distinct, k)]
    best = min(positions(lengths, widths, budget) for widths in others)
    assert positions(lengths, found.tolist(), budget) == best
    assert positions(lengths, [int(lengths.max())], budget) > best


def test_dearer_shapes_are_fewer_and_more_epochs_earn_more():
    lengths = np.random.default_rng(0).lognormal(5.1, 0.6, 800).astype(int).clip(1, 700)

    def count(**price):
        return len(choose_widths(lengths, 1024, price=ShapePrice(**price)))

    assert count(retrace_s=1e9) == 1
    assert count(retrace_s=30.0) < count(retrace_s=3.0) < count(retrace_s=0.3, max_shapes=99)
    assert count(retrace_s=30.0, epochs=10) == count(retrace_s=3.0)
    assert count(retrace_s=3.0, tokens_per_s=1800.0) == count(retrace_s=30.0)
    assert count(retrace_s=0.0) == 48


def test_equal_lengths_need_one_width():
    assert choose_widths(np.full(1001, 64), 1024).tolist() == [64]
    assert choose_widths(np.array([7]), 4).tolist() == [7]


def test_many_rows_take_well_under_a_second():
    lengths = np.random.default_rng(1).lognormal(5.1, 0.7, 52_000).astype(int).clip(1, 2047)
    start = time.process_time()
    widths = choose_widths(lengths, 2048)
    assert time.process_time() - start < 3.0  # of this process: 0.3 s on two cores
    assert 24 < len(widths) <= 48  # shapes are cheap beside so many rows
    assert widths[-1] == lengths.max()
    padded = widths[np.searchsorted(widths, lengths)]
    assert 1 - lengths.sum() / padded.sum() < 0.04
    few = choose_widths(lengths, 2048, price=ShapePrice(max_shapes=24))
    # 0.0653 is the least that 24 widths can do here.
    assert 0.065 < 1 - lengths.sum() / few[np.searchsorted(few, lengths)].sum() < 0.067
