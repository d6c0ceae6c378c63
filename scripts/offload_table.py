"""Print docs/memory.md's table of models that are larger than a Mac's memory, made by `mlx-lora plan` from model configs alone.

python scripts/offload_table.py
"""

from __future__ import annotations

import fits_table

# Published sizes. Source: config.json of openai/gpt-oss-20b and meta-llama/Llama-3.3-70B-Instruct on the hub. Experts are mxfp4 as
# published, and the other layers have 16 bits.
GPT_OSS = {"model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24, "intermediate_size": 2880,
           "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 32,
           "num_experts_per_tok": 4, "vocab_size": 201088, "rms_norm_eps": 1e-5, "sliding_window": 128,
           "rope_theta": 150000, "rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0,
           "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 4096},
           "layer_types": ["sliding_attention", "full_attention"] * 12, "tie_word_embeddings": False,
           "max_position_embeddings": 131072, "quantization_config": {"quant_method": "mxfp4"}}  # fmt: skip
LLAMA_70B = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672,
             "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
             "rms_norm_eps": 1e-5, "rope_theta": 500000, "tie_word_embeddings": False,
             "max_position_embeddings": 131072, "quantization": {"group_size": 64, "bits": 4}}  # fmt: skip
ATTENTION = ("--target-modules", "q_proj,k_proj,v_proj,o_proj")
MODELS = (
    *((name, fits_table.config_of(name), ()) for name in ("Qwen3.5-9B", "Qwen3.5-27B")),
    ("GPT-OSS-20B", GPT_OSS, ()),
    ("GPT-OSS-20B, attention adapted", GPT_OSS, ATTENTION),
    ("Llama-3.3-70B", LLAMA_70B, ()),
)
MEMORY_GB = (8, 16, 24, 32)


def cell(chips: list[dict]) -> str:
    """Return one cell: the peak, the speeds of the slowest and the fastest chip, and the most of the time that one waits."""
    words = fits_table.cell(chips)
    waits = [chip["reading"]["waiting_share"] for chip in chips if chip["reading"]]
    return words.replace("from disk", f"from disk, waiting {max(waits):.0%}") if waits else words


def table() -> str:
    """Return the whole table as Markdown."""
    lines = ["| model | read in a step | " + " | ".join(f"{size} GB" for size in MEMORY_GB) + " |"]
    lines.append("|---|---|" + "---|" * len(MEMORY_GB))
    for name, config, flags in MODELS:
        chips = fits_table.chips_of(config, *flags)
        read = max((chip["reading"]["bytes"] for chip in chips if chip["reading"]), default=0)
        row = [cell(fits_table.of_memory(chips, size)) for size in MEMORY_GB]
        lines.append(f"| {name} | {read / 1e9:.1f} GB | " + " | ".join(row) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
