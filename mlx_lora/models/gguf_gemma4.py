"""GGUF's gemma4, which has heads of two widths and may have shared keys, per-layer inputs and experts.

One architecture name covers all sizes: the small ones have per-layer embeddings and share the keys of their last layers,
the large ones use keys as values in full attention, and one has experts. Unlike Gemma 3's, norms have no offset.
RoPE in full attention only rotates the first pairs of each head: `rope_freqs.weight` holds 1 for those, and for the
others a divisor so large that they do not rotate.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_lora.models.gguf_dense import GEMMA_NORMS
from mlx_lora.models.gguf_family import ATTENTION, HEAD_NORMS, MLP, TOP, Block, Family, Written, plain
from mlx_lora.models.gguf_keys import Settings, experts
from mlx_lora.models.gguf_mapping import TensorMapping
from mlx_lora.models.gguf_scaling import ROPE_FACTORS, refuse_scaling

Config = dict[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"
_STILL = 1e30  # the divisor for pairs that do not rotate
_PER_LAYER_TOP = {
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
}
_PER_LAYER = {
    "inp_gate.weight": "per_layer_input_gate.weight",
    "proj.weight": "per_layer_projection.weight",
    "post_norm.weight": "post_per_layer_input_norm.weight",
}
_EXPERTS = {
    "ffn_gate_inp.scale": "router.scale",
    "ffn_down_exps.scale": "router.per_expert_scale",
    "pre_ffw_norm_2.weight": "pre_feedforward_layernorm_2.weight",
    "post_ffw_norm_1.weight": "post_feedforward_layernorm_1.weight",
    "post_ffw_norm_2.weight": "post_feedforward_layernorm_2.weight",
}
_KEYS = ("attn_k.weight", "attn_v.weight", "attn_k_norm.weight")


def _block(config: Config, layer: int) -> Block:
    names = ATTENTION | HEAD_NORMS | MLP | GEMMA_NORMS | {"layer_output_scale.weight": "layer_scalar"}
    if _shares_keys(config, layer):
        names = {tensor: ours for tensor, ours in names.items() if tensor not in _KEYS}
    elif config["attention_k_eq_v"] and config["layer_types"][layer] == FULL:
        names = {tensor: ours for tensor, ours in names.items() if tensor != "attn_v.weight"}
    if config["hidden_size_per_layer_input"]:
        names = names | _PER_LAYER
    if not config["enable_moe_block"]:
        return plain(names)
    gate, up = (f"experts.switch_glu.{part}_proj.weight" for part in ("gate", "up"))
    return plain(names | _EXPERTS) | {
        "ffn_gate_up_exps.weight": TensorMapping(gate, then=(up,)),
        "ffn_down_exps.weight": TensorMapping("experts.switch_glu.down_proj.weight", scaled=True),
        "ffn_gate_inp.weight": TensorMapping("router.proj.weight", exact=True),
    }


def _shares_keys(config: Config, layer: int) -> bool:
    return layer >= config["num_hidden_layers"] - config["num_kv_shared_layers"]


def _spare(config: Config, tensor: str) -> bool:
    """Return whether a tensor is a key or value weight of a layer that shares keys: published files have these unused."""
    _, layer, name = tensor.split(".", 2) if tensor.startswith("blk.") else ("", "", "")
    return name in _KEYS and layer.isdigit() and _shares_keys(config, int(layer))


def _fields(settings: Settings, config: Config) -> Config:
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
                "partial_rotary_factor": _turning_share(settings, wide, FULL in kinds),
            },
            SLIDING: {"rope_type": "default", "rope_theta": settings.number("rope.freq_base_swa", 10000.0)},
        },
        "hidden_activation": "gelu_pytorch_tanh",
    }
    embedded = settings.file.tensors.get("per_layer_token_embd.weight")
    fields["vocab_size_per_layer_input"] = embedded.shape[0] if embedded and embedded.shape else config["vocab_size"]
    if fields["num_kv_shared_layers"] >= layers:
        settings.problems.append(f"{settings.architecture}.attention.shared_kv_layers covers all {layers} layers")
    return fields | _key_heads(settings, kinds) | _widths(settings, fields, layers) | _mixture(settings)


def _turning_share(settings: Settings, head_dim: int, needed: bool) -> float:
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


def _key_heads(settings: Settings, kinds: list[str]) -> Config:
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


def _widths(settings: Settings, fields: Config, layers: int) -> Config:
    """Return the fields for the feed-forward width, which may be double in layers that share keys."""
    widths = settings.per_layer("feed_forward_length", layers) or [settings.count("feed_forward_length")] * layers
    shared = fields["num_kv_shared_layers"]
    double = bool(shared) and widths[-1] == 2 * widths[0]
    if widths != [widths[0] * (2 if double and layer >= layers - shared else 1) for layer in range(layers)]:
        settings.problems.append(f"{settings.architecture}.feed_forward_length is {str(widths)[:40]}")
    return {"intermediate_size": widths[0], "use_double_wide_mlp": double}


def _mixture(settings: Settings) -> Config:
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


def _settings(args: Config, problems: list[str]) -> Written:
    kinds, layers, shared = args["layer_types"], args["num_hidden_layers"], args["num_kv_shared_layers"]
    full, sliding = (args["rope_parameters"].get(kind, {}) for kind in (FULL, SLIDING))
    narrow, wide = args["head_dim"], args["global_head_dim"] or args["head_dim"]
    _check_rope(args, full, sliding, problems)
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


def _check_rope(args: Config, full: Config, sliding: Config, problems: list[str]) -> None:
    kinds = {"full": full.get("rope_type", "default"), "sliding": sliding.get("rope_type", "default")}
    if kinds["full"] not in ("proportional", "default") or full.get("factor", 1.0) != 1.0:
        problems.append(f"rope_parameters {kinds['full']} by {full.get('factor', 1.0):g} in full attention")
    if kinds["sliding"] != "default":
        problems.append(f"rope_parameters {kinds['sliding']} in sliding attention")
    if args["rope_traditional"]:
        problems.append("rope_traditional")
    if kinds["full"] == "default":  # mlx-lm then rotates whole heads
        full["partial_rotary_factor"] = 1.0


GEMMA4 = Family(
    "gemma4_text",
    "Gemma4ForCausalLM",
    _block,
    _fields,
    _settings,
    top=lambda config: TOP | (_PER_LAYER_TOP if config["hidden_size_per_layer_input"] else {}),
    absorbed=(ROPE_FACTORS,),
    spare=_spare,
    also=("gemma4", "gemma4_unified"),
)
