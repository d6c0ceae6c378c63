"""Dense transformers: attention and a feed-forward layer in every block, all layers alike."""

from __future__ import annotations

from architectures.parts import config

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
