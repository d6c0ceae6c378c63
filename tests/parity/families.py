"""Tiny random models of current families, for both sides of transformers_steps.py, without torch and mlx."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 288
SHARED = {"vocab_size": VOCABULARY, "hidden_size": 32, "max_position_embeddings": 256, "pad_token_id": None}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
# An output of the first tokens is small if q and k are almost orthogonal; in heads with this few channels, a norm with the
# usual 1e-6 would make its rounding a thousand times larger on both sides.
WIDE_EPS = {"rms_norm_eps": 1e-4}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}
# mlx-lm wants the distance between layers of full attention, transformers their indices.
EVERY_SECOND = {"full_attention_interval": 2}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        config, model: names of transformers' classes.
        settings: of the config.
        for_mlx_lm: what its config.json needs in addition to what transformers writes.
        names: (part of our layer's path, transformers'), each replaced in turn.
        own_layout: whether mlx-lm reads the weights in the layout of transformers' model, not of its saved files.
        stored: (part of a tensor's name as transformers saves it, as mlx-lm reads it), each replaced in turn.
    """

    config: str
    model: str
    settings: dict[str, Any]
    for_mlx_lm: dict[str, Any] = field(default_factory=dict)
    names: tuple[tuple[str, str], ...] = ()
    own_layout: bool = False
    stored: tuple[tuple[str, str], ...] = ()

    def name_there(self, path: str) -> str:
        """Return transformers' path of our layer."""
        for ours, theirs in self.names:
            path = path.replace(ours, theirs)
        return path


WRAPPED = (("language_model.", ""),)
FAMILIES = {
    "qwen3_5": Family(
        "Qwen3_5TextConfig",
        "Qwen3_5ForCausalLM",
        {**SHARED, **ATTENTION, **DELTA, **WIDE_EPS, "intermediate_size": 48},
        {"model_type": "qwen3_5", **EVERY_SECOND},
        WRAPPED,
    ),
    "qwen3_5_moe": Family(
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeForCausalLM",
        {**SHARED, **ATTENTION, **DELTA, **WIDE_EPS, **EXPERTS},
        {"model_type": "qwen3_5_moe", **EVERY_SECOND},
        WRAPPED,
        own_layout=True,
    ),
    "qwen3_next": Family(
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {**SHARED, **ATTENTION, **DELTA, **WIDE_EPS, **EXPERTS, "intermediate_size": 48},
        {**EVERY_SECOND, "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mlp_only_layers": []},
    ),
    "olmo_hybrid": Family(
        "OlmoHybridConfig",
        "OlmoHybridForCausalLM",
        {**SHARED, **DELTA, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
        own_layout=True,
    ),
    "kimi_linear": Family(
        "KimiLinearConfig",
        "KimiLinearForCausalLM",
        {
            **SHARED,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse"],
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 48,
            "moe_intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
        },
        {
            "head_dim": 8,
            "rope_theta": 10000.0,
            "model_max_length": 256,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 2.446,
            "mla_use_nope": True,
            "linear_attn_config": {
                "num_heads": 4,
                "head_dim": 16,
                "short_conv_kernel_size": 4,
                "kda_layers": [1, 3],
                "full_attn_layers": [2],
            },
        },
        (
            ("self_attn.f_a_proj", "self_attn.forget_gate.f_a_proj"),
            ("self_attn.f_b_proj", "self_attn.forget_gate.f_b_proj"),
        ),
        stored=(("layers.0.block_sparse_moe", "layers.0.mlp"),),
    ),
    "gemma4": Family(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {
            **SHARED,
            **ATTENTION,
            "num_hidden_layers": 4,
            "intermediate_size": 48,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 16,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
            "num_kv_shared_layers": 2,
            "final_logit_softcapping": 30.0,
            "pad_token_id": 0,
        },
        {"global_head_dim": 16},
    ),
    "gpt_oss": Family(
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **SHARED,
            **ATTENTION,
            "num_hidden_layers": 2,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        {"rope_theta": 10000.0},
        own_layout=True,
    ),
}
