"""The score head of a reward model: one number for a text, from the hidden state of its last token.

It is transformers' head for sequence classification with one label: a linear layer without a bias, after the model's last
norm. It is trained in full, in float32, and saved with the adapter as `score.weight`.

Shapes: B batch, T time, D width, P positions.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.initial_factors import path_key
from mlx_lora.adapters.parts import EMBEDDING, base_dims
from mlx_lora.models.head import Head, find_head
from mlx_lora.models.shared_prefix import shared_caches
from mlx_lora.system.errors import InputError

SCORE = "score"
SCORE_WEIGHT = f"{SCORE}.weight"
INITIALIZER_RANGE = 0.02  # transformers' default


def put_score_head(model: nn.Module, config: dict[str, Any], seed: int = 0) -> None:
    """Give a model a new score head, which is trainable.

    Args:
        model: an mlx-lm model, adapted or not; changed in place.
        config: its config.json, which may have an `initializer_range`.
        seed: of the run.

    Raises:
        InputError: the model's last hidden states cannot be read.
    """
    layer = body_of(model).layer
    width = base_dims(layer)[isinstance(layer, EMBEDDING)]
    spread = float({**config, **(config.get("text_config") or {})}.get("initializer_range") or INITIALIZER_RANGE)
    head = nn.Linear(width, 1, bias=False)
    head.weight = spread * mx.random.normal((1, width), key=path_key(SCORE, seed))
    model.score = head


def body_of(model: nn.Module) -> Head:
    """Return the model's output head, whose `hidden` gives the hidden states after the last norm.

    Raises:
        InputError: they cannot be read.
    """
    head = find_head(model, {})  # the config only decides what is done to logits
    if isinstance(head, str):
        raise InputError(
            f"--objective reward: the last hidden states of this model cannot be read ({head}); do not train or adapt "
            "its output head, or choose another model"
        )
    return head


def score_at(model: nn.Module, body: Head, inputs: mx.array, positions: mx.array, *starts: mx.array) -> mx.array:
    """Return the scores at some positions of a batch.

    Args:
        model: with a score head.
        body: as `body_of` returns it.
        inputs: (B, T) token ids.
        positions: (P,) int, row * T + column.
        starts: (B, K) int32, where rows hold several answers (models/shared_prefix.py).

    Returns:
        (P,) float32.
    """
    hidden = body.hidden_at(positions, inputs, **shared_caches(model, inputs, *starts))  # (P, D)
    return model.score(hidden.astype(mx.float32)).squeeze(-1)
