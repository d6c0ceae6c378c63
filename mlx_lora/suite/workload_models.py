"""The models of the workloads: their hub ids, and their shapes, so that a plan needs no download.

The shapes are those of the published config.json files, reduced to what decides memory and speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SuiteModel:
    """A base model, in bfloat16 and in 4 bits.

    Attributes:
        name: in workload names and tables.
        float_id, packed_id: hub ids of the bfloat16 and the 4-bit model; None: no workload uses it.
        parameters: the published number of weights.
        config: the fields of config.json that decide its shape.
        quantization: of the 4-bit model.
    """

    name: str
    float_id: str | None
    packed_id: str | None
    parameters: float
    config: dict[str, Any]
    quantization: dict[str, Any]


AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}


def _config(model_type: str, width: int, blocks: int, inner: int, heads: int, key_heads: int, **more: Any) -> dict:
    return {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        **more,
    }


SMOLLM2 = SuiteModel(
    "smollm2-135m",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "mlx-community/SmolLM2-135M-Instruct-4bit",
    134.5e6,
    _config("llama", 576, 30, 1536, 9, 3, vocab_size=49152, tie_word_embeddings=True),
    AFFINE,
)
LLAMA_1B = SuiteModel(
    "llama-3.2-1b",
    "mlx-community/Llama-3.2-1B-Instruct-bf16",
    "mlx-community/Llama-3.2-1B-Instruct-4bit",
    1.236e9,
    _config("llama", 2048, 16, 8192, 32, 8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    AFFINE,
)
LLAMA_3B = SuiteModel(
    "llama-3.2-3b",
    "mlx-community/Llama-3.2-3B-Instruct-bf16",
    "mlx-community/Llama-3.2-3B-Instruct-4bit",
    3.213e9,
    _config("llama", 3072, 28, 8192, 24, 8, head_dim=128, vocab_size=128256, tie_word_embeddings=True),
    AFFINE,
)
QWEN3_4B = SuiteModel(
    "qwen3-4b",
    "mlx-community/Qwen3-4B-bf16",
    "mlx-community/Qwen3-4B-4bit",
    4.022e9,
    _config("qwen3", 2560, 36, 9728, 32, 8, head_dim=128, vocab_size=151936, tie_word_embeddings=True),
    AFFINE,
)
QWEN3_8B = SuiteModel(
    "qwen3-8b",
    "mlx-community/Qwen3-8B-bf16",
    "mlx-community/Qwen3-8B-4bit",
    8.191e9,
    _config("qwen3", 4096, 36, 12288, 32, 8, head_dim=128, vocab_size=151936, tie_word_embeddings=False),
    AFFINE,
)
GEMMA3_1B = SuiteModel(
    "gemma-3-1b",
    "mlx-community/gemma-3-1b-it-bf16",
    "mlx-community/gemma-3-1b-it-4bit",
    1.0e9,
    _config(
        "gemma3_text",
        1152,
        26,
        6912,
        4,
        1,
        head_dim=256,
        vocab_size=262144,
        query_pre_attn_scalar=256,
        rope_local_base_freq=10000.0,
        sliding_window=512,
        sliding_window_pattern=6,
    ),
    AFFINE,
)
GPT_OSS_20B = SuiteModel(
    "gpt-oss-20b",
    None,
    "mlx-community/gpt-oss-20b-MXFP4-Q8",
    20.9e9,
    _config(
        "gpt_oss",
        2880,
        24,
        2880,
        64,
        8,
        head_dim=64,
        vocab_size=201088,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        tie_word_embeddings=False,
    ),
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
)
MODELS = {m.name: m for m in (SMOLLM2, LLAMA_1B, LLAMA_3B, QWEN3_4B, QWEN3_8B, GEMMA3_1B, GPT_OSS_20B)}
