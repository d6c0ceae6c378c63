"""GGUF's gemma4, lfm2, qwen35 and qwen35moe, whose blocks are of several kinds.

gemma4: blocks have sliding or full attention, with heads of two widths. One architecture name covers all sizes: the small
ones have per-layer embeddings and share the keys of their last layers, the large ones use keys as values in full
attention, and one has experts. Unlike Gemma 3's, norms have no offset. RoPE in full attention only rotates the first pairs
of each head: `rope_freqs.weight` holds 1 for those, and for the others a divisor so large that they do not rotate.

lfm2, qwen35, qwen35moe: attention blocks are mixed with convolutional or recurrent blocks. llama.cpp drops the axis of
length one from the kernels of LFM2's short convolutions and Qwen3.5's gated delta nets. In Qwen3.5 a key head serves
several value heads. mlx-lm groups value heads by key head; llama.cpp stores the first of every group, then the second of
every group, so rows, and columns of the output projection, are reordered. Its `ssm_a` is -exp(A_log). Its norms need no
offset: mlx-lm and llama.cpp's converter both add 1 to the original weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_lora.gguf.dense import GEMMA_NORMS, expert_names
from mlx_lora.gguf.mapping import (
    ATTENTION,
    HEAD_NORMS,
    MLP,
    ROPE_FACTORS,
    TOP,
    Block,
    GgufFamily,
    Order,
    Settings,
    TensorMapping,
    Written,
    experts,
    feed_forward,
    kind_of,
    plain,
    refuse_scaling,
    same_key_heads,
    whole_heads_rotate,
)

Config = dict[str, Any]
SLIDING, FULL, CONV, LINEAR = "sliding_attention", "full_attention", "conv", "linear_attention"  # in layer_types


# Gemma 4

_STILL = 1e30  # the divisor for pairs that do not rotate
_GEMMA4_PER_LAYER_TOP = {
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
_GEMMA4_PER_LAYER = {
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
}
_GEMMA4_EXPERTS = {
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
}
_GEMMA4_KEYS = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")


def _gemma4_block(config: Config, layer: int) -> Block:
    names = ATTENTION | HEAD_NORMS | MLP | GEMMA_NORMS | {"layer_output_scale.weight": "layer_scalar"}
    if _shares_keys(config, layer):
        names = {tensor: ours for tensor, ours in names.items() if tensor not in _GEMMA4_KEYS}
    elif config["attention_k_eq_v"] and config["layer_types"][layer] == FULL:
        names = {tensor: ours for tensor, ours in names.items() if tensor != "attn_v.weight"}
    if config["hidden_size_per_layer_input"]:
        names = names | _GEMMA4_PER_LAYER
    if not config["enable_moe_block"]:
        return plain(names)
    gate, up = (f"experts.switch_glu.{part}_proj.weight" for part in ("gate", "up"))
    return plain(names | _GEMMA4_EXPERTS) | {
        "ffn_gate_up_exps.weight": TensorMapping(gate, then=(up,)),
        "ffn_down_exps.weight": TensorMapping("experts.switch_glu.down_proj.weight", scaled=True),
        "ffn_gate_inp.weight": TensorMapping("router.proj.weight", exact=True),
    }


def _shares_keys(config: Config, layer: int) -> bool:
    return layer >= config["num_hidden_layers"] - config["num_kv_shared_layers"]


def _gemma4_spare(config: Config, tensor: str) -> bool:
    """Return whether a tensor is a key or value weight of a layer that shares keys: published files have these unused."""
    _, layer, name = tensor.split(".", 2) if tensor.startswith("blk.") else ("", "", "")
    return name in _GEMMA4_KEYS and layer.isdigit() and _shares_keys(config, int(layer))


def _gemma4_fields(settings: Settings, config: Config) -> Config:
    refuse_scaling(settings, "gemma4_text")
    layers = config["num_hidden_layers"]
    sliding = settings.per_layer("attention.sliding_window_pattern", layers)
    if sliding is None:
        settings.problems.append(f"{settings.architecture}.attention.sliding_window_pattern is not one value per layer")
    kinds = [SLIDING if is_sliding else FULL for is_sliding in sliding or [True] * layers]
    narrow, wide = settings.count("attention.key_length_swa"), config["head_dim"]
    settings.same("attention.value_length_swa", narrow)
    settings.same("rope.dimension_count_swa", narrow)
    settings.same("rope.dimension_count", wide)
    fields: Config = {
        "layer_types": kinds,
        "head_dim": narrow,
        "global_head_dim": wide,
        "num_kv_shared_layers": settings.count("attention.shared_kv_layers", 0, zero=True),
        "hidden_size_per_layer_input": settings.count("embedding_length_per_layer_input", 0, zero=True),
        "sliding_window": settings.count("attention.sliding_window"),
        "final_logit_softcapping": settings.number("final_logit_softcapping")
        if settings.has("final_logit_softcapping")
        else None,
        "rope_parameters": {
            FULL: {
                "rope_type": "proportional",
                "rope_theta": config["rope_theta"],
                "partial_rotary_factor": _rotating_share(settings, wide, FULL in kinds),
            },
            SLIDING: {"rope_type": "default", "rope_theta": settings.number("rope.freq_base_swa", 10000.0)},
        },
        "hidden_activation": "gelu_pytorch_tanh",
    }
    embedded = settings.file.tensors.get("per_layer_token_embd.weight")
    fields["vocab_size_per_layer_input"] = embedded.shape[0] if embedded and embedded.shape else config["vocab_size"]
    if fields["num_kv_shared_layers"] >= layers:
        settings.problems.append(f"{settings.architecture}.attention.shared_kv_layers covers all {layers} layers")
    return (
        fields
        | _gemma4_key_heads(settings, kinds)
        | _gemma4_widths(settings, fields, layers)
        | _gemma4_mixture(settings)
    )


def _rotating_share(settings: Settings, head_dim: int, needed: bool) -> float:
    """Return the part of each head that RoPE rotates in full attention."""
    factors = settings.values(ROPE_FACTORS)
    if factors is None:
        if needed:
            settings.problems.append(f"{ROPE_FACTORS} is missing")
        return 1.0
    turning = int((factors == 1).sum())
    still = factors[turning:]
    if len(factors) != head_dim // 2 or not (factors[:turning] == 1).all() or (still < 0.99 * _STILL).any():
        settings.problems.append(f"{ROPE_FACTORS} is not 1 for some pairs and {_STILL:g} for the others")
    return 2 * turning / head_dim


def _gemma4_key_heads(settings: Settings, kinds: list[str]) -> Config:
    """Return the fields for the numbers of key heads and for whether full attention uses keys as values."""
    counts = settings.per_layer("attention.head_count_kv", len(kinds))
    if counts is None:
        counts = [settings.count("attention.head_count_kv")] * len(kinds)
    by_kind = {
        kind: {count for count, own in zip(counts, kinds, strict=True) if own == kind} for kind in (SLIDING, FULL)
    }
    if any(len(found) > 1 for found in by_kind.values()):
        settings.problems.append(f"{settings.architecture}.attention.head_count_kv is {str(counts)[:40]}")
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    same = bool(full) and f"blk.{full[0]}.attn_v.weight" not in settings.file.tensors
    narrow, wide = (max(by_kind[kind], default=counts[0]) for kind in (SLIDING, FULL))
    if wide != narrow and not same:
        settings.problems.append(f"{settings.architecture}.attention.head_count_kv differs where values are not keys")
    return {"num_key_value_heads": narrow, "num_global_key_value_heads": wide, "attention_k_eq_v": same}


def _gemma4_widths(settings: Settings, fields: Config, layers: int) -> Config:
    """Return the fields for the feed-forward width, which may be double in layers that share keys."""
    widths = settings.per_layer("feed_forward_length", layers) or [settings.count("feed_forward_length")] * layers
    shared = fields["num_kv_shared_layers"]
    double = bool(shared) and widths[-1] == 2 * widths[0]
    if widths != [widths[0] * (2 if double and layer >= layers - shared else 1) for layer in range(layers)]:
        settings.problems.append(f"{settings.architecture}.feed_forward_length is {str(widths)[:40]}")
    return {"intermediate_size": widths[0], "use_double_wide_mlp": double}


def _gemma4_mixture(settings: Settings) -> Config:
    if not settings.has("expert_count"):
        return {"enable_moe_block": False}
    width = settings.count("expert_feed_forward_length")
    n_experts, used, _ = experts(settings, {"intermediate_size": width})
    return {
        "enable_moe_block": True,
        "num_experts": n_experts,
        "top_k_experts": used,
        "moe_intermediate_size": width,
    }


def _gemma4_settings(args: Config, problems: list[str]) -> Written:
    kinds, layers, shared = args["layer_types"], args["num_hidden_layers"], args["num_kv_shared_layers"]
    full, sliding = (args["rope_parameters"].get(kind, {}) for kind in (FULL, SLIDING))
    narrow, wide = args["head_dim"], args["global_head_dim"] or args["head_dim"]
    _check_gemma4_rope(args, full, sliding, problems)
    width, keys = args["intermediate_size"], args["num_key_value_heads"]
    double = args["use_double_wide_mlp"] and 0 < shared < layers
    own_keys = args["attention_k_eq_v"] and args["num_global_key_value_heads"] is not None
    settings: Config = {
        "feed_forward_length": [width * (2 if layer >= layers - shared else 1) for layer in range(layers)]
        if double
        else width,
        "attention.head_count_kv": [keys if kind == SLIDING else args["num_global_key_value_heads"] for kind in kinds]
        if own_keys
        else keys,
        "attention.key_length": wide,
        "attention.value_length": wide,
        "attention.key_length_swa": narrow,
        "attention.value_length_swa": narrow,
        "attention.shared_kv_layers": shared,
        "attention.sliding_window": args["sliding_window"],
        "attention.sliding_window_pattern": [kind == SLIDING for kind in kinds],
        "embedding_length_per_layer_input": args["hidden_size_per_layer_input"] or 0,
        "rope.dimension_count": wide,
        "rope.dimension_count_swa": narrow,
        "rope.freq_base": float(full.get("rope_theta", 10000.0)),
        "rope.freq_base_swa": float(sliding.get("rope_theta", 10000.0)),
    }
    if args["final_logit_softcapping"] is not None:
        settings["final_logit_softcapping"] = float(args["final_logit_softcapping"])
    if args["enable_moe_block"]:
        settings |= {
            "expert_count": args["num_experts"],
            "expert_used_count": args["top_k_experts"],
            "expert_feed_forward_length": args["moe_intermediate_size"],
        }
    turning = int(wide * full.get("partial_rotary_factor", 1.0)) // 2
    factors = np.where(np.arange(wide // 2) < turning, 1.0, _STILL)
    return settings, {ROPE_FACTORS: factors.astype(np.float32)}


def _check_gemma4_rope(args: Config, full: Config, sliding: Config, problems: list[str]) -> None:
    kinds = {"full": full.get("rope_type", "default"), "sliding": sliding.get("rope_type", "default")}
    if kinds["full"] not in ("proportional", "default") or full.get("factor", 1.0) != 1.0:
        problems.append(f"rope_parameters {kinds['full']} by {full.get('factor', 1.0):g} in full attention")
    if kinds["sliding"] != "default":
        problems.append(f"rope_parameters {kinds['sliding']} in sliding attention")
    if args["rope_traditional"]:
        problems.append("rope_traditional")
    if kinds["full"] == "default":  # mlx-lm then rotates whole heads
        full["partial_rotary_factor"] = 1.0


GEMMA4 = GgufFamily(
    "gemma4_text",
    "Gemma4ForCausalLM",
    _gemma4_block,
    _gemma4_fields,
    _gemma4_settings,
    top=lambda config: TOP | (_GEMMA4_PER_LAYER_TOP if config["hidden_size_per_layer_input"] else {}),
    absorbed=(ROPE_FACTORS,),
    spare=_gemma4_spare,
    also=("gemma4", "gemma4_unified"),
)


# LFM2

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


LFM2 = GgufFamily(
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


# Qwen3.5

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
    mixer = plain(ATTENTION | HEAD_NORMS) if full else _qwen35_delta_net(config)
    return plain(norms) | mixer | (_qwen35_mixture() if config["num_experts"] else plain(MLP))


def _qwen35_mixture() -> Block:
    return {
        **plain(expert_names("mlp.switch_mlp") | _SHARED_EXPERT),
        "ffn_gate_inp.weight": TensorMapping("mlp.gate.weight", exact=True),
        "ffn_gate_inp_shexp.weight": TensorMapping("mlp.shared_expert_gate.weight", axis=0, exact=True),  # ours (1, D)
    }


def _qwen35_delta_net(config: Config) -> Block:
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
    return fields | _qwen35_delta_fields(settings) | {"attention_bias": False}


def _qwen35_delta_fields(settings: Settings) -> Config:
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


QWEN35 = GgufFamily(
    "qwen3_5",
    "Qwen3_5ForCausalLM",
    _qwen35_block,
    _qwen35_dense_fields,
    _qwen35_settings,
    prefix="language_model.",
)
QWEN35_MOE = GgufFamily(
    "qwen3_5_moe",
    "Qwen3_5MoeForCausalLM",
    _qwen35_block,
    _qwen35_moe_fields,
    _qwen35_settings,
    prefix="language_model.",
)
