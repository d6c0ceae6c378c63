"""Models, data and rewards of the golden runs, made from fixed seeds and without this project's own code.

The tree that is recorded must not make its own inputs: a fault in it would change both, and hide.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from byte_tokenizer import CHATML, byte_tokenizer
from gguf import GGMLQuantizationType
from hf_to_gguf import gguf_tensors, write_gguf
from mlx.utils import tree_flatten
from PIL import Image
from tiny_recurrent import recurrent_model
from tiny_vision import vision_files

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 288,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
}
FOUR_BITS = {"group_size": 32, "bits": 4, "mode": "affine"}
EXPERTS = {
    **LLAMA, "model_type": "qwen3_moe", "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 32, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
# name: (configuration, seed)
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": (LLAMA, 0),
    "untied": ({**LLAMA, "tie_word_embeddings": False}, 1),
    "teacher": (LLAMA, 7),
    "experts": (EXPERTS, 2),
}
REWARD = """
def odd(completions, **columns):
    return [sum(ord(letter) % 2 for letter in text) / max(1, len(text)) for text in completions]
"""
TEXT = "In the beginning there was a word, and number {} followed it; so it went on until the evening.\n\n"


def make_inputs(folder: Path) -> dict[str, str]:
    """Write all inputs into a folder.

    Args:
        folder: is made.

    Returns:
        SHA-256 of each file, by its name in the folder.
    """
    folder.mkdir(parents=True)
    with mx.stream(mx.cpu):
        for name, (config, seed) in MODELS.items():
            write_model(folder / name, random_model(config, seed), config)
        write_model(folder / "recurrent", *recurrent_model("falcon_h1", 3))
        small = random_model(LLAMA, 0)
        nn.quantize(small, **FOUR_BITS)
        write_model(folder / "tiny-4bit", small, {**LLAMA, "quantization": FOUR_BITS})
        write_gguf(
            folder / "tiny.gguf", gguf_tensors(random_model(LLAMA, 5), "llama", LLAMA), "llama", LLAMA,
            {"rope.dimension_count": 16, "tokenizer.chat_template": CHATML}, GGMLQuantizationType.Q4_1,
        )  # fmt: skip
        write_vision_model(folder / "smolvlm", "smolvlm")
    (folder / "pictures").mkdir()
    for number in range(12):
        Image.new("RGB", (40 + number, 30 + 2 * number), (20 * number, 200 - 10 * number, 90)).save(
            folder / "pictures" / f"{number}.png"
        )
    for name, rows in data_rows().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "book.txt").write_text("".join(TEXT.format(n * n) for n in range(60)), encoding="utf-8")
    (folder / "reward.py").write_text(REWARD, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def random_model(config: dict[str, Any], seed: int) -> nn.Module:
    """Return a float32 model with random weights; norms and biases are random, too, which ones and zeros would hide."""
    mx.random.seed(seed)
    build, arguments = mlx_lm.utils._get_classes(config)
    model = build(arguments.from_dict(config))
    for name, value in tree_flatten(model.parameters()):
        if name.endswith(("norm.weight", "bias")):
            model.load_weights([(name, value + 0.1 * mx.random.normal(value.shape))], strict=False)
    mx.eval(model.parameters())
    return model


def write_vision_model(folder: Path, family: str) -> None:
    """Write a tiny random vision-language model, under mlx-vlm's names."""
    from mlx_vlm.utils import get_model_and_args, update_module_configs  # slow to import

    config = vision_files(family, folder)
    module, _ = get_model_and_args(config)
    settings = update_module_configs(module.ModelConfig.from_dict(config), module, config, ["text", "vision"])
    mx.random.seed(4)
    weights = {
        name: 0.15 * mx.random.normal(value.shape) if value.ndim > 1 else 1 + 0.1 * mx.random.normal(value.shape)
        for name, value in sorted(tree_flatten(module.Model(settings).parameters()))
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})


def write_model(folder: Path, model: nn.Module, config: dict[str, Any]) -> None:
    """Write a Hugging Face folder."""
    folder.mkdir()
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": tokenizer.eos_token_id}))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"})


def data_rows() -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each data file."""
    said = [{"instruction": f"Say {n % 7}. #{n}", "input": "", "output": "abc" * (1 + n % 5)} for n in range(40)]
    pairs = [
        {"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": "No idea" + "!" * (n % 5)} for n in range(24)
    ]
    chats = [
        {
            "messages": [
                {"role": "system", "content": "Answer briefly."},
                {"role": "user", "content": f"Add {n}"},
                {"role": "assistant", "content": str(n + 1) * (1 + n % 3)},
                {"role": "user", "content": "And again?"},
                {"role": "assistant", "content": str(n + 2)},
            ]
        }
        for n in range(24)
    ]
    return {
        "said": said,
        "chats": chats,
        "pairs": pairs,
        "rated": [
            {"prompt": row["prompt"], "completion": row[name], "label": name == "chosen"}
            for row in pairs
            for name in ("chosen", "rejected")
        ],
        "labeled": [{"text": f"{'warm' * (n % 3)} day {n}", "label": "abc"[n % 3]} for n in range(30)],
        "searches": [
            {"query": f"Where is {n}?", "positive": f"{n} is here.", "negatives": [f"{n}, no.", f"Not {n + 1}."]}
            for n in range(24)
        ],
        "pictures/train": [
            {"prompt": "Which?", "completion": "abc"[n % 3] * 2, "images": [f"{n}.png"]} for n in range(12)
        ],
        "pictures/pairs": [
            {"prompt": "Which?", "chosen": "abc"[n % 3] * 2, "rejected": "z" * (1 + n % 3), "images": [f"{n}.png"]}
            for n in range(12)
        ],
        "pictures/prompts": [{"prompt": "Which?", "answer": "abc"[n % 3], "images": [f"{n}.png"]} for n in range(12)],
        "prompts": [{"prompt": f"{n}+1=", "answer": str(n + 1), "level": n % 3} for n in range(20)],
    }
