"""Multi-head latent attention (DeepSeek and its kin): keys and values through a narrow projection."""

from __future__ import annotations

from architectures.parts import GROUPED_EXPERTS, LATENT, config

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
