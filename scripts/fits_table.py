"""Print the README's table of what fits a Mac, made by `mlx-lora plan --all-chips --json` from model configs alone.

python scripts/fits_table.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SHARED = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "vocab_size": 151936, "rope_theta": 1000000, "head_dim": 128,
          "num_key_value_heads": 8, "max_position_embeddings": 40960,
          "quantization": {"group_size": 64, "bits": 4}}  # fmt: skip
# Published sizes: hidden, blocks, intermediate, heads, tied head. Source: config.json of each repository on the hub.
SIZES = {
    "Qwen3-0.6B": (1024, 28, 3072, 16, True),
    "Qwen3-4B": (2560, 36, 9728, 32, True),
    "Qwen3-8B": (4096, 36, 12288, 32, False),
    "Qwen3-14B": (5120, 40, 17408, 40, False),
    "Qwen3-32B": (5120, 64, 25600, 64, False),
}
MEMORY_GB = (8, 16, 24, 32, 64, 128)
FLAGS = ("--all-chips", "--json")


def config_of(name: str) -> dict:
    """Return the config.json of a model in 4 bits."""
    hidden, blocks, intermediate, heads, tied = SIZES[name]
    return {**SHARED, "hidden_size": hidden, "num_hidden_layers": blocks, "intermediate_size": intermediate,
            "num_attention_heads": heads, "tie_word_embeddings": tied}  # fmt: skip


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
