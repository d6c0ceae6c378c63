"""Mixtures of experts with ordinary attention."""

from __future__ import annotations

from architectures.parts import GROUPED_EXPERTS, SLIDING_THEN_FULL, config
from architectures.windows import TWO_ROPES

QWEN_MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
    "mlp_only_layers": [0], "norm_topk_prob": True,
}  # fmt: skip
QWEN3_MOE = config("qwen3_moe", QWEN_MOE, head_dim=16)
BAILING = {
    "moe_intermediate_size": 32, "num_experts": 4, "num_shared_experts": 1, "norm_topk_prob": True,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "use_qk_norm": True, "n_group": 2, "topk_group": 1,
    "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "routed_scaling_factor": 1.5,
}  # fmt: skip

EXPERTS = {
    "Klear": config(
        "Klear", QWEN_MOE, attention_bias=False, n_shared_experts=1,
    ),
    "afmoe": config(
        "afmoe", head_dim=16, layer_types=SLIDING_THEN_FULL, moe_intermediate_size=32, num_experts=4,
        num_experts_per_tok=2, num_shared_experts=1, num_dense_layers=1, sliding_window=8,
    ),
    "bailing_moe": config("bailing_moe", BAILING),
    "dbrx": {
        "model_type": "dbrx", "vocab_size": 288, "d_model": 64, "n_layers": 2, "n_heads": 4,
        "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
    },
    "deepseek": config(
        "deepseek", moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        first_k_dense_replace=1, moe_layer_freq=1,
    ),
    "dots1": config("dots1", GROUPED_EXPERTS, head_dim=16, scoring_func="noaux_tc"),
    "ernie4_5_moe": config(
        "ernie4_5_moe", head_dim=16, use_bias=False, moe_num_experts=4, moe_layer_start_index=1, moe_layer_interval=1,
        moe_layer_end_index=1, moe_intermediate_size=32, moe_k=2, moe_num_shared_experts=1, moe_use_aux_free=True,
    ),
    "exaone_moe": config(
        "exaone_moe", GROUPED_EXPERTS, head_dim=16, num_experts=4, num_shared_experts=1, sliding_window=8,
        layer_types=SLIDING_THEN_FULL, is_moe_layer=[False, True],
    ),
    "glm4_moe": config(
        "glm4_moe", GROUPED_EXPERTS, head_dim=16, rope_scaling=None, use_qk_norm=True, attention_bias=True,
        partial_rotary_factor=0.5,
    ),
    "gpt_oss": config(
        "gpt_oss", num_local_experts=4, num_experts_per_tok=2, head_dim=16, sliding_window=8, intermediate_size=64,
        layer_types=SLIDING_THEN_FULL,
    ),
    "granitemoe": config(
        "granitemoe", logits_scaling=4.0, attention_multiplier=0.25, embedding_multiplier=6.0, residual_multiplier=0.5,
        attention_bias=False, num_local_experts=4, num_experts_per_tok=2, intermediate_size=32,
    ),
    "hunyuan": config(
        "hunyuan", attention_bias=False, moe_topk=2, num_experts=4, num_shared_expert=1, use_mixed_mlp_moe=True,
        use_qk_norm=True, use_cla=True, cla_share_factor=2, moe_intermediate_size=32,
        rope_scaling={"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    ),
    "laguna": config(
        "laguna", head_dim=16, sliding_window=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, moe_routed_scaling_factor=1.5, layer_types=SLIDING_THEN_FULL,
        mlp_layer_types=["dense", "sparse"], num_attention_heads_per_layer=[4, 4], rope_parameters=TWO_ROPES,
    ),
    "llama4_text": config(
        "llama4_text", head_dim=16, intermediate_size_mlp=96, no_rope_layers=[1, 0], use_qk_norm=True,
    ),
    "mellum": config(
        "mellum", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True,
        sliding_window=8, layer_types=SLIDING_THEN_FULL, rope_parameters=TWO_ROPES,
    ),
    "mimo_v2_flash": config(
        "mimo_v2_flash", GROUPED_EXPERTS, n_shared_experts=None, routed_scaling_factor=None,
        hybrid_layer_pattern=[0, 1], moe_layer_freq=[0, 1], add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False, sliding_window_size=8, topk_method="noaux_tc", scoring_func="sigmoid",
        layernorm_epsilon=1e-5, swa_rope_theta=1000.0, swa_num_attention_heads=4, swa_num_key_value_heads=2,
        head_dim=24, v_head_dim=16, swa_head_dim=24, swa_v_head_dim=16, partial_rotary_factor=0.5,
    ),
    "minimax": config(
        "minimax", num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32, rotary_dim=8, head_dim=16,
        intermediate_size=32, use_qk_norm=True,
    ),
    "mixtral": config("mixtral", num_local_experts=4, num_experts_per_tok=2, intermediate_size=32),
    "olmoe": config("olmoe", num_experts=4, num_experts_per_tok=2, intermediate_size=32, norm_topk_prob=True),
    "phimoe": config(
        "phimoe", num_local_experts=4, num_experts_per_tok=2, intermediate_size=32,
        original_max_position_embeddings=128,
        rope_scaling={
            "type": "longrope", "long_factor": [1.0] * 8, "short_factor": [1.0] * 8, "long_mscale": 1.2,
            "short_mscale": 1.1, "original_max_position_embeddings": 128,
        },
    ),
    "phixtral": {
        "model_type": "phi-msft", "num_vocab": 288, "model_dim": 64, "num_heads": 4, "num_layers": 2, "rotary_dim": 8,
        "num_experts_per_tok": 2, "num_local_experts": 4, "vocab_size": 288,
    },
    "qwen2_moe": config("qwen2_moe", QWEN_MOE, shared_expert_intermediate_size=64),
    "qwen3_moe": QWEN3_MOE,
    "solar_open": config(
        "solar_open", GROUPED_EXPERTS, head_dim=16, partial_rotary_factor=1.0, n_group=1,
    ),
    "step3p5": config(
        "step3p5", num_attention_groups=2, head_dim=16, sliding_window=8, layer_types=SLIDING_THEN_FULL,
        use_head_wise_attn_gate=True, moe_num_experts=4, moe_top_k=2, moe_intermediate_size=32, share_expert_dim=32,
        moe_layers_enum="1", partial_rotary_factors=[1.0, 0.5],
        attention_other_setting={"num_attention_heads": 8, "num_attention_groups": 4, "head_dim": 16},
        swiglu_limits=[0.0, 7.0], swiglu_limits_shared=[0.0, 7.0],
    ),
}  # fmt: skip
