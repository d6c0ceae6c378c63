"""Tiny random models of many of mlx-lm's architectures, as folders that mlx-lm itself wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from byte_tokenizer import byte_tokenizer
from mlx.utils import tree_flatten

# What most configurations share; mlx-lm reads of it what an architecture has.
COMMON = {
    "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "vocab_size": 288, "rope_theta": 1e4,
    "max_position_embeddings": 512, "attention_bias": False, "tie_word_embeddings": True,
}  # fmt: skip
MAMBA = {
    "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_n_groups": 1,
    "mamba_d_conv": 4, "mamba_chunk_size": 16,
}  # fmt: skip
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "full_attention_interval": 2, "num_experts": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
}  # fmt: skip
QWEN_ROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
KINDS: dict[str, dict[str, Any]] = {
    "afm7": {"hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4, "num_kv_heads": 2},
    "baichuan_m1": {
        "sliding_window": 8, "sliding_window_layers": [0], "conv_window": 2,
        "tie_word_embeddings": False,
    },
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8, "sliding_window_pattern": 2},
    "dbrx": {
        "d_model": 64, "n_layers": 2, "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000},
        "tie_word_embeddings": False,
    },
    "deepseek_v32": {
        "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4, "moe_intermediate_size": 32, "n_shared_experts": 1,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "ernie4_5": {"use_bias": False},
    "exaone": {"num_layers": 2, "layer_norm_epsilon": 1e-5},
    "exaone4": {
        "rope_scaling": None, "sliding_window": 8, "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "falcon_h1": {**MAMBA},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    "gemma3n": {"text_config": {
        **COMMON, "model_type": "gemma3n", "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 288, "sliding_window": 8, "rope_local_base_freq": 1e4,
        "final_logit_softcapping": 30.0, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5] * 4, "hidden_size_per_layer_input": 32, "altup_num_inputs": 4,
        "altup_coef_clip": 1.0, "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8,
    }},
    "gear": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
    "glm4": {"partial_rotary_factor": 0.5, "tie_word_embeddings": False},
    "gpt_bigcode": {
        "n_embd": 64, "n_layer": 2, "n_inner": 96, "n_head": 4, "n_positions": 512, "layer_norm_epsilon": 1e-5,
    },
    "gpt2": {
        "n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 200, "layer_norm_epsilon": 1e-5,
    },
    "llama": {},
    "olmo3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "phi3": {},
    "plamo2": {
        "mamba_d_state": 16, "mamba_num_heads": 4, "mamba_step": 2, "mamba_d_conv": 4, "mamba_dt_min": 0.001,
        "hidden_size_per_head": 16, "attention_window_size": 8, "full_attention_idx": [],
    },
    "plamo3": {"window_size": 8, "sliding_window_pattern": 2, "sliding_window": 8, "rope_local_theta": 1e4},
    "recurrent_gemma": {
        "conv1d_width": 4, "logits_soft_cap": 30.0, "attention_window_size": 8, "num_hidden_layers": 3,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "rwkv7": {
        "a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8, "norm_eps": 1e-5,
        "tie_word_embeddings": False,
    },
    "seed_oss": {},
    "stablelm": {
        "use_qkv_bias": False, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "use_parallel_residual": False,
    },
    "starcoder2": {"norm_epsilon": 1e-5},
    "talkie": {"tie_word_embeddings": False},
    "youtu_llm": {
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "head_dim": 24,
    },
}  # fmt: skip
# Multimodal wrappers, by the text part they hold.
WRAPPERS = {
    "gemma3": {**KINDS["gemma3_text"], "model_type": "gemma3_text"},
    "mistral3": {"model_type": "llama"},
    "qwen2_vl": {"model_type": "qwen2", **QWEN_ROPE},
    "qwen3_5": {**DELTA, "model_type": "qwen3_5_text"},
    "qwen3_vl": {"model_type": "qwen3", **QWEN_ROPE},
}
ALL = (*KINDS, *WRAPPERS)


def family_config(kind: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a tiny model.

    Args:
        kind: of ALL.
        changes: to the (text) model's settings.
    """
    if kind in KINDS:
        return {**COMMON, "model_type": kind, **KINDS[kind], **changes}
    text = {**COMMON, **WRAPPERS[kind], **changes}
    outer = {"vocab_size": text["vocab_size"]} if kind == "gemma3" else {}  # where mlx-lm has it from
    return {
        "model_type": kind,
        "text_config": text,
        "tie_word_embeddings": text["tie_word_embeddings"],
        **outer,
    }


def family_model(config: dict[str, Any]) -> nn.Module:
    """Build mlx-lm's model of a config with random weights, none of them zero as mlx-lm leaves some."""
    mx.random.seed(0)
    model_class, args_class = mlx_lm.utils._get_classes(config)
    model = model_class(args_class.from_dict(config))
    drawn = [
        (name, 0.2 * mx.random.normal(value.shape))
        for name, value in tree_flatten(model.parameters())
        if not value.any().item()
    ]
    model.load_weights(drawn, strict=False)
    model.eval()
    return model


def save_family(folder: Path, config: dict[str, Any], model: nn.Module | None = None) -> Path:
    """Write a folder as mlx-lm does, with the byte tokenizer; a tied model's weights hold no head."""
    folder.mkdir(parents=True, exist_ok=True)
    model = family_model(config) if model is None else model
    owner = model.get("language_model", model)
    if config["tie_word_embeddings"] and type(owner).__module__.endswith(("gemma3_text", "recurrent_gemma")):
        owner.pop("lm_head")  # what is published
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    mlx_lm.utils.save_model(folder, model)
    mlx_lm.utils.save_config({**config, "eos_token_id": tokenizer.eos_token_id}, folder / "config.json")
    return folder
