"""Decode several rows together: check whether a model can, and join and separate the keys and values of rows.

mlx-lm's batches pad rows on the left, and some of its architectures do not expect that: they read one position for all rows,
or apply the mask to the wrong axis, which raises or, worse, changes the text. So a model is tried once, with rows of unlike
length, together and alone.

Shapes: B rows, T columns, S positions in the caches, V vocabulary.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models import gemma2
from mlx_lm.models.cache import (
    ArraysCache,
    BatchKVCache,
    BatchRotatingKVCache,
    CacheList,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from mlx_lora.compat.instances import become
from mlx_lora.rollouts.decode import TokenSteps
from mlx_lora.utils.errors import InputError, describe_gpu_failure, first_line

log = logging.getLogger(__name__)

# Tokens of the rows that are tried, few because this may run on a CPU. Three rows: few models have three heads of keys, with
# which an axis that is mistaken for the rows would raise no error.
TRIED_LENGTHS = (6, 3, 2)
TRIED_TOKENS = 50  # ids below this, which every vocabulary has
# The largest difference of the next token's distribution (total variation, 0 to 1) that rounding explains, in float32 and
# in 16 bits. A wrong mask or position changes much of it.
ROUNDING, ROUNDING_16 = 1e-3, 0.25
GROUPED, TRIED = "has_grouped_scores", "one_row_because"  # attributes of a model: what is known of it

Rows = Sequence[Sequence[Any]]


class GroupedRows(BatchKVCache):
    """Keys and values of rows, for scores of shape (B, heads of keys, heads that share them, T, S), as in Gemma 2."""

    def make_mask(self, N: int, return_array: bool = False, **window: Any) -> Any:  # mlx-lm's name
        """Return the mask, (B, 1, 1, T, S)."""
        mask = super().make_mask(N, return_array, **window)
        return mask[:, None] if isinstance(mask, mx.array) and mask.ndim == 4 else mask


def merge_rows(model: Any, rows: Rows) -> list[Any]:
    """Return the caches of a batch, one for each layer.

    Args:
        model: the rows' model, with or without `TokenSteps`.
        rows: the caches of each row, one for each layer.
    """
    merged = [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]
    if _has_grouped_scores(_plain(model)):
        for cache in merged:
            if type(cache) is BatchKVCache:
                become(cache, GroupedRows)
    return merged


def extract_row(cache: Any, place: int) -> Any:
    """Return a row's own cache of a layer; an empty one if the layer keeps nothing, as in blocks without attention."""
    if isinstance(cache, CacheList):
        return CacheList(*(extract_row(part, place) for part in cache.caches))
    if not cache.empty():
        return cache.extract(place)
    if isinstance(cache, ArraysCache):
        return ArraysCache(len(cache.cache))
    return RotatingKVCache(cache.max_size) if isinstance(cache, BatchRotatingKVCache) else KVCache()


def check_rows(model: Any, model_id: str, instead: str) -> None:
    """Refuse a model whose keys and values cannot be held for rows of a batch.

    Args:
        model: the model.
        model_id: how the user names it.
        instead: what to do instead.

    Raises:
        InputError: its caches cannot be merged.
    """
    kind = rowless(model)
    if kind:
        raise InputError(
            f"--model {model_id}: mlx-lm keeps its keys and values in a {kind}, which cannot hold a batch; {instead}"
        )


def rowless(model: Any) -> str:
    """Return the class of a cache that cannot be merged, empty if there is none."""
    return next((type(cache).__name__ for cache in make_prompt_cache(_plain(model)) if not hasattr(cache, "merge")), "")


def one_row_because(model: Any) -> str:
    """Return why rows of a model must be decoded one at a time, empty if they need not.

    The model is tried at the first call, which logs the reason; its caches can be merged.

    Args:
        model: the model, with or without an adapter.

    Raises:
        InputError: it cannot decode a single row either.
    """
    plain = _plain(model)
    if not hasattr(plain, TRIED):
        training = plain.training
        plain.eval()
        try:
            why = _try_rows(plain)
        finally:
            plain.train(training)
        setattr(plain, TRIED, why)
        if why:
            log.warning(
                "--model: mlx-lm's code for it cannot decode several rows together (%s); they are decoded one at a time",
                why,
            )
    return getattr(plain, TRIED)


def _try_rows(model: nn.Module) -> str:
    prompts = [
        [(7 * place * place + 3 * place + number) % TRIED_TOKENS for place in range(length)]
        for number, length in enumerate(TRIED_LENGTHS, 1)
    ]
    try:
        rows = [_begun(model, prompt) for prompt in prompts]
        last = [prompt[-1] for prompt in prompts]
        alone = mx.concatenate(
            [_distributions(model, [token], [copy.deepcopy(row)]) for token, row in zip(last, rows, strict=True)]
        )
    except Exception as error:
        if describe_gpu_failure(error):
            raise
        raise InputError(
            f"--model: mlx-lm's code fails to generate from it ({_words(error)}); choose another"
        ) from error
    try:
        together = _distributions(model, last, rows)
    except Exception as error:
        if describe_gpu_failure(error):
            raise
        return _words(error)
    worst = 0.5 * mx.abs(together - alone).sum(axis=-1).max().item()
    return "" if worst <= _rounding(model) else "rows of unlike length change each other"


def _begun(model: nn.Module, prompt: Sequence[int]) -> list[Any]:
    """Return caches that hold a prompt without its last token."""
    caches = make_prompt_cache(model)
    model(mx.array([prompt[:-1]]), cache=caches)
    return caches


def _distributions(model: nn.Module, last: Sequence[int], rows: Rows) -> mx.array:
    """Return the distribution of the token after the last of each row, (B, V) float32."""
    logits = model(mx.array(list(last))[:, None], cache=merge_rows(model, rows))[:, -1]
    found = mx.softmax(logits.astype(mx.float32), axis=-1)
    mx.eval(found)
    return found


def _rounding(model: nn.Module) -> float:
    narrow = any(array.dtype in (mx.float16, mx.bfloat16) for _, array in tree_flatten(model.parameters()))
    return ROUNDING_16 if narrow else ROUNDING


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _plain(model: Any) -> Any:
    return model.model if isinstance(model, TokenSteps) else model


def _has_grouped_scores(model: Any) -> bool:
    if not hasattr(model, GROUPED):
        setattr(model, GROUPED, any(type(one) is gemma2.Attention and one.repeats > 1 for one in model.modules()))
    return getattr(model, GROUPED)
