"""The batch plan: exactly once per epoch, repeatable, little padding, nothing padded is trained; and its choice of widths."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from mlx_lora.data.batch import Batch
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan, ShapePrice, choose_widths


def encoded(lengths: list[int], seed: int = 0) -> EncodedSet:
    """Rows whose tokens are never 0, so that padding shows; first tokens are no targets."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = random.random(offsets[-1]) < 0.7
    mask[offsets[:-1]] = False
    return EncodedSet(random.integers(1, 200, offsets[-1]).astype(np.int32), mask, offsets)


LENGTHS = [int(n) for n in np.random.default_rng(1).lognormal(5.1, 0.6, 1000).clip(2, 700)]


def planned(rows: EncodedSet, epoch: int = 0, seed: int = 0, **budget) -> tuple[BatchPlan, list[Batch]]:
    """Return a plan, and its batches of an epoch."""
    plan = BatchPlan(rows, seed=seed, **{"batch_tokens": 1024, "batch_size": None, **budget})
    return plan, [plan.batch(epoch, number) for number in range(len(plan))]


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("budget", [{}, {"batch_tokens": 1, "batch_size": 4}], ids=["tokens", "rows"])
@pytest.mark.parametrize("count", [1000, 7, 1])
def test_every_row_and_target_comes_once_per_epoch_in_few_shapes(count, budget, epoch):
    rows = encoded(LENGTHS[:count])
    plan, batches = planned(rows, epoch, 3, **budget)
    assert sum(int(b.mask.sum()) for b in batches) == sum(b.weights.sum() for b in batches) == rows.supervised_tokens
    assert sum(b.real_tokens for b in batches) == sum(n - 1 for n in LENGTHS[:count])
    assert all(b.inputs.any() for b in batches)
    seen = sorted(tuple(r[r > 0]) for b in batches for r in b.inputs if r.any())
    assert seen == sorted(tuple(rows.row(i)[0][:-1]) for i in range(len(rows)))
    assert {(*b.inputs.shape, len(b.positions)) for b in batches} == plan.shapes
    assert len(plan.shapes) <= ShapePrice().max_shapes
    real, positions = sum(b.real_tokens for b in batches), sum(b.inputs.size for b in batches)
    assert plan.padding_fraction == pytest.approx(1 - real / positions)


def test_padding_is_never_trained_and_targets_are_shifted_inputs():
    for batch in planned(encoded(LENGTHS))[1]:
        assert not batch.mask[batch.targets == 0].any()
        assert (batch.inputs[:, 1:] == np.where(batch.inputs[:, 1:] > 0, batch.targets[:, :-1], 0)).all()


@pytest.mark.parametrize("budget", [1024, 2048])
def test_budget_holds_and_little_is_padding(budget):
    plan, batches = planned(encoded(LENGTHS), batch_tokens=budget)
    assert all(b.inputs.size <= budget or len(b.inputs) == 1 for b in batches)
    assert plan.padding_fraction < 0.05
    one_width, _ = planned(encoded(LENGTHS), batch_tokens=budget, price=ShapePrice(max_shapes=1))
    assert one_width.padding_fraction > 0.5
    assert len(one_width.shapes) == 1


def test_positions_and_weights_say_what_the_mask_says():
    places = trained = 0
    for batch in planned(encoded(LENGTHS), epoch=1)[1]:
        assert (batch.positions.dtype, batch.weights.dtype) == (np.int32, np.float32)
        count = int(batch.mask.sum())
        assert batch.weights.tolist() == [1.0] * count + [0.0] * (len(batch.weights) - count)
        assert batch.positions[:count].tolist() == np.flatnonzero(batch.mask).tolist()
        assert not batch.positions[count:].any()
        assert (batch.targets.reshape(-1)[batch.positions[:count]] == batch.targets[batch.mask]).all()
        places, trained = places + len(batch.positions), trained + count
    assert trained / places > 0.93  # rows are dealt so that batches of a shape have alike counts


def test_batch_size_is_rows_per_batch():
    plan, batches = planned(encoded(LENGTHS[:997]), batch_tokens=64, batch_size=8)
    assert len(batches) == -(-997 // 8)
    assert {len(b.inputs) for b in batches} <= {8, 5}  # the rest of all stand alone, or empty rows fill up
    assert sum(int((b.inputs > 0).any(axis=1).sum()) for b in batches) == 997
    assert plan.padding_fraction < 0.06


def test_windows_of_one_length_need_two_shapes_at_most():
    (plan, first), (_, second) = (planned(encoded([65] * 1001), epoch, batch_tokens=512) for epoch in (0, 1))
    assert len(plan.shapes) <= 2
    assert plan.padding_fraction < 0.01
    together = [{tuple(row) for row in batch.inputs} for batch in first]
    assert not [batch for batch in second if {tuple(row) for row in batch.inputs} in together]  # dealt anew


def test_order_depends_on_seed_and_epoch_and_is_not_by_length():
    def widths(seed, epoch):
        return [batch.inputs.tobytes() for batch in planned(encoded(LENGTHS), epoch, seed, batch_tokens=512)[1]]

    assert widths(0, 0) == widths(0, 0)
    assert widths(0, 0) != widths(1, 0)
    assert widths(0, 0) != widths(0, 1)
    plan = BatchPlan(encoded(LENGTHS), batch_tokens=512, batch_size=None, seed=0)
    order = [plan.batch(0, i).inputs.shape[1] for i in range(len(plan))]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.35


def test_one_row_and_one_long_row():
    one = BatchPlan(encoded([5]), batch_tokens=2, batch_size=None, seed=0)
    assert (len(one), one.batch(0, 0).inputs.shape) == (1, (1, 4))
    long = BatchPlan(encoded([900, 3, 3, 3]), batch_tokens=64, batch_size=None, seed=0)
    assert sorted(b.inputs.shape for b in long.batches()) == [(1, 899), (3, 2)]


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
