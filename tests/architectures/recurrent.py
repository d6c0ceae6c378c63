"""Models with a state: selective state spaces, gated delta rules, linear attention, short convolutions, hybrids."""

from __future__ import annotations

from architectures.experts import BAILING, QWEN_MOE
from architectures.parts import LATENT, config

DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
QWEN35_ROPE = {
    "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}  # fmt: skip
QWEN35_TEXT = config(
    "qwen3_5_text", DELTA, head_dim=16, full_attention_interval=2, rope_parameters=QWEN35_ROPE,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
QWEN35_MOE_TEXT = config(
    "qwen3_5_moe_text", DELTA, head_dim=16, full_attention_interval=2, rope_parameters=QWEN35_ROPE,
    layer_types=["linear_attention", "full_attention"], num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=32, shared_expert_intermediate_size=32,
)  # fmt: skip
KDA = {"num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4, "kda_layers": [1, 2], "full_attn_layers": [3]}
KIMI = {
    "num_hidden_layers": 3, "head_dim": 16, "num_key_value_heads": 4, "linear_attn_config": KDA,
    "num_experts": 4, "moe_intermediate_size": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
    "v_head_dim": 16, "num_experts_per_token": 2, "num_shared_experts": 1, "first_k_dense_replace": 1,
    "mla_use_nope": True, "routed_scaling_factor": 1.5, "num_expert_group": 1, "topk_group": 1,
}  # fmt: skip
KIMI_K3_TEXT = config(
    "kimi_linear", KIMI, hidden_act="situ", q_lora_rank=32, attn_res_block_size=2, mla_use_output_gate=True,
    linear_attn_config={**KDA, "gate_lower_bound": -5.0}, routed_expert_hidden_size=32, latent_moe_use_norm=True,
    activation_situ_beta=4.0, activation_situ_linear_beta=25.0,
)  # fmt: skip
LFM2 = config(
    "lfm2", norm_eps=1e-5, conv_bias=False, conv_L_cache=3, block_dim=64, block_ff_dim=96, block_multiple_of=32,
    block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"],
)  # fmt: skip
HYBRID_QWEN = {**DELTA, **QWEN_MOE, "mlp_only_layers": []}
BAILING_LATENT = {**LATENT, **BAILING}

RECURRENT = {
    "bailing_hybrid": config(
        "bailing_hybrid", BAILING_LATENT, layer_group_size=2, group_norm_size=1, head_dim=16,
        num_key_value_heads=4, moe_shared_expert_intermediate_size=32,
    ),
    "bailing_moe_linear": config(
        "bailing_moe_linear", BAILING, layer_group_size=2, group_norm_size=1, head_dim=16, num_key_value_heads=4,
    ),
    "bailing_moe_v3": config(
        "bailing_hybrid", BAILING_LATENT, architectures=["BailingMoeV3ForCausalLM"], layer_group_size=2, head_dim=16,
        moe_shared_expert_intermediate_size=32, short_conv_kernel_size=4, kda_lower_bound=-5.0,
    ),
    "falcon_h1": config(
        "falcon_h1", head_dim=16, mamba_d_ssm=64, mamba_d_head=16, mamba_n_heads=4, mamba_d_state=16, mamba_n_groups=2,
        mamba_d_conv=4, mamba_rms_norm=True, mamba_chunk_size=16, attention_out_multiplier=0.9,
        embedding_multiplier=2.0, key_multiplier=0.5, lm_head_multiplier=0.5, mlp_multipliers=[0.9, 0.6],
        ssm_in_multiplier=1.25, ssm_out_multiplier=0.5, ssm_multipliers=[0.7, 0.5, 0.6, 0.8, 0.9],
    ),
    "granitemoehybrid": config(
        "granitemoehybrid", attention_bias=False, embedding_multiplier=6.0, attention_multiplier=0.25,
        logits_scaling=4.0, residual_multiplier=0.5, layer_types=["mamba", "attention"], num_local_experts=4,
        num_experts_per_tok=2, shared_intermediate_size=64, intermediate_size=32, mamba_n_heads=8, mamba_d_head=16,
        mamba_proj_bias=False, mamba_d_state=16, mamba_d_conv=4, mamba_n_groups=1, mamba_conv_bias=True,
        position_embedding_type="nope",
    ),
    "jamba": config(
        "jamba", num_hidden_layers=3, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1,
        expert_layer_period=2, mamba_d_conv=4, mamba_d_state=16, mamba_expand=2, mamba_dt_rank=32, num_experts=4,
        num_experts_per_tok=2,
    ),
    "kimi_linear": config("kimi_linear", KIMI, model_max_length=512),
    "lfm2": LFM2,
    "lfm2_moe": config(
        "lfm2_moe", num_hidden_layers=3, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        norm_topk_prob=True, use_expert_bias=True, num_dense_layers=1, norm_eps=1e-5, conv_bias=False, conv_L_cache=3,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "mamba": {
        "model_type": "mamba", "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "state_size": 16,
        "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 32,
    },
    "mamba2": {
        "model_type": "mamba2", "num_heads": 8, "head_dim": 16, "vocab_size": 288, "hidden_size": 64,
        "intermediate_size": 128, "state_size": 16, "num_hidden_layers": 2, "layer_norm_epsilon": 1e-5,
        "conv_kernel": 4, "n_groups": 2, "use_bias": False, "use_conv_bias": True, "time_step_rank": 32,
        "time_step_limit": [0.001, 10.0],
    },
    "nemotron_h": config(
        "nemotron_h", head_dim=16, attention_bias=False, mamba_num_heads=8, mamba_head_dim=16, mamba_proj_bias=False,
        ssm_state_size=16, conv_kernel=4, n_groups=2, time_step_limit=[0.001, 10.0], mlp_bias=False,
        layer_norm_epsilon=1e-5, use_bias=False, use_conv_bias=True, hybrid_override_pattern="M*-E",
        moe_intermediate_size=32, moe_shared_expert_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
        n_group=1, topk_group=1, num_experts_per_tok=2, norm_topk_prob=True, routed_scaling_factor=1.5,
        num_hidden_layers=4,
    ),
    "olmo_hybrid": config(
        "olmo_hybrid", DELTA, linear_num_key_heads=4, linear_allow_neg_eigval=True, attention_bias=False, head_dim=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "plamo2": config(
        "plamo2", hidden_size_per_head=16, attention_window_size=8, full_attention_idx=[], mamba_d_state=16,
        mamba_d_conv=4, mamba_num_heads=4, mamba_step=2, mamba_chunk_size=16, mamba_enabled=True,
    ),
    "qwen3_next": config(
        "qwen3_next", HYBRID_QWEN, head_dim=16, shared_expert_intermediate_size=32, partial_rotary_factor=0.5,
        full_attention_interval=2,
    ),
    "recurrent_gemma": config(
        "recurrent_gemma", num_hidden_layers=3, attention_bias=False, conv1d_width=4, logits_soft_cap=30.0,
        num_key_value_heads=1, attention_window_size=8, block_types=["recurrent", "recurrent", "attention"],
    ),
    "rwkv7": {
        "model_type": "rwkv7", "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "norm_eps": 1e-5,
        "head_dim": 16, "num_hidden_layers": 2, "a_low_rank_dim": 32, "v_low_rank_dim": 32, "gate_low_rank_dim": 32,
        "decay_low_rank_dim": 32,
    },
}  # fmt: skip
