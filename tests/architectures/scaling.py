"""Wider and deeper configs of the tiny architectures, for tests in which a block must decide what a step needs."""

from __future__ import annotations

from typing import Any

from architectures.build import tiny_config

WIDTHS = {
    "hidden_size", "intermediate_size", "moe_intermediate_size", "intermediate_size_mlp", "dense_intermediate_size",
    "shared_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size",
    "share_expert_dim", "ff_intermediate_size", "ffn_hidden_size", "expert_ffn_hidden_size", "moe_hidden_size",
    "mlp_hidden_size", "n_embd", "n_inner", "d_model", "model_dim", "hidden_dim", "routed_expert_hidden_size",
    "block_dim", "block_ff_dim", "dim_model_base", "hidden_size_per_layer_input", "hidden_size_per_head",
    "head_dim", "global_head_dim", "swa_head_dim", "v_head_dim", "swa_v_head_dim", "kv_channels", "rotary_dim",
    "kv_lora_rank", "q_lora_rank", "o_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "index_head_dim",
    "sparse_index_dim", "linear_key_head_dim", "linear_value_head_dim", "mamba_d_ssm", "mamba_d_head",
    "mamba_head_dim", "mamba_dt_rank", "time_step_rank", "ssm_state_size", "a_low_rank_dim", "v_low_rank_dim",
    "gate_low_rank_dim", "decay_low_rank_dim", "laurel_rank",
}  # fmt: skip
# Mamba's first form has 16 states to a channel at every width.
STATES = {"state_size", "mamba_d_state"}
SIXTEEN_STATES = {"mamba", "jamba"}
COUNTS = {"num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers", "num_kv_shared_layers",
          "num_kv_reuse_layers", "moe_layer_end_index"}  # fmt: skip
PER_LAYER = {
    "layer_types", "mlp_layer_types", "block_configs", "num_query_heads", "num_kv_heads", "ffn_multipliers",
    "no_rope_layers", "hybrid_layer_pattern", "moe_layer_freq", "is_moe_layer", "layer_rope_theta",
    "num_attention_heads_per_layer", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared",
    "activation_sparsity_pattern", "hybrid_override_pattern", "sparse_attention_freq", "intermediate_size",
    "compress_ratios", "block_types",
}  # fmt: skip
NUMBERED_LAYERS = {
    "kda_layers", "full_attn_layers", "sliding_window_layers", "kv_source_layer_ids", "index_source_layer_ids",
}  # fmt: skip
# One factor to each pair of rotated features.
PER_FREQUENCY = {"long_factor", "short_factor"}


def scaled(name: str, width: int = 1, layers: int = 1, tied: bool = False) -> dict[str, Any]:
    """Return an architecture's config with its widths and its blocks multiplied.

    Args:
        name, tied: as `tiny_config` takes them.
        width: factor of every width: 4 makes 64 features 256, and heads of 16 heads of 64. Head counts stay.
        layers: factor of the number of blocks; the pattern of block kinds is repeated.

    Returns:
        A config for `write_architecture` and `tiny_architecture`.
    """
    config = tiny_config(name, tied)
    return _scaled(config, width, layers, _blocks(config), name not in SIXTEEN_STATES)


def _blocks(config: dict[str, Any]) -> int:
    text = config.get("text_config", config)
    keys = [key for key in COUNTS - {"num_kv_shared_layers", "num_kv_reuse_layers"} if key in text]
    return text[keys[0]]


def _scaled(config: dict[str, Any], width: int, layers: int, blocks: int, states: bool) -> dict[str, Any]:
    def value(key: str, old: Any) -> Any:
        if isinstance(old, dict):
            return _scaled(old, width, layers, blocks, states) if key != "vision_config" else old
        if key in NUMBERED_LAYERS or (key == "moe_layers_enum" and isinstance(old, list)):
            return [index + round_ * blocks for round_ in range(layers) for index in old]
        if key == "moe_layers_enum":
            return ",".join(str(int(index) + n * blocks) for n in range(layers) for index in old.split(","))
        if key in PER_FREQUENCY:
            return old * width
        if key in WIDTHS and isinstance(old, list):
            return [size * width for size in old] * layers
        if key in PER_LAYER and isinstance(old, list | str):
            return old * layers
        if key in WIDTHS or (key in STATES and states):
            return old if old is None or isinstance(old, str) else old * width
        return old * layers if key in COUNTS else old

    return {key: value(key, old) for key, old in config.items()}
