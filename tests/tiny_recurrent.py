"""Two-layer models with recurrent layers and random weights, of every architecture whose recurrence we compute."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx.utils import tree_flatten

COMMON = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 288, "rope_theta": 1e4,
    "max_position_embeddings": 512, "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip

BARE = {"vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 2, "tie_word_embeddings": False}
MAMBA = {
    **BARE, "intermediate_size": 128, "state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True,
    "time_step_rank": 8,
}  # fmt: skip
NEMOTRON = {
    "mamba_num_heads": 8, "mamba_head_dim": 16, "mamba_proj_bias": False, "ssm_state_size": 16, "conv_kernel": 4,
    "n_groups": 2, "time_step_limit": [0.0, 100.0], "mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False,
    "use_conv_bias": True, "hybrid_override_pattern": "M*M-", "num_hidden_layers": 4, "n_groups_moe": 1,
}  # fmt: skip
BAILING = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "num_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "use_qkv_bias": False,
    "use_qk_norm": True, "use_bias": False, "norm_head": False, "norm_softmax": False, "rope_scaling": None,
    "max_window_layers": 2, "layer_group_size": 2, "group_norm_size": 2, "num_key_value_heads": 4,
    "partial_rotary_factor": 0.5, "moe_router_enable_expert_bias": False, "routed_scaling_factor": 1.0,
    "score_function": "sigmoid", "moe_router_enable_routed_scaling": False,
}  # fmt: skip
RECURRENT: dict[str, dict[str, Any]] = {
    "mamba": {**MAMBA, "model_type": "mamba"},
    "falcon_mamba": {**MAMBA, "model_type": "falcon_mamba"},
    "jamba": {
        **COMMON, "model_type": "jamba", "num_hidden_layers": 3, "attn_layer_offset": 1, "attn_layer_period": 2,
        "expert_layer_offset": 1, "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2,
        "mamba_dt_rank": 8, "num_experts": 1, "num_experts_per_tok": 1, "tie_word_embeddings": False,
    },
    "mamba2": {
        **BARE, "model_type": "mamba2", "num_heads": 8, "head_dim": 16, "state_size": 16, "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4, "n_groups": 2, "use_bias": False, "use_conv_bias": True, "time_step_rank": 8,
        "time_step_limit": [0.0, 100.0], "intermediate_size": 128,
    },
    "falcon_h1": {
        **COMMON, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_heads": 4,
        "mamba_d_conv": 4, "mamba_chunk_size": 16, "model_type": "falcon_h1", "mamba_n_groups": 2, "tie_word_embeddings": False,
    },
    "nemotron_h": {**COMMON, **NEMOTRON, "model_type": "nemotron_h", "tie_word_embeddings": False},
    "granitemoehybrid": {
        **COMMON, "model_type": "granitemoehybrid", "embedding_multiplier": 6.0, "attention_multiplier": 0.25,
        "logits_scaling": 4.0, "residual_multiplier": 0.5, "layer_types": ["mamba", "attention"],
        "num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 64, "mamba_n_heads": 8,
        "mamba_d_head": 16, "mamba_proj_bias": False, "mamba_d_state": 16, "mamba_d_conv": 4, "mamba_n_groups": 1,
        "mamba_conv_bias": True, "position_embedding_type": "nope", "tie_word_embeddings": False,
    },
    "plamo2": {
        **COMMON, "model_type": "plamo2", "mamba_d_state": 16, "mamba_num_heads": 4, "mamba_step": 2, "mamba_d_conv": 4,
        "mamba_dt_min": 0.001, "hidden_size_per_head": 16, "attention_window_size": 8, "full_attention_idx": [],
    },
    "bailing_moe_linear": {**COMMON, **BAILING, "model_type": "bailing_moe_linear", "tie_word_embeddings": False},
    "recurrent_gemma": {
        **COMMON, "model_type": "recurrent_gemma", "conv1d_width": 4, "logits_soft_cap": 30.0, "attention_window_size": 8,
        "num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        **COMMON, "model_type": "rwkv7", "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8,
        "decay_low_rank_dim": 8, "norm_eps": 1e-5, "tie_word_embeddings": False,
    },
}  # fmt: skip
# Softplus of these is a time step of about 0.1 to 0.5: a state that remembers, and forgets.
TIME_STEP_BIAS = (-2.0, -0.5)


def recurrent_model(kind: str, seed: int = 0, **changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    """Return a model of a kind in RECURRENT and its config.

    Args:
        kind: of RECURRENT.
        seed: of the weights.
        changes: to the config.
    """
    config = {**RECURRENT[kind], **changes}
    mx.random.seed(seed)
    model_class, args_class = mlx_lm.utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    if kind == "recurrent_gemma":  # mlx-lm's class leaves this out, and nothing can be frozen without it
        nn.Module.__init__(model)
    drawn = [(name, _spread(name, value)) for name, value in tree_flatten(model.parameters())]
    model.load_weights(drawn, strict=True)
    model.eval()
    mx.eval(model.parameters())
    return model, config


def _spread(name: str, value: mx.array) -> mx.array:
    """Return a weight's random value: what starts as one number everywhere would be a special case."""
    if name.endswith("A_log"):
        return mx.log(mx.random.uniform(1.0, 4.0, value.shape))
    if name.endswith(("dt_bias", "dt_proj.bias")):
        return mx.random.uniform(*TIME_STEP_BIAS, value.shape)
    if value.ndim == 1 or not value.any().item():
        return value + 0.1 * mx.random.normal(value.shape)
    return value
