"""The classes of adapter layers: a variant of LoRA is a class in a file of its own, and a row here."""

from __future__ import annotations

import mlx.nn as nn

from mlx_lora.adapters.base import EMBEDDING, LINEAR, SWITCH, AdapterLayer, is_exactly
from mlx_lora.adapters.lora import (
    DoRAEmbedding,
    DoRALinear,
    DoRASwitchLinear,
    LoRAEmbedding,
    LoRALinear,
    LoRASwitchLinear,
)

_CLASSES = (
    LoRALinear,
    LoRAEmbedding,
    LoRASwitchLinear,
    DoRALinear,
    DoRAEmbedding,
    DoRASwitchLinear,
)
REGISTRY: dict[tuple[str, tuple[type, ...]], type[AdapterLayer]] = {(one.LAYER_TYPE, one.OVER): one for one in _CLASSES}
LAYER_TYPES = tuple(dict.fromkeys(name for name, _ in REGISTRY))


def adapter_class(base: nn.Module, layer_type: str = "lora") -> type[AdapterLayer] | None:
    """Return the class that wraps `base` in a layer of this type, or None if there is none."""
    kind = next((kind for kind in (LINEAR, EMBEDDING, SWITCH) if is_exactly(base, kind)), None)
    return None if kind is None else REGISTRY.get((layer_type, kind))
