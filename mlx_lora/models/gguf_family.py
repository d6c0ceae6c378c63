"""The row type of the table of GGUF architectures: a family's tensors and settings, in both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_lora.models.gguf_keys import Settings
from mlx_lora.models.gguf_mapping import TensorMapping

Block = dict[str, TensorMapping]
Written = tuple[dict[str, Any], dict[str, np.ndarray]]

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ATTENTION = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
}
MLP = {
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
POST_NORM = {"ffn_norm.weight": "post_attention_layernorm.weight"}
HEAD_NORMS = {
    "attn_q_norm.weight": "self_attn.q_norm.weight",
    "attn_k_norm.weight": "self_attn.k_norm.weight",
}
QKV_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
ATTENTION_BIASES = {**QKV_BIASES, "attn_output.bias": "self_attn.o_proj.bias"}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        model_type: mlx-lm's.
        model_class: transformers' class, which tells llama.cpp's converter and others what the folder holds.
        block: (config, layer) -> {GGUF name without `blk.N.`: mapping to parameters within the block}.
        fields: (settings, config so far) -> config fields that add to the shared ones.
        settings: (model's arguments, problems) -> GGUF settings that add to or replace the shared ones, and tensors
            that hold settings.
        top: config -> {GGUF name: mlx-lm's parameter} outside of blocks.
        prefix: of all of mlx-lm's names.
        norm_offset: what the file adds to norm weights.
        absorbed: tensors that `fields` turns into config fields.
        spare: (config, tensor) -> whether a file may have a tensor that mlx-lm's model does not use.
        also: further model types with the same files.
    """

    model_type: str
    model_class: str
    block: Callable[[dict[str, Any], int], Block]
    fields: Callable[[Settings, dict[str, Any]], dict[str, Any]]
    settings: Callable[[dict[str, Any], list[str]], Written]
    top: Callable[[dict[str, Any]], dict[str, str]] = lambda config: TOP
    prefix: str = ""
    norm_offset: float = 0.0
    absorbed: tuple[str, ...] = ()
    spare: Callable[[dict[str, Any], str], bool] = lambda config, tensor: False
    also: tuple[str, ...] = ()


def plain(names: dict[str, str], **how: Any) -> Block:
    """Return a mapping for each {GGUF name: mlx-lm's name}, all with the same further attributes `how`."""
    return {tensor: TensorMapping(name, **how) for tensor, name in names.items()}
