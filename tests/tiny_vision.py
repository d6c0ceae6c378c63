"""Tiny random vision-language models, one of each family, as transformers writes them: model, tokenizer, image processor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from byte_tokenizer import byte_tokenizer

VOCABULARY = 320
CHATML_PARTS = """\
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ 'PICTURE' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}
{{- '<|im_end|>' + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SMOLVLM_TEMPLATE = """\
<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}\
{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}\
<end_of_utterance>
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""
GEMMA3_TEMPLATE = """\
<bos>{%- for message in messages -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""

GEMMA4_TEMPLATE = """\
<bos>{%- for message in messages -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<|turn>' + role + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}{%- for item in message['content'] -%}
{%- if item['type'] == 'image' -%}{{ '<|image|>' }}{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}{{ '<turn|>\\n' }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|turn>model\\n' }}{%- endif -%}"""
MISTRAL_TEMPLATE = """\
<s>{%- for message in messages %}{% if message['role'] == 'user' %}{{ '[INST]' }}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '[IMG]' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}
{{- '[/INST]' }}{% else %}
{%- if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}
{{- '</s>' }}{% endif %}{% endfor %}"""

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
SIGLIP: dict[str, Any] = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip


def _tokenizer(specials: list[str], template: str | None, eos: str, **named: str) -> Any:
    tokenizer = byte_tokenizer(template, eos=eos, special_tokens=[eos, *(s for s in specials if s != eos)])
    for name, text in named.items():
        setattr(tokenizer, name, text)
    if named:
        tokenizer.init_kwargs.update(named)
    return tokenizer


def _smolvlm(kind: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import transformers

    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)]
    specials = ["<fake_token_around_image>", "<image>", "<global-img>", *tiles, "<|im_start|>", "<end_of_utterance>"]
    tokenizer = _tokenizer(specials, SMOLVLM_TEMPLATE, "<end_of_utterance>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    upper = {"smolvlm": "SmolVLM", "idefics3": "Idefics3"}[kind]
    config = getattr(transformers, f"{upper}Config")(
        text_config={**TEXT, "model_type": "llama", "pad_token_id": 0},
        vision_config={**SIGLIP, "image_size": 56}, scale_factor=2, image_token_id=image, pad_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    processor = {
        "image_processor_type": f"{upper}ImageProcessor", "do_image_splitting": True, "do_convert_rgb": True,
        "size": {"longest_edge": 112}, "max_image_size": {"longest_edge": 56}, "do_pad": True,
    }  # fmt: skip
    return config, tokenizer, processor, {"processor_class": f"{upper}Processor", "image_seq_len": 4}


def _qwen(kind: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import transformers

    specials = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|im_start|>"]
    template = CHATML_PARTS.replace("PICTURE", "<|vision_start|><|image_pad|><|vision_end|>")
    tokenizer = _tokenizer(specials, template, "<|im_end|>")
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 64, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
    if kind == "qwen3_5":
        vision |= {"patch_size": 8, "num_position_embeddings": 64}
        text = {
            **TEXT, "head_dim": 64, "rope_parameters": {**rope, "mrope_interleaved": True, "partial_rotary_factor": 0.25},
            "layer_types": ["linear_attention", "full_attention"] * 2, "full_attention_interval": 2,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
        }  # fmt: skip
    elif kind == "qwen3_vl":
        vision |= {"patch_size": 8, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text = {**TEXT, "head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}}
    elif kind == "qwen2_5_vl":
        vision |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1], "tokens_per_second": 2}
        text = {**TEXT, "rope_parameters": rope}
    else:
        vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14, "in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2}  # fmt: skip
        text = {**TEXT, "rope_parameters": rope}
    name = {"qwen2_vl": "Qwen2VLConfig", "qwen2_5_vl": "Qwen2_5_VLConfig", "qwen3_vl": "Qwen3VLConfig", "qwen3_5": "Qwen3_5Config"}[kind]  # fmt: skip
    config = getattr(transformers, name)(
        text_config=text, vision_config=vision, image_token_id=ids["image_pad"], video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"], vision_end_token_id=ids["vision_end"], tie_word_embeddings=False,
    )  # fmt: skip
    patch = vision["patch_size"]
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor", "patch_size": patch, "temporal_patch_size": 2, "merge_size": 2,
        "size": {"shortest_edge": (patch * 2) ** 2, "longest_edge": (patch * 8) ** 2},
    }  # fmt: skip
    return config, tokenizer, processor, {"processor_class": name.replace("Config", "Processor").replace("3_5", "3VL")}


def _gemma3(kind: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import transformers

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    specials = [*named.values(), "<bos>", "<start_of_turn>", "<pad>"]
    tokenizer = _tokenizer(specials, GEMMA3_TEMPLATE, "<end_of_turn>", **named)
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16, "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
            "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window_pattern": 2, "_sliding_window_pattern": 2},
        vision_config={**SIGLIP, "vision_use_head": False, "image_size": 112}, mm_tokens_per_image=16, image_token_id=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
        boi_token_index=tokenizer.convert_tokens_to_ids("<start_of_image>"), eoi_token_index=tokenizer.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<image_soft_token>"),
    )  # fmt: skip
    processor = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 112, "width": 112}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_pan_and_scan": False}  # fmt: skip
    return config, tokenizer, processor, {"processor_class": "Gemma3Processor", "image_seq_length": 16}


def _llava(kind: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import transformers

    tokenizer = _tokenizer(["<image>", "<|im_start|>"], CHATML_PARTS.replace("PICTURE", "<image>\\n"), "<|im_end|>")
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"}, vision_config={**SIGLIP, "model_type": "clip_vision_model", "projection_dim": 32},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), image_token_id=tokenizer.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    processor = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}  # fmt: skip
    own = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, tokenizer, processor, {"processor_class": "LlavaProcessor", **own}


def _gemma4(kind: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """Gemma 4 has two kinds: small ones with embeddings per layer and shared keys, and large ones whose pictures see themselves."""
    import transformers

    named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>"}
    specials = [*named.values(), "<bos>", "<|turn>", "<pad>", "<|video|>", "<|audio|>"]
    tokenizer = _tokenizer(specials, GEMMA4_TEMPLATE, "<turn|>", **named)
    ids = {name: tokenizer.convert_tokens_to_ids(text) for name, text in named.items()}
    small = kind == "gemma4"
    own: dict[str, Any] = {"hidden_size_per_layer_input": 16, "num_kv_shared_layers": 2, "use_double_wide_mlp": True}
    if not small:
        own = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1, "use_bidirectional_attention": "vision"}  # fmt: skip
    text = {
        **TEXT, "head_dim": 16, "global_head_dim": 32, "sliding_window": 16, "vocab_size_per_layer_input": VOCABULARY,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "final_logit_softcapping": 30.0,
        "pad_token_id": tokenizer.convert_tokens_to_ids("<pad>"), **own,
    }  # fmt: skip
    vision = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 8, "patch_size": 4, "position_embedding_size": 64,
        "use_clipped_linears": small, "standardize": not small,
    }  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=text, vision_config=vision, audio_config=None, image_token_id=ids["image_token"],
        boi_token_id=ids["boi_token"], eoi_token_id=ids["eoi_token"],
        video_token_id=tokenizer.convert_tokens_to_ids("<|video|>"), audio_token_id=tokenizer.convert_tokens_to_ids("<|audio|>"),
    )  # fmt: skip
    processor = {"image_processor_type": "Gemma4ImageProcessor", "patch_size": 4, "max_soft_tokens": 70}
    return config, tokenizer, processor, {"processor_class": "Gemma4Processor"}


def _mistral(kind: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import transformers

    tokenizer = _tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "<s>"], MISTRAL_TEMPLATE, "</s>")
    image, vision = tokenizer.convert_tokens_to_ids("[IMG]"), {
        "model_type": "pixtral", "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "head_dim": 12, "image_size": 112, "patch_size": 14 if kind == "mistral3" else 16, "hidden_act": "silu",
    }  # fmt: skip
    text = {**TEXT, "model_type": "mistral", "sliding_window": None, "head_dim": 16}
    if kind == "mistral3":
        config = transformers.Mistral3Config(
            text_config=text,
            vision_config=vision,
            image_token_index=image,
            spatial_merge_size=2,
            tie_word_embeddings=False,
        )
    else:
        config = transformers.LlavaConfig(
            text_config=text, vision_config=vision, image_token_index=image, vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )  # fmt: skip
    patch = vision["patch_size"]
    processor = {"image_processor_type": "PixtralImageProcessor", "patch_size": {"height": patch, "width": patch}, "size": {"longest_edge": 112}}  # fmt: skip
    merge = {"spatial_merge_size": 2} if kind == "mistral3" else {}
    return config, tokenizer, processor, {"processor_class": "PixtralProcessor", "patch_size": patch, **merge}


def _paligemma(kind: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    import transformers

    tokenizer = _tokenizer(["<bos>", "<image>", "<pad>"], None, "<eos>", bos_token="<bos>")
    image = tokenizer.convert_tokens_to_ids("<image>")
    own = (
        {"model_type": "gemma"}
        if kind == "paligemma"
        else {"model_type": "gemma2", "query_pre_attn_scalar": 16, "sliding_window": 4096}
    )
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "head_dim": 16, **own}, vision_config={**SIGLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=image, projection_dim=64, hidden_size=32, vocab_size=VOCABULARY,
    )  # fmt: skip
    processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 56, "width": 56}, "image_seq_length": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    return config, tokenizer, processor, {"processor_class": "PaliGemmaProcessor"}


MAKERS: dict[str, Callable[[str], tuple[Any, Any, dict[str, Any], dict[str, Any]]]] = {
    "smolvlm": _smolvlm,
    "idefics3": _smolvlm,
    "qwen2_vl": _qwen,
    "qwen2_5_vl": _qwen,
    "qwen3_vl": _qwen,
    "qwen3_5": _qwen,
    "gemma3": _gemma3,
    "gemma4": _gemma4,
    "gemma4_31b": _gemma4,
    "llava": _llava,
    "pixtral": _mistral,
    "mistral3": _mistral,
    "paligemma": _paligemma,
    "paligemma2": _paligemma,
}


def write_model(family: str, folder: Path, seed: int = 0, scale: float = 0.15) -> Path:
    """Write a tiny random vision-language model to a folder, with all files that a published one has; needs torch.

    Args:
        family: of MAKERS.
        folder: made here.
        seed: of the weights.
        scale: their standard deviation, large enough that a picture changes the logits.
    """
    import torch
    import transformers

    config, tokenizer, image_processor, processor = MAKERS[family](family)
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, scale)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return _write_rest(folder, tokenizer, image_processor, processor)


def vision_files(family: str, folder: Path) -> dict[str, Any]:
    """Write all files of such a model but its weights, and return its config."""
    config, tokenizer, image_processor, processor = MAKERS[family](family)
    config.architectures = None
    config.save_pretrained(folder)
    _write_rest(folder, tokenizer, image_processor, processor)
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def write_model_here(
    family: str,
    folder: Path,
    seed: int = 0,
    scale: float = 0.15,
    changes: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """Write the same without torch, under mlx-vlm's names.

    Args:
        family, folder, seed, scale: as for `write_model`.
        changes: other values of parts of the config, such as {"text_config": {"hidden_size": 512}}.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from mlx_lora.models.convert import build_model
    from mlx_lora.models.vision import LANGUAGE, build_tower

    values = vision_files(family, folder)
    if changes:
        for part, values_of_part in changes.items():
            values[part] = {**values[part], **values_of_part}
        (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    language = dict(tree_flatten(build_model(values).parameters()))
    tower = {n: w for n, w in tree_flatten(build_tower(values).parameters()) if not n.startswith(LANGUAGE)}
    mx.random.seed(seed)
    shapes = {name: value.shape for name, value in sorted({**language, **tower}.items())}
    weights = {
        name: scale * mx.random.normal(shape) if len(shape) > 1 else 1 + 0.1 * mx.random.normal(shape)
        for name, shape in shapes.items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    return folder


def _write_rest(folder: Path, tokenizer: Any, image_processor: dict[str, Any], processor: dict[str, Any]) -> Path:
    tokenizer.save_pretrained(folder)
    kind = processor.pop("processor_class")
    (folder / "preprocessor_config.json").write_text(json.dumps({**image_processor, "processor_class": kind}))
    (folder / "processor_config.json").write_text(json.dumps({**processor, "processor_class": kind}))
    return folder
