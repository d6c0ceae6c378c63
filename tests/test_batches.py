"""The batch plan: exactly once per epoch, repeatable, little padding, nothing padded is trained."""

from __future__ import annotations

import numpy as np
import pytest

from mlx_lora.data.batches import BatchPlan
from mlx_lora.data.encode import EncodedSet


def encoded(lengths: list[int], seed: int = 0) -> EncodedSet:
    """Rows whose tokens are never 0, so that padding shows; first tokens are no targets."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    mask = random.random(offsets[-1]) < 0.7
    mask[offsets[:-1]] = False
    return EncodedSet(random.integers(1, 200, offsets[-1]).astype(np.int32), mask, offsets)


LENGTHS = [int(n) for n in np.random.default_rng(1).lognormal(5.1, 0.6, 1000).clip(2, 700)]


@pytest.mark.parametrize("budget", [{"batch_tokens": 1024, "batch_size": None}, {"batch_tokens": 1, "batch_size": 4}])
def test_every_target_exactly_once_per_epoch(budget):
    rows = encoded(LENGTHS)
    plan = BatchPlan(rows, seed=3, **budget)
    for epoch in (0, 1):
        batches = [plan.batch(epoch, i) for i in range(len(plan))]
        assert sum(int(b.mask.sum()) for b in batches) == rows.supervised_tokens
        assert sum(b.real_tokens for b in batches) == sum(n - 1 for n in LENGTHS)
        seen = sorted(tuple(r[r > 0]) for b in batches for r in b.inputs)
        assert seen == sorted(tuple(rows.row(i)[0][:-1]) for i in range(len(rows)))


def test_padding_is_never_trained_and_targets_are_shifted_inputs():
    plan = BatchPlan(encoded(LENGTHS), batch_tokens=1024, batch_size=None, seed=0)
    for i in range(len(plan)):
        batch = plan.batch(0, i)
        assert not batch.mask[batch.targets == 0].any()
        assert (batch.inputs[:, 1:] == np.where(batch.inputs[:, 1:] > 0, batch.targets[:, :-1], 0)).all()


def test_budget_holds_and_little_is_padding():
    plan = BatchPlan(encoded(LENGTHS), batch_tokens=1024, batch_size=None, seed=0)
    batches = [plan.batch(0, i) for i in range(len(plan))]
    assert all(b.inputs.size <= 1024 or len(b.inputs) == 1 for b in batches)
    positions = sum(b.inputs.size for b in batches)
    assert 1 - sum(b.real_tokens for b in batches) / positions < 0.08
    assert len({b.inputs.shape for b in batches}) < len(batches) / 2


def test_batch_size_is_rows_per_batch():
    plan = BatchPlan(encoded(LENGTHS), batch_tokens=64, batch_size=8, seed=0)
    sizes = [len(plan.batch(0, i).inputs) for i in range(len(plan))]
    assert sorted(sizes, reverse=True) == [8] * (len(LENGTHS) // 8) + [len(LENGTHS) % 8] * (len(LENGTHS) % 8 > 0)


def test_order_depends_on_seed_and_epoch_and_is_not_by_length():
    def widths(seed, epoch):
        plan = BatchPlan(encoded(LENGTHS), batch_tokens=512, batch_size=None, seed=seed)
        return [plan.batch(epoch, i).inputs.tobytes() for i in range(len(plan))]

    assert widths(0, 0) == widths(0, 0)
    assert widths(0, 0) != widths(1, 0)
    assert widths(0, 0) != widths(0, 1)
    plan = BatchPlan(encoded(LENGTHS), batch_tokens=512, batch_size=None, seed=0)
    order = [plan.batch(0, i).inputs.shape[1] for i in range(len(plan))]
    assert abs(np.corrcoef(order, range(len(order)))[0, 1]) < 0.35


def test_one_row_and_one_long_row():
    one = BatchPlan(encoded([5]), batch_tokens=2, batch_size=None, seed=0)
    assert len(one) == 1
    assert one.batch(0, 0).inputs.shape == (1, 4)
    assert [
        b.inputs.shape for b in BatchPlan(encoded([900, 3]), batch_tokens=64, batch_size=None, seed=0).batches()
    ] != []
