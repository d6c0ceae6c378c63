"""Tiny random models of the families that GGUF files are read and written of, with a real byte-level vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from mlx.utils import tree_flatten, tree_unflatten

from mlx_lora.models.convert import build_model

MERGES = (("a", "b"), ("Ġ", "t"), ("ab", "c"))
_SHARED = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 288,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN35 = {
    **_SHARED,
    "model_type": "qwen3_5",
    "head_dim": 32,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
    },
}  # fmt: skip
_GEMMA4 = {
    **_SHARED,
    "model_type": "gemma4_text",
    "tie_word_embeddings": True,
    "head_dim": 32,
    "global_head_dim": 64,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 288,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "use_double_wide_mlp": False,
    "final_logit_softcapping": 30.0,
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e5, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
_LONG, _SHORT = [1.0, 1.5, 2.25, 3.5, 5.0, 7.25], [1.0, 1.0, 1.25, 1.5, 1.75, 2.0]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3moe": {
        **_SHARED, **_EXPERTS, "model_type": "qwen3_moe", "head_dim": 32, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [],
    },
    "phi3": {**_SHARED, "model_type": "phi3", "original_max_position_embeddings": 512},
    "phi3 longrope": {
        **_SHARED, "model_type": "phi3", "original_max_position_embeddings": 64, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "long_factor": _LONG, "short_factor": _SHORT},
    },
    "gpt-oss": {
        **_SHARED, "model_type": "gpt_oss", "head_dim": 32, "num_local_experts": 6, "num_experts_per_tok": 2,
        "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 32.0,
            "beta_slow": 1.0, "truncate": False,
        },
    },
    "lfm2": {
        **_SHARED, "model_type": "lfm2", "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64,
        "block_ff_dim": 150, "block_multiple_of": 32, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True,
        "tie_word_embeddings": True, "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "qwen35": _QWEN35,
    "qwen35 one value head a key": {**_QWEN35, "linear_num_value_heads": 2, "tie_word_embeddings": True},
    "qwen35moe": {**_QWEN35, **_EXPERTS, "model_type": "qwen3_5_moe", "shared_expert_intermediate_size": 64},
    "gemma4": {
        **_GEMMA4, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3,
        "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 32, "use_double_wide_mlp": True,
    },
    "gemma4 values from keys": {**_GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4 experts": {
        **_GEMMA4, "enable_moe_block": True, "num_experts": 6, "top_k_experts": 2, "moe_intermediate_size": 32,
    },
}  # fmt: skip


def architecture(name: str) -> str:
    """Return llama.cpp's name of a case's architecture."""
    return name.split()[0]


def tiny_family(name: str, seed: int = 0, changes: dict[str, Any] | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a float32 model whose outputs keep to a few units, and its config.

    Every weight is random: norms of one, biases and sinks of zero would hide that they went astray.
    """
    config = json.loads(json.dumps(FAMILIES[name] | (changes or {})))
    model = build_model(json.loads(json.dumps(config)))
    mx.random.seed(seed)
    # As a head, embeddings of this size leave the likeliest token to what the blocks add to the last one.
    tied = config["tie_word_embeddings"]
    values = [
        (key, _random(key, value.shape, 0.06 if tied else 1.0)) for key, value in tree_flatten(model.parameters())
    ]
    last = ("model.norm.weight", "embedding_norm.weight")
    values = [(key, 6 * value if tied and key.endswith(last) else value) for key, value in values]
    model.update(tree_unflatten(values))
    model.eval()
    mx.eval(model.parameters())
    return model, config


def _random(name: str, shape: tuple[int, ...], embedding: float) -> mx.array:
    noise = mx.random.normal(shape)
    if "embed_tokens" in name:
        return embedding * noise
    if name.endswith(("conv1d.weight", "conv.conv.weight")):
        return 0.5 * noise
    if len(shape) == 1:
        around = 0.0 if name.endswith(("bias", "sinks", "A_log")) else 1.0
        return around + 0.2 * noise
    # A router's decisions must not hang on the last bits.
    return noise * ((6.0 if name.endswith(("router.proj.weight", "mlp.gate.weight")) else 1.2) / shape[-1] ** 0.5)


def write_family(name: str, folder: Path, model: nn.Module | None = None, more: dict[str, Any] | None = None) -> Path:
    """Write a case as a model folder in mlx-lm's layout, with a tokenizer that GGUF knows."""
    made, config = tiny_family(name)
    model = model or made
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(merges=MERGES)
    tokenizer.save_pretrained(folder)
    config |= {"eos_token_id": tokenizer.eos_token_id, **(more or {})}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})
    return folder


def write_folder_with_merges(path: Path, model=None, config=None) -> Path:
    """Write a Hugging Face folder whose tokenizer has merges: without any it is none that GGUF knows."""
    write_folder(path, model or tiny_model(), config)
    byte_tokenizer(merges=MERGES).save_pretrained(path)
    return path
