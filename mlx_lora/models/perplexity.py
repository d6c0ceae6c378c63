"""Measure how well a model predicts a text, to show what a conversion cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn


@dataclass(frozen=True)
class TextLoss:
    """The summed negative log-likelihood (nats) of `tokens` predicted tokens."""

    loss_sum: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(self.loss_sum / self.tokens)


def measure_text_loss(model: nn.Module, ids: list[int], bos_id: int | None, window_tokens: int = 512) -> TextLoss:
    """Return a text's loss, predicted window by window, each with an empty context.

    Args:
        model: an mlx-lm model.
        ids: the text's tokens, without BOS; at least two.
        bos_id: put before every window, so that its first token is predicted too; None: the first is not predicted.
        window_tokens: tokens per window, BOS included.
    """
    loss_sum, tokens = 0.0, 0
    step = window_tokens if bos_id is None else window_tokens - 1
    for start in range(0, len(ids), step):
        window = ids[start : start + step]
        window = window if bos_id is None else [bos_id, *window]
        if len(window) > 1:
            loss_sum += -token_logprobs(model, window).sum().item()
            tokens += len(window) - 1
    return TextLoss(loss_sum, tokens)


def token_logprobs(model: nn.Module, ids: list[int]) -> mx.array:
    """Return (len(ids) - 1,) float32: the log-probability of each token but the first, given those before it."""
    inputs = mx.array(ids)
    logits = model(inputs[None, :-1])[0].astype(mx.float32)  # (T - 1, V)
    chosen = mx.take_along_axis(logits, inputs[1:, None], axis=-1)[:, 0]
    return chosen - mx.logsumexp(logits, axis=-1)
