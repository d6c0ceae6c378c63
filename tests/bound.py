"""An objective's loss on a model, as a run binds it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import mlx.nn as nn

from mlx_lora.config.load import train_settings
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.objectives.base import BoundObjective, Objective, RunContext


def bind(objective: Objective, loss: Any, base: Any, rows: Any = None) -> BoundObjective:
    """Return the loss of an objective on a base, or on a model; nothing that samples answers is made."""
    base = SimpleNamespace(model=base, config={}) if isinstance(base, nn.Module) else base
    ctx = RunContext(replace(train_settings({}), objective=objective.options), objective, base)
    sampled = getattr(objective, "bind_sampled", None)
    rows = EncodedSet.from_rows([]) if rows is None else rows
    return objective.bind(ctx, loss, rows) if sampled is None else sampled(ctx, loss)


def with_targets(objective: Objective, rows: EncodedSet) -> EncodedSet:
    """Return rows with an objective's targets; a classifier decides by them what is open in its questions."""
    if hasattr(objective, "questions"):
        objective._settle([rows])
        return objective._targets(rows)
    return objective._with_targets(rows)
