"""Which layer wraps which base: form by kind of base."""

from __future__ import annotations

import mlx.nn as nn

from mlx_lora.adapters.dora import DoRAEmbedding, DoRALinear
from mlx_lora.adapters.layers import LoRAEmbedding, LoRALinear
from mlx_lora.adapters.moe import DoRASwitchLinear, LoRASwitchLinear
from mlx_lora.adapters.parts import EMBEDDING, LINEAR, SWITCH, is_exactly

Adapter = LoRALinear | LoRAEmbedding | LoRASwitchLinear | DoRALinear | DoRAEmbedding | DoRASwitchLinear

DORA = (DoRALinear, DoRAEmbedding, DoRASwitchLinear)
ADAPTERS = (LoRALinear, LoRAEmbedding, LoRASwitchLinear, *DORA)
EMBEDDING_ADAPTERS = (LoRAEmbedding, DoRAEmbedding)
EXPERT_ADAPTERS = (LoRASwitchLinear, DoRASwitchLinear)
# Their call takes the dropout's key.
WITH_DROPOUT_KEY = (LoRALinear, DoRALinear, *EXPERT_ADAPTERS)
# Form -> the layer for a linear base, an embedding, a mixture's experts.
FORMS = {
    "lora": (LoRALinear, LoRAEmbedding, LoRASwitchLinear),
    "dora": (DoRALinear, DoRAEmbedding, DoRASwitchLinear),
}


def adapter_class(base: nn.Module, form: str = "lora") -> type[Adapter] | None:
    """Return the layer that wraps `base` in a form of FORMS, or None when none fits it."""
    for kinds, layer in zip((LINEAR, EMBEDDING, SWITCH), FORMS[form], strict=True):
        if is_exactly(base, kinds):
            return layer
    return None


def base_of(layer: Adapter) -> nn.Module:
    """Return the frozen layer inside an adapter layer."""
    return layer.embedding if isinstance(layer, EMBEDDING_ADAPTERS) else layer.linear
