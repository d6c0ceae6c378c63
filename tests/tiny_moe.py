"""Two-layer mixtures of experts with random weights: GPT-OSS with mxfp4 experts, Qwen3-MoE, Mixtral, Qwen2-MoE."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from comparing import by_dtype
from conftest import TINY
from mlx.utils import tree_flatten
from mlx_lm.models import gpt_oss, mixtral, qwen2_moe, qwen3_moe
from mlx_lm.models.switch_layers import SwitchLinear

MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
SHARED = {**TINY, "tie_word_embeddings": False, "num_experts_per_tok": 2}
QWEN = {**SHARED, "num_experts": 4, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": []}
CONFIGS = {
    "gpt_oss": {
        **SHARED, "model_type": "gpt_oss", "num_local_experts": 4, "head_dim": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "qwen3_moe": {**QWEN, "model_type": "qwen3_moe", "head_dim": 16, "norm_topk_prob": True},
    "qwen2_moe": {**QWEN, "model_type": "qwen2_moe", "shared_expert_intermediate_size": 40},
    "mixtral": {**SHARED, "model_type": "mixtral", "num_local_experts": 4},
}  # fmt: skip
ARCHITECTURES = {"gpt_oss": gpt_oss, "qwen3_moe": qwen3_moe, "qwen2_moe": qwen2_moe, "mixtral": mixtral}
# 36 rows for the experts, and 72, which mlx-lm sorts.
FEW, MANY = mx.array([[3, 1, 4, 1, 5, 9, 2, 6] * 2 + [7, 8]]), mx.array([[3, 1, 4, 1, 5, 9, 2, 6] * 4 + [5, 3, 5, 8]])


def tiny_moe(kind: str, seed: int = 0) -> tuple[nn.Module, dict]:
    """Return a float model and its config; its biases and sinks are random too, not the zeros of a fresh one."""
    mx.random.seed(seed)
    made = ARCHITECTURES[kind]
    config = {**CONFIGS[kind], **({"intermediate_size": 64} if kind == "gpt_oss" else {})}
    model = made.Model(made.ModelArgs.from_dict(config))
    for name, value in tree_flatten(model.parameters()):
        if name.endswith(("norm.weight", "bias", "sinks")):
            model.load_weights([(name, value + 0.1 * mx.random.normal(value.shape))], strict=False)
    model.eval()
    return model, config


def with_quantized_experts(model: nn.Module, config: dict, layout: dict | None = None) -> tuple[nn.Module, dict]:
    """Quantize the experts alone, as GPT-OSS is published; returns the model and its config."""
    layout = layout or MXFP4
    nn.quantize(model, **layout, class_predicate=lambda path, module: isinstance(module, SwitchLinear))
    return model, {**config, "quantization": layout}


def logits(model) -> list[np.ndarray]:
    """Return the logits of few tokens and of many."""
    return [np.array(model(ids).astype(mx.float32)) for ids in (FEW, MANY)]


def close(found: list[np.ndarray], expected: list[np.ndarray], atol: float) -> bool:
    """Return whether both pairs of logits agree.

    In bfloat16 at three of five positions and to 6% of the largest logit: rounding sends a few tokens to other experts.
    """
    shares = []
    for a, b in zip(found, expected, strict=True):
        within = np.abs(a - b) <= max(atol, by_dtype(0.0, 0.06) * np.abs(b).max())
        shares.append(within.all(axis=-1).mean())
    return min(shares) >= by_dtype(1.0, 0.6)


def differ(found: list[np.ndarray], expected: list[np.ndarray], atol: float) -> bool:
    """Return whether some logit of each pair is further off than `atol`."""
    return all(np.abs(a - b).max() > atol for a, b in zip(found, expected, strict=True))
