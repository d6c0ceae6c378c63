"""State-space models against transformers on torch, same random weights: logits, every gradient, 30 steps of LoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tiny_steps import batch

from mlx_lora.adapters.inject import adapter_parameters, inject, select_targets
from mlx_lora.config.settings import OptimizerSettings
from mlx_lora.kernels import recurrent
from mlx_lora.kernels.attention import attend
from mlx_lora.kernels.choose import exchanging, training_kernels
from mlx_lora.losses.cross_entropy import Arrays, plain_loss, token_arrays
from mlx_lora.trainer.optimizer import build_optimizer
from mlx_lora.trainer.step import Step, StepOptions

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [
    pytest.mark.parity,
    # Its fast paths need a GPU; which path a CPU gets is what we compare with.
    pytest.mark.filterwarnings("ignore"),
]

BARE: dict[str, Any] = {
    "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ATTENTION: dict[str, Any] = {
    **BARE, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
HEADS = {
    "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_chunk_size": 16,
    "mamba_expand": 2,
}  # fmt: skip
# The width is no multiple of a chunk here or there.
ROWS, WIDTH, STEPS, RATE = 2, 43, 30, 3e-3
# One group in Mamba-2 and no norm in Falcon-H1: behind several groups mlx-lm 0.32.2 takes one norm over all of them,
# transformers one for each.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("MambaConfig", {**BARE, "state_size": 16, "time_step_rank": 8}),
    "falcon_mamba": ("FalconMambaConfig", {**BARE, "state_size": 16, "time_step_rank": 8}),
    "jamba": (
        "JambaConfig",
        {
            **ATTENTION, "num_hidden_layers": 3, "attn_layer_offset": 1, "attn_layer_period": 2, "mamba_d_state": 16,
            "expert_layer_offset": 1, "expert_layer_period": 2, "num_experts": 1, "num_experts_per_tok": 1,
            "mamba_dt_rank": 8, "use_mamba_kernels": False,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        {**BARE, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    ),
    "falcon_h1": (
        "FalconH1Config",
        {**ATTENTION, **HEADS, "mamba_d_ssm": 128, "mamba_n_groups": 2, "mamba_rms_norm": False, "head_dim": 16},
    ),
    "nemotron_h": (
        "NemotronHConfig",
        {
            **ATTENTION, "layers_block_type": ["mamba", "attention", "mamba", "mlp"], "num_hidden_layers": 4,
            "head_dim": 16, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
            "chunk_size": 16, "use_mamba_kernels": False, "expand": 2,
        },
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        {
            **ATTENTION, **HEADS, "layer_types": ["mamba", "attention"], "num_local_experts": 0,
            "num_experts_per_tok": 0, "shared_intermediate_size": 96, "embedding_multiplier": 6.0,
            "attention_multiplier": 0.25, "logits_scaling": 4.0, "residual_multiplier": 0.5,
            "position_embedding_type": "nope",
        },
    ),
}  # fmt: skip

# What mlx-lm 0.32.2 reads and transformers 5 does not write.
OLD_WORDS: dict[str, dict[str, Any]] = {
    "mamba2": {"intermediate_size": 128},
    "falcon_h1": {"rope_theta": 1e4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
}


@pytest.fixture(autouse=True)
def _quiet_and_small(monkeypatch, uncompiled):
    torch.set_num_threads(1)
    monkeypatch.setattr(recurrent, "CHUNK", 8)
    monkeypatch.setattr(recurrent, "MAX_CHUNKS", 2)
    monkeypatch.setattr(recurrent, "SCAN_TOKENS", (16, 16))


def torch_model(family: str) -> Any:
    """Return transformers' model with random weights, none of them zero or one as it leaves some."""
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings), dtype=torch.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith(("dt_bias", "dt_proj.bias")):
                value.uniform_(-2.0, -0.5)
            elif key.endswith("A_log"):
                value.uniform_(0.0, 1.4)
            elif value.ndim == 1:
                value.add_(0.1 * torch.randn_like(value))
            else:
                value.copy_(torch.randn_like(value) / value.shape[-1] ** 0.5)
    return model.train()


def both(family: str, folder: Path) -> tuple[Any, nn.Module]:
    """Return transformers' model, and mlx-lm's of what that one saved."""
    theirs = torch_model(family)
    theirs.save_pretrained(folder)
    # transformers leaves out of config.json what is its default, which is not always mlx-lm's, and has new words.
    content = {**theirs.config.to_dict(), **OLD_WORDS.get(family, {})}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    ours, _ = mlx_lm.utils.load_model(folder, lazy=False)
    return theirs, ours


def difference(got: mx.array, expected: Any) -> float:
    got, expected = np.array(got), np.array(expected)
    return float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-6))


def torch_loss(model: Any, arrays: Arrays) -> Any:
    """Return the summed cross-entropy of the trained tokens."""
    inputs, targets, mask = (
        torch.tensor(np.array(one)) for one in (arrays["inputs"], arrays["targets"], arrays["mask"])
    )
    logits = model(inputs.long(), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[mask], targets[mask].long(), reduction="sum")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient_equal_transformers(family, tmp_path):
    theirs, ours = both(family, tmp_path)
    arrays = token_arrays(batch(ROWS, WIDTH, seed=1))
    expected = theirs(torch.tensor(np.array(arrays["inputs"])).long(), use_cache=False).logits.detach()
    ours.train()
    with training_kernels(ours):
        logits = ours(arrays["inputs"])
        _, gradients = nn.value_and_grad(ours, lambda model: plain_loss(model, arrays)[0])(ours)
        mx.eval(logits, gradients)
    assert difference(logits, expected) < 1e-5
    torch_loss(theirs, arrays).backward()
    # The names and layouts that mlx-lm gives the weights are those of their gradients too.
    named = {name_here(ours, key): mx.array(value.grad.numpy()) for key, value in theirs.named_parameters()}
    wanted = ours.sanitize(named) if hasattr(ours, "sanitize") else named
    found = dict(tree_flatten(gradients))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert difference(found[name], value) < 1e-4, name
    assert difference(logits[:, ::-1], expected) > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_thirty_steps_of_lora_equal_transformers(family, tmp_path):
    theirs, ours = both(family, tmp_path)
    scale = 2.0
    ours.freeze()
    modules = {name_here(ours, name): module for name, module in theirs.named_modules()}
    # Granite's gate and up are one layer there, whose factors would not be ours.
    inject(ours, [path for path in select_targets(ours).paths if path in modules], rank=4, scale=scale, seed=0)
    factors = {
        name: torch.tensor(np.array(value), requires_grad=True) for name, value in adapter_parameters(ours).items()
    }
    adapt(modules, factors, scale)
    optimizer = torch.optim.AdamW(factors.values(), lr=RATE, weight_decay=0.0)
    settings = OptimizerSettings(learning_rate=RATE, lr_schedule="constant", warmup=0.0, weight_decay=0.0)
    step = Step(ours, build_optimizer(settings, STEPS), plain_loss, 0.0, StepOptions(exchanging(attend)))
    pairs = []
    for number in range(STEPS):
        one = batch(ROWS, WIDTH, seed=number % 3)
        result = step([one])
        loss = torch_loss(theirs, token_arrays(one)) / int(one.mask.sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pairs.append((result.loss_sum.item() / result.count.item(), loss.item()))
    got, expected = np.array(pairs).T
    assert np.abs(got / expected - 1).max() < 1e-4
    assert expected[-1] < 0.97 * expected[0]


def name_here(ours: nn.Module, name: str) -> str:
    """Return the name of transformers' parameter or module in a checkpoint: Nemotron-H's body goes by another there."""
    return name.replace("model.", "backbone.", 1) if "backbone" in ours and name.startswith("model.") else name


def adapt(modules: dict[str, Any], factors: dict[str, Any], scale: float) -> None:
    """Add s (A B)^T to the weights of the linear layers that the factors are named after.

    To the weights, since Mamba's layers read some of them without calling the layer.
    """
    for path in {name.rpartition(".")[0] for name in factors}:
        added = Added(factors[f"{path}.lora_a"], factors[f"{path}.lora_b"], scale)
        torch.nn.utils.parametrize.register_parametrization(modules[path], "weight", added)


class Added(torch.nn.Module):
    """W, (out, in), plus s (A B)^T."""

    def __init__(self, a: Any, b: Any, scale: float):
        super().__init__()
        self.factors = (a, b, scale)

    def forward(self, weight: Any) -> Any:
        a, b, scale = self.factors
        return weight + scale * (a @ b).T
