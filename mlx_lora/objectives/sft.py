"""Imitation: cross-entropy on the tokens of the data's answers. All of it is what `Objective` does by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_lora.objectives.base import Objective

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings


def sft(settings: ObjectiveSettings) -> Objective:
    """Return the objective of --objective sft, which has no options of its own."""
    return Objective("sft")
