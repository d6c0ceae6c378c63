"""Look up an objective by name and build it from a run's settings.

A new objective is a file in this room with a function that takes `ObjectiveSettings`, and one more row in `OBJECTIVES`. Its
file is imported when the objective is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import mlx.nn as nn

from mlx_lora.config.objectives import SAMPLING, ObjectiveSettings
from mlx_lora.models.encoder import is_encoder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import unknown_name

if TYPE_CHECKING:
    from mlx_lora.objectives.base import Objective

# Name -> file in this room and function in it.
OBJECTIVES = {
    "sft": ("sft", "sft"),
    "dpo": ("preference", "dpo"),
    "orpo": ("preference", "orpo"),
    "simpo": ("preference", "simpo"),
    "cpo": ("preference", "cpo"),
    "kto": ("preference", "kto"),
    "reward": ("preference", "reward"),
    "grpo": ("grpo", "policy"),
    "rloo": ("grpo", "policy"),
    "distill": ("distill", "distill"),
    "classify": ("classify", "classify"),
    "rerank": ("rerank", "rerank"),
    "embed": ("embed", "embed"),
    "vision_sft": ("pictures", "vision_sft"),
}


def objective_of(settings: ObjectiveSettings) -> Objective:
    """Return the objective that the settings ask for.

    Raises:
        InputError: an unknown objective or loss type.
    """
    row = OBJECTIVES.get(settings.objective)
    if row is None:
        raise InputError(f"--objective {settings.objective!r}: {unknown_name(settings.objective, OBJECTIVES)}")
    file, function = row
    if settings.images:
        file, function = "pictures", "vision_policy" if settings.objective in SAMPLING else "vision_preference"
    objective = getattr(import_module(f"mlx_lora.objectives.{file}"), function)(settings)
    if settings.shared_prefix != ObjectiveSettings.shared_prefix and not (objective.shares_prompts or settings.images):
        raise InputError(
            f"--shared-prefix {settings.shared_prefix} with --objective {settings.objective}: only objectives with several answers to a "
            "prompt use it; leave it out"
        )
    return objective


def check_kind(model: nn.Module, model_id: str, objective: Objective) -> None:
    """Refuse an encoder for an objective that does not mask the padding, which every token of an encoder would see.

    Raises:
        InputError: it is one.
    """
    if is_encoder(model) and not (objective.vectors or objective.on_encoders):
        raise InputError(
            f"--objective {objective.name} with --model {model_id}: it is an encoder, which writes no text; train it "
            "with --objective embed, rerank or classify, or choose a language model"
        )
