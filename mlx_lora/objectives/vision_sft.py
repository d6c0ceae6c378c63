"""Imitation with pictures: cross-entropy on the answers' tokens, of conversations that have pictures (objectives/pictures.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mlx_lora.objectives.base import Objective
from mlx_lora.objectives.pictures import WithPictures

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings


@dataclass(eq=False)
class VisionSFT(WithPictures, Objective):
    """Imitation with pictures."""


def vision_sft(settings: ObjectiveSettings) -> Objective:
    """Return the objective of --objective vision_sft, which has no options of its own."""
    return VisionSFT("vision_sft", "examples", "imitation, with pictures")
