"""Preference training here, and TRL's loss code over PEFT on torch: same factors, rows and optimizer."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from bound import bind
from mlx.utils import tree_flatten
from real_models import smollm2_gguf
from run_cli import run
from torch_judge import name_here, torch_base

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.settings import AdapterSettings, ModelSettings, OptimizerSettings
from mlx_lora.data.batch import collate
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.losses.agree import choose_loss
from mlx_lora.models.load import load_base
from mlx_lora.models.prefix_attention import rotate_by_token
from mlx_lora.objectives.answer_sums import batch_sums
from mlx_lora.objectives.prefix_sharing import joined
from mlx_lora.objectives.reference import row_log_probabilities
from mlx_lora.objectives.table import objective_of
from mlx_lora.parallel.strategy import SINGLE_DEVICE
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

STEPS, RANK, ALPHA, RATE = 30, 4, 8.0, 3e-3
EXAMPLES = 12


def answers(seed: int = 0, rated: bool = False) -> EncodedSet:
    """Return random pairs (or rated answers with their partners): a shared prompt, then an answer."""
    random = np.random.default_rng(seed)
    rows, labels = [], []
    for number in range(EXAMPLES):
        prompt = random.integers(0, 288, int(random.integers(3, 9)))
        for side in range(2):
            answer = random.integers(0, 288, int(random.integers(2, 12)))
            mask = np.arange(len(prompt) + len(answer)) >= len(prompt)
            rows.append((np.concatenate([prompt, answer]).astype(np.int32), mask))
            labels.append(float(number % 2) if rated and side == 0 else 0.0)
    return EncodedSet.from_rows(rows).grouped(2, np.array(labels))


def settings_of(name: str, **options) -> ObjectiveSettings:
    return ObjectiveSettings(objective=name, **{"beta": 0.3, **options})


def ours(
    folder, settings: ObjectiveSettings, rows: EncodedSet, steps: int = STEPS, shared: bool = False, rate: float = RATE
):
    """Train, with `shared` on rows that hold a prompt and both answers.

    Returns losses, reports, initial factors, first gradients, final factors, the reference and the batches of
    separate rows.
    """
    objective = objective_of(settings)
    base = load_base(ModelSettings(model=str(folder)))
    adapt_model(base.model, AdapterSettings(rank=RANK, alpha=ALPHA), seed=1)
    loss = choose_loss(base.model, base.config)
    rows = rows.with_whole_rows() if objective.likelihood == "rows" else rows
    reference = row_log_probabilities(base.model, batch_sums(loss.measure_tokens), rows, 256)
    rows = replace(rows, reference=reference if objective.options.row.reference else None)
    random = np.random.default_rng(5)
    moved = {name: random.normal(0, 0.02, value.shape) for name, value in adapter_parameters(base.model).items()}
    base.model.load_weights(
        [(n, mx.array(v.astype(np.float32))) for n, v in moved.items() if "lora_b" in n], strict=False
    )
    initial = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    task = bind(objective, loss, base)
    optimizer = build_optimizer(OptimizerSettings(learning_rate=rate, lr_schedule="constant", warmup=0.0), STEPS)
    step = Step(base.model, optimizer, task.loss.train, 1.0, StepOptions(prepare=lambda batches: task.prepare(batches, SINGLE_DEVICE), arrays_of=task.arrays_of, reports=task.reports))  # fmt: skip
    if shared:
        rotate_by_token(base.model)
    plan = BatchPlan(joined(rows) if shared else rows, batch_tokens=400, batch_size=4, seed=0)
    batches = [plan.batch(*divmod(number, len(plan))) for number in range(steps)]
    losses, reports = [], []
    gradients = first_gradients(base.model, task, batches[0])
    for batch in batches:
        result = step([batch])
        losses.append(result.loss_sum.item() / result.count.item())
        means = {name: value.item() / result.count.item() for name, value in result.reports.items()}
        reports.append(task.finish(means))
    final = {name: np.array(value) for name, value in tree_flatten(base.model.trainable_parameters())}
    if shared:
        assert all(batch.starts is not None for batch in batches)
        wide = int(rows.lengths.max())
        batches = [collate(rows, batch.numbers, wide, 8 * wide) for batch in batches]
    return losses, reports, initial, gradients, final, reference, batches


def first_gradients(model, task, batch) -> dict[str, np.ndarray]:
    import mlx.nn as nn

    [ready] = task.prepare([batch], SINGLE_DEVICE)
    (_, count, _), grads = nn.value_and_grad(model, task.loss.train)(model, task.arrays_of(ready))
    return {name: np.array(value / count) for name, value in tree_flatten(grads)}


def in_trl(folder, settings: ObjectiveSettings, initial, batches, reference, rate: float = RATE):
    """Return losses, reports, first gradients and final factors of TRL's loss over PEFT, in our orientation."""
    import peft
    import torch
    from trl_judge import preference_loss

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear")
    model = peft.get_peft_model(torch_base(folder), config).train()
    trained = {name_here(name): value for name, value in model.named_parameters() if value.requires_grad}
    assert trained.keys() == initial.keys()
    for name, value in trained.items():
        value.data = torch.tensor(initial[name].T.copy())
    optimizer = torch.optim.AdamW(trained.values(), lr=rate, weight_decay=0.01)
    losses, reports, gradients = [], [], None
    for batch in batches:
        loss, told = preference_loss(settings, model, batch, reference)
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: value.grad.numpy().T.copy() for name, value in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        reports.append(told)
    return losses, reports, gradients, {name: value.detach().numpy().T for name, value in trained.items()}


CASES = {
    "dpo": settings_of("dpo"),
    "dpo hinge": settings_of("dpo", loss_type="hinge"),
    "dpo ipo": settings_of("dpo", loss_type="ipo"),
    "dpo robust": settings_of("dpo", loss_type="robust", label_smoothing=0.1),
    "dpo aot": settings_of("dpo", loss_type="aot"),
    "dpo apo_zero": settings_of("dpo", loss_type="apo_zero"),
    "dpo mixed": settings_of("dpo", loss_type="sigmoid,bco_pair,sft", loss_weights="0.8,0.2,0.5"),
    "orpo": settings_of("orpo"),
    "simpo": settings_of("simpo", simpo_gamma=0.4),
    "cpo": settings_of("cpo", cpo_alpha=0.7),
    "kto": settings_of("kto", undesirable_weight=0.6),
}
NAMES = {"accuracy": "rewards/accuracies", "margin": "rewards/margins", "chosen_rewards": "rewards/chosen",
         "rejected_rewards": "rewards/rejected", "chosen_logps": "logps/chosen"}  # fmt: skip


SHARED = ("dpo", "dpo mixed", "orpo", "simpo", "cpo")


@pytest.mark.parametrize(("case", "shared"), [*((case, False) for case in CASES), *((case, True) for case in SHARED)])
def test_losses_gradients_and_curves_are_trls(case, shared, tiny_folder):
    compare(tiny_folder, CASES[case], shared)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in float32."""
    folder = tmp_path_factory.mktemp("smollm2") / "float"
    assert run("convert", "--model", smollm2_gguf(), "--out", folder, "--no-quantize", "--dtype", "float32").code == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_smollm2_trains_as_in_trl(case, smollm2):
    curve = case in ("dpo", "orpo", "simpo", "cpo", "kto")
    compare(smollm2, CASES[case], case != "kto", rate=3e-4, steps=STEPS if curve else 2, small=False)


def compare(
    folder, settings: ObjectiveSettings, shared: bool, rate: float = RATE, steps: int = STEPS, small: bool = True
) -> None:
    """Train here and with TRL's loss over PEFT, and compare losses, gradients, factors and reports.

    A model that is not `small` has wider bars: a loss is a difference of log-probabilities near 100, and after SmolLM2's 30
    blocks TRL's own float32 gradient of the worst factor is 3.6e-4 from its float64 one.
    """
    pytest.importorskip("trl")
    rows = answers(rated=settings.objective == "kto")
    losses, reports, initial, gradients, final, reference, batches = ours(folder, settings, rows, steps, shared, rate)
    theirs, told, their_gradients, their_final = in_trl(folder, settings, initial, batches, reference, rate)
    # Relative to the curve: some losses pass through zero.
    assert np.abs(np.subtract(losses, theirs)).max() < 1e-3 * np.abs(theirs).max()
    assert losses[0] == pytest.approx(theirs[0], rel=1e-5 if small else 1e-4)
    errors = {
        name: np.linalg.norm(value - their_gradients[name]) / np.linalg.norm(their_gradients[name])
        for name, value in gradients.items()
    }
    assert max(errors.values()) < (1e-4 if small else 4e-4), max(errors, key=errors.get)
    assert np.median(list(errors.values())) < 1e-4
    for name, value in final.items():
        assert np.abs(value - initial[name]).max() > 0, f"{name} did not move"
        one, other = value.ravel().astype(np.float64), their_final[name].ravel().astype(np.float64)
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.9999, name
    for name, other in NAMES.items():
        if name in reports[0] and other in told[0]:
            assert reports[0][name] == pytest.approx(told[0][other], rel=1e-4, abs=1e-5 if small else 2e-4), name


@pytest.mark.parametrize("case", ["dpo", "orpo", "simpo", "cpo", "kto"])
def test_a_swapped_pair_or_another_beta_is_another_loss(case, tiny_folder):
    settings = CASES[case]
    rows = answers(rated=case == "kto")
    right = ours(tiny_folder, settings, rows, steps=2)[0]
    assert right == ours(tiny_folder, settings, rows, steps=2)[0]
    assert not np.allclose(right, ours(tiny_folder, replace(settings, beta=0.5), rows, steps=2)[0], rtol=1e-4)
    if case == "kto":
        swapped = rows.grouped(2, 1 - rows.labels)
    else:
        swapped = EncodedSet.from_rows([rows.row(i ^ 1) for i in range(len(rows))]).grouped(2, rows.labels)
    assert not np.allclose(right, ours(tiny_folder, settings, swapped, steps=2)[0], rtol=1e-4)


def test_the_reference_is_torchs(tiny_folder):
    import torch

    rows = answers()
    reference = ours(tiny_folder, CASES["dpo"], rows, steps=1)[5]
    model = torch_base(tiny_folder)
    for number in range(0, len(rows), 5):
        tokens, mask = rows.row(number)
        with torch.no_grad():
            logps = torch.log_softmax(model(torch.tensor(tokens[None].astype(np.int64))).logits[0], dim=-1)
        wanted = sum(logps[i - 1, tokens[i]].item() for i in np.flatnonzero(mask))
        assert reference[number] == pytest.approx(wanted, rel=1e-5)
        assert reference[number] != pytest.approx(reference[number ^ 1], rel=1e-3)
