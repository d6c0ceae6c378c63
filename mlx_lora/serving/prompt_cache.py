"""Cache the keys and values of earlier prompts, per adapter, within one byte budget.

An adapter changes every key and value from its first layer on, so adapters cannot share them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache


@dataclass(frozen=True)
class _Entry:
    tokens: tuple[int, ...]
    caches: list[Any]
    nbytes: int


class PromptCache:
    """A cache that evicts the least recently used entries first."""

    def __init__(self, budget_bytes: int):
        self.budget_bytes = budget_bytes
        self.nbytes = 0
        self.reused_tokens = 0
        self._entries: OrderedDict[tuple[int | None, tuple[int, ...]], _Entry] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, adapter: int | None, tokens: list[int]) -> tuple[list[Any] | None, int]:
        """Return a copy of the caches of the longest known prefix of `tokens`, and its length.

        At least the last token remains to be computed, because generation starts from its logits.

        Args:
            adapter: number of the adapter, None for the base.
            tokens: the prompt.
        """
        best, length = None, 0
        for key, entry in self._entries.items():
            if key[0] != adapter:
                continue
            common = min(_common(entry.tokens, tokens), len(tokens) - 1)
            if common > length and (common == len(entry.tokens) or can_trim_prompt_cache(entry.caches)):
                best, length = key, common
        if best is None:
            return None, 0
        self._entries.move_to_end(best)
        self.reused_tokens += length
        entry = self._entries[best]
        caches = copy.deepcopy(entry.caches)
        if length < len(entry.tokens):
            trim_prompt_cache(caches, len(entry.tokens) - length)
        return caches, length

    def keep(self, adapter: int | None, tokens: list[int], caches: list[Any]) -> None:
        """Store the caches of `tokens`, which must not be changed afterwards; entries for their prefixes are dropped."""
        nbytes = sum(cache.nbytes for cache in caches)
        if nbytes > self.budget_bytes or not tokens:
            return
        own = tuple(tokens)
        covered = [key for key in self._entries if key[0] == adapter and own[: len(key[1])] == key[1]]
        for key in covered if can_trim_prompt_cache(caches) else [key for key in covered if key[1] == own]:
            self._forget(key)
        self._entries[adapter, own] = _Entry(own, caches, nbytes)
        self.nbytes += nbytes
        while self.nbytes > self.budget_bytes:
            self._forget(next(iter(self._entries)))

    def drop(self, adapter: int) -> None:
        """Drop all entries of an adapter."""
        for key in [key for key in self._entries if key[0] == adapter]:
            self._forget(key)

    def _forget(self, key: tuple[int | None, tuple[int, ...]]) -> None:
        self.nbytes -= self._entries.pop(key).nbytes


def _common(one: tuple[int, ...], other: list[int]) -> int:
    """Return how many tokens two sequences share at their start."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
