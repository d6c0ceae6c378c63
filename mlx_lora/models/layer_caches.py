"""Read from a model's own caches what its layers keep of a row while they generate.

The model is called on two tokens without computing them: the caches then hold arrays that have a shape, and a dtype, but no
numbers. So latent attention, shared keys, sliding windows and recurrent states count as what they are.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import CacheList, KVCache, RotatingKVCache, make_prompt_cache

from mlx_lora.models.folder import FOREIGN_ERRORS, is_foreign, short
from mlx_lora.models.unchanged import left_unchanged
from mlx_lora.planner.shapes import LayerCache, NotKnown


def layer_caches(model: nn.Module) -> tuple[LayerCache, ...]:
    """Return what each layer keeps of a row.

    Args:
        model: an mlx-lm model with or without adapters; its arrays need not be computed yet.

    Raises:
        NotKnown: the model cannot be called, or one of its caches cannot be read.
    """
    training = model.training
    model.eval()
    try:
        with left_unchanged(model):
            caches = make_prompt_cache(model)
            model(mx.zeros((1, 2), mx.int32), cache=caches)
            return tuple(found for cache in caches for found in _kept_by(cache))
    except FOREIGN_ERRORS as error:
        if not is_foreign(error):
            raise
        raise NotKnown(f"keys and values of answers: {short(error, 100)}") from error
    finally:
        model.train(training)


def _kept_by(cache: Any) -> list[LayerCache]:
    """Return what a cache keeps, one for each part of it."""
    if isinstance(cache, CacheList):
        return [found for part in cache.caches for found in _kept_by(part)]
    if not isinstance(cache, KVCache | RotatingKVCache):
        return [LayerCache(fixed_bytes=cache.nbytes)]
    if cache.keys is None or cache.values is None:  # the layer uses another one's
        return []
    token_bytes = sum(array.nbytes // array.shape[2] for array in (cache.keys, cache.values))
    return [LayerCache(token_bytes, cache.max_size if isinstance(cache, RotatingKVCache) else None)]
