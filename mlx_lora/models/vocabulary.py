"""How many token ids a model has rows for: watched, not read from a config that may speak of another part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class Watched:
    """Mixed in front of an embedding's class: notes that it was called, and with what."""

    def __call__(self, tokens: mx.array) -> mx.array:
        self.seen.append((self, tokens))
        return super().__call__(tokens)


def embedding_rows(model: nn.Module, config: dict[str, Any]) -> int | None:
    """Return the rows of the embedding that token ids pick from: ids from there on would read foreign memory.

    Two tokens are sent through the model, and nothing is computed.

    Args:
        model: an mlx-lm model, adapted or not; a multimodal one's text part is what is called.
        config: its config.json, for models that embed in a way of their own.

    Returns:
        The fewest rows of the embeddings that the ids reach as they are; else what the config says, None if nothing.
    """
    ids = mx.zeros((1, 2), mx.int32)
    with _watched(model) as seen:
        model(ids)
    rows = [embedding.weight.shape[0] for embedding, tokens in seen if tokens is ids]
    if rows:
        return min(rows)
    said = config.get("text_config", config).get("vocab_size", config.get("vocab_size"))
    return said if isinstance(said, int) else None


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[tuple[nn.Module, mx.array]]]:
    """Watch the model's embeddings inside the block; only their instances' classes change, and change back."""
    seen: list[tuple[nn.Module, mx.array]] = []
    embeddings = [(module, type(module)) for module in model.modules() if isinstance(module, EMBEDDINGS)]
    for module, own in embeddings:
        module.__class__ = type(own.__name__, (Watched, own), {"seen": seen})
    try:
        yield seen
    finally:
        for module, own in embeddings:
            module.__class__ = own
