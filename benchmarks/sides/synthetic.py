"""Writes a random llama folder and text rows of one length, for benchmarks/scaling.py.

Weights are random: cost depends on shapes alone. The tokenizer makes one token of each byte, so a row's length
in tokens is known; the model's vocabulary may be larger than the tokenizer's.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import mlx_lora  # isort: skip  (first: it gives MLX a fast BLAS)
import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from shared import read_job, write_result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def write_model(folder: Path, job: dict[str, Any]) -> int:
    """Write config, float32 weights and tokenizer; return the weights' bytes."""
    folder.mkdir(parents=True)
    hidden = job["hidden"]
    config = {
        "model_type": "llama", "hidden_size": hidden, "num_hidden_layers": job["layers"], "intermediate_size": 3 * hidden,
        "num_attention_heads": max(1, hidden // 64), "num_key_value_heads": max(1, hidden // 128), "rms_norm_eps": 1e-5,
        "vocab_size": job["vocabulary"], "rope_theta": 10000.0, "tie_word_embeddings": True,
        "max_position_embeddings": 1 << 17,
    }  # fmt: skip
    mx.random.seed(0)
    weights = dict(tree_flatten(llama.Model(llama.ModelArgs(**config)).parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    tokenizer.save_pretrained(folder)
    config["eos_token_id"] = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return sum(value.nbytes for value in weights.values())


def write_texts(file: Path, rows: int, tokens: int) -> None:
    """Write rows that are all different and, with their end token, `tokens` long."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(rows):
            out.write(json.dumps({"text": "".join(draw.choices("abcdefgh ", k=tokens - 2)) + "."}) + "\n")


if __name__ == "__main__":
    asked = read_job()
    weights_bytes = write_model(Path(asked["folder"]) / "model", asked)
    write_texts(Path(asked["folder"]) / "train.jsonl", asked["rows"], asked["sequence"])
    write_result(asked, {"weights_bytes": weights_bytes, "blas": mlx_lora.BLAS.name})
