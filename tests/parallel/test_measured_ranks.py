"""What the ranks of a run measure is put together as one process has it."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from conftest import TINY, tiny_model
from embedding_cases import bound, random_examples

from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.check import choose_loss
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import DataParallel
from mlx_lora.trainer.evaluate import mean_loss


class Messages:
    """The ranks of a measurement, taken one after the other: the last gets what all of them sent."""

    def __init__(self, size: int):
        self.size, self.rank, self.sent = size, 0, {"sum": [], "everyone": []}

    leads = property(lambda self: self.rank == 0)

    def sum(self, array: mx.array) -> mx.array:
        self.sent["sum"].append(array)
        return sum(self.sent["sum"][1:], self.sent["sum"][0])

    def everyone(self, value):
        self.sent["everyone"].append(json.dumps(value))
        return list(map(json.loads, self.sent["everyone"]))

    def meet(self) -> None:
        pass


class Lockstep(DataParallel):
    lockstep = True


def measured_in(size: int, model, task, plan, kind=DataParallel):
    """Return what the last of several ranks finds."""
    ranks, found = Messages(size), None
    for ranks.rank in range(size):
        strategy = kind(ranks)
        found = mean_loss(model, task, strategy.held_out(plan, -1), strategy)
    return found


@pytest.mark.parametrize("kind", [DataParallel, Lockstep])
def test_each_held_out_row_is_known_once_and_in_order(kind):
    random = np.random.default_rng(2)
    lengths = random.integers(4, 30, 11)
    rows = EncodedSet.from_rows([(random.integers(0, 288, n).astype(np.int32), np.arange(n) > 1) for n in lengths])
    model, plan = tiny_model(), BatchPlan(rows, batch_tokens=64, batch_size=None, seed=0)
    task = bind(objective_of(ObjectiveSettings()), choose_loss(model, TINY), model)
    alone = mean_loss(model, task, plan.batches())
    assert len(plan) % 4  # one of four ranks has a batch without rows, or fewer batches
    for size in (2, 4):
        found = measured_in(size, model, task, plan, kind)
        assert found.loss == pytest.approx(alone.loss, rel=1e-5)
        assert found.rows.tokens.tolist() == alone.rows.tokens.tolist() == (lengths - 2).tolist()
        assert found.rows.sums == pytest.approx(alone.rows.sums, rel=1e-6)
        assert found.rows.loss == pytest.approx(found.loss, rel=1e-5)


@pytest.mark.parametrize("kind", [DataParallel, Lockstep])
def test_a_rank_without_rows_has_no_part_in_the_search(kind, tiny_folder):
    rows = random_examples(13, 1, False)
    base = load_base(ModelSettings(model=str(tiny_folder), dtype="float32"))
    _, task = bound(base, rows)
    plan = BatchPlan(rows, batch_tokens=10**6, batch_size=5, seed=0)
    alone = mean_loss(base.model, task, plan.batches())
    for size in (2, 4):
        found = measured_in(size, base.model, task, plan, kind)
        assert (found.loss, found.count) == (pytest.approx(alone.loss, rel=1e-5), 13)
        assert found.reports == pytest.approx(alone.reports)
