"""Makes the tiny configuration of an architecture from the settings that its module of mlx-vlm or mlx-lm reads, with their defaults.

A setting whose name is in SMALL gets that value, one without a default one by its kind, and all others keep theirs. What a family
needs beside that is in the table of its package (architectures/vlm.py).
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from importlib import import_module
from typing import Any

LAYERS = 2


SMALL: dict[str, Any] = {
    # widths
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "prefix_dense_intermediate_size", "dense_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size", "share_expert_dim",
                     "kv_lora_rank", "q_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "linear_head_dim",
                     "linear_value_head_dim", "index_head_dim", "indexer_head_dim", "swa_head_dim", "swa_v_head_dim", "kv_channels"), 16),
    "mlp_hidden_size": 192, "qk_rope_head_dim": 8, "rope_dim": 8, "qk_head_dim": 16,
    # counts
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "swa_num_attention_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "n_kv_heads", "num_attention_groups", "linear_num_key_heads", "index_n_heads",
                     "swa_num_key_value_heads", "indexer_n_heads", "num_query_groups"), 2),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "n_group"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("index_topk", "linear_conv_kernel_dim", "conv_kernel"), 4),
    **dict.fromkeys(("vocab_size", "embedding_size", "org_vocab_size"), 288),
    **dict.fromkeys(("max_position_embeddings", "block_size", "max_seq_len", "max_sequence_length"), 512),
    **dict.fromkeys(("sliding_window", "sliding_window_size"), 8),
    # numbers, and settings that have no default
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), 1e-5),
    "rope_theta": 10000.0, "n_group": 2, "routed_scaling_factor": 1.5, "norm_topk_prob": True, "use_qk_norm": True,
    "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False, "conv_L_cache": 3,
}  # fmt: skip


def shrunk(kind: type, **changes: Any) -> dict[str, Any]:
    """Return the values of a class's settings that differ from their defaults in a tiny model.

    Args:
        kind: a dataclass of settings.
        **changes: values that differ from SMALL's; None leaves a setting at its default.
    """
    names = inspect.signature(kind).parameters
    values = {**{name: SMALL[name] for name in names if name in SMALL}, **changes}
    return {name: copy.deepcopy(value) for name, value in values.items() if value is not None}


def shrunk_package(
    name: str, text: dict[str, Any], whole: dict[str, Any], vision: dict[str, Any], flat: bool = False
) -> dict[str, Any]:
    """Return the tiny config.json of one of mlx-vlm's architectures.

    Args:
        name: of its package, which is its `model_type`.
        text: settings of its text part, or of the whole if it has none.
        whole, vision: settings of the whole, and of its tower.
        flat: the settings of the text part stand beside those of the whole.
    """
    made = import_module(f"mlx_vlm.models.{name}")
    fields = _fields(made.ModelConfig)
    if "text_config" not in fields or not hasattr(made, "TextConfig"):
        return {"model_type": name, **shrunk(made.ModelConfig, **text), **whole}
    own = {"model_type": _own_type(made.TextConfig, name), **shrunk(made.TextConfig, **text)}
    shared = {
        key: own[key] for key in ("hidden_size", "vocab_size", "tie_word_embeddings") if {key} <= {*fields} & {*own}
    }
    found = {**shared, **whole, **(own if flat else {"text_config": own}), "model_type": name}
    if "vision_config" in fields:
        needed = (
            {"model_type": name}
            if "model_type" in _fields(made.VisionConfig) and not _own_type(made.VisionConfig, "")
            else {}
        )
        found["vision_config"] = {**needed, **vision}
    return found


def _own_type(kind: type, other: str) -> str:
    """Return the `model_type` that a part's settings have by default."""
    return getattr(kind, "model_type", other)


def _fields(kind: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(kind)}
