"""Models published with a `text_config` beside a tower that sees or hears: mlx-lm takes the text model of them."""

from __future__ import annotations

from architectures.experts import QWEN3_MOE
from architectures.latent import DEEPSEEK_V3
from architectures.parts import SLIDING_THEN_FULL, config, wrapper
from architectures.recurrent import KIMI_K3_TEXT, LFM2, QWEN35_MOE_TEXT, QWEN35_TEXT
from architectures.windows import GEMMA3_TEXT, GEMMA3N_TEXT, GEMMA4_TEXT, WINDOWS

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
