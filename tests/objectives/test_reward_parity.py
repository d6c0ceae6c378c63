"""Reward models here, and TRL's RewardTrainer over transformers and PEFT on torch: same factors, head, rows, optimizer."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from bound import bind
from mlx.utils import tree_flatten
from real_models import smollm2_gguf
from run_cli import run

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, ModelSettings, OptimizerSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.head import SCORE_WEIGHT, put_score_head
from mlx_lora.models.load import load_base
from mlx_lora.objectives.answer_sums import batch_sums
from mlx_lora.objectives.ratings import score_loss
from mlx_lora.objectives.reference import row_log_probabilities
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

STEPS, RANK, ALPHA, PAD = 30, 4, 8.0, 0
PLAIN = ObjectiveSettings(objective="reward")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "float"
    assert run("convert", "--model", smollm2_gguf(), "--out", folder, "--no-quantize", "--dtype", "float32").code == 0
    return folder


def pairs(examples: int = 12, margins: bool = True, seed: int = 0) -> EncodedSet:
    """Return random pairs that share a prompt, without the token that pads."""
    random = np.random.default_rng(seed)
    rows, labels = [], []
    for number in range(examples):
        prompt = random.integers(1, 288, int(random.integers(3, 9)))
        for side in range(2):
            answer = random.integers(1, 288, int(random.integers(2, 12)))
            mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
            rows.append((np.concatenate([prompt, answer]).astype(np.int32), mask))
            labels.append(0.25 * (number % 4) if margins and side == 0 else 0.0)
    return EncodedSet.from_rows(rows).grouped(2, np.array(labels))


def ours(folder, settings: ObjectiveSettings, rows: EncodedSet, steps: int = STEPS, rate: float = 3e-3):
    """Return losses, reports, initial parameters, first gradients, final parameters, scores and batches."""
    objective = objective_of(settings)
    rows = objective._with_targets(rows)
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    adapt_model(base.model, AdapterSettings(rank=RANK, alpha=ALPHA), seed=1)
    put_score_head(base.model, base.config, seed=1)
    random = np.random.default_rng(5)
    factors = {name: value for name, value in adapter_parameters(base.model).items() if "lora_b" in name}
    moved = [
        (name, mx.array(random.normal(0, 0.02, value.shape).astype(np.float32))) for name, value in factors.items()
    ]
    base.model.load_weights(moved, strict=False)
    initial = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    scores = row_log_probabilities(base.model, batch_sums(score_loss(base.model).tokens), rows, 256)
    task = bind(objective, choose_loss(base.model, base.config), base)
    optimizer = build_optimizer(OptimizerSettings(learning_rate=rate, lr_schedule="constant", warmup=0.0), STEPS)
    step = Step(base.model, optimizer, task.loss.train, 1.0, StepOptions(prepare=lambda batches: task.prepare(batches, SINGLE_DEVICE), arrays_of=task.arrays_of, reports=task.reports))  # fmt: skip
    plan = BatchPlan(rows, batch_tokens=400, batch_size=4, seed=0)
    batches = [plan.batch(*divmod(number, len(plan))) for number in range(steps)]
    (_, count, _), grads = nn.value_and_grad(base.model, task.loss.train)(base.model, task.arrays_of(batches[0]))
    gradients = {name: np.array(value / count) for name, value in tree_flatten(grads)}
    losses, reports = [], []
    for batch in batches:
        result = step([batch])
        losses.append(result.loss_sum.item() / result.count.item())
        reports.append({name: value.item() / result.count.item() for name, value in result.reports.items()})
    final = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    return losses, reports, initial, gradients, final, scores, batches


def in_trl(folder, settings: ObjectiveSettings, initial, batches, rows: EncodedSet, rate: float = 3e-3):
    """Return losses, reports, first gradients, final parameters and scores of TRL's loss, in our orientation."""
    import peft
    import torch
    import transformers
    from trl_judge import reward_loss

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=1, pad_token_id=PAD
    )
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=r"model\.layers\..*_proj", task_type="SEQ_CLS"
    )
    model = peft.get_peft_model(base, config)
    trained = {name_here(name): value for name, value in model.named_parameters() if value.requires_grad}
    assert trained.keys() == initial.keys()
    for name, value in trained.items():
        value.data = torch.tensor(turned(name, initial[name]).copy())
    model.eval()
    with torch.no_grad():
        row_tokens = [torch.tensor(rows.row(number)[0][None].astype(np.int64)) for number in range(len(rows))]
        scores = np.array([model(tokens).logits.item() for tokens in row_tokens])
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.01)
    losses, reports, gradients = [], [], None
    for batch in batches:
        kept = np.flatnonzero(batch.numbers >= 0)
        order = np.concatenate([kept[0::2], kept[1::2]])
        margin = torch.tensor(batch.columns["labels"][order][: len(order) // 2])
        inputs = torch.tensor(batch.inputs[order].astype(np.int64))
        loss, told = reward_loss(model, inputs, margin if margin.any() else None, settings.center_rewards or None)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: turned(name, value.grad.numpy()).copy() for name, value in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        reports.append(told)
    final = {name: turned(name, value.detach().numpy()) for name, value in trained.items()}
    return losses, reports, gradients, final, scores


def turned(name: str, value: np.ndarray) -> np.ndarray:
    """Return a parameter in the other's orientation: factors are transposed, the head is not."""
    return value if name == SCORE_WEIGHT else value.T


def name_here(name: str) -> str:
    plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
    return plain.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")


def compare(folder, settings, rows, rate):
    losses, reports, initial, gradients, final, scores, batches = ours(folder, settings, rows, rate=rate)
    theirs, told, their_gradients, their_final, their_scores = in_trl(folder, settings, initial, batches, rows, rate)
    assert np.abs(scores - their_scores).max() < 1e-4 * np.abs(their_scores).max()
    assert len(np.unique(np.round(their_scores, 3))) > len(rows) // 2  # scores that differ from row to row
    assert losses[0] == pytest.approx(theirs[0], rel=1e-4)
    assert np.abs(np.subtract(losses, theirs)).max() < 1e-3 * np.abs(theirs).max()
    assert gradients.keys() == their_gradients.keys()
    for name, value in gradients.items():
        error = np.linalg.norm(value - their_gradients[name]) / np.linalg.norm(their_gradients[name])
        assert error < 1e-4, name
    for name, value in final.items():
        assert np.abs(value - initial[name]).max() > 0, f"{name} did not move"
        one, other = value.ravel().astype(np.float64), their_final[name].ravel().astype(np.float64)
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.9999, name
    for mine, trl in zip(reports[:5], told[:5], strict=True):
        assert mine["accuracy"] == pytest.approx(trl["accuracy"])
        assert mine["margin"] == pytest.approx(trl["margin"], rel=1e-3, abs=1e-4)
        assert (mine["chosen_rewards"] + mine["rejected_rewards"]) / 2 == pytest.approx(trl["mean_reward"], abs=1e-4)


CASES = {"plain": (PLAIN, False), "margin": (PLAIN, True), "centered": (replace(PLAIN, center_rewards=0.05), True)}


@pytest.mark.parametrize("case", CASES)
def test_scores_gradients_and_curves_are_trls(case, tiny_folder):
    pytest.importorskip("trl")
    settings, margins = CASES[case]
    compare(tiny_folder, settings, pairs(margins=margins), 3e-3)


@pytest.mark.slow
def test_smollm2_trains_as_in_trl(smollm2):
    pytest.importorskip("trl")
    compare(smollm2, PLAIN, pairs(8), 3e-4)


def test_a_swapped_pair_or_another_margin_is_another_loss(tiny_folder):
    rows = pairs()
    right = ours(tiny_folder, PLAIN, rows, steps=2)[0]
    assert right == ours(tiny_folder, PLAIN, rows, steps=2)[0]
    swapped = EncodedSet.from_rows([rows.row(i ^ 1) for i in range(len(rows))]).grouped(2, rows.labels)
    for other in (swapped, rows.grouped(2, rows.labels + 0.5), rows.grouped(2, 0 * rows.labels)):
        assert not np.allclose(right, ours(tiny_folder, PLAIN, other, steps=2)[0], rtol=1e-4)
    centered = replace(PLAIN, center_rewards=0.05)
    assert not np.allclose(right, ours(tiny_folder, centered, rows, steps=2)[0], rtol=1e-4)
