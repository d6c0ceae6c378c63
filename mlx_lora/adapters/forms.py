"""Which layer wraps which base: form by kind of base."""

from __future__ import annotations

import mlx.nn as nn

from mlx_lora.adapters.bases import EMBEDDING, LINEAR
from mlx_lora.adapters.dora import DoRAEmbedding, DoRALinear
from mlx_lora.adapters.layers import LoRAEmbedding, LoRALinear

Adapter = LoRALinear | LoRAEmbedding | DoRALinear | DoRAEmbedding

ADAPTERS = (LoRALinear, DoRALinear, LoRAEmbedding, DoRAEmbedding)
EMBEDDING_ADAPTERS = (LoRAEmbedding, DoRAEmbedding)
DORA = (DoRALinear, DoRAEmbedding)
# Their call takes the dropout's key.
WITH_DROPOUT_KEY = (LoRALinear, DoRALinear)
FORMS = {"lora": (LoRALinear, LoRAEmbedding), "dora": (DoRALinear, DoRAEmbedding)}


def adapter_class(base: nn.Module, form: str = "lora") -> type[Adapter] | None:
    """Return the layer that wraps `base` in a form of FORMS, or None when none fits it."""
    linear, embedding = FORMS[form]
    if isinstance(base, LINEAR):
        return linear
    return embedding if isinstance(base, EMBEDDING) else None


def base_of(layer: Adapter) -> nn.Module:
    """Return the frozen layer inside an adapter layer."""
    return layer.embedding if isinstance(layer, EMBEDDING_ADAPTERS) else layer.linear
