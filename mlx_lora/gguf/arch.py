"""The table of architectures that can be read from and written to GGUF, and lookups in both directions.

Each row is one of llama.cpp's architecture names; they are made of gguf/mapping.py's parts. Reading turns a file's
metadata into config.json's fields. Writing takes the settings from the arguments that mlx-lm built the model from,
including defaults, so that llama.cpp runs the same model even if config.json leaves something out.

In llama, qwen2, qwen3, gemma3, phi3, qwen3moe and gpt-oss, every block has attention.

llama.cpp's converter changes two things, which are undone here:
    llama   rows of q and k are permuted within each head, from [half, pair] to [pair, half] order
    gemma3  norm weights carry +1, where mlx-lm's norms multiply by (1 + w)
Phi-3's joined q, k, v and joined gate, up are joined in mlx-lm too.

The blocks of qwen3moe and gpt-oss have E experts instead of one feed-forward layer. All experts of a projection are one
tensor (E, out, in), in GGUF and in mlx-lm. GPT-OSS' are MXFP4 blocks, a format that MLX has too; see gguf/weights.py.

The blocks of gemma4, lfm2, qwen35 and qwen35moe are of several kinds.

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

import dataclasses
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_lora.gguf.mapping import (
    ATTENTION,
    ATTENTION_BIASES,
    HEAD_NORMS,
    LONG_FACTORS,
    MLP,
    POST_NORM,
    QKV_BIASES,
    ROPE_FACTORS,
    SHORT_FACTORS,
    TOP,
    Block,
    GgufFamily,
    Order,
    Settings,
    TensorMapping,
    Written,
    experts,
    kind_of,
    llama3_factors,
    plain,
    read_llama3_scaling,
    read_longrope,
    read_scaling,
    refuse_scaling,
    rope_order,
    same_key_heads,
    shared_fields,
    whole_heads_rotate,
    write_longrope,
    write_scaling,
)
from mlx_lora.gguf.reader import GGUFFile
from mlx_lora.models.folder import FUSED_KEY
from mlx_lora.utils.errors import InputError, Problems, first_of

Config = dict[str, Any]


def heads_make_up_width(settings: Settings, config: Config) -> None:
    """Note a problem if the heads together are wider or narrower than the model."""
    settings.problems.note_if(
        config["head_dim"] * config["num_attention_heads"] != config["hidden_size"],
        f"{settings.architecture} heads of {config['head_dim']} do not make up the width",
    )


def dense_fields(settings: Settings, config: Config) -> Config:
    """Return the fields that these architectures share: one width, one number of key heads, RoPE over whole heads."""
    settings.problems.note_if(
        settings.has("expert_count"),
        f"{settings.architecture}.expert_count: mixtures of experts of this architecture cannot be read from GGUF",
    )
    whole_heads_rotate(settings, config)
    same_key_heads(settings, config)
    return {"intermediate_size": settings.count("feed_forward_length"), **read_scaling(settings)}


# Llama


def _llama_block(config: Config, layer: int) -> Block:
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    names = ATTENTION | POST_NORM | MLP | (ATTENTION_BIASES if config.get("attention_bias") else {})
    orders = {kind: rope_order(count) for kind, count in heads.items()}
    return {tensor: TensorMapping(name, rows=orders.get(tensor.split(".")[0])) for tensor, name in names.items()}


def _llama_fields(settings: Settings, config: Config) -> Config:
    fields: Config = dense_fields(settings, config) | {"rope_traditional": False, "mlp_bias": False}
    fields["attention_bias"] = "blk.0.attn_q.bias" in settings.file.tensors
    if settings.has("attention.sliding_window"):
        fields["sliding_window"] = settings.count("attention.sliding_window")
    return fields | read_llama3_scaling(settings, config)


def _llama_settings(args: Config, problems: Problems) -> Written:
    settings = _window(args, problems)
    if kind_of(args) == "llama3":
        return settings, llama3_factors(args, problems)
    return settings | write_scaling(args, problems), {}


def _window(args: Config, problems: Problems) -> Config:
    """Return the sliding window that mlx-lm's llama keeps but ignores; note a problem if layers use one."""
    problems.note_if("sliding_attention" in (args.get("layer_types") or ()), "sliding attention in some layers")
    problems.note_if(args.get("rope_traditional"), "rope_traditional")
    return {"attention.sliding_window": args["sliding_window"]} if args.get("sliding_window") else {}


LLAMA = GgufFamily("llama", "LlamaForCausalLM", _llama_block, _llama_fields, _llama_settings, absorbed=(ROPE_FACTORS,),
               also=("mistral",))  # fmt: skip


# Qwen2 and Qwen3


def _qwen2_fields(settings: Settings, config: Config) -> Config:
    heads_make_up_width(settings, config)
    return dense_fields(settings, config) | {"rope_traditional": False}


def _qwen_settings(args: Config, problems: Problems) -> Written:
    return _window(args, problems) | write_scaling(args, problems), {}


QWEN2 = GgufFamily(
    "qwen2",
    "Qwen2ForCausalLM",
    lambda config, layer: plain(ATTENTION | POST_NORM | MLP | QKV_BIASES),
    _qwen2_fields,
    _qwen_settings,
)
QWEN3 = GgufFamily(
    "qwen3",
    "Qwen3ForCausalLM",
    lambda config, layer: plain(ATTENTION | POST_NORM | MLP | HEAD_NORMS),
    dense_fields,
    _qwen_settings,
)


# Qwen-VL's text parts: those of Qwen2 and Qwen3 under names of their own, by which llama.cpp turns a picture's tokens by
# time, row and column. gguf/mmproj.py has the sections of the rotation, which mlx-lm's arguments lack.


def _qwen_vl_settings(args: Config, problems: Problems) -> Written:
    # For text alone, the three positions of a token are equal.
    return _qwen_settings(args if kind_of(args) != "mrope" else {**args, "rope_scaling": None}, problems)


def _qwen_vl(text: GgufFamily, model_class: str, *model_types: str) -> GgufFamily:
    """Return the row for writing a text part; files of these architectures are not read."""
    names = (*model_types, *(f"{name}_text" for name in model_types))
    return dataclasses.replace(
        text, model_type=names[0], model_class=model_class, settings=_qwen_vl_settings, also=names[1:]
    )


QWEN2_VL = _qwen_vl(QWEN2, "Qwen2VLForConditionalGeneration", "qwen2_vl", "qwen2_5_vl")
QWEN3_VL = _qwen_vl(QWEN3, "Qwen3VLForConditionalGeneration", "qwen3_vl")


# Gemma 3

GEMMA_NORMS = {
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    "ffn_norm.weight": "pre_feedforward_layernorm.weight",
    "post_ffw_norm.weight": "post_feedforward_layernorm.weight",
}


def _gemma3_fields(settings: Settings, config: Config) -> Config:
    return {
        **dense_fields(settings, config),
        "query_pre_attn_scalar": gemma3_attention_scalar(config),
        "sliding_window": settings.count("attention.sliding_window"),
        "sliding_window_pattern": settings.count("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": settings.number("rope.freq_base_swa", 10000.0),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma3_settings(args: Config, problems: Problems) -> Written:
    wanted = gemma3_attention_scalar(args)
    problems.note_if(
        args["query_pre_attn_scalar"] != wanted,
        f"query_pre_attn_scalar {args['query_pre_attn_scalar']:g}, not {wanted:g}",
    )
    settings = {
        "attention.sliding_window": args["sliding_window"],
        "attention.sliding_window_pattern": args["sliding_window_pattern"],
        "rope.freq_base_swa": float(args["rope_local_base_freq"]),
    }
    return settings | write_scaling(args, problems), {}


def gemma3_attention_scalar(config: Config) -> float:
    """Return the number whose inverse square root scales attention, as llama.cpp derives it from the model's size."""
    if config["num_hidden_layers"] == 62:  # only the 27B model scales by hidden size per head
        return config["hidden_size"] / config["num_attention_heads"]
    return config["head_dim"]


GEMMA3 = GgufFamily(
    "gemma3_text",
    "Gemma3ForCausalLM",
    lambda config, layer: plain(ATTENTION | MLP | HEAD_NORMS | GEMMA_NORMS),
    _gemma3_fields,
    _gemma3_settings,
    norm_offset=1.0,
)


# Phi-3

_PHI3_BLOCK = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_qkv.weight": "self_attn.qkv_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    **POST_NORM,
    "ffn_up.weight": "mlp.gate_up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}


def _phi3_fields(settings: Settings, config: Config) -> Config:
    heads_make_up_width(settings, config)
    same_key_heads(settings, config)
    turned = settings.count("rope.dimension_count", config["head_dim"])
    window = settings.count("attention.sliding_window", 0, zero=True)
    return {
        **{"intermediate_size": settings.count("feed_forward_length")},
        **read_longrope(settings, config),
        "partial_rotary_factor": turned / config["head_dim"],
        "sliding_window": window or None,  # neither mlx-lm nor llama.cpp uses it
        "rope_traditional": False,
        # The default in transformers is an id of Phi-3's own vocabulary, which a smaller vocabulary lacks.
        "pad_token_id": settings.file.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _phi3_settings(args: Config, problems: Problems) -> Written:
    problems.note_if(args["rope_traditional"], "rope_traditional")
    settings, factors = write_longrope(args, problems)
    turned = int(args["head_dim"] * args["partial_rotary_factor"])
    return settings | {"rope.dimension_count": turned, "attention.sliding_window": 0}, factors


PHI3 = GgufFamily(
    "phi3",
    "Phi3ForCausalLM",
    lambda config, layer: plain(_PHI3_BLOCK),
    _phi3_fields,
    _phi3_settings,
    absorbed=(SHORT_FACTORS, LONG_FACTORS),
)


# Experts: Qwen3 MoE and GPT-OSS


def expert_names(module: str) -> dict[str, str]:
    """Return {GGUF name: mlx-lm's name} of the three projections of a block's experts."""
    return {f"ffn_{part}_exps.weight": f"{module}.{part}_proj.weight" for part in ("gate", "up", "down")}


def _qwen3_moe_fields(settings: Settings, config: Config) -> Config:
    refuse_scaling(settings, "qwen3_moe")
    whole_heads_rotate(settings, config)
    same_key_heads(settings, config)
    width = settings.count("feed_forward_length")
    n_experts, used = experts(settings)
    return {
        "intermediate_size": width,
        "num_experts": n_experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": settings.count("expert_feed_forward_length", width),
        # llama.cpp supports no other values for this architecture.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3_moe_settings(args: Config, problems: Problems) -> Written:
    problems.note_if(kind_of(args) != "default", f"rope_scaling {kind_of(args)}, which mlx-lm's qwen3_moe leaves out")
    problems.note_if(not args["norm_topk_prob"], "norm_topk_prob false")
    problems.note_if(args["decoder_sparse_step"] != 1 or args["mlp_only_layers"], "blocks without experts")
    return {
        "expert_count": args["num_experts"],
        "expert_used_count": args["num_experts_per_tok"],
        "expert_feed_forward_length": args["moe_intermediate_size"],
    }, {}


ROUTER = plain({"ffn_gate_inp.weight": "mlp.gate.weight"}, exact=True)
QWEN3_MOE = GgufFamily(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    lambda config, layer: plain(ATTENTION | POST_NORM | HEAD_NORMS | expert_names("mlp.switch_mlp")) | ROUTER,
    _qwen3_moe_fields,
    _qwen3_moe_settings,
)
_GPT_OSS_BLOCK = {
    **ATTENTION,
    **ATTENTION_BIASES,
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm.weight": "post_attention_layernorm.weight",
    **expert_names("mlp.experts"),
    "ffn_gate_inp.bias": "mlp.router.bias",
}
# Biases of experts have two axes, as weights do, but stay float.
_GPT_OSS_FLOATS = {
    "ffn_gate_inp.weight": "mlp.router.weight",
    **{f"ffn_{part}_exps.bias": f"mlp.experts.{part}_proj.bias" for part in ("gate", "up", "down")},
}
_ALTERNATING = ["sliding_attention", "full_attention"]


def _gpt_oss_fields(settings: Settings, config: Config) -> Config:
    whole_heads_rotate(settings, config)
    same_key_heads(settings, config)
    width = settings.count("expert_feed_forward_length")
    n_experts, used = experts(settings)
    scaling = read_scaling(settings)
    if scaling:
        scaling["rope_scaling"]["truncate"] = False  # as published; transformers heeds it
    layers = config["num_hidden_layers"]
    settings.problems.note_if(
        layers < len(_ALTERNATING),
        f"{settings.architecture}.block_count is {layers}, too few for two kinds of layers that alternate",
    )
    settings.problems.note_if(config["tie_word_embeddings"], "output.weight is missing")
    return {
        **scaling,
        "intermediate_size": width,
        "num_local_experts": n_experts,
        "num_experts_per_tok": used,
        "sliding_window": settings.count("attention.sliding_window"),
        "layer_types": [_ALTERNATING[layer % 2] for layer in range(layers)],
        "attention_bias": True,
    }


def _gpt_oss_settings(args: Config, problems: Problems) -> Written:
    layers = args["num_hidden_layers"]
    alternating = [_ALTERNATING[layer % 2] for layer in range(layers)]
    problems.note_if(
        (args["layer_types"] or alternating) != alternating,
        "layer_types that do not alternate, sliding attention first",
    )
    settings = {
        **write_scaling(args, problems),
        "expert_count": args["num_local_experts"],
        "expert_used_count": args["num_experts_per_tok"],
        "expert_feed_forward_length": args["intermediate_size"],
        "attention.sliding_window": args["sliding_window"],
    }
    return settings, {}


GPT_OSS = GgufFamily(
    "gpt_oss",
    "GptOssForCausalLM",
    lambda config, layer: plain(_GPT_OSS_BLOCK) | plain(_GPT_OSS_FLOATS, exact=True),
    _gpt_oss_fields,
    _gpt_oss_settings,
)


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
    settings.problems.note_if(
        sliding is None, f"{settings.architecture}.attention.sliding_window_pattern is not one value per layer"
    )
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
    settings.problems.note_if(
        fields["num_kv_shared_layers"] >= layers,
        f"{settings.architecture}.attention.shared_kv_layers covers all {layers} layers",
    )
    fields |= _gemma4_key_heads(settings, kinds)
    # The feed-forward width may be double in layers that share keys.
    widths = settings.per_layer("feed_forward_length", layers) or [settings.count("feed_forward_length")] * layers
    shared = fields["num_kv_shared_layers"]
    double = bool(shared) and widths[-1] == 2 * widths[0]
    settings.problems.note_if(
        widths != [widths[0] * (2 if double and layer >= layers - shared else 1) for layer in range(layers)],
        f"{settings.architecture}.feed_forward_length is {str(widths)[:40]}",
    )
    fields |= {"intermediate_size": widths[0], "use_double_wide_mlp": double, "enable_moe_block": False}
    if settings.has("expert_count"):
        n_experts, used = experts(settings)
        fields |= {"enable_moe_block": True, "num_experts": n_experts, "top_k_experts": used}
        fields["moe_intermediate_size"] = settings.count("expert_feed_forward_length")
    return fields


def _rotating_share(settings: Settings, head_dim: int, needed: bool) -> float:
    """Return the part of each head that RoPE rotates in full attention."""
    factors = settings.values(ROPE_FACTORS)
    if factors is None:
        settings.problems.note_if(needed, f"{ROPE_FACTORS} is missing")
        return 1.0
    turning = int((factors == 1).sum())
    still = factors[turning:]
    settings.problems.note_if(
        len(factors) != head_dim // 2 or not (factors[:turning] == 1).all() or (still < 0.99 * _STILL).any(),
        f"{ROPE_FACTORS} is not 1 for some pairs and {_STILL:g} for the others",
    )
    return 2 * turning / head_dim


def _gemma4_key_heads(settings: Settings, kinds: list[str]) -> Config:
    """Return the fields for the numbers of key heads and for whether full attention uses keys as values."""
    counts = settings.per_layer("attention.head_count_kv", len(kinds))
    if counts is None:
        counts = [settings.count("attention.head_count_kv")] * len(kinds)
    by_kind = {
        kind: {count for count, own in zip(counts, kinds, strict=True) if own == kind} for kind in (SLIDING, FULL)
    }
    settings.problems.note_if(
        any(len(found) > 1 for found in by_kind.values()),
        f"{settings.architecture}.attention.head_count_kv is {str(counts)[:40]}",
    )
    full = [layer for layer, kind in enumerate(kinds) if kind == FULL]
    same = bool(full) and f"blk.{full[0]}.attn_v.weight" not in settings.file.tensors
    narrow, wide = (max(by_kind[kind], default=counts[0]) for kind in (SLIDING, FULL))
    settings.problems.note_if(
        wide != narrow and not same,
        f"{settings.architecture}.attention.head_count_kv differs where values are not keys",
    )
    return {"num_key_value_heads": narrow, "num_global_key_value_heads": wide, "attention_k_eq_v": same}


def _gemma4_settings(args: Config, problems: Problems) -> Written:
    kinds, layers, shared = args["layer_types"], args["num_hidden_layers"], args["num_kv_shared_layers"]
    full, sliding = (args["rope_parameters"].get(kind, {}) for kind in (FULL, SLIDING))
    narrow, wide = args["head_dim"], args["global_head_dim"] or args["head_dim"]
    of_full, of_sliding = (rope.get("rope_type", "default") for rope in (full, sliding))
    problems.note_if(
        of_full not in ("proportional", "default") or full.get("factor", 1.0) != 1.0,
        f"rope_parameters {of_full} by {full.get('factor', 1.0):g} in full attention",
    )
    problems.note_if(of_sliding != "default", f"rope_parameters {of_sliding} in sliding attention")
    problems.note_if(args["rope_traditional"], "rope_traditional")
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
    # mlx-lm rotates whole heads by default.
    turning = int(wide * (1.0 if of_full == "default" else full.get("partial_rotary_factor", 1.0))) // 2
    factors = np.where(np.arange(wide // 2) < turning, 1.0, _STILL)
    return settings, {ROPE_FACTORS: factors.astype(np.float32)}


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
    heads_make_up_width(settings, config)
    settings.problems.note_if(
        not config["tie_word_embeddings"], "output.weight: mlx-lm's lfm2 uses the embedding as its head"
    )
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


def _lfm2_settings(args: Config, problems: Problems) -> Written:
    problems.note_if(args["conv_bias"], "conv_bias")
    problems.note_if(args["block_dim"] != args["hidden_size"], f"block_dim {args['block_dim']}, not hidden_size")
    attention, layers, width = args["full_attn_idxs"], args["num_hidden_layers"], args["block_ff_dim"]
    if args["block_auto_adjust_ff_dim"]:  # as mlx-lm computes the final width
        width, rounded_to = int(2 * width / 3), args["block_multiple_of"]
        if args["block_ffn_dim_multiplier"] is not None:
            width = int(args["block_ffn_dim_multiplier"] * width)
        width = -(-width // rounded_to) * rounded_to
    return {
        "attention.layer_norm_rms_epsilon": float(args["norm_eps"]),
        "attention.head_count_kv": [args["num_key_value_heads"] if i in attention else 0 for i in range(layers)],
        "feed_forward_length": width,
        "shortconv.l_cache": args["conv_L_cache"],
    }, {}


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


_QWEN35_MIXTURE = {
    **plain(expert_names("mlp.switch_mlp") | _SHARED_EXPERT),
    **ROUTER,
    "ffn_gate_inp_shexp.weight": TensorMapping("mlp.shared_expert_gate.weight", axis=0, exact=True),  # ours (1, D)
}


def _qwen35_block(config: Config, layer: int) -> Block:
    norms = {
        "attn_norm.weight": "input_layernorm.weight",
        "post_attention_norm.weight": "post_attention_layernorm.weight",
    }
    full = (layer + 1) % config["full_attention_interval"] == 0
    mixer = plain(ATTENTION | HEAD_NORMS) if full else _qwen35_delta_net(config)
    return plain(norms) | mixer | (_QWEN35_MIXTURE if config["num_experts"] else plain(MLP))


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
    settings.problems.note_if(
        stated and [bool(linear) for linear in stated] != [kind == LINEAR for kind in kinds],
        f"{settings.architecture}.attention.recurrent_layers is not every {interval} but one",
    )
    settings.problems.note_if(
        layers < interval or interval < 2, f"{settings.architecture}: attention in every {interval} of {layers} layers"
    )
    turned = settings.count("rope.dimension_count", config["head_dim"])
    sections = settings.per_layer("rope.dimension_sections", 3)
    settings.problems.note_if(
        sections is None and settings.has("rope.dimension_sections"),
        f"{settings.architecture}.rope.dimension_sections is not a list of whole numbers",
    )
    rope = {
        "rope_type": "default",
        "rope_theta": config["rope_theta"],
        "partial_rotary_factor": turned / config["head_dim"],
        "mrope_section": sections or [11, 11, 10],
        "mrope_interleaved": True,
    }
    value_heads, inner = settings.count("ssm.time_step_rank"), settings.count("ssm.inner_size")
    key_heads, width = settings.count("ssm.group_count"), settings.count("ssm.state_size")
    if inner != value_heads * width or value_heads % key_heads:
        settings.problems.append(
            f"{settings.architecture}.ssm: {value_heads} value heads and {key_heads} key heads of {width}, "
            f"and {inner} values in all"
        )
        value_heads = key_heads
    fields: Config = {
        "full_attention_interval": interval,
        "layer_types": kinds,
        "rope_parameters": rope,
        "linear_num_value_heads": value_heads,
        "linear_num_key_heads": key_heads,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
        "linear_conv_kernel_dim": settings.count("ssm.conv_kernel"),
        "attention_bias": False,
    }
    if settings.architecture == "qwen35":
        return {**fields, "intermediate_size": settings.count("feed_forward_length"), "num_experts": 0}
    width = settings.count("expert_feed_forward_length")
    n_experts, used = experts(settings)
    return {
        **fields,
        "num_experts": n_experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": settings.count("expert_shared_feed_forward_length", width),
        "norm_topk_prob": True,
    }


def _qwen35_settings(args: Config, problems: Problems) -> Written:
    width, value_heads = args["linear_value_head_dim"], args["linear_num_value_heads"]
    problems.note_if(
        width != args["linear_key_head_dim"],
        f"linear_value_head_dim {width}, and keys of {args['linear_key_head_dim']}",
    )
    problems.note_if(kind_of(args) not in ("default", "mrope"), f"rope_scaling {kind_of(args)}")
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
        problems.note_if(not args["norm_topk_prob"], "norm_topk_prob false")
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
    _qwen35_fields,
    _qwen35_settings,
    prefix="language_model.",
)
QWEN35_MOE = GgufFamily(
    "qwen3_5_moe",
    "Qwen3_5MoeForCausalLM",
    _qwen35_block,
    _qwen35_fields,
    _qwen35_settings,
    prefix="language_model.",
)


ARCHITECTURES: dict[str, GgufFamily] = {
    "llama": LLAMA,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "qwen3moe": QWEN3_MOE,
    "qwen35": QWEN35,
    "qwen35moe": QWEN35_MOE,
    "gemma3": GEMMA3,
    "gemma4": GEMMA4,
    "gpt-oss": GPT_OSS,
    "lfm2": LFM2,
    "phi3": PHI3,
}
# Also the text parts of vision-language models that have an architecture of their own in llama.cpp.
WRITTEN = {**ARCHITECTURES, "qwen2vl": QWEN2_VL, "qwen3vl": QWEN3_VL}
# Some files join two tensors in one: the rows of the second follow those of the first.
JOINED = {"ffn_gate_up_exps.weight": ("ffn_gate_exps.weight", "ffn_up_exps.weight")}


# Reading


def gguf_architecture(file: GGUFFile) -> GgufFamily:
    """Return the table's row for a file.

    Raises:
        InputError: the table has no such architecture, or the file is one part of a split model.
    """
    name = file.metadata.get("general.architecture")
    if isinstance(name, str) and name == "clip":
        raise InputError(
            f"{file.path}: a vision tower (mmproj) without a language model; give the language model's GGUF file, or for "
            "training on pictures, the model's Hugging Face weights"
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        shown = f"{str(name)[:40]!r}"
        raise InputError(
            f"{file.path}: architecture {shown} cannot be read from GGUF (supported: {known}); use its Hugging Face weights"
        )
    if str(file.metadata.get("split.count", 0)) not in ("0", "1"):
        raise InputError(f"{file.path}: one part of a split model; join the parts with llama-gguf-split --merge")
    return ARCHITECTURES[name]


def model_config(file: GGUFFile) -> dict[str, Any]:
    """Return the config.json that mlx-lm builds this file's model from, without its quantization.

    Raises:
        InputError: a setting is missing, or mlx-lm's model does not support it; the message has all of them.
    """
    family = gguf_architecture(file)
    settings = Settings(file, file.metadata["general.architecture"])
    config = shared_fields(settings)
    config |= {"model_type": family.model_type, "architectures": [family.model_class]}
    config |= family.fields(settings, config)
    if FUSED_KEY in file.metadata:
        config["mlx_lora"] = {"fused": file.metadata[FUSED_KEY]}
    if settings.problems:
        raise InputError(f"{file.path}: {'; '.join(settings.problems)}; use the model's Hugging Face weights")
    return config


def weight_map(file: GGUFFile, config: dict[str, Any]) -> dict[str, TensorMapping]:
    """Return the mapping of each tensor of the file to mlx-lm's parameters.

    Args:
        file: the GGUF file.
        config: from `model_config`.

    Returns:
        {GGUF name: mapping}, in the file's order, without the tensors that `model_config` turned into settings.

    Raises:
        InputError: tensors are missing, or mlx-lm's model does not have them; the message names them.
    """
    family = gguf_architecture(file)
    mappings = _as_in_file(_mappings(family, config, family.prefix), file)
    if config["tie_word_embeddings"]:
        mappings.pop("output.weight", None)
    unknown = [
        name
        for name in file.tensors
        if name not in mappings and name not in family.absorbed and not _left_out(family, config, name)
    ]
    missing = [name for name in mappings if name not in file.tensors]
    problems = [f"tensors missing: {first_of(missing, 6, ', ')}"] if missing else []
    problems += [f"tensors unknown to {family.model_type}: {first_of(unknown, 6, ', ')}"] if unknown else []
    if problems:
        raise InputError(f"{file.path}: {'; '.join(problems)}; download it again or use its Hugging Face weights")
    return {name: mappings[name] for name in file.tensors if name in mappings}


def _as_in_file(mappings: dict[str, TensorMapping], file: GGUFFile) -> dict[str, TensorMapping]:
    """Return the mappings with tensors joined or split as the file has them (see JOINED)."""
    found = dict(mappings)
    for layer in {name.rpartition(".ffn_")[0] for name in mappings if ".ffn_" in name}:
        for whole, parts in JOINED.items():
            joined, (first, second) = f"{layer}.{whole}", (f"{layer}.{part}" for part in parts)
            if joined in mappings and joined not in file.tensors and first in file.tensors:
                found |= {first: TensorMapping(mappings[joined].name), second: TensorMapping(mappings[joined].then[0])}
                del found[joined]
            elif first in mappings and first not in file.tensors and joined in file.tensors:
                found[joined] = TensorMapping(mappings[first].name, then=(mappings[second].name,))
                del found[first], found[second]
    return found


def _left_out(family: GgufFamily, config: dict[str, Any], name: str) -> bool:
    """Return whether a file may have a tensor although mlx-lm's model does not use it."""
    number = name.split(".")[1] if name.startswith("blk.") else ""
    # Layers after the last one predict further tokens in one step, which only llama.cpp uses.
    return (number.isdigit() and int(number) >= config["num_hidden_layers"]) or family.spare(config, name)


def _mappings(family: GgufFamily, config: dict[str, Any], prefix: str) -> dict[str, TensorMapping]:
    """Return every tensor of an architecture's files, with its full names."""
    mappings = {
        name: TensorMapping(prefix + ours, offset=family.norm_offset if "norm" in name else 0.0)
        for name, ours in family.top(config).items()
    }
    for layer in range(config["num_hidden_layers"]):
        for name, mapping in family.block(config, layer).items():
            offset = family.norm_offset if "norm" in name else mapping.offset
            whole, *then = (f"{prefix}model.layers.{layer}.{part}" for part in mapping.names)
            mappings[f"blk.{layer}.{name}"] = dataclasses.replace(mapping, name=whole, then=tuple(then), offset=offset)
    return mappings


# Writing


def text_model(model: nn.Module) -> tuple[str, nn.Module]:
    """Return the prefix of the text model's parameter names, and the text model (all of it, unless multimodal)."""
    return ("language_model.", model["language_model"]) if "language_model" in model else ("", model)


def text_arguments(model: nn.Module) -> dict[str, Any]:
    """Return the arguments that mlx-lm built the text model from, with defaults filled in."""
    args = dataclasses.asdict(text_model(model)[1].args)
    heads = args["num_attention_heads"]
    args["num_key_value_heads"] = args.get("num_key_value_heads") or heads
    args["head_dim"] = args.get("head_dim") or args["hidden_size"] // heads
    return args


def gguf_weights(model: nn.Module) -> tuple[str, dict[str, TensorMapping]]:
    """Return llama.cpp's name for a model's architecture, and every tensor that its files may have.

    Args:
        model: an mlx-lm model, adapted or not.

    Returns:
        The architecture, and {GGUF name: mapping} in a file's order; a single model may lack some of them.

    Raises:
        InputError: the architecture is not in the table.
    """
    prefix, text = text_model(model)
    kinds = dict.fromkeys((model.args.model_type, text.args.model_type))  # SmolVLM's text part is a llama
    found = [name for kind in kinds for name, family in WRITTEN.items() if kind in (family.model_type, *family.also)]
    if not found:
        known = ", ".join(family.model_type for family in WRITTEN.values())
        raise InputError(
            f"model_type {' with a text part of type '.join(kinds)}: cannot be written as GGUF (supported: {known}); "
            "export to another format"
        )
    return found[0], _mappings(WRITTEN[found[0]], text_arguments(model), prefix)


def context_length(model: nn.Module, config: dict[str, Any]) -> int:
    """Return how many tokens a model is made for, beyond which llama.cpp refuses a prompt.

    mlx-lm's arguments only have what mlx-lm uses, and its defaults are not always the published models' (Gemma 3). So
    the config decides, and what it leaves out is transformers' default, by which it was saved.

    Args:
        model: an mlx-lm model.
        config: its config.json.
    """
    text = config.get("text_config")
    parts = [text if isinstance(text, dict) else {}, config]
    found = [part.get("max_position_embeddings") for part in parts]
    if not any(found):
        from transformers import CONFIG_MAPPING  # slow to import, and most files do not need it

        kinds = [part.get("model_type") for part in parts]
        usual = [CONFIG_MAPPING[kind]().get_text_config() for kind in kinds if kind in CONFIG_MAPPING]
        found = [getattr(config, "max_position_embeddings", None) for config in usual]
    found += [text_arguments(model).get("max_position_embeddings"), 2048]  # llama.cpp requires one
    return int(next(value for value in found if value))


def gguf_settings(model: nn.Module, architecture: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the settings that llama.cpp needs in addition to a model's weights and tokenizer.

    Args:
        model: an mlx-lm model of an architecture in WRITTEN.
        architecture: llama.cpp's name for it.

    Returns:
        {key without the architecture's prefix: value, or a list of one per layer}, without the context length, and
        tensors that hold settings.

    Raises:
        InputError: llama.cpp does not support a setting for the architecture; the message has all of them.
    """
    args = text_arguments(model)
    problems = Problems()
    shared: Config = {
        "block_count": args["num_hidden_layers"],
        "embedding_length": args["hidden_size"],
        "attention.head_count": args["num_attention_heads"],
        "attention.head_count_kv": args["num_key_value_heads"],
        "attention.key_length": args["head_dim"],
        "attention.value_length": args["head_dim"],
        "rope.dimension_count": args["head_dim"],
        "vocab_size": args["vocab_size"],
    }
    if args.get("intermediate_size"):
        shared["feed_forward_length"] = args["intermediate_size"]
    rates = {"attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta"}
    shared |= {key: float(args[name]) for key, name in rates.items() if name in args}
    own, tensors = WRITTEN[architecture].settings(args, problems)
    if problems:
        raise InputError(
            f"--to gguf: {'; '.join(problems)}: llama.cpp's {architecture} does not support this; use --to peft or hf"
        )
    return shared | own, tensors
