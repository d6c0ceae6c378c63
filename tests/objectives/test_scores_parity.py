"""Classifiers here, and transformers' model for sequence classification under PEFT on torch: same factors, head, rows, optimizer."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from bound import bind
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, ModelSettings, OptimizerSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.check import choose_loss
from mlx_lora.losses.classification import NUMBER, SEVERAL, SINGLE
from mlx_lora.models.head import SCORE_WEIGHT, put_score_head
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

RANK, ALPHA, PAD, STEPS, RATE = 4, 8.0, 0, 30, 3e-3
LABELS = ("cold", "hot", "mild")
WEIGHTS = "cold=3,hot=0.5,mild=1"


def labeled(problem: str, count: int = 12, seed: int = 0) -> EncodedSet:
    """Return random rows without the token that pads, and their labels."""
    random = np.random.default_rng(seed)
    rows = [random.integers(1, 288, int(random.integers(3, 20))).astype(np.int32) for _ in range(count)]
    facts = []
    for number in range(count):
        label = {
            SINGLE: LABELS[number % 3],
            SEVERAL: [name for name in LABELS if random.random() < 0.5],
            NUMBER: float(random.normal()),
        }
        facts.append({"label": label[problem]})
    return EncodedSet.from_rows([(row, np.zeros(len(row), bool)) for row in rows]).with_facts(facts)


def ours(folder, problem: str, weights: str | None):
    """Return losses, initial parameters, first gradients, final parameters and batches."""
    named = None if problem == NUMBER else ",".join(LABELS)
    objective = objective_of(ObjectiveSettings("classify", problem_type=problem, labels=named, class_weights=weights))
    rows = objective._with_targets(labeled(problem))
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    adapt_model(base.model, AdapterSettings(rank=RANK, alpha=ALPHA), seed=1)
    put_score_head(base.model, base.config, 1, objective.head.outputs)
    random = np.random.default_rng(5)
    moved = [
        (name, mx.array(random.normal(0, 0.02, value.shape).astype(np.float32)))
        for name, value in adapter_parameters(base.model).items()
        if "lora_b" in name
    ]
    base.model.load_weights(moved, strict=False)
    initial = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    bound = bind(objective, choose_loss(base.model, base.config), base)
    optimizer = build_optimizer(OptimizerSettings(learning_rate=RATE, lr_schedule="constant", warmup=0.0), STEPS)
    options = StepOptions(
        prepare=lambda batches: bound.prepare(batches, SINGLE_DEVICE), arrays_of=bound.arrays_of, reports=bound.reports
    )
    step = Step(base.model, optimizer, bound.loss.train, 1.0, options)
    plan = BatchPlan(rows, batch_tokens=400, batch_size=4, seed=0)
    batches = [plan.batch(*divmod(number, len(plan))) for number in range(STEPS)]
    (_, count, _), grads = nn.value_and_grad(base.model, bound.loss.train)(base.model, bound.arrays_of(batches[0]))
    gradients = {name: np.array(value / count) for name, value in tree_flatten(grads)}
    losses = [one.loss_sum.item() / one.count.item() for one in (step([batch]) for batch in batches)]
    final = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    return losses, initial, gradients, final, batches


def in_transformers(folder, problem: str, weights: str | None, initial, batches):
    """Return losses, first gradients and final parameters of AutoModelForSequenceClassification under PEFT."""
    import peft
    import torch
    import transformers

    outputs = 1 if problem == NUMBER else len(LABELS)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=outputs, pad_token_id=PAD, problem_type=problem
    )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=r"model\.layers\..*_proj", task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(base, config)
    named = {name_here(name): value for name, value in model.named_parameters() if value.requires_grad}
    assert named.keys() == initial.keys()
    for name, value in named.items():
        value.data = torch.tensor(turned(name, initial[name]).copy())
    model.eval()
    optimizer = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.01)
    losses, gradients = [], {}
    for batch in batches:
        real = batch.numbers >= 0
        inputs, labels = torch.tensor(batch.inputs[real].astype(np.int64)), torch.tensor(batch.columns["labels"][real])
        labels = labels.long() if problem == SINGLE else labels
        out = model(input_ids=inputs, attention_mask=(inputs != PAD).long(), labels=labels)
        loss = out.loss if weights is None else weighted(problem, weights)(out.logits, labels)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: turned(name, value.grad.numpy()).copy() for name, value in named.items()}
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients, {name: turned(name, value.detach().numpy()) for name, value in named.items()}


def weighted(problem: str, weights: str):
    """Return torch's loss with weights of labels."""
    import torch

    values = torch.tensor([float(part.split("=")[1]) for part in weights.split(",")])
    return (
        torch.nn.CrossEntropyLoss(weight=values) if problem == SINGLE else torch.nn.BCEWithLogitsLoss(pos_weight=values)
    )


def turned(name: str, value: np.ndarray) -> np.ndarray:
    return value if name == SCORE_WEIGHT else value.T


def name_here(name: str) -> str:
    plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
    return plain.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("problem", [SINGLE, SEVERAL, NUMBER])
def test_losses_gradients_and_curves_are_those_of_transformers(problem, weights, tiny_folder):
    pytest.importorskip("peft")
    if problem == NUMBER and weights:
        pytest.skip("numbers have no weights")
    losses, initial, gradients, final, batches = ours(tiny_folder, problem, weights)
    theirs, their_gradients, their_final = in_transformers(tiny_folder, problem, weights, initial, batches)
    assert losses[0] == pytest.approx(theirs[0], rel=1e-4)
    assert np.abs(np.subtract(losses, theirs)).max() < 1e-3 * np.abs(theirs).max()
    assert losses[-1] < losses[0] / 2
    assert gradients.keys() == their_gradients.keys()
    for name, value in gradients.items():
        assert np.linalg.norm(value - their_gradients[name]) < 1e-4 * np.linalg.norm(their_gradients[name]), name
    for name, value in final.items():
        one, other = value.ravel().astype(np.float64), their_final[name].ravel().astype(np.float64)
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.9999, name
        assert np.abs(value - initial[name]).max() > 0, f"{name} did not move"
    if weights:
        plain, *_ = ours(tiny_folder, problem, None)
        assert abs(plain[0] - losses[0]) > 1e-3
