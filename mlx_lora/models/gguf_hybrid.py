"""GGUF's lfm2, qwen35 and qwen35moe, which mix attention blocks with recurrent or convolutional blocks.

llama.cpp drops the axis of length one from the kernels of LFM2's short convolutions and Qwen3.5's gated delta nets. In
Qwen3.5 a key head serves several value heads. mlx-lm groups value heads by key head; llama.cpp stores the first of every
group, then the second of every group, so rows, and columns of the output projection, are reordered. Its `ssm_a` is
-exp(A_log). Its norms need no offset: mlx-lm and llama.cpp's converter both add 1 to the original weights.
"""

from __future__ import annotations

from typing import Any

from mlx_lora.models.gguf_experts import expert_names
from mlx_lora.models.gguf_family import ATTENTION, HEAD_NORMS, MLP, Block, Family, Written, plain
from mlx_lora.models.gguf_keys import Settings, experts, feed_forward, same_key_heads, whole_heads_rotate
from mlx_lora.models.gguf_mapping import Order, TensorMapping
from mlx_lora.models.gguf_scaling import kind_of, refuse_scaling

Config = dict[str, Any]
CONV, FULL, LINEAR = "conv", "full_attention", "linear_attention"

# --- LFM2

_LFM2_BLOCK = {
    "attn_norm.weight": "operator_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn_gate.weight": "feed_forward.w1.weight",
    "ffn_up.weight": "feed_forward.w3.weight",
    "ffn_down.weight": "feed_forward.w2.weight",
}
_LFM2_ATTENTION = {
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.out_proj.weight",
    "attn_q_norm.weight": "self_attn.q_layernorm.weight",
    "attn_k_norm.weight": "self_attn.k_layernorm.weight",
}
_LFM2_CONV = {
    "shortconv.in_proj.weight": "conv.in_proj.weight",
    "shortconv.out_proj.weight": "conv.out_proj.weight",
}


def _lfm2_block(config: Config, layer: int) -> Block:
    if layer in config["full_attn_idxs"]:
        return plain(_LFM2_BLOCK | _LFM2_ATTENTION)
    kernel = {"shortconv.conv.weight": TensorMapping("conv.conv.weight", axis=-1, exact=True)}  # ours (C, K, 1)
    return plain(_LFM2_BLOCK | _LFM2_CONV) | kernel


def _lfm2_fields(settings: Settings, config: Config) -> Config:
    refuse_scaling(settings, "lfm2")
    whole_heads_rotate(settings, config)
    layers = config["num_hidden_layers"]
    key_heads = settings.per_layer("attention.head_count_kv", layers) or [config["num_key_value_heads"]] * layers
    attention = [layer for layer, count in enumerate(key_heads) if count]
    if len(set(key_heads) - {0}) > 1 or not attention:
        settings.problems.append(f"{settings.architecture}.attention.head_count_kv is {str(key_heads)[:40]}")
        attention = attention or [0]
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        settings.problems.append(f"{settings.architecture} heads of {config['head_dim']} do not make up the width")
    if not config["tie_word_embeddings"]:
        settings.problems.append("output.weight: mlx-lm's lfm2 uses the embedding as its head")
    width = settings.count("feed_forward_length")
    return {
        "norm_eps": config["rms_norm_eps"],
        "conv_bias": False,
        "conv_L_cache": settings.count("shortconv.l_cache"),
        "block_dim": config["hidden_size"],
        # The file holds the final width, so that nothing is left to adjust.
        "block_ff_dim": width,
        "intermediate_size": width,
        "block_multiple_of": 1,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
        "full_attn_idxs": attention,
        "layer_types": [FULL if layer in attention else CONV for layer in range(layers)],
    }


def _lfm2_settings(args: Config, problems: list[str]) -> Written:
    if args["conv_bias"]:
        problems.append("conv_bias")
    if args["block_dim"] != args["hidden_size"]:
        problems.append(f"block_dim {args['block_dim']}, not hidden_size")
    attention, layers = args["full_attn_idxs"], args["num_hidden_layers"]
    return {
        "attention.layer_norm_rms_epsilon": float(args["norm_eps"]),
        "attention.head_count_kv": [args["num_key_value_heads"] if i in attention else 0 for i in range(layers)],
        "feed_forward_length": _lfm2_width(args),
        "shortconv.l_cache": args["conv_L_cache"],
    }, {}


def _lfm2_width(args: Config) -> int:
    """Return the width of LFM2's feed-forward layers, computed from the config's base width as mlx-lm does."""
    width = args["block_ff_dim"]
    if not args["block_auto_adjust_ff_dim"]:
        return width
    width = int(2 * width / 3)
    if args["block_ffn_dim_multiplier"] is not None:
        width = int(args["block_ffn_dim_multiplier"] * width)
    return -(-width // args["block_multiple_of"]) * args["block_multiple_of"]


# --- Qwen3.5

_DELTA = "linear_attn."
_SHARED_EXPERT = {
    f"ffn_{part}_shexp.weight": f"mlp.shared_expert.{part}_proj.weight" for part in ("gate", "up", "down")
}


def _qwen35_block(config: Config, layer: int) -> Block:
    norms = {
        "attn_norm.weight": "input_layernorm.weight",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
    }
    full = (layer + 1) % config["full_attention_interval"] == 0
    mixer = plain(ATTENTION | HEAD_NORMS) if full else _delta_net(config)
    return plain(norms) | mixer | (_mixture() if config["num_experts"] else plain(MLP))


def _mixture() -> Block:
    return {
        **plain(expert_names("mlp.switch_mlp") | _SHARED_EXPERT),
        "ffn_gate_inp.weight": TensorMapping("mlp.gate.weight", exact=True),
        "ffn_gate_inp_shexp.weight": TensorMapping("mlp.shared_expert_gate.weight", axis=0, exact=True),  # ours (1, D)
    }


def _delta_net(config: Config) -> Block:
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    width, per_key = config["linear_value_head_dim"], value_heads // key_heads
    start = 2 * key_heads * config["linear_key_head_dim"]  # queries and keys come first and are not reordered

    def order(inner: int, start: int = 0) -> Order | None:
        return Order(1, key_heads, per_key, inner, start) if per_key > 1 else None

    return {
        "attn_qkv.weight": TensorMapping(f"{_DELTA}in_proj_qkv.weight", rows=order(width, start)),
        "attn_gate.weight": TensorMapping(f"{_DELTA}in_proj_z.weight", rows=order(width)),
        "ssm_beta.weight": TensorMapping(f"{_DELTA}in_proj_b.weight", rows=order(1)),
        "ssm_alpha.weight": TensorMapping(f"{_DELTA}in_proj_a.weight", rows=order(1)),
        "ssm_conv1d.weight": TensorMapping(f"{_DELTA}conv1d.weight", rows=order(width, start), axis=-1, exact=True),
        "ssm_dt.bias": TensorMapping(f"{_DELTA}dt_bias", rows=order(1)),
        "ssm_a": TensorMapping(f"{_DELTA}A_log", rows=order(1), values="minus_exp"),
        "ssm_norm.weight": TensorMapping(f"{_DELTA}norm.weight"),
        "ssm_out.weight": TensorMapping(f"{_DELTA}out_proj.weight", columns=order(width)),
    }


def _qwen35_fields(settings: Settings, config: Config) -> Config:
    refuse_scaling(settings, "qwen3_5")
    same_key_heads(settings, config)
    layers = config["num_hidden_layers"]
    interval = settings.count("full_attention_interval", 4)
    kinds = [FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(layers)]
    stated = settings.per_layer("attention.recurrent_layers", layers)
    if stated and [bool(linear) for linear in stated] != [kind == LINEAR for kind in kinds]:
        settings.problems.append(f"{settings.architecture}.attention.recurrent_layers is not every {interval} but one")
    if layers < interval or interval < 2:
        settings.problems.append(f"{settings.architecture}: attention in every {interval} of {layers} layers")
    turned = settings.count("rope.dimension_count", config["head_dim"])
    sections = settings.per_layer("rope.dimension_sections", 3)
    if sections is None and settings.has("rope.dimension_sections"):
        settings.problems.append(f"{settings.architecture}.rope.dimension_sections is not a list of whole numbers")
    rope = {
        "rope_type": "default",
        "rope_theta": config["rope_theta"],
        "partial_rotary_factor": turned / config["head_dim"],
        "mrope_section": sections or [11, 11, 10],
        "mrope_interleaved": True,
    }
    fields = {"full_attention_interval": interval, "layer_types": kinds, "rope_parameters": rope}
    return fields | _delta_fields(settings) | {"attention_bias": False}


def _delta_fields(settings: Settings) -> Config:
    value_heads, inner = settings.count("ssm.time_step_rank"), settings.count("ssm.inner_size")
    key_heads, width = settings.count("ssm.group_count"), settings.count("ssm.state_size")
    if inner != value_heads * width or value_heads % key_heads:
        settings.problems.append(
            f"{settings.architecture}.ssm: {value_heads} value heads and {key_heads} key heads of {width}, "
            f"and {inner} values in all"
        )
        value_heads = key_heads
    return {
        "linear_num_value_heads": value_heads,
        "linear_num_key_heads": key_heads,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
        "linear_conv_kernel_dim": settings.count("ssm.conv_kernel"),
    }


def _qwen35_dense_fields(settings: Settings, config: Config) -> Config:
    return _qwen35_fields(settings, config) | feed_forward(settings) | {"num_experts": 0}


def _qwen35_moe_fields(settings: Settings, config: Config) -> Config:
    width = settings.count("expert_feed_forward_length")
    n_experts, used, _ = experts(settings, {"intermediate_size": width})
    return {
        **_qwen35_fields(settings, config),
        "num_experts": n_experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": settings.count("expert_shared_feed_forward_length", width),
        "norm_topk_prob": True,
    }


def _qwen35_settings(args: Config, problems: list[str]) -> Written:
    width, value_heads = args["linear_value_head_dim"], args["linear_num_value_heads"]
    if width != args["linear_key_head_dim"]:
        problems.append(f"linear_value_head_dim {width}, and keys of {args['linear_key_head_dim']}")
    if kind_of(args) not in ("default", "mrope"):
        problems.append(f"rope_scaling {kind_of(args)}")
    pairs = int(args["head_dim"] * args["partial_rotary_factor"]) // 2
    settings = {
        "rope.dimension_count": 2 * pairs,
        # llama.cpp requires sections; for text, all have the same positions, so any that cover every pair will do.
        "rope.dimension_sections": _sections((args["rope_parameters"] or {}).get("mrope_section"), pairs),
        "full_attention_interval": args["full_attention_interval"],
        "ssm.conv_kernel": args["linear_conv_kernel_dim"],
        "ssm.state_size": args["linear_key_head_dim"],
        "ssm.group_count": args["linear_num_key_heads"],
        "ssm.time_step_rank": value_heads,
        "ssm.inner_size": width * value_heads,
    }
    if args["num_experts"]:
        if not args["norm_topk_prob"]:
            problems.append("norm_topk_prob false")
        settings |= {
            "feed_forward_length": args["moe_intermediate_size"],
            "expert_count": args["num_experts"],
            "expert_used_count": args["num_experts_per_tok"],
            "expert_feed_forward_length": args["moe_intermediate_size"],
            "expert_shared_feed_forward_length": args["shared_expert_intermediate_size"],
        }
    return settings, {}


def _sections(given: list[int] | None, pairs: int) -> list[int]:
    """Return the number of RoPE pairs for time, height and width, and 0 for the fourth section."""
    if given and len(given) == 3 and sum(given) >= pairs:
        return [*given, 0]
    third = -(-pairs // 3)
    return [third, third, third, 0]


LFM2 = Family(
    "lfm2",
    "Lfm2ForCausalLM",
    _lfm2_block,
    _lfm2_fields,
    _lfm2_settings,
    top=lambda config: {
        "token_embd.weight": "model.embed_tokens.weight",
        "token_embd_norm.weight": "model.embedding_norm.weight",
    },
)
QWEN35 = Family(
    "qwen3_5",
    "Qwen3_5ForCausalLM",
    _qwen35_block,
    _qwen35_dense_fields,
    _qwen35_settings,
    prefix="language_model.",
)
QWEN35_MOE = Family(
    "qwen3_5_moe",
    "Qwen3_5MoeForCausalLM",
    _qwen35_block,
    _qwen35_moe_fields,
    _qwen35_settings,
    prefix="language_model.",
)
