"""The same architectures as transformers 5 builds and saves them, loaded here: its folders' keys, names and layouts.

A tiny random model of transformers, from the sweep's config with a base of RoPE that no class has as its default, is
saved by `save_pretrained`, loaded here, and its logits are compared with torch's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from byte_tokenizer import byte_tokenizer
from huggingface_hub.errors import StrictDataclassError

from architectures.build import SPREAD, tiny_config
from architectures.families import SLIDING_THEN_FULL
from architectures.trial import LOGIT_BAR, ROWS, WIDTH, NotRun, Trial, Wrong, relative
from architectures.vlm import CHANGES, HYBRID
from mlx_lora.config.settings import ModelSettings
from mlx_lora.models.load import load_base

THETA = 50000.0
MOST_PARAMETERS = 20_000_000
ABSENT = "not in transformers"
# What transformers raises for a config that it cannot use, one of another program's included.
BUILDING = (ValueError, AttributeError, TypeError, KeyError, ImportError, RuntimeError, StrictDataclassError)
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY_TOWER = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "depth": 1, "num_heads": 2, "out_hidden_size": 64, "embed_dim": 32, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0], "width": 32, "layers": 1, "heads": 2,
}  # fmt: skip
ONE_ROPE = {kind: {"rope_type": "default", "rope_theta": THETA} for kind in SLIDING_THEN_FULL}
# What makes transformers' config say the same as the sweep's: other names of keys, and features that mlx-lm lacks.
EQUIVALENT: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 256},
    "internlm3": {"head_dim": 16},
    "olmo3": {"rope_parameters": ONE_ROPE},
    "ministral3": {"sliding_window": None, "layer_types": None},
    "mistral3": {"sliding_window": None, "layer_types": None},
    "mellum": {"rope_parameters": ONE_ROPE},
    "laguna": {"rope_parameters": ONE_ROPE},
    "minimax": {"model_type": "minimax_m2", "rotary_dim": 8},
    "phimoe": {"attention_bias": True, "lm_head_bias": True, "rope_scaling": None},
    "qwen2_moe": {"mlp_only_layers": [], "norm_topk_prob": False},
    "recurrent_gemma": {"rope_theta": 10000.0},
    "solar_open": {"first_k_dense_replace": 0},
    "longcat_flash": {"head_dim": 8},
    **{name: {"layer_types": HYBRID} for name in ("qwen3_5_text", "qwen3_5_moe_text", "minicpmv4_6")},
    "step3p7": {"use_head_wise_attn_gate": True},
    "flint": {"no_rope_layer_indices": [0, 1]},  # transformers rotates no layer with full attention
}
# Models of mlx-lm that compute something else than transformers, whoever saved them. Each was found by taking the cause
# out of the config, after which the logits agree; of MiniMax M3 it was not found.
GELU = "mlx-lm has another form of GELU than transformers"
INDEXER = "mlx-lm's indexer chooses other keys than transformers' where index_topk is less than the text's length"
OTHERWISE = {
    "deepseek_v32": INDEXER,
    "ernie4_5_moe": "mlx-lm chooses experts without their correction bias",
    "falcon_h1": "mlx-lm leaves key_multiplier out",
    "gemma2": "mlx-lm has no sliding window",
    "glm_moe_dsa": INDEXER,
    "glm5_next": INDEXER.replace("mlx-lm", "mlx-vlm"),
    "gpt_bigcode": GELU,
    "gpt_neox": GELU,
    "jamba": "mlx-lm divides the weights of the chosen experts by their sum, transformers does not",
    "mamba2": "mlx-lm normalizes all groups of features together, transformers each of n_groups",
    "minicpm3": "mlx-lm does not divide by hidden_size / dim_model_base before a tied head",
    "minimax_m3_vl": "the cause is not known",
    "starcoder2": GELU,
}


def by_transformers(folder: Path, name: str, tied: bool = False, **changes: Any) -> np.ndarray:
    """Write an architecture as transformers 5 saves it, and return its logits of `token_ids`, (B, T, V) float32.

    Args:
        folder: to write.
        name, tied: as `tiny_config` takes them.
        changes: of the config's keys; in its text part if it has one.

    Raises:
        NotRun: transformers does not have the architecture, or has it in another form.
    """
    import torch

    torch.manual_seed(0)
    try:
        made = config_of_transformers(name, tied, **changes)
        auto = auto_class(made)
        with torch.device("meta"):
            size = sum(p.numel() for p in auto.from_config(made).parameters())
        if size > MOST_PARAMETERS:
            raise NotRun(f"in transformers with another config ({size / 1e9:.1f} billion parameters from ours)")
        model = auto.from_config(made, attn_implementation="eager").float().eval()
    except BUILDING as error:
        raise NotRun(f"transformers cannot build it from our config ({type(error).__name__})") from error
    with torch.no_grad():
        for label, value in model.named_parameters():
            noise = torch.randn(value.shape)
            if value.ndim == 1 or label.rpartition(".")[2] in ("A_log", "bias"):
                value.add_(SPREAD * noise)
            else:
                value.copy_(noise / value.shape[-1] ** 0.5)
        try:
            logits = model(torch.tensor(np.array(token_ids()))).logits.numpy()
            model.save_pretrained(folder)
        except BUILDING as error:
            raise NotRun(f"transformers cannot run or save it from our config ({type(error).__name__})") from error
    byte_tokenizer().save_pretrained(folder)
    return logits


def config_of_transformers(name: str, tied: bool = False, **changes: Any) -> Any:
    """Return transformers' config of a tiny architecture; arguments as for `by_transformers`.

    Raises:
        NotRun: transformers does not have the architecture.
    """
    import transformers

    config = tiny_config(name, tied)
    text = config.get("text_config", config)
    text |= {"rope_theta": THETA} if "rope_theta" in text else {}
    for key, value in {**EQUIVALENT.get(name, {}), **changes}.items():
        text[key] = value
        if value is None:
            del text[key]
    kind = config.pop("model_type")
    if kind not in transformers.CONFIG_MAPPING:
        raise NotRun(ABSENT)
    if name in CHANGES and text is not config:
        text |= SPECIAL
    if "vision_config" in config and (config["vision_config"] or name in CHANGES):
        config["vision_config"] = {**TINY_TOWER, **config["vision_config"]} if name in CHANGES else dict(TINY_TOWER)
        if name == "qwen4_exp":
            config["vision_config"]["deepstack_visual_indexes"] = []
    return transformers.CONFIG_MAPPING[kind](**config, **SPECIAL)


def auto_class(config: Any) -> Any:
    """Return transformers' class of all models of a kind: with a tower for pictures if it always has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    kinds = [AutoModelForCausalLM, AutoModelForImageTextToText]
    if hasattr(config, "text_config"):
        kinds.reverse()
    return next((kind for kind in kinds if type(config) in kind._model_mapping), kinds[0])


def token_ids() -> mx.array:
    """Return the rows that logits are compared on, (B, T): ordinary tokens, longer than the tiny models' windows."""
    return mx.array(np.random.default_rng(0).integers(5, 250, (ROWS, WIDTH)))


def saved(trial: Trial) -> str | None:
    """Load the folder that transformers 5 saved: its logits are torch's."""
    folder = trial.work / "saved"
    expected = mx.array(by_transformers(folder, trial.name, trial.tied))
    base = load_base(ModelSettings(model=str(folder), dtype="float32"))
    difference = relative(base.model(token_ids()), expected)
    trial.facts["saved_error"] = difference
    if difference <= LOGIT_BAR:
        return None
    if trial.name in OTHERWISE:
        return f"logits differ: {OTHERWISE[trial.name]}"
    raise Wrong(f"logits differ by {difference:.1e}, allowed {LOGIT_BAR:.0e}")
