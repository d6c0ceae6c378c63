"""A validation does not depend on how it is divided into batches, and a step not on its micro-batches."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten
from tiers import by_default

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, OptimizerSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.prefix_attention import rotate_by_token
from mlx_lora.objectives.prefix_sharing import joined
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.trainer.evaluate import mean_loss
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

CASES = {
    "orpo": {},
    "cpo": {"cpo_alpha": 0.7},
    "rpo": {"objective": "dpo", "loss_type": "sigmoid,sft", "loss_weights": "1,0.5"},
    "sft": {"objective": "dpo", "loss_type": "sft"},
    "aot": {"objective": "dpo", "loss_type": "aot"},
    "dpo": {},
    "simpo": {},
    "kto": {"beta": 0.05},
}


def objective(case: str):
    return objective_of(ObjectiveSettings(**{"objective": case, **CASES[case]}))


def answers(case: str, examples: int = 11) -> EncodedSet:
    """Return pairs (or rated answers) whose answers have very different lengths."""
    random = np.random.default_rng(3)
    rows = []
    for _ in range(examples):
        prompt = random.integers(0, 288, int(random.integers(3, 9)))
        for _ in range(2):
            answer = random.integers(0, 288, int(random.integers(1, 40)))
            mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
            rows.append((np.concatenate([prompt, answer]).astype(np.int32), mask))
    labels = np.tile([1.0, 0.0, 0.0, 0.0], examples)[: 2 * examples]
    encoded = EncodedSet.from_rows(rows)
    known = objective(case)
    encoded = known._with_targets(encoded.grouped(2, labels, trained_rows=1 if case == "kto" else None))
    reference = random.normal(-130, 9, 2 * examples).astype(np.float32)
    return replace(encoded, reference=reference if known.options.row.reference else None)


@pytest.fixture
def model():
    made = tiny_model()
    adapt_model(made, AdapterSettings(rank=4, alpha=8.0), seed=1)
    rng = np.random.default_rng(5)
    moved = {
        name: mx.array(rng.normal(0, 0.05, value.shape).astype(np.float32))
        for name, value in tree_flatten(made.trainable_parameters())
        if "lora_b" in name
    }
    made.load_weights(list(moved.items()), strict=False)
    return made


def measured(case: str, rows: EncodedSet, model, **batches: int | None):
    task = bind(objective(case), choose_loss(model, TINY), model)
    plan = BatchPlan(rows, **{"batch_tokens": 256, "batch_size": None, "seed": 0, **batches})
    return mean_loss(model, task, plan.batches()), len(plan)


@pytest.mark.parametrize("case", by_default(CASES, *list(CASES)[:3]))
def test_a_validation_does_not_depend_on_its_batches(case, model):
    rows = answers(case)
    whole, count = measured(case, rows, model, batch_tokens=4096)
    for tokens in (64, 128, 300):
        found, batches = measured(case, rows, model, batch_tokens=tokens)
        assert batches > count
        assert found.count == whole.count == 11
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)
        assert found.reports == pytest.approx(whole.reports, rel=1e-5, abs=1e-6)
    fewer, _ = measured(case, rows.select(list(range(10))), model)
    assert fewer.loss != pytest.approx(whole.loss, rel=1e-4)


@pytest.mark.parametrize("case", ["orpo", "cpo", "rpo"])
def test_the_whole_set_has_the_loss_of_one_step_over_it(case, model):
    rows = answers(case)
    task = bind(objective(case), choose_loss(model, TINY), model)
    [batch] = BatchPlan(rows, batch_tokens=4096, batch_size=11, seed=0).batches()
    [ready] = task.prepare([batch], SINGLE_DEVICE)
    total, count, _ = task.loss.train(model, task.arrays_of(ready))
    found, _ = measured(case, rows, model, batch_tokens=64)
    assert found.loss == pytest.approx((total / count).item(), rel=1e-6)


@pytest.mark.parametrize("case", ["orpo", "cpo", "rpo", "kto"])
def test_a_step_does_not_depend_on_its_micro_batches(case, model):
    rows = answers(case)
    initial = {name: mx.array(value) for name, value in tree_flatten(model.trainable_parameters())}
    ends = []
    for size in (11, 3):
        model.load_weights(list(initial.items()), strict=False)
        task = bind(objective(case), choose_loss(model, TINY), model)
        optimizer = build_optimizer(OptimizerSettings(learning_rate=1e-2, lr_schedule="constant", warmup=0.0), 1)
        step = Step(model, optimizer, task.loss.train, 0.0, StepOptions(prepare=lambda batches, task=task: task.prepare(batches, SINGLE_DEVICE), arrays_of=task.arrays_of, reports=task.reports))  # fmt: skip
        result = step(list(BatchPlan(rows, batch_tokens=4096, batch_size=size, seed=0).batches()))
        ends.append(((result.loss_sum / result.count).item(), result.grad_norm.item()))
    assert ends[0] == pytest.approx(ends[1], rel=1e-5)


@pytest.mark.parametrize("case", ["orpo", "cpo", "rpo"])
def test_joined_rows_are_measured_alike(case, model):
    rows = answers(case)
    apart, _ = measured(case, rows, model)
    rotate_by_token(model)
    together, _ = measured(case, joined(rows), model, batch_tokens=200)
    assert together.count == apart.count
    assert together.loss == pytest.approx(apart.loss, rel=1e-5)
