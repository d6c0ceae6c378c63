"""Find how many token ids a model has rows for, by watching its embeddings, because a config may not say so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)


class Watched(nn.Module):
    """A mix-in for an embedding's class that records its calls."""

    seen: list[tuple[nn.Module, mx.array]]

    def __call__(self, tokens: mx.array) -> mx.array:
        self.seen.append((self, tokens))
        return super().__call__(tokens)


def embedding_rows(model: nn.Module, config: dict[str, Any]) -> int | None:
    """Return the number of rows of the token embedding: higher ids would read memory beyond it.

    The model is called with two tokens, but nothing is computed.

    Args:
        model: an mlx-lm model, adapted or not; for a multimodal one, this calls its text part.
        config: its config.json, used if the model does not call an embedding with the ids.

    Returns:
        The fewest rows of the embeddings that are called with the ids; else the config's number, None if it has none.
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
    """Watch the model's embeddings inside the block, by changing the class of these instances for its duration."""
    seen: list[tuple[nn.Module, mx.array]] = []
    embeddings: list[tuple[Any, type]] = [
        (module, type(module)) for module in model.modules() if isinstance(module, EMBEDDINGS)
    ]
    for module, own in embeddings:
        module.__class__ = type(own.__name__, (Watched, own), {"seen": seen})
    try:
        yield seen
    finally:
        for module, own in embeddings:
            module.__class__ = own
