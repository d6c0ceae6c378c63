"""A tiny random model of each architecture, written as GGUF by llama.cpp's rules."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Kind
from hf_to_gguf import gguf_tensors, write_gguf
from mlx.utils import tree_map

from mlx_lora.gguf.mapping import llama3_rope_factors

SHARED = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 288,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: (GGUF architecture, config, settings in the GGUF beside the shared ones)
    "llama": ("llama", {"model_type": "llama"}, {"rope.dimension_count": 16}),
    "llama untied": ("llama", {"model_type": "llama", "tie_word_embeddings": False}, {}),
    "llama biased": ("llama", {"model_type": "llama", "attention_bias": True}, {}),
    "llama 3.2": (
        "llama",
        {
            "model_type": "llama",
            "rope_theta": 500000.0,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
        },
        {},
    ),
    "mistral": ("llama", {"model_type": "llama", "head_dim": 32, "tie_word_embeddings": False}, {}),
    "qwen2": ("qwen2", {"model_type": "qwen2", "rope_theta": 1e6}, {}),
    "qwen2 yarn": (
        "qwen2",
        {
            "model_type": "qwen2",
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64},
    ),
    "qwen3": ("qwen3", {"model_type": "qwen3", "head_dim": 32}, {}),
    "gemma3": (
        "gemma3",
        {
            "model_type": "gemma3_text",
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "rope_local_base_freq": 1000.0,
            "rope_theta": 1e6,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": 2,
            "rope.freq_base_swa": 1000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
    ),
}
IDS = mx.array([[3, 250, 17, 99, 42, 7, 7, 201, 5, 88, 31, 60, 2, 140]])


def tiny_model(config: dict[str, Any], seed: int = 0) -> nn.Module:
    """Build mlx-lm's model of a config with random weights, norms and biases included."""
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(config))
    if config["tie_word_embeddings"] and "lm_head" in model:
        model.sanitize({})
    mx.random.seed(seed)
    model.update(tree_map(lambda p: 0.2 * mx.random.normal(p.shape) + (p.ndim == 1), model.parameters()))
    return model


def write_case(name: str, path: Path, kind: Kind = Kind.F32) -> tuple[nn.Module, dict[str, Any]]:
    """Write one of CASES as a GGUF file; returns the model and its config."""
    architecture, changes, extra = CASES[name]
    config = {**SHARED, **changes}
    model = tiny_model(config)
    tensors = gguf_tensors(model, architecture, config)
    if name == "llama 3.2":
        tensors["rope_freqs.weight"] = llama3_rope_factors(16, 500000.0, 32.0).astype(np.float32)
    write_gguf(path, tensors, architecture, config, extra, kind)
    return model, config
