"""Translate between PEFT's names of layers and tensors and the paths in an mlx-lm model."""

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


# model_type -> prefixes of paths, mlx-lm's and transformers'; the first match counts.
RENAMED = {
    "gptj": (("model.", "transformer."),),
    "gpt2": (("model.", "transformer."),),
    "gpt_neox": (("model.h.", "gpt_neox.layers."), ("model.embed_out", "lm_head"), ("model.", "gpt_neox.")),
    "nemotron_h": (("backbone.", "model."),),
}


def own_path(layer: str, modules: dict[str, nn.Module]) -> str | None:
    """Return mlx-lm's path of a layer: the same, with a family's prefix, or with a multimodal wrapper's parts swapped."""
    other = re.sub(r"^model\.language_model\.", "language_model.model.", layer)
    renamed = [
        ours + layer.removeprefix(theirs)
        for pairs in RENAMED.values()
        for ours, theirs in pairs
        if layer.startswith(theirs)
    ]
    return next((path for path in (layer, other, *renamed) if path in modules), None)


def peft_path(path: str, kind: str) -> str:
    """Return transformers' path of a layer.

    Args:
        path: mlx-lm's.
        kind: the config's model_type.
    """
    for ours, theirs in RENAMED.get(kind, ()):
        if path.startswith(ours):
            return theirs + path.removeprefix(ours)
    return re.sub(r"^language_model\.model\.", "model.language_model.", path)
