"""Some steps of an objective here, and the same steps on torch over PEFT: what both sides of such a comparison need."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch_judge
from mlx.utils import tree_flatten

from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.config.settings import OptimizerSettings
from mlx_lora.data.batch import Batch
from mlx_lora.models.head import SCORE_WEIGHT
from mlx_lora.objectives.base import BoundObjective
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

STEPS, RANK, ALPHA, RATE, PAD = 30, 4, 8.0, 3e-3, 0
Arrays = dict[str, np.ndarray]


@dataclass
class Curve:
    """What came of some steps.

    Attributes:
        losses, reports: of each.
        gradients: of the mean loss of the first batch, by our names and in our orientation, as the others.
        final: what was trained, after the last step.
    """

    losses: list[float]
    reports: list[dict[str, float]]
    gradients: Arrays
    final: Arrays


def trained_numbers(model: nn.Module) -> Arrays:
    """Return what is trained of a model."""
    return {name: np.array(value) for name, value in adapter_parameters(model).items()}


def move_second_factors(model: nn.Module, size: float = 0.02) -> Arrays:
    """Give every lora_b random numbers: a zero one hides every gradient of lora_a. Returns what is trained."""
    random = np.random.default_rng(5)
    moved = {name: random.normal(0, size, value.shape) for name, value in adapter_parameters(model).items()}
    of_b = [(name, mx.array(value.astype(np.float32))) for name, value in moved.items() if "lora_b" in name]
    model.load_weights(of_b, strict=False)
    return trained_numbers(model)


def first_gradients(model: nn.Module, task: BoundObjective, batch: Batch) -> Arrays:
    """Return the gradients of the mean loss of a batch."""
    [ready] = task.prepare([batch], SINGLE_DEVICE)
    (_, count, _), grads = nn.value_and_grad(model, task.loss.train)(model, task.arrays_of(ready))
    return {name: np.array(value / count) for name, value in tree_flatten(grads)}


def step_of(model: nn.Module, task: BoundObjective, rate: float = RATE) -> Step:
    """Return an objective's step with a constant rate."""
    optimizer = build_optimizer(OptimizerSettings(learning_rate=rate, lr_schedule="constant", warmup=0.0), STEPS)
    options = StepOptions(
        prepare=lambda batches: task.prepare(batches, SINGLE_DEVICE), arrays_of=task.arrays_of, reports=task.reports
    )
    return Step(model, optimizer, task.loss.train, 1.0, options)


def our_curve(model: nn.Module, task: BoundObjective, batches: Sequence[Batch], rate: float = RATE) -> Curve:
    """Take a step with each batch."""
    step, gradients = step_of(model, task, rate), first_gradients(model, task, batches[0])
    results = [step([batch]) for batch in batches]
    reports = [{name: value.item() / one.count.item() for name, value in one.reports.items()} for one in results]
    losses = [one.loss_sum.item() / one.count.item() for one in results]
    return Curve(losses, list(map(task.finish, reports)), gradients, trained_numbers(model))


def over_peft(base: Any, initial: Mapping[str, np.ndarray], **config: Any) -> tuple[Any, dict[str, Any]]:
    """Return a torch model under PEFT, and its trained parameters by our names, with our initial values."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = {"target_modules": "all-linear", **config}
    model = peft.get_peft_model(base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, **config))
    trained = {name_here(name): value for name, value in model.named_parameters() if value.requires_grad}
    assert trained.keys() == initial.keys()
    for name, value in trained.items():
        value.data = torch.tensor(turned(name, initial[name]).copy())
    return model, trained


def classifier_over_peft(folder: Any, initial: Mapping[str, np.ndarray], outputs: int, **config: Any) -> Any:
    """Return transformers' model for sequence classification under PEFT, and its trained parameters, as `over_peft` does."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=outputs, pad_token_id=PAD, **config
    )
    model, trained = over_peft(base, initial, target_modules=r"model\.layers\..*_proj", task_type="SEQ_CLS")
    return model.eval(), trained


def torch_curve(
    trained: Mapping[str, Any],
    loss_of: Callable[[Batch], tuple[Any, dict]],
    batches: Sequence[Batch],
    rate: float = RATE,
) -> Curve:
    """Take torch's steps; `loss_of` gives a batch's loss with its graph, and what else is reported."""
    import torch

    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.01)
    losses, reports, gradients = [], [], {}
    for batch in batches:
        loss, told = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: turned(name, value.grad.numpy()).copy() for name, value in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        reports.append(told)
    final = {name: turned(name, value.detach().numpy()) for name, value in trained.items()}
    return Curve(losses, reports, gradients, final)


def turned(name: str, value: np.ndarray) -> np.ndarray:
    """Return a parameter in the other's orientation: factors are transposed, a head is not."""
    return value if name == SCORE_WEIGHT else value.T


def name_here(name: str) -> str:
    """Return our name of one of PEFT's trained parameters."""
    plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
    return plain if plain == SCORE_WEIGHT else torch_judge.name_here(name)


def assert_same_curve(ours: Curve, theirs: Curve, initial: Arrays, first: float = 1e-4, gradient: float = 1e-4) -> None:
    """Compare losses, gradients and what was trained, each of which must have moved.

    Args:
        ours, theirs: the two sides.
        initial: what was trained, before the first step.
        first: bar of the first loss; the others are compared with the whole curve, which may pass through zero.
        gradient: bar of the worst gradient; the median's is 1e-4.
    """
    assert ours.losses[0] == pytest.approx(theirs.losses[0], rel=first)
    assert np.abs(np.subtract(ours.losses, theirs.losses)).max() < 1e-3 * np.abs(theirs.losses).max()
    assert ours.gradients.keys() == theirs.gradients.keys()
    errors = {name: apart(value, theirs.gradients[name]) for name, value in ours.gradients.items()}
    assert max(errors.values()) < gradient, max(errors, key=errors.get)
    assert np.median(list(errors.values())) < 1e-4
    for name, value in ours.final.items():
        assert cosine(value, theirs.final[name]) > 0.9999, name
        assert np.abs(value - initial[name]).max() > 0, f"{name} did not move"


def assert_same_gradients(ours: Mapping[str, Any], trained: Mapping[str, Any], bar: float = 1e-4) -> None:
    """Compare gradients with those of torch's parameters, none of which is zero."""
    for name, value in trained.items():
        theirs = turned(name, value.grad.numpy())
        assert np.linalg.norm(theirs) > 0
        assert apart(ours[name], theirs) < bar, name


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Return the distance of two arrays as a share of the second."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Return the cosine of the angle between two arrays, in double precision."""
    one, other = one.ravel().astype(np.float64), other.ravel().astype(np.float64)
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))
