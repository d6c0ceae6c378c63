"""Print the README's table of what fits a Mac, made by `mlx-lora plan --all-chips --json` from model configs alone.

python scripts/fits_table.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED = {
    "vocab_size": 248320, "head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "full_attention_interval": 4,
    "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}  # fmt: skip
QUANTIZATION = {"group_size": 64, "bits": 4}
EXPERTS = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
# Published sizes of Qwen3.5: hidden, blocks, intermediate, heads, key heads, linear value heads, tied head. Sources: the model cards
# (4B, 9B), THUDM/slime scripts/models (0.8B, 27B, 35B-A3B). Qwen3.6 and Qwen3.8 have the shapes of 3.5 at 27B and 35B-A3B.
SIZES = {
    "Qwen3.5-0.8B": (1024, 24, 3584, 8, 2, 16, True),
    "Qwen3.5-4B": (2560, 32, 9216, 16, 4, 32, True),
    "Qwen3.5-9B": (4096, 32, 12288, 16, 4, 32, False),
    "Qwen3.5-27B": (5120, 64, 17408, 24, 4, 48, False),
    "Qwen3.5-35B-A3B": (2048, 40, 512, 16, 2, 32, False),
}
MEMORY_GB = (8, 16, 24, 32, 64, 128)
FLAGS = ("--all-chips", "--json")


def config_of(name: str) -> dict:
    """Return the config.json of a model in 4 bits."""
    hidden, blocks, intermediate, heads, keys, values, tied = SIZES[name]
    mixture = name.endswith("A3B")
    text = {**SHARED, "hidden_size": hidden, "num_hidden_layers": blocks, "intermediate_size": intermediate,
            "num_attention_heads": heads, "num_key_value_heads": keys, "linear_num_value_heads": values,
            "tie_word_embeddings": tied, **(EXPERTS if mixture else {})}  # fmt: skip
    kind = "qwen3_5_moe" if mixture else "qwen3_5"
    return {"model_type": kind, "text_config": {**text, "model_type": f"{kind}_text"}, "quantization": QUANTIZATION}


def chips_of(config: dict, *flags: str) -> list[dict]:
    """Return what the planner says of a model on every chip and memory size."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "mlx_lora", "plan", "--model", str(path), *FLAGS, *flags]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)["chips"]


def cell(chips: list[dict]) -> str:
    """Return one cell: the most that a run takes, and the speeds of the slowest and the fastest chip."""
    if not all(chip["fits"] for chip in chips):
        return "no"
    speeds = sorted(round(chip["tokens_per_s"], -1 if chip["tokens_per_s"] >= 100 else 0) for chip in chips)
    peak = max(chip["peak_bytes"] for chip in chips) / 1e9
    disk = " (from disk)" if any(chip["reading"] for chip in chips) else ""
    return f"{peak:.1f} GB, {speeds[0]:,.0f}-{speeds[-1]:,.0f}{disk}"


def of_memory(chips: list[dict], memory_gb: int) -> list[dict]:
    """Return the chips that are sold with this memory."""
    return [chip for chip in chips if round(chip["memory_bytes"] / 2**30) == memory_gb]


def table() -> str:
    """Return the whole table as Markdown."""
    planned = {name: chips_of(config_of(name)) for name in SIZES}
    lines = ["| memory | " + " | ".join(SIZES) + " |", "|---|" + "---|" * len(SIZES)]
    for memory_gb in MEMORY_GB:
        row = [cell(of_memory(chips, memory_gb)) for chips in planned.values()]
        lines.append(f"| {memory_gb} GB | " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
