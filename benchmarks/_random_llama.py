"""Write a llama of random weights, for timings where the published small models have head counts that ranks do not divide."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import llama

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")


def write_random_llama(folder: Path, like: Path, shape: str, bits: int | None) -> Path:
    """Write a model folder.

    Args:
        folder: to write; is created.
        like: a model's folder, whose tokenizer and vocabulary it gets.
        shape: blocks, width and heads, as in 12x512x8; a head in two is a key-value head, and the MLP is three times as wide.
        bits: of its quantized weights; None: float32.

    Returns:
        The folder.
    """
    blocks, width, heads = map(int, shape.split("x"))
    config = json.loads((like / "config.json").read_text(encoding="utf-8"))
    made = {
        "model_type": "llama",
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": 3 * width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": config["vocab_size"],
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
        "eos_token_id": config.get("eos_token_id"),
    }
    mx.random.seed(0)
    model = llama.Model(llama.ModelArgs.from_dict(made))
    if bits is not None:
        nn.quantize(model, 32, bits)
        made["quantization"] = {"group_size": 32, "bits": bits, "mode": "affine"}
    shutil.copytree(like, folder, ignore=shutil.ignore_patterns(*WEIGHTS))
    (folder / "config.json").write_text(json.dumps(made, indent=1), encoding="utf-8")
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )
    return folder
