"""Translate between PEFT's names and the paths in an mlx-lm model, and check the ranks that its patterns give the factors."""

from __future__ import annotations

import re
from typing import Any

import mlx.nn as nn
import regex

from mlx_lora.utils.errors import InputError

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
PATTERN_S = 1.0  # limit for matching a config's pattern with a layer's name, which takes microseconds


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


def names_layer(pattern: str, layer: str) -> bool:
    """Tell whether a PEFT pattern matches a layer.

    Raises:
        InputError: it is not a regular expression, or matching takes too long (`(.*)*x`). Python's matcher cannot be
            interrupted, so the `regex` package is used.
    """
    try:
        return regex.match(rf"(.*\.)?({pattern})$", layer, timeout=PATTERN_S) is not None
    except (regex.error, TimeoutError, RecursionError, OverflowError, MemoryError) as error:
        reason = "takes too long" if isinstance(error, TimeoutError) else str(error)
        raise InputError(f"the pattern {pattern[:80]!r}: {reason}; write the layer's name") from None


def rank_problems(config: dict[str, Any], found: dict[str, dict[str, str]], header: dict[str, Any]) -> list[str]:
    """Return that layers have factors of another rank than the config says: one of the two is another adapter's.

    Args:
        config: PEFT's adapter_config.json.
        found: layer -> side of the factors -> name of its tensor.
        header: of the file; has each tensor's shape.
    """
    if str(config.get("peft_type")).upper() == "ADALORA":  # whose ranks were cut, each layer's to another number
        return []
    patterns, usual = config.get("rank_pattern") or {}, config.get("r") or 8
    wrong = []
    for layer, sides in found.items():
        asked = next((rank for pattern, rank in patterns.items() if names_layer(pattern, layer)), usual)
        rank = header[sides["A"]]["shape"][0] if "A" in sides else asked
        if rank != asked:
            wrong.append(f"layer {layer} has factors of rank {rank}, but adapter_config.json says r {asked}")
    more = f" (and {len(wrong) - 1} more layers)" if len(wrong) > 1 else ""
    return [wrong[0] + more] if wrong else []
