"""Write a model's settings as GGUF metadata: the inverse of `gguf_arch.model_config`.

The settings are taken from the arguments that mlx-lm built the model from, including defaults, so that llama.cpp runs
the same model even if config.json leaves something out.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_lora.models.gguf_arch import ARCHITECTURES, text_arguments
from mlx_lora.system.errors import InputError


def gguf_settings(model: nn.Module, architecture: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings that llama.cpp needs beside a model's weights and tokenizer.

    Args:
        model: an mlx-lm model of an architecture in gguf_arch.py's table.
        architecture: llama.cpp's name for it.

    Returns:
        {key without the architecture's prefix: value, or a list of one per layer}, and tensors that hold settings.

    Raises:
        InputError: llama.cpp does not support a setting for the architecture; the message has all of them.
    """
    args = text_arguments(model)
    problems: list[str] = []
    own, tensors = ARCHITECTURES[architecture].settings(args, problems)
    if problems:
        raise InputError(
            f"--to gguf: {'; '.join(problems)}: llama.cpp's {architecture} does not support this; use --to peft or hf"
        )
    return _shared(args) | own, tensors


def _shared(args: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all architectures have; a family's own settings override them."""
    settings: dict[str, Any] = {
        "block_count": args["num_hidden_layers"],
        # llama.cpp requires a context length; mlx-lm's llama may have none.
        "context_length": args["max_position_embeddings"] if args.get("max_position_embeddings") else 2048,
        "embedding_length": args["hidden_size"],
        "attention.head_count": args["num_attention_heads"],
        "attention.head_count_kv": args["num_key_value_heads"],
        "attention.key_length": args["head_dim"],
        "attention.value_length": args["head_dim"],
        "rope.dimension_count": args["head_dim"],
        "vocab_size": args["vocab_size"],
    }
    if args.get("intermediate_size"):
        settings["feed_forward_length"] = args["intermediate_size"]
    if "rms_norm_eps" in args:
        settings["attention.layer_norm_rms_epsilon"] = float(args["rms_norm_eps"])
    if "rope_theta" in args:
        settings["rope.freq_base"] = float(args["rope_theta"])
    return settings
