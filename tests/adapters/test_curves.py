"""Training here and in PEFT on torch: same factors, data and optimizer, so the same losses and adapters."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_steps import batch, losses_of, method_step
from torch_judge import name_here, torch_base, trained_in_torch

from mlx_lora.adapters.inject import adapt_model, adapter_parameters
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.models.load import load_base

# PEFT calls what transformers has deprecated.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning")]

STEPS, RANK, ALPHA = 30, 4, 8.0
# LoRA+ moves B sixteen times as fast.
RATES = {"lora": 5e-3, "rslora": 5e-3, "dora": 5e-3, "lora-plus": 5e-4, "pissa": 2e-3, "full": 1e-3}
# PEFT's PiSSA takes the start out of the weight, ours out of the product: the same function of both factors.
PEFT_SETTINGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lora-plus": {},
    "pissa": {"init_lora_weights": "pissa"},
}


def batches():
    return [batch(3, 17 + step % 4, seed=step) for step in range(STEPS)]


def ours(folder, method: str):
    """Return losses, the initial factors and the final parameters."""
    base = load_base(ModelSettings(model=str(folder)))
    settings = AdapterSettings(method=method, rank=RANK, alpha=ALPHA)
    adapt_model(base.model, settings, seed=1)
    initial = {name: np.array(value) for name, value in adapter_parameters(base.model).items()}
    losses = losses_of(method_step(base.model, settings, STEPS, RATES[method]), batches())
    return losses, initial, {name: np.array(value) for name, value in tree_flatten(base.model.trainable_parameters())}


def in_peft(folder, method: str, initial: dict[str, np.ndarray]):
    """Return losses and the final parameters, under our names and in our orientation."""
    import peft
    import torch

    if method == "full":
        model = torch_base(folder).train()
        kept = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
        trained = {n: v for n, v in model.named_parameters() if n.split(".")[-2] in kept}
        assert trained.keys() == initial.keys()
        optimizer = torch.optim.AdamW(trained.values(), lr=RATES[method], weight_decay=0.01)
        losses = trained_in_torch(model, trained, optimizer, batches())
        return losses, {name: value.detach().numpy() for name, value in trained.items()}
    settings = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "target_modules": "all-linear"}
    model = peft.get_peft_model(torch_base(folder), peft.LoraConfig(**settings, **PEFT_SETTINGS[method])).train()
    trained = {name_here(name): value for name, value in model.named_parameters() if value.requires_grad}
    assert trained.keys() == initial.keys()
    for name, value in trained.items():
        if name.endswith(".m"):
            assert np.allclose(value.detach().numpy(), initial[name], rtol=1e-5)
        else:
            value.data = torch.tensor(initial[name].T.copy())
    if method == "lora-plus":
        from peft.optimizers import create_loraplus_optimizer

        optimizer = create_loraplus_optimizer(
            model,
            torch.optim.AdamW,
            lr=RATES[method],
            loraplus_lr_ratio=16,
            loraplus_weight_decay=0.01,
            weight_decay=0.01,
        )
    else:
        optimizer = torch.optim.AdamW(trained.values(), lr=RATES[method], weight_decay=0.01)
    losses = trained_in_torch(model, trained, optimizer, batches())
    final = {name: value.detach().numpy() for name, value in trained.items()}
    return losses, {name: value.T if ".lora_" in name else value for name, value in final.items()}


@pytest.mark.parametrize("method", RATES)
def test_losses_and_adapters_are_pefts(method, tiny_folder):
    pytest.importorskip("peft")
    losses, initial, final = ours(tiny_folder, method)
    theirs, their_final = in_peft(tiny_folder, method, initial)
    assert np.abs(np.array(losses) / np.array(theirs) - 1).max() < 1e-4
    assert losses[-1] != pytest.approx(losses[0], rel=1e-3)
    for name, value in final.items():
        one, other = value.ravel().astype(np.float64), their_final[name].ravel().astype(np.float64)
        assert one @ other / np.linalg.norm(one) / np.linalg.norm(other) > 0.9999, name


def test_the_methods_are_not_each_other(tiny_folder):
    curves = {method: ours(tiny_folder, method)[0] for method in RATES}
    for one, other in combinations(curves, 2):
        assert not np.allclose(curves[one], curves[other], rtol=1e-3), (one, other)
