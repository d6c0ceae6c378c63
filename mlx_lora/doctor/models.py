"""Models of random weights, tiny or of published shapes, and rows to train them on: nothing is downloaded.

The tokenizer has a token for each byte, so every text can be encoded, and ids are below 261 whatever the vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_lora.models.convert import build_model
from mlx_lora.models.folder import save_tensors

END, START, TEXT_END = "<|im_end|>", "<|im_start|>", "<|endoftext|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 288,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
TINY_4BIT = {"group_size": 32, "bits": 4, "mode": "affine"}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte, and ChatML's markers."""
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (TEXT_END, START, END)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=END, pad_token=TEXT_END, chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def random_model(
    config: dict[str, Any], dtype: mx.Dtype = mx.float32, layout: dict[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """Return a model of random weights in evaluation mode, the same each time.

    Args:
        config: config.json's entries.
        dtype: of the weights that are not quantized.
        layout: `group_size`, `bits` and `mode`; None: nothing is quantized.
        seed: of the weights.
    """
    mx.random.seed(seed)
    model = build_model(config)
    model.set_dtype(dtype)
    if layout is not None:
        nn.quantize(model, **layout)
    mx.eval(model.parameters())
    model.eval()
    return model


def write_model(
    folder: Path,
    config: dict[str, Any],
    dtype: mx.Dtype = mx.float32,
    layout: dict[str, Any] | None = None,
    seed: int = 0,
) -> Path:
    """Write a folder with a model of random weights and the byte tokenizer, unless it is there; arguments as in `random_model`."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    model = random_model(config, dtype, layout, seed)
    save_tensors(folder / "model.safetensors", dict(tree_flatten(model.parameters())))
    content = {**config, "eos_token_id": tokenizer.eos_token_id}
    if layout is not None:
        content["quantization"] = layout
    # Last, so that a folder with it is whole.
    (folder / "config.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder


def tiny_folder(work: Path, packed: bool = False) -> Path:
    """Return the folder of a model of two blocks."""
    return write_model(work / f"tiny{'-4bit' if packed else ''}", TINY, layout=TINY_4BIT if packed else None)


def other_tiny_folder(work: Path) -> Path:
    """Return the folder of a model of the same shape with other weights: a teacher."""
    return write_model(work / "tiny-teacher", TINY, seed=1)
