"""GGUF's llama, qwen2, qwen3, gemma3, phi3, qwen3moe and gpt-oss, in which every block has attention.

llama.cpp's converter changes two things, which are undone here:
    llama   rows of q and k are permuted within each head, from [half, pair] to [pair, half] order
    gemma3  norm weights carry +1, where mlx-lm's norms multiply by (1 + w)
Phi-3's joined q, k, v and joined gate, up are joined in mlx-lm too.

The blocks of qwen3moe and gpt-oss have E experts instead of one feed-forward layer. All experts of a projection are one
tensor (E, out, in), in GGUF and in mlx-lm. GPT-OSS' are MXFP4 blocks, a format that MLX has too; see gguf/weights.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

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
    Block,
    GgufFamily,
    Settings,
    TensorMapping,
    Written,
    experts,
    feed_forward,
    kind_of,
    llama3_factors,
    plain,
    read_llama3_scaling,
    read_longrope,
    read_scaling,
    refuse_scaling,
    rope_order,
    same_key_heads,
    whole_heads_rotate,
    write_longrope,
    write_scaling,
)

Config = dict[str, Any]


def dense_fields(settings: Settings, config: Config) -> Config:
    """Return the fields that these architectures share: one width, one number of key heads, RoPE over whole heads."""
    if settings.has("expert_count"):
        settings.problems.append(
            f"{settings.architecture}.expert_count: mixtures of experts of this architecture cannot be read from GGUF"
        )
    whole_heads_rotate(settings, config)
    same_key_heads(settings, config)
    return feed_forward(settings)


def _heads_make_up_width(settings: Settings, config: Config) -> None:
    """Note a problem if the heads together are wider or narrower than the model."""
    if config["head_dim"] * config["num_attention_heads"] != config["hidden_size"]:
        settings.problems.append(f"{settings.architecture} heads of {config['head_dim']} do not make up the width")


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
    return fields | read_scaling(settings) | read_llama3_scaling(settings, config)


def _llama_settings(args: Config, problems: list[str]) -> Written:
    settings = _window(args, problems)
    if kind_of(args) == "llama3":
        return settings, llama3_factors(args, problems)
    return settings | write_scaling(args, problems), {}


def _window(args: Config, problems: list[str]) -> Config:
    """Return the sliding window that mlx-lm's llama keeps but ignores; note a problem if layers use one."""
    if "sliding_attention" in (args.get("layer_types") or ()):
        problems.append("sliding attention in some layers")
    if args.get("rope_traditional"):
        problems.append("rope_traditional")
    return {"attention.sliding_window": args["sliding_window"]} if args.get("sliding_window") else {}


LLAMA = GgufFamily("llama", "LlamaForCausalLM", _llama_block, _llama_fields, _llama_settings, absorbed=(ROPE_FACTORS,),
               also=("mistral",))  # fmt: skip


# Qwen2 and Qwen3


def _qwen2_fields(settings: Settings, config: Config) -> Config:
    _heads_make_up_width(settings, config)
    return dense_fields(settings, config) | read_scaling(settings) | {"rope_traditional": False}


def _qwen3_fields(settings: Settings, config: Config) -> Config:
    return dense_fields(settings, config) | read_scaling(settings)


def _qwen_settings(args: Config, problems: list[str]) -> Written:
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
    _qwen3_fields,
    _qwen_settings,
)


# Qwen-VL's text parts: those of Qwen2 and Qwen3 under names of their own, by which llama.cpp turns a picture's tokens by
# time, row and column. gguf/vision.py has the sections of the rotation, which mlx-lm's arguments lack.


def _qwen_vl_settings(args: Config, problems: list[str]) -> Written:
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
        **read_scaling(settings),
        "query_pre_attn_scalar": gemma3_attention_scalar(config),
        "sliding_window": settings.count("attention.sliding_window"),
        "sliding_window_pattern": settings.count("attention.sliding_window_pattern", 6),
        "rope_local_base_freq": settings.number("rope.freq_base_swa", 10000.0),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma3_settings(args: Config, problems: list[str]) -> Written:
    wanted = gemma3_attention_scalar(args)
    if args["query_pre_attn_scalar"] != wanted:
        problems.append(f"query_pre_attn_scalar {args['query_pre_attn_scalar']:g}, not {wanted:g}")
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
    _heads_make_up_width(settings, config)
    same_key_heads(settings, config)
    turned = settings.count("rope.dimension_count", config["head_dim"])
    window = settings.count("attention.sliding_window", 0, zero=True)
    return {
        **feed_forward(settings),
        **read_longrope(settings, config),
        "partial_rotary_factor": turned / config["head_dim"],
        "sliding_window": window or None,  # neither mlx-lm nor llama.cpp uses it
        "rope_traditional": False,
        # The default in transformers is an id of Phi-3's own vocabulary, which a smaller vocabulary lacks.
        "pad_token_id": settings.file.metadata.get("tokenizer.ggml.padding_token_id"),
    }


def _phi3_settings(args: Config, problems: list[str]) -> Written:
    if args["rope_traditional"]:
        problems.append("rope_traditional")
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


def _expert_settings(n_experts: int, used: int, width: int) -> Config:
    return {"expert_count": n_experts, "expert_used_count": used, "expert_feed_forward_length": width}


def _qwen3_moe_block(config: Config, layer: int) -> Block:
    router = plain({"ffn_gate_inp.weight": "mlp.gate.weight"}, exact=True)
    return plain(ATTENTION | POST_NORM | HEAD_NORMS | expert_names("mlp.switch_mlp")) | router


def _qwen3_moe_fields(settings: Settings, config: Config) -> Config:
    refuse_scaling(settings, "qwen3_moe")
    whole_heads_rotate(settings, config)
    same_key_heads(settings, config)
    fields = feed_forward(settings)
    n_experts, used, width = experts(settings, fields)
    return {
        **fields,
        "num_experts": n_experts,
        "num_experts_per_tok": used,
        "moe_intermediate_size": width,
        # llama.cpp supports no other values for this architecture.
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _qwen3_moe_settings(args: Config, problems: list[str]) -> Written:
    if kind_of(args) != "default":
        problems.append(f"rope_scaling {kind_of(args)}, which mlx-lm's qwen3_moe leaves out")
    if not args["norm_topk_prob"]:
        problems.append("norm_topk_prob false")
    if args["decoder_sparse_step"] != 1 or args["mlp_only_layers"]:
        problems.append("blocks without experts")
    return _expert_settings(args["num_experts"], args["num_experts_per_tok"], args["moe_intermediate_size"]), {}


QWEN3_MOE = GgufFamily("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_moe_block, _qwen3_moe_fields, _qwen3_moe_settings)
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


def _gpt_oss_block(config: Config, layer: int) -> Block:
    return plain(_GPT_OSS_BLOCK) | plain(_GPT_OSS_FLOATS, exact=True)


def _gpt_oss_fields(settings: Settings, config: Config) -> Config:
    whole_heads_rotate(settings, config)
    same_key_heads(settings, config)
    width = settings.count("expert_feed_forward_length")
    n_experts, used, _ = experts(settings, {"intermediate_size": width})
    scaling = read_scaling(settings)
    if scaling:
        scaling["rope_scaling"]["truncate"] = False  # as published; transformers heeds it
    layers = config["num_hidden_layers"]
    if layers < len(_ALTERNATING):
        settings.problems.append(
            f"{settings.architecture}.block_count is {layers}, too few for two kinds of layers that alternate"
        )
    if config["tie_word_embeddings"]:
        settings.problems.append("output.weight is missing")
    return {
        **scaling,
        "intermediate_size": width,
        "num_local_experts": n_experts,
        "num_experts_per_tok": used,
        "sliding_window": settings.count("attention.sliding_window"),
        "layer_types": [_ALTERNATING[layer % 2] for layer in range(layers)],
        "attention_bias": True,
    }


def _gpt_oss_settings(args: Config, problems: list[str]) -> Written:
    layers = args["num_hidden_layers"]
    alternating = [_ALTERNATING[layer % 2] for layer in range(layers)]
    if (args["layer_types"] or alternating) != alternating:
        problems.append("layer_types that do not alternate, sliding attention first")
    settings = {
        **write_scaling(args, problems),
        **_expert_settings(args["num_local_experts"], args["num_experts_per_tok"], args["intermediate_size"]),
        "attention.sliding_window": args["sliding_window"],
    }
    return settings, {}


GPT_OSS = GgufFamily("gpt_oss", "GptOssForCausalLM", _gpt_oss_block, _gpt_oss_fields, _gpt_oss_settings)
