"""The tiny configuration of each of mlx-lm's families, and the parts that their configs share."""

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
LATENT = {"kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
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


DENSE = {
    "apertus": config("apertus", mlp_bias=False, attention_bias=False, post_norm=False, qk_norm=True),
    "bitnet": config("bitnet", hidden_act="relu2"),
    "cohere": config("cohere", layer_norm_eps=1e-5, logit_scale=0.25, use_qk_norm=True, num_key_value_heads=4),
    "ernie4_5": config("ernie4_5", head_dim=16, use_bias=True),
    "exaone": config(
        "exaone", num_layers=2, layer_norm_epsilon=1e-5, without=("num_hidden_layers", "rms_norm_eps")
    ),
    "gemma": config("gemma", head_dim=16, hidden_act="gelu_pytorch_tanh"),
    "glm": config("glm", head_dim=16, partial_rotary_factor=0.5, attention_bias=True),
    "glm4": config("glm4", head_dim=16, partial_rotary_factor=0.5, attention_bias=True),
    "gpt2": {
        "model_type": "gpt2", "n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 512,
        "layer_norm_epsilon": 1e-5, "vocab_size": 288,
    },
    "gpt_bigcode": {
        "model_type": "gpt_bigcode", "n_embd": 64, "n_head": 4, "n_layer": 2, "n_inner": 96, "n_positions": 512,
        "layer_norm_epsilon": 1e-5, "vocab_size": 288, "multi_query": True,
    },
    "gpt_neox": {
        "model_type": "gpt_neox", "max_position_embeddings": 512, "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "layer_norm_eps": 1e-5, "vocab_size": 288, "rotary_emb_base": 10000,
        "rotary_pct": 0.5, "use_parallel_residual": True,
    },
    "gptj": {
        "model_type": "gptj", "n_embd": 64, "vocab_size": 288, "layer_norm_epsilon": 1e-5, "n_positions": 512,
        "n_head": 4, "rotary_dim": 8, "n_layer": 2,
    },
    "granite": config(
        "granite", logits_scaling=4.0, attention_multiplier=0.25, embedding_multiplier=6.0, residual_multiplier=0.5,
        attention_bias=False, mlp_bias=False,
    ),
    "helium": config("helium", attention_bias=False, head_dim=16, mlp_bias=False),
    "hunyuan_v1_dense": config("hunyuan_v1_dense", head_dim=16, use_qk_norm=True, rope_scaling=None),
    "internlm2": config("internlm2", bias=False),
    "internlm3": config("internlm3", bias=False, qkv_bias=False),
    "iquestloopcoder": config("iquestloopcoder", head_dim=16, loop_num=2, loop_window_size=8),
    "lille-130m": {
        "model_type": "lille-130m", "block_size": 512, "layer_norm_eps": 1e-5, "n_embd": 64, "n_head": 4,
        "n_kv_heads": 2, "n_layer": 2, "rope_theta": 10000.0, "vocab_size": 288,
    },
    "llama": config("llama", head_dim=16, attention_bias=False, mlp_bias=False),
    "mimo": config("mimo", num_nextn_predict_layers=1),
    "minicpm": config("minicpm", dim_model_base=32, scale_depth=1.4, scale_emb=6, num_key_value_heads=4),
    "nanbeige": config("nanbeige", head_dim=16, num_loops=2),
    "nanochat": config("nanochat", num_key_value_heads=2),
    "nemotron": config("nemotron", hidden_act="relu2", norm_eps=1e-5, partial_rotary_factor=0.5),
    "olmo": {
        "model_type": "olmo", "d_model": 64, "n_layers": 2, "mlp_hidden_size": 192, "n_heads": 4, "vocab_size": 288,
        "embedding_size": 288, "weight_tying": False,
    },
    "olmo2": config("olmo2", head_dim=16),
    "openelm": {
        "model_type": "openelm", "head_dim": 16, "num_transformer_layers": 2, "model_dim": 64, "vocab_size": 288,
        "ffn_dim_divisor": 32, "num_query_heads": [4, 8], "num_kv_heads": [2, 4], "ffn_multipliers": [1.0, 2.0],
        "share_input_output_layers": True,
    },
    "phi": config("phi", layer_norm_eps=1e-5, partial_rotary_factor=0.5, num_key_value_heads=4),
    "phi3": config("phi3", original_max_position_embeddings=512, partial_rotary_factor=1.0),
    # mlx-lm writes into logits 100,256 to 100,351 of it, whatever the vocabulary: a smaller one lets it write past them.
    "phi3small": config(
        "phi3small", ff_intermediate_size=96, dense_attention_every_n_layers=2, gegelu_limit=20.0,
        layer_norm_epsilon=1e-5, mup_width_multiplier=4.0, mup_embedding_multiplier=4.0, rope_embedding_base=10000,
        blocksparse_block_size=32, blocksparse_num_local_blocks=1, blocksparse_vert_stride=2,
        vocab_size=100352,
        without=("intermediate_size", "rms_norm_eps"),
    ),
    "plamo": config("plamo", n_shared_head=2, without=("num_key_value_heads",)),
    "qwen": config(
        "qwen", kv_channels=16, layer_norm_epsilon=1e-6, no_bias=True, intermediate_size=192,
        without=("num_key_value_heads", "rms_norm_eps"),
    ),
    "qwen2": config("qwen2"),
    "qwen3": config("qwen3", head_dim=16),
    "seed_oss": config("seed_oss", head_dim=16, attention_bias=True, attention_out_bias=False),
    "smollm3": config("smollm3", no_rope_layers=[1, 0], no_rope_layer_interval=2),
    "stablelm": config(
        "stablelm", use_qkv_bias=True, partial_rotary_factor=0.5, layer_norm_eps=1e-5, qk_layernorm=True,
    ),
    "starcoder2": config("starcoder2", norm_epsilon=1e-5, use_bias=True),
    "talkie": config("talkie", head_dim=16, num_key_value_heads=4),
    "telechat3": config("telechat3", head_dim=16),
}  # fmt: skip


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


DEEPSEEK = {
    **LATENT, **GROUPED_EXPERTS, "num_key_value_heads": 4, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "moe_layer_freq": 1, "attention_bias": False,
}  # fmt: skip
YARN = {
    "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
DEEPSEEK_V3 = config("deepseek_v3", DEEPSEEK, rope_scaling=YARN)
# A top k under the rows' length, so that the indexer's choice matters.
INDEXED = {**DEEPSEEK, "index_head_dim": 32, "index_n_heads": 2, "index_topk": 8}
LONGCAT = config(
    "longcat_flash", LATENT, attention_method="MLA", zero_expert_type="identity", ffn_hidden_size=96, moe_topk=2,
    expert_ffn_hidden_size=32, n_routed_experts=4, zero_expert_num=2, num_layers=2, routed_scaling_factor=1.5,
    mla_scale_q_lora=True, mla_scale_kv_lora=True, attention_bias=False, router_bias=True,
    without=("num_hidden_layers", "intermediate_size", "num_key_value_heads"),
)  # fmt: skip
MISTRAL4 = config(
    "mistral4", LATENT, GROUPED_EXPERTS, n_group=1, num_key_value_heads=4,
    rope_parameters={
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
    },
)  # fmt: skip

LATENT_ATTENTION = {
    "deepseek_v2": config(
        "deepseek_v2", DEEPSEEK, topk_method="group_limited_greedy", scoring_func="softmax", rope_scaling=YARN,
    ),
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v32": config("deepseek_v32", INDEXED, rope_scaling=YARN),
    "deepseek_v41": config(
        "deepseek_v41", head_dim=32, q_lora_rank=32, qk_rope_head_dim=8, o_groups=2, o_lora_rank=32,
        moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, sliding_window=8, num_hidden_layers=4,
        compress_ratios=[0, 4, 4, 4], kv_source_layer_ids=[1], index_source_layer_ids=[1], index_n_heads=2,
        index_head_dim=32, index_topk=4, rms_norm_eps=1e-6, hc_mult=2, hc_sinkhorn_iters=4, rope_scaling=YARN,
    ),
    "glm4_moe_lite": config("glm4_moe_lite", DEEPSEEK, num_nextn_predict_layers=1, partial_rotary_factor=1.0),
    "glm_moe_dsa": config("glm_moe_dsa", INDEXED, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}),
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": {
        **LONGCAT, "model_type": "longcat_flash_ngram", "ngram_vocab_size_ratio": 3, "emb_neighbor_num": 3,
        "emb_split_num": 2, "hidden_size": 128,
    },
    "minicpm3": config("minicpm3", LATENT, dim_model_base=32, scale_depth=1.4, scale_emb=6, num_key_value_heads=4,
        rope_scaling={
            "type": "longrope", "long_factor": [1.0] * 4, "short_factor": [1.0] * 4,
            "original_max_position_embeddings": 128,
        },
    ),
    "mistral4": MISTRAL4,
    "youtu_llm": config("youtu_llm", LATENT, num_key_value_heads=4),
}  # fmt: skip


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


LLAMA4_TEXT = config(
    "llama4_text", num_hidden_layers=4, attention_bias=False, attention_chunk_size=8, head_dim=16,
    interleave_moe_layer_step=2, intermediate_size=32, intermediate_size_mlp=96, num_experts_per_tok=1,
    num_local_experts=4, rope_scaling=None, use_qk_norm=True,
)  # fmt: skip
MINIMAX_M3_TEXT = config(
    "minimax_m3_vl_text", head_dim=16, rotary_dim=8, dense_intermediate_size=96, intermediate_size=32,
    shared_intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, moe_layer_freq=[0, 1],
    sparse_attention_config={
        "sparse_num_index_heads": 2, "sparse_index_dim": 32, "sparse_block_size": 4, "sparse_topk_blocks": 2,
        "sparse_local_block": 1, "sparse_attention_freq": [0, 1],
    },
)  # fmt: skip
MUSE_TEXT = config(
    "muse_spark_text", head_dim=16, post_norm_eps=1e-5, rope_parameters={"rope_theta": 10000.0},
    layer_rope_theta=[10000.0, 0], layer_types=SLIDING_THEN_FULL, sliding_window=8, final_logit_softcapping=20.0,
    output_multiplier=0.5, num_local_experts=4, num_experts_per_tok=2, moe_hidden_size=32, moe_intermediate_size=32,
)  # fmt: skip
QWEN35_SIGNS = wrapper(
    "prism_hadamard_qwen35",
    {**QWEN35_TEXT, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32, "linear_key_head_dim": 32,
     "linear_value_head_dim": 32},
    schema_version=2, tensor_namespace="mlx-vlm-qwen3_5", gdn_activation_layout="grouped",
    quantization={"bits": 2, "group_size": 128, "mode": "affine"},
    modules=[
        {"path": f"model.layers.{layer}.mlp.{name}", "block": 0, "embedding": False, "dtype": "float16"}
        for layer in range(2) for name in ("gate_proj", "up_proj", "down_proj")
    ],
)  # fmt: skip

WRAPPERS = {
    "gemma3": wrapper("gemma3", GEMMA3_TEXT, vocab_size=288),
    "gemma3n": wrapper("gemma3n", GEMMA3N_TEXT),
    "gemma4": wrapper("gemma4", GEMMA4_TEXT, vocab_size=288),
    "kimi_k25": wrapper("kimi_k25", DEEPSEEK_V3),
    "kimi_k3": wrapper("kimi_k3", KIMI_K3_TEXT),
    "kimi_vl": wrapper("kimi_vl", DEEPSEEK_V3),
    "lfm2-vl": wrapper("lfm2-vl", LFM2),
    "llama4": wrapper("llama4", LLAMA4_TEXT),
    "minimax_m3_vl": wrapper("minimax_m3_vl", MINIMAX_M3_TEXT),
    "mistral3": wrapper("mistral3", WINDOWS["ministral3"]),
    "muse_spark": {**wrapper("muse_spark", MUSE_TEXT), "vision_config": None},
    "pixtral": wrapper("pixtral", config("mistral", head_dim=16)),
    "prism_hadamard_qwen35": QWEN35_SIGNS,
    "qwen2_vl": wrapper("qwen2_vl", config("qwen2")),
    "qwen3_5": wrapper("qwen3_5", QWEN35_TEXT),
    "qwen3_5_moe": wrapper("qwen3_5_moe", QWEN35_MOE_TEXT),
    "qwen3_vl": wrapper("qwen3_vl", config("qwen3", head_dim=16)),
    "qwen3_vl_moe": wrapper("qwen3_vl_moe", QWEN3_MOE),
}
