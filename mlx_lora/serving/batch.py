"""Generate with a batch of rows, each with its own adapter, which join and leave between steps.

mlx-lm's caches hold the rows. Its BatchGenerator does not tell the model which rows a call is for, but our layers have
to know, so the loop is our own. As in mlx-lm, step n + 1 is computed while the host reads step n.

The keys and values of earlier prompts are cached per adapter, within one byte budget: an adapter changes every key and value
from its first layer on, so adapters cannot share them.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from mlx_lora.rollouts.decode import TokenSteps
from mlx_lora.serving.pools import Routing
from mlx_lora.serving.sampling import Likelihoods, Sampler, sample_rows


@dataclass(eq=False)
class BatchRow:
    """One sequence.

    Attributes:
        owner: what its tokens are for; the engine's own object.
        adapter: number of its adapter, None for the base.
        sampler: draws its tokens.
        tokens: the tokens whose keys and values its cache holds.
        fresh: the next token that a step returns is the prompt's last, which is not new.
    """

    owner: Any
    adapter: int | None
    sampler: Sampler
    tokens: list[int] = field(default_factory=list)
    fresh: bool = True


class Prefill:
    """A prompt that is computed in parts, so that running rows do not wait for a long prompt."""

    def __init__(self, model: TokenSteps, routing: Routing, row: BatchRow, tokens: list[int], caches: list[Any] | None):
        """Prepare to compute a prompt.

        Args:
            model: the routed model.
            routing: tells its layers which adapter to use.
            row: the sequence; `row.tokens` are those that `caches` holds.
            tokens: the rest of the prompt, at least one token.
            caches: of one sequence; None: empty ones.
        """
        self._model, self._routing = model, routing
        self.row = row
        self.rest = tokens
        self.caches = make_prompt_cache(model.model) if caches is None else caches

    @property
    def done(self) -> bool:
        """Whether only the last token is left, which the batch's next step computes."""
        return len(self.rest) == 1

    def advance(self, most: int) -> None:
        """Compute up to `most` tokens of the prompt."""
        part, self.rest = self.rest[: min(most, len(self.rest) - 1)], self.rest[min(most, len(self.rest) - 1) :]
        self._routing.rows = (self.row.adapter,)
        self._model(mx.array([part]), cache=self.caches)
        mx.eval([cache.state for cache in self.caches])
        self.row.tokens += part


class RunningBatch:
    """The rows that generate together."""

    def __init__(self, model: TokenSteps, routing: Routing):
        self._model, self._routing = model, routing
        self.rows: list[BatchRow] = []
        self._caches: list[Any] = []
        self._next: Any = None  # (B,) each row's next token, which may not be computed yet
        self._reports: list[Likelihoods | None] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the rows' keys and values."""
        return sum(cache.nbytes for cache in self._caches)

    def join(self, prefill: Prefill) -> None:
        """Add a row whose prompt is computed except for its last token."""
        merged = [cache.merge([cache]) for cache in prefill.caches]
        if self._caches:
            for own, new in zip(self._caches, merged, strict=True):
                own.extend(new)
        else:
            self._caches = merged
        last = mx.array(prefill.rest, mx.uint32)
        self._next = last if self._next is None else mx.concatenate([self._next.astype(mx.uint32), last])
        self.rows.append(prefill.row)
        self._reports.append(None)

    def step(self) -> list[tuple[BatchRow, int, Likelihoods | None]]:
        """Start computing every row's next token, and return the tokens that the previous step started."""
        known, reports = self._next, self._reports
        self._routing.rows = tuple(row.adapter for row in self.rows)
        logits = self._model(known[:, None], cache=self._caches)[:, -1]  # (B, V)
        self._next, self._reports = sample_rows(logits, [row.sampler for row in self.rows])
        mx.async_eval(self._next, [array for report in self._reports if report for array in report.arrays()])
        news = []
        for row, token, report in zip(self.rows, known.tolist(), reports, strict=True):
            row.tokens.append(token)
            if row.fresh:
                row.fresh = False
            else:
                news.append((row, token, report))
        return news

    def extract(self, row: BatchRow) -> list[Any]:
        """Return the caches of one row, for the prompt cache."""
        return [cache.extract(self.rows.index(row)) for cache in self._caches]

    def leave(self, leaving: list[BatchRow]) -> None:
        """Remove rows."""
        keep = [index for index, row in enumerate(self.rows) if row not in leaving]
        self.rows = [self.rows[index] for index in keep]
        self._reports = [self._reports[index] for index in keep]
        if not keep:
            self._caches, self._next = [], None
            return
        chosen = mx.array(keep)
        for cache in self._caches:
            cache.filter(chosen)
        self._next = self._next[chosen]


# Keys and values of earlier prompts


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
