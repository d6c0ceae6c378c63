"""Compare the planner's predictions for Macs with training figures that others have published.

    python benchmarks/plan_published.py

We measured none of these figures, and most are of other trainers with other kernels, padding and logits. Models are
outlined from their published settings; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import sys

import mlx_lora  # noqa: F401  loads the BLAS before mlx.core

import mlx.core as mx  # isort: skip

from mlx_lora.config.load import train_settings
from mlx_lora.models.meta import outline_of_config
from mlx_lora.planner.chips import find_chip
from mlx_lora.planner.fit import run_of
from mlx_lora.planner.memory import plan_memory
from mlx_lora.planner.speed import listed_ceilings, step_seconds
from mlx_lora.trainer.fit import outlined_shape

PACKED = {"quantization": {"group_size": 64, "bits": 4}}


def config(kind: str, width: int, blocks: int, feed: int, heads: int, keys: int, vocabulary: int, tied: bool) -> dict:
    """Return the settings that decide a shape, with config.json's names."""
    return {
        "model_type": kind, "hidden_size": width, "num_hidden_layers": blocks, "intermediate_size": feed,
        "num_attention_heads": heads, "num_key_value_heads": keys, "head_dim": 128, "vocab_size": vocabulary,
        "tie_word_embeddings": tied, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 32768,
    }  # fmt: skip


QWEN3_8B = config("qwen3", 4096, 36, 12288, 32, 8, 151936, False)
QWEN3_4B = config("qwen3", 2560, 36, 9728, 32, 8, 151936, True)
LLAMA_3B = config("llama", 3072, 28, 8192, 24, 8, 128256, True)
MISTRAL_7B = config("llama", 4096, 32, 14336, 32, 8, 32000, False)


@dataclasses.dataclass(frozen=True)
class Published:
    """One published figure: its source, machine, run and result."""

    who: str
    chip: str
    memory_gib: int
    model: str
    config: dict
    rows: int
    width: int
    mode: str = "none"
    num_layers: int = -1
    tokens_per_s: float | None = None
    peak_gb: float | None = None
    note: str = ""


FIGURES = (
    Published("mlx-train-perf", "M1 Max", 32, "Qwen3-8B-4bit", QWEN3_8B | PACKED, 1, 2048, "block", tokens_per_s=97.8),
    Published(
        "mlx-train-perf", "M1 Max", 32, "same, packed", QWEN3_8B | PACKED, 1, 4096, "block", tokens_per_s=99.2,
        note="Alpaca in rows of 4,096",
    ),
    Published(
        "mlx-train-perf", "M1 Max", 32, "same, unpacked", QWEN3_8B | PACKED, 1, 160, "block", tokens_per_s=33.1,
        note="Alpaca; 160 is our guess",
    ),
    Published(
        "mlx-train-perf", "M1 Max", 32, "Llama-3.2-3B-4bit, packed", LLAMA_3B | PACKED, 1, 4096, "block",
        tokens_per_s=226.3, note="checkpointing is our guess",
    ),
    Published(
        "mlx-train-perf", "M1 Max", 32, "same, unpacked", LLAMA_3B | PACKED, 1, 160, "block", tokens_per_s=76.7,
        note="160 and checkpointing are our guess",
    ),
    Published(
        "mlx-lm LORA.md", "M1 Max", 32, "Mistral-7B, 4 layers", MISTRAL_7B, 1, 128, num_layers=4, tokens_per_s=250,
        note="128 is our guess",
    ),
    Published(
        "mlx-examples", "M2 Ultra", 64, "Mistral-7B, 16 layers", MISTRAL_7B, 4, 128, num_layers=16, tokens_per_s=475,
        note="model, layers, 4 x 128 are our guess",
    ),
    Published(
        "mlx-lm#1206", "M3 Pro", 18, "Qwen3-4B-4bit, 16 layers", QWEN3_4B | PACKED, 4, 512, "block", num_layers=16,
        peak_gb=7.9, note="512 is our guess; whole logits there",
    ),
)  # fmt: skip


def row(figure: Published) -> str:
    """Return a table row with a published figure and its prediction."""
    settings = train_settings({"model": "x", "rank": 8, "num_layers": figure.num_layers})
    chip = find_chip(figure.chip)
    machine = chip.machine(figure.memory_gib)
    shape = outlined_shape(outline_of_config(figure.config, mx.bfloat16), settings)
    run = run_of(settings, figure.rows, figure.width, figure.mode)
    speed = run.positions / step_seconds(shape, run, machine, listed_ceilings(chip))[0]
    plan = plan_memory(shape, run, machine)
    published = f"{figure.tokens_per_s:g}" if figure.tokens_per_s else "-"
    ratio = f"{speed / figure.tokens_per_s:.2f}" if figure.tokens_per_s else "-"
    peak = f"{figure.peak_gb:g}" if figure.peak_gb else "-"
    return (
        f"| {figure.who} | {figure.chip} {figure.memory_gib} GB | {figure.model}, {figure.rows} x {figure.width}, "
        f"{figure.mode} | {published} | {speed:.0f} | {ratio} | {peak} | {plan.peak_bytes / 1e9:.1f} | {figure.note} |"
    )


def main() -> int:
    """Print Markdown."""
    print("| who | chip | run | tokens/s, theirs | ours, predicted | ratio | GB, theirs | ours, predicted | guessed |")
    print("|---|---|---|---|---|---|---|---|---|")
    for figure in FIGURES:
        print(row(figure))
    return 0


if __name__ == "__main__":
    sys.exit(main())
