"""The tiny configuration of each architecture module of mlx-lm, as its config.json would be published."""

from __future__ import annotations

import pkgutil

from mlx_lm import models

from architectures.families import DENSE, EXPERTS, LATENT_ATTENTION, RECURRENT, WINDOWS, WRAPPERS
from architectures.vlm import CHANGES, vlm_config, vlm_packages

CONFIGS = {**DENSE, **WINDOWS, **EXPERTS, **LATENT_ATTENTION, **RECURRENT, **WRAPPERS}
# Modules of mlx-lm's folder that other modules import: no architecture has their name.
PARTS = {
    "activations", "base", "bitlinear_layers", "cache", "gated_delta", "mla", "pipeline", "rope_utils", "ssm",
    "switch_layers",
}  # fmt: skip

# Heads that no config can tie, and heads that no config can untie: their `tie_word_embeddings` says which.
NEVER_TIED = {
    "Klear", "baichuan_m1", "dbrx", "deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v41", "glm4",
    "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_neox", "gpt_oss", "gptj", "helium", "kimi_k25", "kimi_vl",
    "llama4", "longcat_flash", "longcat_flash_ngram", "mimo_v2_flash", "muse_spark", "nanochat", "nemotron_h", "phi",
    "phimoe", "phixtral", "pixtral", "plamo", "qwen", "qwen2_moe", "solar_open", "stablelm", "step3p5", "talkie",
}  # fmt: skip
ALWAYS_TIED = {
    "afm7", "cohere", "cohere2", "gemma", "gemma2", "gemma3n", "gpt2", "hunyuan", "lfm2", "lfm2-vl", "lfm2_moe",
    "lille-130m", "phi3small",
}  # fmt: skip
# These learn from the weights, not from the config, that they have no head of their own.
TIED_BY_THE_WEIGHTS = {"gemma3", "gemma3_text", "recurrent_gemma"}


def architecture_modules() -> list[str]:
    """Return the names of the installed mlx-lm's architecture modules, and of mlx-vlm's that only it has, in alphabetical order."""
    own = [m.name for m in pkgutil.iter_modules(models.__path__) if m.name not in PARTS]
    return sorted([*own, *vlm_packages(own)], key=str.lower)


def ways(name: str) -> tuple[bool, ...]:
    """Return the values of `tie_word_embeddings` that an architecture's configs may have."""
    if name in NEVER_TIED or (name in CHANGES and "tie_word_embeddings" not in str(vlm_config(name))):
        return (False,)
    return (True,) if name in ALWAYS_TIED else (False, True)
