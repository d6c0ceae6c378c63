"""Keep the tower of a model that sees when its language model is converted or fused: its tensors stay as they are stored.

    model.safetensors     the language model, quantized or fused
    tower.safetensors     everything else: tower, connector

mlx-lm only reads `model*.safetensors`, so text alone never touches the tower. The index names both, for mlx-vlm.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from mlx_lora.models.folder import read_safetensors_header, save_tensors, write_json
from mlx_lora.utils.parsing import read_json

CONFIG_FILE, TOWER_FILE, INDEX_FILE = "config.json", "tower.safetensors", "model.safetensors.index.json"
# What tensors of a language model begin with, in models with a tower.
OF_LANGUAGE = (
    "language_model.", "model.language_model.", "model.text_model.", "text_model.", "lm_head.", "model.lm_head.",
    "model.layers.", "model.embed_tokens.", "model.norm.",
)  # fmt: skip


def copy_tower(source: Path, folder: Path) -> None:
    """Copy the tensors that are not of the language model, if the source's config has a `vision_config`.

    Args:
        source: a folder with the whole model, or one that was written like this.
        folder: has the language model and its index.
    """
    config = source / CONFIG_FILE
    vision = read_json(config, "download it again").get("vision_config") if config.is_file() else None
    if not isinstance(vision, dict):
        return
    tensors: dict[str, mx.array] = {}
    for file in sorted(source.glob("*.safetensors")):
        names = [name for name in read_safetensors_header(file) if not name.startswith(OF_LANGUAGE)]
        if names:
            stored = mx.load(str(file))  # lazy: the language model is not read
            tensors |= {name: stored[name] for name in names}  # pyright: ignore[reportArgumentType, reportCallIssue, reportIndexIssue]
    if not tensors:
        return
    save_tensors(folder / TOWER_FILE, tensors)
    written = read_json(folder / CONFIG_FILE, "convert the model again")
    write_json(folder / CONFIG_FILE, {**written, "vision_config": vision})  # mlx-lm leaves it out
    index = folder / INDEX_FILE
    if index.is_file():
        content = json.loads(index.read_text(encoding="utf-8"))
        content["weight_map"] |= dict.fromkeys(sorted(tensors), TOWER_FILE)
        content["metadata"]["total_size"] += sum(tensor.nbytes for tensor in tensors.values())
        write_json(index, content)
