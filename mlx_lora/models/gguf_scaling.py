"""Convert RoPE scaling for long contexts between GGUF's settings and tensors and config.json's fields.

linear, YaRN   settings under rope.scaling
Llama 3        rope_freqs.weight, (head_dim / 2,) divisors of the frequencies
LongRoPE       rope_factors_short.weight and rope_factors_long.weight, the same for short and long contexts
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from mlx_lora.models.gguf_keys import Settings

ROPE_FACTORS = "rope_freqs.weight"
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# llama.cpp fixes these fields of YaRN to these values, and GGUF files have no keys for them. GPT-OSS' `truncate` is not
# here because neither mlx-lm nor llama.cpp reads it.
YARN_DEFAULTS = {"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0, "attention_factor": None}
Values = dict[str, Any]


def read_scaling(settings: Settings) -> dict[str, Any]:
    """Return the config's field for linear or YaRN scaling, {} if the file has none."""
    kind = settings.text("rope.scaling.type", "none")
    if kind == "none":
        return {}
    scaling: dict[str, Any] = {"rope_type": kind, "factor": settings.number("rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = settings.count("rope.scaling.original_context_length")
    elif kind != "linear":
        settings.problems.append(f"{settings.architecture}.rope.scaling.type is {kind!r}, not linear or yarn")
    return {"rope_scaling": scaling}


def refuse_scaling(settings: Settings, model_type: str) -> None:
    """Note a problem if the file scales RoPE, for a model type that does not support it in mlx-lm."""
    kind = settings.text("rope.scaling.type", "none")
    if kind != "none":
        settings.problems.append(
            f"{settings.architecture}.rope.scaling.type is {kind!r}, but mlx-lm's {model_type} has no scaling"
        )


def kind_of(args: Values) -> str:
    """Return the kind of scaling in a model's arguments, `default` if there is none."""
    scaling = args.get("rope_scaling") or {}
    return scaling.get("type") or scaling.get("rope_type") or "default"


def write_scaling(args: Values, problems: list[str]) -> Values:
    """Return linear or YaRN scaling as GGUF settings; note a problem for another kind."""
    kind, scaling = kind_of(args), args.get("rope_scaling") or {}
    if kind == "default":
        return {}
    if kind not in ("linear", "yarn"):
        problems.append(f"rope_scaling {kind}")
        return {}
    settings = {"rope.scaling.type": kind, "rope.scaling.factor": float(scaling["factor"])}
    if kind == "yarn":
        # mlx-lm's default if the config has none.
        settings["rope.scaling.original_context_length"] = scaling.get("original_max_position_embeddings", 4096)
        problems += [
            f"rope_scaling.{key} {scaling[key]}"
            for key, value in YARN_DEFAULTS.items()
            if scaling.get(key, value) != value
        ]
    return settings


def read_llama3_scaling(settings: Settings, config: dict[str, Any]) -> dict[str, Any]:
    """Return the config's field for Llama 3's scaling, derived from the file's frequency divisors."""
    factors = settings.values(ROPE_FACTORS)
    if factors is None or (factors == 1).all():
        return {}
    factor = float(factors.max())
    expected = llama3_rope_factors(config["head_dim"], config["rope_theta"], factor)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
        settings.problems.append(f"{ROPE_FACTORS} is not Llama 3's RoPE scaling by {factor:g}")
        return {}
    return {"rope_scaling": {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}}


def llama3_factors(args: Values, problems: list[str]) -> dict[str, np.ndarray]:
    """Return Llama 3's scaling as {tensor name: frequency divisors}."""
    scaling = args["rope_scaling"]
    problems += [
        f"rope_scaling.{key} {scaling[key]}, not {value:g}"
        for key, value in LLAMA3_ROPE.items()
        if scaling.get(key, value) != value
    ]
    factors = llama3_rope_factors(args["head_dim"], args["rope_theta"], scaling["factor"])
    return {ROPE_FACTORS: factors.astype(np.float32)}


def llama3_rope_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """Return the divisors that llama.cpp's converter stores as rope_freqs.weight for Llama 3's scaling.

    Returns:
        (head_dim / 2,) float64: 1 for short wavelengths, `factor` for long ones, and a smooth transition between.
    """
    low, high = LLAMA3_ROPE["low_freq_factor"], LLAMA3_ROPE["high_freq_factor"]
    context = LLAMA3_ROPE["original_max_position_embeddings"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((context / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def read_longrope(settings: Settings, config: dict[str, Any]) -> dict[str, Any]:
    """Return Phi-3's config fields for LongRoPE: the original context, and the factors if the file has any."""
    short, long = settings.values(SHORT_FACTORS), settings.values(LONG_FACTORS)
    whole = config["max_position_embeddings"]
    original = settings.count("rope.scaling.original_context_length", whole)
    fields: dict[str, Any] = {"original_max_position_embeddings": original}
    if short is None and long is None:
        return fields
    pairs = settings.count("rope.dimension_count", config["head_dim"]) // 2
    if original < 2:
        settings.problems.append(f"{settings.architecture}.rope.scaling.original_context_length is {original}")
        return fields
    if short is None or long is None or not len(short) == len(long) == pairs:
        settings.problems.append(f"{SHORT_FACTORS} and {LONG_FACTORS} are not {pairs} numbers each")
        return fields
    wanted = longrope_attention_factor(whole, original)
    found = settings.number("rope.scaling.attn_factor", 1.0)
    if not math.isclose(found, wanted, rel_tol=1e-4):
        settings.problems.append(f"{settings.architecture}.rope.scaling.attn_factor is {found}, not {wanted:.6g}")
    # float32's shortest decimal is the number that the config had.
    lists = {
        name: [float(str(value)) for value in values]
        for name, values in (("short_factor", short), ("long_factor", long))
    }
    return fields | {"rope_scaling": {"type": "longrope", **lists}}


def write_longrope(args: Values, problems: list[str]) -> tuple[Values, dict[str, np.ndarray]]:
    """Return LongRoPE as GGUF settings and the two tensors of factors (none without scaling)."""
    original, whole = args["original_max_position_embeddings"], args["max_position_embeddings"]
    settings: Values = {"rope.scaling.original_context_length": original}
    kind, scaling = kind_of(args), args.get("rope_scaling") or {}
    if kind == "default":
        return settings, {}
    if kind not in ("longrope", "su"):
        problems.append(f"rope_scaling {kind}")
        return settings, {}
    settings["rope.scaling.attn_factor"] = longrope_attention_factor(whole, original)
    factors = {SHORT_FACTORS: scaling["short_factor"], LONG_FACTORS: scaling["long_factor"]}
    return settings, {name: np.array(values, np.float32) for name, values in factors.items()}


def longrope_attention_factor(whole: int, original: int) -> float:
    """Return the factor for queries and keys in a model extended from `original` to `whole` positions.

    Source: LongRoPE, arXiv 2402.13753; the factor is that of Phi-3's published code.
    """
    ratio = whole / original
    return math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
