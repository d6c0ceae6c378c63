"""Keys and values that are kept from one turn of an episode to the next, so that a turn computes only its new tokens.

When an answer ends, its row is taken out of the batch's caches. At the next turn the rows are joined again, and the tokens
since then, the answer's last one and the observation, are computed, for all rows together unless a layer is recurrent. Caches of a sliding window
are not kept: rows of unequal length share one window there, so each turn computes such models' episodes from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import ArraysCache, BatchKVCache, CacheList, KVCache

from mlx_lora.rollouts.row_batches import extract_row, merge_rows

Held = tuple[int, list[Any]]
"""The number of tokens whose keys and values are held, and one cache for each layer."""


@dataclass
class KeptCaches:
    """What is kept around one turn.

    Attributes:
        begun: of each row, from the turn before; empty: nothing was kept.
        ended: of each row that ended, by its number.
    """

    begun: Sequence[Held] = ()
    ended: dict[int, Held] = field(default_factory=dict)

    def joined(self, model: nn.Module, prompts: Sequence[Sequence[int]]) -> list[Any] | None:
        """Return caches of all rows that hold each prompt without its last token; None if they were not kept.

        What was kept is let go, so that it is not in memory beside its copy.

        Args:
            model: in eval mode.
            prompts: all tokens of each row so far.
        """
        if not self.begun:
            return None
        new = [list(prompt[held:-1]) for prompt, (held, _) in zip(prompts, self.begun, strict=True)]
        rows = [caches for _, caches in self.begun]
        self.begun = ()
        padded = all(isinstance(cache, KVCache) for caches in rows for cache in caches)
        if not padded:  # a recurrent layer's state would take in the padding
            for tokens, caches in zip(new, rows, strict=True):
                _compute(model, [tokens], caches)
        joined = merge_rows(model, rows)
        mx.eval([cache.state for cache in joined])
        del rows
        if padded:
            lengths, width = list(map(len, new)), max(map(len, new))
            for cache in joined:
                cache.prepare(lengths=lengths, right_padding=[width - length for length in lengths])
            _compute(model, [tokens + [0] * (width - len(tokens)) for tokens in new], joined)
            for cache in joined:
                cache.finalize()
        return joined

    def keep(self, row: int, place: int, tokens: int, caches: Sequence[Any]) -> None:
        """Keep a row that ended.

        Args:
            row: its number.
            place: where it is in the caches.
            tokens: that they hold of it.
            caches: of the batch, one for each layer.
        """
        if all(map(_can_be_kept, caches)):
            taken = [extract_row(cache, place) for cache in caches]
            mx.eval([cache.state for cache in taken])
            self.ended[row] = tokens, taken


def _compute(model: nn.Module, rows: list[list[int]], caches: Sequence[Any]) -> None:
    """Put the keys and values of rows of equal length into caches."""
    if rows[0]:
        model(mx.array(rows), cache=list(caches))
        mx.eval([cache.state for cache in caches])


def _can_be_kept(cache: Any) -> bool:
    if isinstance(cache, CacheList):
        return all(map(_can_be_kept, cache.caches))
    return isinstance(cache, BatchKVCache | ArraysCache)
