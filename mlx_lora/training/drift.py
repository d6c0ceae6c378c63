"""Measure how far a fine-tuned model has moved from its base, with both on the same held-out tokens.

For each trained token x of the held-out rows, given the tokens before it:

    change = log p_base(x) - log p_tuned(x)                          nats; above 0: the tuned model is worse
    KL     = sum over the vocabulary of p_base (log p_base - log p_tuned)    nats; how far the tuned model has moved

On the new task, this KL correlates with forgetting across methods (arXiv 2509.04259). LoRA forgets less than full
fine-tuning, and learns less (arXiv 2405.09673). Errors are standard errors of a ratio of sums over rows, because the
tokens of one row are not independent.

Shapes: B rows, T columns, P trained positions, R of them at a time, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batches import Batch
from mlx_lora.models.head import Head, find_head
from mlx_lora.planner.this_machine import loss_tile_bytes

# The largest rise in loss that counts as no change, and the largest that counts as small: 2% and 10% of perplexity.
NO_CHANGE, SMALL_CHANGE = 0.02, 0.1
CHECK_TOKENS = 16


@dataclass(frozen=True)
class Drift:
    """The differences between a tuned model and its base on one held-out set.

    Attributes:
        rows, tokens: how many the set has.
        base_loss, loss: nats per token, of the base and of the tuned model.
        change_error: standard error of loss - base_loss.
        kl, kl_error: nats per token, and its standard error.
        same_top: fraction of tokens for which both models have the same most likely token.
    """

    rows: int
    tokens: int
    base_loss: float
    loss: float
    change_error: float
    kl: float
    kl_error: float
    same_top: float

    @property
    def change(self) -> float:
        """The change in nats per token; above 0 the tuned model is worse."""
        return self.loss - self.base_loss

    def verdict(self, learned: bool) -> str:
        """Return the change in words.

        Args:
            learned: whether the set is of the trained task, so that a fall is wanted.
        """
        if abs(self.change) <= 2 * self.change_error:
            if learned:
                return "not learned"
            return "kept" if self.change + 2 * self.change_error <= SMALL_CHANGE else "unclear, too few rows"
        if learned:
            return "learned" if self.change < 0 else "worse than the base"
        if self.change <= NO_CHANGE:
            return "kept" if self.change > -NO_CHANGE else "better than the base"
        return "slightly forgotten" if self.change <= SMALL_CHANGE else "forgotten"


class Readout:
    """Reads a model's hidden states at trained positions, and their logits a few at a time."""

    def __init__(self, model: nn.Module, config: dict[str, Any]):
        """Split the model at its head, if that gives the model's own logits.

        Args:
            model: with or without an adapter, in eval mode.
            config: its config.json.
        """
        head = find_head(model, config)
        self._body, self._head = (head.hidden, head) if isinstance(head, Head) else (model, None)
        if self._head is None:
            return
        ids = mx.arange(CHECK_TOKENS)[None]  # (1, T)
        own = model(ids).astype(mx.float32)
        cut = self._head.logits(self._body(ids))
        if not mx.allclose(cut, own, rtol=1e-2, atol=1e-2 * mx.abs(own).max().item()).item():
            self._body, self._head = model, None

    def states(self, inputs: mx.array, positions: mx.array) -> mx.array:
        """Return the input of `logits` for (P,) flat positions of the (B, T) inputs: (P, D), or (P, V) if not split."""
        out = self._body(inputs)
        return out.reshape(-1, out.shape[-1])[positions]

    def logits(self, states: mx.array) -> mx.array:
        """Return (R, V) float32."""
        return states.astype(mx.float32) if self._head is None else self._head.logits(states)


def measure_drifts(
    base: Readout, tuned: Mapping[str, Readout], batches: Iterable[Batch], vocabulary: int
) -> dict[str, Drift]:
    """Measure the same batches with the base, once, and with every tuned model.

    Args:
        base: the model that all are compared with.
        tuned: name -> model, with the same vocabulary.
        batches: held-out rows, each once.
        vocabulary: V, which decides how many positions are read together.

    Raises:
        ValueError: there is no trained token.
    """
    step = max(1, loss_tile_bytes() // (4 * vocabulary))
    columns: dict[str, list[np.ndarray]] = {name: [] for name in tuned}
    rows, row_count = [], 0
    for batch in batches:
        trained_at = np.flatnonzero(batch.mask)
        inputs, targets = mx.array(batch.inputs), mx.array(batch.targets.reshape(-1)[trained_at])
        positions = mx.array(trained_at)
        of_base = base.states(inputs, positions)
        of_tuned = {name: readout.states(inputs, positions) for name, readout in tuned.items()}
        mx.eval(of_base, of_tuned)
        for start in range(0, len(trained_at), step):
            tile = slice(start, start + step)
            base_logs = _log_probabilities(base.logits(of_base[tile]))
            for name, readout in tuned.items():
                tuned_logs = _log_probabilities(readout.logits(of_tuned[name][tile]))
                columns[name].append(np.array(_compare(base_logs, tuned_logs, targets[tile])))  # (4, R)
        rows.append(trained_at // batch.mask.shape[1] + row_count)
        row_count += len(batch.mask)
    if not sum(map(len, rows)):
        raise ValueError("no trained token in the set")
    numbers = np.unique(np.concatenate(rows), return_inverse=True)[1]
    return {name: _drift(np.concatenate(parts, axis=1).astype(np.float64), numbers) for name, parts in columns.items()}


def _drift(columns: np.ndarray, rows: np.ndarray) -> Drift:
    """Summarize the columns that `_compare` returned.

    Args:
        columns: (4, tokens).
        rows: (tokens,) each token's row, from 0.
    """
    base_losses, losses, kls, same = columns
    return Drift(
        rows=int(rows.max()) + 1,
        tokens=len(rows),
        base_loss=float(base_losses.mean()),
        loss=float(losses.mean()),
        change_error=_error(losses - base_losses, rows),
        kl=float(kls.mean()),
        kl_error=_error(kls, rows),
        same_top=float(same.mean()),
    )


def _log_probabilities(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)  # (R, V)


def _compare(base_logs: mx.array, tuned_logs: mx.array, targets: mx.array) -> mx.array:
    """Return (4, R) float32: the base's loss, the tuned model's, the KL, and whether the most likely token is the same."""
    at = targets[:, None]
    losses = [-mx.take_along_axis(logs, at, axis=-1).squeeze(-1) for logs in (base_logs, tuned_logs)]
    kl = (mx.exp(base_logs) * (base_logs - tuned_logs)).sum(axis=-1)
    same = (base_logs.argmax(axis=-1) == tuned_logs.argmax(axis=-1)).astype(mx.float32)
    return mx.stack([*losses, kl, same])


def _error(values: np.ndarray, rows: np.ndarray) -> float:
    """Return the standard error of the mean of `values` per token, with rows as the samples; nan for one row."""
    counts = np.bincount(rows)
    if len(counts) < 2:
        return math.nan
    spread = np.bincount(rows, values) - values.mean() * counts
    return float(np.sqrt((spread**2).sum() * len(counts) / (len(counts) - 1)) / counts.sum())
