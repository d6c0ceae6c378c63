"""Write a tiny mlx-lm model as GGUF, the way llama.cpp's converter does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter
from mlx.utils import tree_flatten

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def permute(weights: np.ndarray, n_head: int) -> np.ndarray:
    """LlamaModel.permute of convert_hf_to_gguf.py, word for word but for torch."""
    return (
        weights.reshape(n_head, 2, weights.shape[0] // n_head // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def gguf_tensors(model: nn.Module, architecture: str, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return the model's parameters under GGUF's names, in its order and conventions."""
    names = NAMES | (GEMMA_NAMES if architecture == "gemma3" else {})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        layer, kind = name.rsplit(".", 1)
        value = np.array(array).astype(np.float32)
        block = ""
        if layer.startswith("model.layers."):
            _, _, number, layer = layer.split(".", 3)
            block = f"blk.{number}."
        if architecture == "gemma3" and "norm" in layer:
            value = value + 1
        if architecture == "llama" and names[layer] in heads:
            value = permute(value, heads[names[layer]])
        tensors[f"{block}{names[layer]}.{kind}"] = value
    return tensors


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: str,
    config: dict[str, Any],
    extra: dict[str, Any] | None = None,
    kind: Kind = Kind.F32,
) -> Path:
    """Write tensors, settings and a byte-level vocabulary; matrices are packed as `kind`."""
    writer = GGUFWriter(str(path), architecture)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    if "head_dim" in config:
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    for key, value in (extra or {}).items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture}.{key}" if not key.startswith(("split.", "tokenizer.")) else key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    n_unused = config["vocab_size"] - 258
    writer.add_token_list([*byte_letters(), "<|end|>", "ab", *(f"<unused{i}>" for i in range(n_unused))])
    writer.add_token_types([1] * 256 + [3, 1] + [3] * n_unused)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_bos_token_id(256)
    writer.add_add_bos_token(False)
    for name, value in tensors.items():
        if value.ndim == 2 and kind is not Kind.F32:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_letters() -> list[str]:
    """Return GPT-2's letter for each byte value."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [letters[byte] for byte in range(256)]
