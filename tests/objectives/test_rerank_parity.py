"""A reranker here, and transformers' model for sequence classification under PEFT on torch: the same curve over 30 steps."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from bound import bind

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, ModelSettings, OptimizerSettings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.labeled import GRADES, ROWS
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.head import SCORE_WEIGHT, put_score_head
from mlx_lora.models.load import load_base
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning")]
RANK, ALPHA, PAD, STEPS, RATE = 4, 8.0, 0, 30, 3e-3


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


def ours(folder, kind: str):
    """Return losses, initial and final parameters, and batches."""
    objective = objective_of(ObjectiveSettings("rerank", rerank_loss=kind))
    rows = objective._with_targets(queries())
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    adapt_model(base.model, AdapterSettings(rank=RANK, alpha=ALPHA), seed=1)
    put_score_head(base.model, base.config, 1, 1)
    initial = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    bound = bind(objective, choose_loss(base.model, base.config), base)
    optimizer = build_optimizer(OptimizerSettings(learning_rate=RATE, lr_schedule="constant", warmup=0.0), STEPS)
    options = StepOptions(
        prepare=lambda batches: bound.prepare(batches, SINGLE_DEVICE), arrays_of=bound.arrays_of, reports=bound.reports
    )
    step = Step(base.model, optimizer, bound.loss.train, 1.0, options)
    plan = BatchPlan(rows, batch_tokens=4096, batch_size=3, seed=0)
    batches = [plan.batch(*divmod(number, len(plan))) for number in range(STEPS)]
    losses = [one.loss_sum.item() / one.count.item() for one in (step([batch]) for batch in batches)]
    mx.eval(base.model.parameters())
    return losses, initial, {name: np.array(value) for name, value in adapter_parameters(base.model).items()}, batches


def in_transformers(folder, kind: str, initial, batches):
    """Return losses and final parameters of AutoModelForSequenceClassification under PEFT."""
    import peft
    import torch
    import transformers

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, num_labels=1, pad_token_id=PAD
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
    optimizer, losses = torch.optim.AdamW(named.values(), lr=RATE, weight_decay=0.01), []
    for batch in batches:
        there = np.where(batch.real, batch.columns["labels"], -1.0).reshape(-1, batch.group)
        numbers = np.arange(len(batch.inputs)).reshape(there.shape)
        kept = numbers[there >= 0]
        inputs = torch.tensor(batch.inputs[kept].astype(np.int64))
        scores = model(input_ids=inputs, attention_mask=(inputs != PAD).long()).logits[:, 0]
        place = {number: at for at, number in enumerate(kept.tolist())}
        parts = []
        for row, grades in zip(numbers, there, strict=True):
            own = scores[[place[number] for number in row[grades >= 0]]] if (grades >= 0).any() else scores[:0]
            graded = torch.tensor(grades[grades >= 0], dtype=torch.float32)
            if kind == "listwise" and len(own):
                parts.append(-(graded.softmax(0) * own.log_softmax(0)).sum())
            elif kind == "pairwise":
                better = graded[:, None] > graded[None]
                parts += (torch.nn.functional.softplus(own[None] - own[:, None])[better] / np.log(2)).unbind()
        loss = torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: turned(name, value.detach().numpy()) for name, value in named.items()}


def turned(name: str, value: np.ndarray) -> np.ndarray:
    return value if name == SCORE_WEIGHT else value.T


def name_here(name: str) -> str:
    plain = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
    return plain.replace(".lora_A.weight", ".lora_a").replace(".lora_B.weight", ".lora_b")


@pytest.mark.parametrize("kind", ["pairwise", "listwise"])
def test_the_curve_is_that_of_transformers(kind, tiny_folder):
    pytest.importorskip("peft")
    losses, initial, final, batches = ours(tiny_folder, kind)
    theirs, their_final = in_transformers(tiny_folder, kind, initial, batches)
    assert np.abs(np.subtract(losses, theirs)).max() < 1e-3 * np.abs(theirs).max()
    assert min(losses) < 0.8 * losses[0]
    for name, value in final.items():
        one, other = value.ravel().astype(np.float64), their_final[name].ravel().astype(np.float64)
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.9999, name
        assert np.abs(value - initial[name]).max() > 0, f"{name} did not move"
