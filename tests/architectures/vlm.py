"""The tiny configuration of each language model that mlx-vlm has and mlx-lm has not, as its config.json would be published."""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from mlx_vlm import models

from architectures.tiny import shrunk, shrunk_package

SLIDING_THEN_FULL = ["sliding_attention", "full_attention"]
SECTIONS = {"rope_type": "default", "mrope_section": [2, 2, 4]}
GLM_TOWER = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 14}
TOWER = {"hidden_size": 32, "num_attention_heads": 2, "patch_size": 14}
HYBRID = ["linear_attention", "full_attention"]
ROPE = {"type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
# What a family needs beside the values that architectures/tiny.py gives; None: its default.
CHANGES: dict[str, dict[str, Any]] = {
    "cohere2_moe": {"first_k_dense_replace": None, "sliding_window_pattern": 2, "logit_scale": 0.25},
    "cohere_compass": {},
    "deepseek_v4": {"num_key_value_heads": 1, "o_groups": 2, "compress_ratios": [0, 4], "num_hash_layers": 1, "hc_mult": 2},
    "dots_ocr": {},
    "ernie4_5_moe_vl": {"FLAT": True, "moe_layer_start_index": 1, "moe_layer_end_index": 1, "mrope_section": [2, 2, 4], "freq_allocation": 4, "head_dim": 16},
    "fastvlm": {},
    "flint": {},
    "glm5_next": {"num_key_value_heads": 4, "qk_rope_head_dim": 0, "layer_types": HYBRID, "index_kpool": 2, "hc_mult": 2},
    "glm_ocr": {},
    "granite4_vision": {"logits_scaling": 4.0},
    "granite_vision": {"logits_scaling": 4.0},
    "hrm_text": {},
    "hy_v4": {},
    "idefics2": {"WHOLE": {"perceiver_config": {"model_type": "idefics2"}}},
    "indic_ocr": {"full_attention_interval": 2, "rope_parameters": ROPE},
    "inkling": {},
    "internvl": {},
    "internvl_chat": {"VISION": {"model_type": "intern_vit_6b"}},
    "jina_vlm": {},
    "k2_horizon": {},
    "kolibri1": {"layer_types": SLIDING_THEN_FULL},
    "llava_next": {"model_type": "llama", "VISION": {"model_type": "clip_vision_model"}},
    "llava_onevision": {},
    "llmjpvl": {},
    "locateanything": {},
    "longcat_flash_sparse": {"ffn_hidden_size": 96, "index_n_heads": 2},
    "mage_vl": {},
    "mimo_v2": {"hybrid_layer_pattern": [0, 1], "moe_layer_freq": [0, 1], "n_shared_experts": None, "partial_rotary_factor": 0.5},
    "minicpmv4_6": {"full_attention_interval": 2, "rope_parameters": ROPE},
    "minimax_m3": {},
    "mistral_large3": {},
    "mllama": {},
    "molmo2": {},
    "moondream2": {},
    "moondream3": {"num_key_value_heads": 4, "moe_start_layer": 1},
    "nemotron_labs_diffusion": {},
    "phi4_siglip": {},
    "plamo2vl": {},
    "qwen3_5_moe_text": {"full_attention_interval": 2, "rope_parameters": ROPE},
    "qwen3_5_text": {"full_attention_interval": 2, "rope_parameters": ROPE},
    "qwen4_exp": {"layer_types": HYBRID, "hc_count": 2, "hc_lowrank": 16, "indexer_budget": 8, "indexer_kv_heads": 1, "indexer_compress_ratio": 4, "rope_parameters": ROPE},
    "step3p7": {"moe_layers_enum": [1]},
    "xing4_0": {},
    "youtu_vl": {"FLAT": True, "n_routed_experts": None, "n_shared_experts": None},
    "z1t": {},
    "zaya1_vl": {"FLAT": True},
    "aya_vision": {"sliding_window_pattern": 2, "logit_scale": 0.25, "VISION": {**TOWER, "model_type": "siglip_vision_model"}},
    "deepseek_vl_v2": {"WHOLE": {"projector_config": {"n_embed": 64}}, "VISION": {"model_type": "vision"}},
    "deepseekocr": {"WHOLE": {"projector_config": {"n_embed": 64}}, "VISION": {"model_type": "vision"}},
    "deepseekocr_2": {"WHOLE": {"projector_config": {"n_embed": 64}}, "VISION": {"model_type": "vision"}},
    "glm4v": {"WHOLE": {"eos_token_id": [2]}, "rope_scaling": SECTIONS, "VISION": GLM_TOWER},
    "glm4v_moe": {"partial_rotary_factor": 0.5, "rope_scaling": SECTIONS, "VISION": GLM_TOWER},
    "got": {"FLAT": True},
    "llava_bunny": {"WHOLE": {"auto_map": {}, "mm_hidden_size": 64}, "VISION": {"model_type": "siglip_vision_model"}},
    "nemotron_h_nano_omni": {"hybrid_override_pattern": "M*", "mamba_num_heads": 4, "mamba_head_dim": 16, "mamba_proj_bias": False, "ssm_state_size": 16, "n_groups": 1, "mlp_bias": False, "layer_norm_epsilon": 1e-5, "use_bias": False, "use_conv_bias": True},
    "paddleocr_vl": {"FLAT": True, "hidden_act": "silu", "use_bias": False, "head_dim": 16, "rope_scaling": {"type": "default", "mrope_section": [2, 3, 3]}},
    "unlimited_ocr": {"WHOLE": {"projector_config": {"n_embed": 64}}, "VISION": {"model_type": "vision"}},
}  # fmt: skip


# The other packages that only mlx-vlm has, by the reason for which they have no row.
KINDS: dict[str, str] = {
    "makes pictures or videos": "bonsai ernie_image flux2 flux3 ideogram4 llada_image mage_flow ming_image minimax_h3 moss_image qwen_image z_image",
    "finds things in pictures": "dinov2 moge3 pp_doclayout_v3 rfdetr rt_detr_v2 sam3 sam3_1 sam3d_body sam3d_objects sapiens2 siglip video_depth_anything yolo11",
    "gives vectors or labels of texts": "bert clef colidefics3 colqwen2_5 d1 d1_omni decider2 embedding_gemma2 gemma3_embedding gliner2_5 laya lfm2_colbert lfm2_embedding lfm2_encoder llama_bidirec llama_nemotron_vl_embedding ministral3_embedding modernbert openai_privacy_filter qwen3_embedding qwen3_vl_embedding xlm_roberta",
    "fills in masked tokens (diffusion), and training here is on the next token": "diffusion_gemma llada2_moe",
    "has an encoder that reads the picture before its text": "florence2 nemotron_parse",
    "speaks": "nemotron_voicechat",
    "is in mlx-lm under another name": "klear lfm2_vl lille_130m llava nemotron_nas qwen2_5_vl",
    "is built here from mlx-lm's language models": "idefics3 paligemma smolvlm",
    "cannot be read back from a folder that mlx-vlm's own names are in": "falcon_ocr falcon_perception",
    "uses weights without calling the layers that have them, so adapters do nothing": "limite",
    "names its head like a layer of its blocks, so an adapter on all layers cannot be loaded again": "molmo",
}  # fmt: skip
OTHERS = {name: reason for reason, names in KINDS.items() for name in names.split()}


def vlm_packages(known: Iterable[str]) -> list[str]:
    """Return mlx-vlm's packages of language models that are not among mlx-lm's modules."""
    own = {name.replace("-", "_").lower() for name in known}
    return [
        m.name for m in pkgutil.iter_modules(models.__path__) if m.ispkg and m.name not in own and m.name not in OTHERS
    ]


def vlm_config(name: str) -> dict[str, Any]:
    """Return the tiny config.json of one of these, or of a module of mlx-lm that is newer than the table of its own."""
    if find_spec(f"mlx_lm.models.{name}") is not None:
        return {"model_type": name, **shrunk(import_module(f"mlx_lm.models.{name}").ModelArgs)}
    text = copy.deepcopy(CHANGES.get(name, {}))
    whole, vision, flat = text.pop("WHOLE", {}), text.pop("VISION", {}), text.pop("FLAT", False)
    return shrunk_package(name, text, whole, vision, flat)
