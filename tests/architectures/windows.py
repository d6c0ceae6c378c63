"""Dense models whose layers differ: windows, layers without rotation, shared keys, short convolutions as keys' filter."""

from __future__ import annotations

from architectures.parts import SLIDING_THEN_FULL, config

GEMMA4_ROPE = {
    "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
    "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
}
TWO_ROPES = {
    "full_attention": {"rope_type": "default", "rope_theta": 100000.0, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
}
GEMMA4_TEXT = config(
    "gemma4_text", num_hidden_layers=4, head_dim=16, global_head_dim=32, num_key_value_heads=1,
    vocab_size_per_layer_input=288, num_kv_shared_layers=2, hidden_size_per_layer_input=32, sliding_window=8,
    sliding_window_pattern=2, layer_types=SLIDING_THEN_FULL * 2, final_logit_softcapping=30.0,
    rope_parameters=GEMMA4_ROPE, use_double_wide_mlp=True, attention_k_eq_v=False, enable_moe_block=False,
)  # fmt: skip
GEMMA3_TEXT = config(
    "gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=8, sliding_window_pattern=2,
    rope_local_base_freq=10000.0, rope_theta=1000000.0, layer_types=SLIDING_THEN_FULL,
)  # fmt: skip
GEMMA3N_TEXT = config(
    "gemma3n_text", num_hidden_layers=4, head_dim=16, num_kv_shared_layers=2, vocab_size_per_layer_input=288,
    sliding_window=8, rope_local_base_freq=10000.0, rope_theta=1000000.0, final_logit_softcapping=30.0,
    layer_types=SLIDING_THEN_FULL * 2, activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0],
    hidden_size_per_layer_input=32, altup_num_inputs=4, altup_coef_clip=120.0, altup_correct_scale=True,
    altup_active_idx=0, laurel_rank=8, intermediate_size=[96] * 4,
)  # fmt: skip

WINDOWS = {
    "afm7": {
        "model_type": "afm7", "vocab_size": 288, "hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2,
        "num_heads": 4, "num_kv_heads": 2, "hidden_dim_scale_factor": 2.0, "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
    },
    "baichuan_m1": config(
        "baichuan_m1", sliding_window=8, sliding_window_layers=[1], conv_window=2, num_swa_attention_heads=2,
        num_swa_key_value_heads=1,
    ),
    "cohere2": config(
        "cohere2", head_dim=16, layer_norm_eps=1e-5, logit_scale=0.25, sliding_window=8, sliding_window_pattern=2,
        layer_types=SLIDING_THEN_FULL,
    ),
    "exaone4": config(
        "exaone4", head_dim=16, rope_scaling=None, sliding_window=8, sliding_window_pattern="LG",
        layer_types=SLIDING_THEN_FULL,
    ),
    "gear": config(
        "gear", num_hidden_layers=3, head_dim=16, layer_types=["sliding_attention", "full_attention", "conv"],
        sliding_window=8, conv_L_cache=3, rope_local_base_freq=10000.0,
    ),
    "gemma2": config(
        "gemma2", head_dim=16, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, query_pre_attn_scalar=16,
        sliding_window=8,
    ),
    "gemma3_text": GEMMA3_TEXT,
    "gemma4_text": GEMMA4_TEXT,
    "ministral3": config(
        "ministral3", head_dim=16, layer_types=SLIDING_THEN_FULL, sliding_window=8,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    ),
    "muse_glimmer": config(
        "muse_glimmer", head_dim=16, post_norm_eps=1e-8, sliding_window=8, qk_scale_factor=2.0,
        layer_types=SLIDING_THEN_FULL, layer_rope_theta=[10000.0, 0.0], final_logit_softcapping=20.0,
        output_multiplier=0.5,
    ),
    "nemotron-nas": config(
        "nemotron-nas", num_hidden_layers=3,
        block_configs=[
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.5}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
        ],
    ),
    "olmo3": config("olmo3", head_dim=16, sliding_window=8, layer_types=SLIDING_THEN_FULL),
    "plamo3": config(
        "plamo3", head_dim=16, window_size=8, sliding_window=8, sliding_window_pattern=2, rope_local_theta=10000,
    ),
    "spark2_5": config(
        "spark2_5", head_dim=16, sliding_window=8, layer_types=SLIDING_THEN_FULL, rope_parameters=TWO_ROPES,
    ),
}  # fmt: skip
