"""Score heads here, and transformers' models for sequence classification under PEFT on torch: same factors, head, rows, optimizer.

Classifiers and rerankers have the losses of transformers and of their definitions, reward models those of TRL's RewardTrainer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from bound import bind, with_targets
from curves import (
    ALPHA,
    PAD,
    RANK,
    RATE,
    STEPS,
    Curve,
    assert_same_curve,
    classifier_over_peft,
    move_second_factors,
    our_curve,
    torch_curve,
)
from real_models import smollm2_gguf
from run_cli import succeeds

from mlx_lora.adapters.inject import adapt_model
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.labeled import GRADES, ROWS
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.losses.scores import NUMBER, SEVERAL, SINGLE
from mlx_lora.models.head import put_score_head
from mlx_lora.models.load import load_base
from mlx_lora.objectives.ratings import score_loss
from mlx_lora.objectives.reference import batch_sums, row_log_probabilities
from mlx_lora.objectives.table import objective_of

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]
LABELS = ("cold", "hot", "mild")
WEIGHTS = "cold=3,hot=0.5,mild=1"


def ours(folder, settings: ObjectiveSettings, rows: EncodedSet, steps: int = STEPS, rate: float = RATE, size: int = 4):
    """Return the curve, the initial parameters, the batches, and the scores of the rows before the first step."""
    objective = objective_of(settings)
    rows = with_targets(objective, rows)
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    adapt_model(base.model, AdapterSettings(rank=RANK, alpha=ALPHA), seed=1)
    put_score_head(base.model, base.config, 1, objective.head.outputs)
    initial = move_second_factors(base.model)
    scores = None
    if settings.objective == "reward":
        scores = row_log_probabilities(base.model, batch_sums(score_loss(base.model).tokens), rows, 256)
    plan = BatchPlan(rows, batch_tokens=4096 if size == 3 else 400, batch_size=size, seed=0)
    batches = [plan.batch(*divmod(number, len(plan))) for number in range(steps)]
    task = bind(objective, choose_loss(base.model, base.config), base)
    return our_curve(base.model, task, batches, rate), initial, batches, scores


def mask_of(inputs: Any) -> Any:
    return (inputs != PAD).long()


# Classifiers


def labeled(problem: str, count: int = 12) -> EncodedSet:
    """Return random rows without the token that pads, and their labels."""
    random = np.random.default_rng(0)
    rows = [random.integers(1, 288, int(random.integers(3, 20))).astype(np.int32) for _ in range(count)]
    labels = {
        SINGLE: [LABELS[number % 3] for number in range(count)],
        SEVERAL: [[name for name in LABELS if random.random() < 0.5] for _ in range(count)],
        NUMBER: random.normal(size=count).tolist(),
    }[problem]
    unmasked = [(row, np.zeros(len(row), bool)) for row in rows]
    return EncodedSet.from_rows(unmasked).with_facts([{"label": label} for label in labels])


def weighted(problem: str, weights: str):
    """Return torch's loss with weights of labels."""
    import torch

    values = torch.tensor([float(part.split("=")[1]) for part in weights.split(",")])
    if problem == SINGLE:
        return torch.nn.CrossEntropyLoss(weight=values)
    return torch.nn.BCEWithLogitsLoss(pos_weight=values)


@pytest.mark.parametrize(
    ("problem", "weights"), [(SINGLE, None), (SINGLE, WEIGHTS), (SEVERAL, None), (SEVERAL, WEIGHTS), (NUMBER, None)]
)
def test_classifiers_have_losses_gradients_and_curves_of_transformers(problem, weights, tiny_folder):
    import torch

    named = None if problem == NUMBER else ",".join(LABELS)
    settings = ObjectiveSettings("classify", problem_type=problem, labels=named, class_weights=weights)
    found, initial, batches, _ = ours(tiny_folder, settings, labeled(problem))
    outputs = 1 if problem == NUMBER else len(LABELS)
    model, trained = classifier_over_peft(tiny_folder, initial, outputs, problem_type=problem)

    def loss_of(batch):
        real = batch.numbers >= 0
        inputs, labels = torch.tensor(batch.inputs[real].astype(np.int64)), torch.tensor(batch.columns["labels"][real])
        labels = labels if problem == SEVERAL else labels[:, 0]
        labels = labels.long() if problem == SINGLE else labels
        out = model(input_ids=inputs, attention_mask=mask_of(inputs), labels=labels)
        return out.loss if weights is None else weighted(problem, weights)(out.logits, labels), {}

    assert_same_curve(found, torch_curve(trained, loss_of, batches), initial)
    assert found.losses[-1] < found.losses[0] / 2
    if weights:
        plain = ours(tiny_folder, replace(settings, class_weights=None), labeled(problem), steps=1)[0]
        assert abs(plain.losses[0] - found.losses[0]) > 1e-3


# Rerankers


def queries(count: int = 10) -> EncodedSet:
    """Return queries with two to four documents of random tokens, without the one that pads."""
    random = np.random.default_rng(0)
    rows, facts = [], []
    for _ in range(count):
        documents = [
            random.integers(1, 288, int(random.integers(4, 20))).astype(np.int32) for _ in range(random.integers(2, 5))
        ]
        rows.append((documents[0], np.zeros(len(documents[0]), bool)))
        facts.append({ROWS: documents, GRADES: [1.0] + [0.0] * (len(documents) - 1)})
    return EncodedSet.from_rows(rows).with_facts(facts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_rerankers_have_the_curve_of_transformers(kind, tiny_folder):
    import torch

    found, initial, batches, _ = ours(tiny_folder, ObjectiveSettings("rerank", rerank_loss=kind), queries(), size=3)
    model, trained = classifier_over_peft(tiny_folder, initial, 1)

    def loss_of(batch):
        there = np.where(batch.real, batch.columns["labels"], -1.0).reshape(-1, batch.group)
        inputs = torch.tensor(batch.inputs.astype(np.int64))
        kept = torch.tensor(there.ravel() >= 0)
        scores = torch.zeros(len(inputs))
        scores[kept] = model(input_ids=inputs[kept], attention_mask=mask_of(inputs[kept])).logits[:, 0]
        parts = []
        for own, grades in zip(scores.reshape(there.shape), there, strict=True):
            own, graded = own[grades >= 0], torch.tensor(grades[grades >= 0], dtype=torch.float32)
            if kind == "listwise" and len(own):
                parts.append(-(graded.softmax(0) * own.log_softmax(0)).sum())
            elif kind == "pairwise":
                better = graded[:, None] > graded[None]
                parts += (torch.nn.functional.softplus(own[None] - own[:, None])[better] / np.log(2)).unbind()
        return torch.stack(parts).mean(), {}

    assert_same_curve(found, torch_curve(trained, loss_of, batches), initial)
    assert min(found.losses) < 0.8 * found.losses[0]


# Reward models

PLAIN = ObjectiveSettings(objective="reward")
CASES = {"plain": (PLAIN, False), "margin": (PLAIN, True), "centered": (replace(PLAIN, center_rewards=0.05), True)}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "float"
    succeeds("convert", "--model", smollm2_gguf(), "--out", folder, "--no-quantize", "--dtype", "float32")
    return folder


def pairs(examples: int = 12, margins: bool = True) -> EncodedSet:
    """Return random pairs that share a prompt, without the token that pads."""
    random = np.random.default_rng(0)
    rows, labels = [], []
    for number in range(examples):
        prompt = random.integers(1, 288, int(random.integers(3, 9)))
        for side in range(2):
            answer = random.integers(1, 288, int(random.integers(2, 12)))
            mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
            rows.append((np.concatenate([prompt, answer]).astype(np.int32), mask))
            labels.append(0.25 * (number % 4) if margins and side == 0 else 0.0)
    return EncodedSet.from_rows(rows).grouped(2, np.array(labels))


def reward_of_trl(model, center: float | None) -> Callable:
    """Return TRL's loss of a batch."""
    import torch
    from trl_judge import reward_loss

    def loss_of(batch):
        kept = np.flatnonzero(batch.numbers >= 0)
        order = np.concatenate([kept[0::2], kept[1::2]])
        margin = torch.tensor(batch.columns["labels"][order][: len(order) // 2])
        inputs = torch.tensor(batch.inputs[order].astype(np.int64))
        return reward_loss(model, inputs, margin if margin.any() else None, center or None)

    return loss_of


def compare(folder, settings: ObjectiveSettings, rows: EncodedSet, rate: float = RATE) -> None:
    import torch

    found, initial, batches, scores = ours(folder, settings, rows, rate=rate)
    model, trained = classifier_over_peft(folder, initial, 1)
    with torch.no_grad():
        tokens = [torch.tensor(rows.row(number)[0][None].astype(np.int64)) for number in range(len(rows))]
        wanted = np.array([model(row).logits.item() for row in tokens])
    assert np.abs(scores - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert len(np.unique(np.round(wanted, 3))) > len(rows) // 2  # scores that differ from row to row
    theirs = torch_curve(trained, reward_of_trl(model, settings.center_rewards), batches, rate)
    assert_same_curve(found, theirs, initial)
    for mine, told in zip(found.reports[:5], theirs.reports[:5], strict=True):
        assert mine["accuracy"] == pytest.approx(told["accuracy"])
        assert mine["margin"] == pytest.approx(told["margin"], rel=1e-3, abs=1e-4)
        assert (mine["chosen_rewards"] + mine["rejected_rewards"]) / 2 == pytest.approx(told["mean_reward"], abs=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_reward_models_have_scores_gradients_and_curves_of_trl(case, tiny_folder):
    pytest.importorskip("trl")
    settings, margins = CASES[case]
    compare(tiny_folder, settings, pairs(margins=margins))


@pytest.mark.slow
def test_smollm2_becomes_a_reward_model_as_in_trl(smollm2):
    pytest.importorskip("trl")
    compare(smollm2, PLAIN, pairs(8), 3e-4)


def test_a_swapped_pair_or_another_margin_is_another_loss(tiny_folder):
    def losses(rows: EncodedSet, settings: ObjectiveSettings = PLAIN) -> list[float]:
        curve: Curve = ours(tiny_folder, settings, rows, steps=2)[0]
        return curve.losses

    rows = pairs()
    right = losses(rows)
    assert right == losses(rows)
    swapped = EncodedSet.from_rows([rows.row(i ^ 1) for i in range(len(rows))]).grouped(2, rows.labels)
    for other in (swapped, rows.grouped(2, rows.labels + 0.5), rows.grouped(2, 0 * rows.labels)):
        assert not np.allclose(right, losses(other), rtol=1e-4)
    assert not np.allclose(right, losses(rows, replace(PLAIN, center_rewards=0.05)), rtol=1e-4)
