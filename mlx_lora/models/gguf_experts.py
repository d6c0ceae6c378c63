"""GGUF's qwen3moe and gpt-oss, whose blocks have attention, and experts instead of one feed-forward layer.

All experts of a projection are one tensor (E, out, in), in GGUF and in mlx-lm. GPT-OSS' are MXFP4 blocks, a format that
MLX has too; see gguf_blocks.py.
"""

from __future__ import annotations

from typing import Any

from mlx_lora.models.gguf_family import (
    ATTENTION,
    ATTENTION_BIASES,
    HEAD_NORMS,
    POST_NORM,
    Block,
    Family,
    Written,
    plain,
)
from mlx_lora.models.gguf_keys import Settings, experts, feed_forward, same_key_heads, whole_heads_rotate
from mlx_lora.models.gguf_scaling import kind_of, read_scaling, refuse_scaling, write_scaling

Config = dict[str, Any]


def expert_names(module: str) -> dict[str, str]:
    """Return {GGUF name: mlx-lm's name} of the three projections of a block's experts."""
    return {f"ffn_{part}_exps.weight": f"{module}.{part}_proj.weight" for part in ("gate", "up", "down")}


def _qwen3_block(config: Config, layer: int) -> Block:
    router = plain({"ffn_gate_inp.weight": "mlp.gate.weight"}, exact=True)
    return plain(ATTENTION | POST_NORM | HEAD_NORMS | expert_names("mlp.switch_mlp")) | router


def _qwen3_fields(settings: Settings, config: Config) -> Config:
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


def _qwen3_settings(args: Config, problems: list[str]) -> Written:
    if kind_of(args) != "default":
        problems.append(f"rope_scaling {kind_of(args)}, which mlx-lm's qwen3_moe leaves out")
    if not args["norm_topk_prob"]:
        problems.append("norm_topk_prob false")
    if args["decoder_sparse_step"] != 1 or args["mlp_only_layers"]:
        problems.append("blocks without experts")
    return _expert_settings(args["num_experts"], args["num_experts_per_tok"], args["moe_intermediate_size"]), {}


def _expert_settings(n_experts: int, used: int, width: int) -> Config:
    return {"expert_count": n_experts, "expert_used_count": used, "expert_feed_forward_length": width}


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
_TURNS = ["sliding_attention", "full_attention"]


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
    if layers < len(_TURNS):
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
        "layer_types": [_TURNS[layer % 2] for layer in range(layers)],
        "attention_bias": True,
    }


def _gpt_oss_settings(args: Config, problems: list[str]) -> Written:
    layers = args["num_hidden_layers"]
    turns = [_TURNS[layer % 2] for layer in range(layers)]
    if (args["layer_types"] or turns) != turns:
        problems.append("layer_types that do not alternate, sliding attention first")
    settings = {
        **write_scaling(args, problems),
        **_expert_settings(args["num_local_experts"], args["num_experts_per_tok"], args["intermediate_size"]),
        "attention.sliding_window": args["sliding_window"],
    }
    return settings, {}


QWEN3_MOE = Family("qwen3_moe", "Qwen3MoeForCausalLM", _qwen3_block, _qwen3_fields, _qwen3_settings)
GPT_OSS = Family("gpt_oss", "GptOssForCausalLM", _gpt_oss_block, _gpt_oss_fields, _gpt_oss_settings)
