"""How PEFT names layers and tensors, and where those are in an mlx-lm model."""

from __future__ import annotations

import re

import mlx.nn as nn

PREFIX = "base_model.model."
TENSOR = re.compile(
    re.escape(PREFIX)
    + r"(?P<layer>.+)\.(?:lora_(?P<side>[AB])(?:\.weight)?|lora_(?P<gains>E)|lora_embedding_(?P<embedding>[AB])"
    + r"|lora_(?P<magnitude>m)agnitude_vector(?:\.weight)?)"
)

BIAS = re.compile(re.escape(PREFIX) + r"(?P<layer>.+?)(?:\.base_layer)?\.bias")
COPY = re.compile(re.escape(PREFIX) + r"(?P<layer>(?:.+\.)?(?:embed_tokens|lm_head))(?:\.base_layer)?\.weight")


def own_path(layer: str, modules: dict[str, nn.Module]) -> str | None:
    """Return mlx-lm's path of a layer: the same, or with a multimodal wrapper's two parts exchanged."""
    other = re.sub(r"^model\.language_model\.", "language_model.model.", layer)
    return next((path for path in (layer, other) if path in modules), None)


def peft_path(path: str) -> str:
    """Return transformers' path of a layer, the other way."""
    return re.sub(r"^language_model\.model\.", "model.language_model.", path)
