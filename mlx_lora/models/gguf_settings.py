"""A model's settings as GGUF metadata: the way back of `gguf_arch.model_config`.

What is written is what mlx-lm built the model from (its `args`, defaults filled in), so that llama.cpp runs the
same model whatever config.json left out.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_lora.errors import InputError
from mlx_lora.models.gguf_arch import LLAMA3_ROPE, ROPE_FACTORS, gemma3_attention_scalar, llama3_rope_factors

# YaRN's fields that llama.cpp has these values for; GGUF files do not carry others.
_YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0, "attention_factor": None}


def gguf_settings(model: nn.Module, architecture: str) -> tuple[dict[str, int | float | str], dict[str, np.ndarray]]:
    """Return what llama.cpp must know of a model beside its weights and tokenizer.

    Args:
        model: an mlx-lm model of an architecture of the table in gguf_arch.py.
        architecture: llama.cpp's name of it.

    Returns:
        {key without the architecture's prefix: value}, and tensors that stand for settings.

    Raises:
        InputError: naming every setting that llama.cpp's form of the architecture cannot express.
    """
    args = dataclasses.asdict(model.args)
    heads, hidden = args["num_attention_heads"], args["hidden_size"]
    head_dim = args.get("head_dim") or hidden // heads
    args["head_dim"] = head_dim
    settings: dict[str, int | float | str] = {
        "block_count": args["num_hidden_layers"],
        # llama.cpp wants one; mlx-lm's llama does without.
        "context_length": args["max_position_embeddings"] or 2048,
        "embedding_length": hidden,
        "feed_forward_length": args["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": args["num_key_value_heads"],
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(args["rms_norm_eps"]),
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(args["rope_theta"]),
        "vocab_size": args["vocab_size"],
    }
    problems: list[str] = []
    scaling, tensors = _rope_scaling(args, architecture, problems)
    settings |= scaling
    if architecture == "gemma3":
        settings |= _gemma3_settings(args, problems)
    else:
        settings |= _window(args, problems)
    if problems:
        raise InputError(
            f"--to gguf: {'; '.join(problems)}: llama.cpp's {architecture} has no such setting; use --to peft or hf"
        )
    return settings, tensors


def _rope_scaling(
    args: dict[str, Any], architecture: str, problems: list[str]
) -> tuple[dict[str, int | float | str], dict[str, np.ndarray]]:
    """Return RoPE's scaling as settings, Llama 3's as the tensor of its frequency divisors."""
    scaling = args.get("rope_scaling") or {}
    kind = scaling.get("type") or scaling.get("rope_type") or "default"
    if kind == "default":
        return {}, {}
    if kind == "llama3" and architecture == "llama":
        problems += [
            f"rope_scaling.{key} {scaling[key]}, not {value:g}"
            for key, value in LLAMA3_ROPE.items()
            if scaling.get(key, value) != value
        ]
        factors = llama3_rope_factors(args["head_dim"], args["rope_theta"], scaling["factor"])
        return {}, {ROPE_FACTORS: factors.astype(np.float32)}
    if kind not in ("linear", "yarn"):
        problems.append(f"rope_scaling {kind}")
        return {}, {}
    settings = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        # mlx-lm's own default where the config is silent.
        settings["rope.scaling.original_context_length"] = scaling.get("original_max_position_embeddings", 4096)
        problems += [
            f"rope_scaling.{key} {scaling[key]}"
            for key, value in _YARN_DEFAULTS.items()
            if scaling.get(key, value) != value
        ]
    return settings, {}


def _gemma3_settings(args: dict[str, Any], problems: list[str]) -> dict[str, int | float | str]:
    wanted = gemma3_attention_scalar(args)
    if args["query_pre_attn_scalar"] != wanted:
        problems.append(f"query_pre_attn_scalar {args['query_pre_attn_scalar']:g}, not {wanted:g}")
    return {
        "attention.sliding_window": args["sliding_window"],
        "attention.sliding_window_pattern": args["sliding_window_pattern"],
        "rope.freq_base_swa": float(args["rope_local_base_freq"]),
    }


def _window(args: dict[str, Any], problems: list[str]) -> dict[str, int | float | str]:
    """Return the window that mlx-lm's llama carries without using it; one it does use is a problem."""
    if "sliding_attention" in (args.get("layer_types") or ()):
        problems.append("sliding attention in some layers")
    if args.get("rope_traditional"):
        problems.append("rope_traditional")
    return {"attention.sliding_window": args["sliding_window"]} if args.get("sliding_window") else {}
