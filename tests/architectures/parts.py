"""What the tiny configurations share: widths that 4-bit groups of 32 divide, and a vocabulary for the byte tokenizer."""

from __future__ import annotations

import copy

BASE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 288,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
GROUPED_EXPERTS = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]


def config(model_type: str, *shared: dict, without: tuple[str, ...] = (), **changes) -> dict:
    """Join the base, shared parts and changes into one config, later ones winning; `without` leaves keys out."""
    joined = {"model_type": model_type, **BASE}
    for part in (*shared, changes):
        joined.update(copy.deepcopy(part))
    return {key: value for key, value in joined.items() if key not in without}


def wrapper(model_type: str, text: dict, **changes) -> dict:
    """Nest a text model's config as models that also see are published: `text_config` beside `vision_config`."""
    return {"model_type": model_type, "text_config": text, "vision_config": {"hidden_size": 32}, **changes}
