"""Preferences about pictures: the losses of objectives/preference.py, on answers to prompts that have pictures.

The reference is that of text: the model before the first step, or --reference-adapter, measured once and kept on disk. Its
name there also covers the pictures and the tower.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_lora.models.vision import open_tower
from mlx_lora.objectives import preference
from mlx_lora.objectives.answers import BatchSums
from mlx_lora.objectives.base import AnswerSums, RunContext
from mlx_lora.objectives.image_features import tower_key
from mlx_lora.objectives.pictures import WithPictures
from mlx_lora.objectives.preference import Preference

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.data.batch import Batch
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.losses.cross_entropy import TokenLosses


@dataclass(eq=False)
class VisionPreference(WithPictures, Preference):
    """An objective of pairs whose prompts may have pictures."""

    def compare(self, ctx: RunContext, sets: dict[str, EncodedSet]) -> dict[str, EncodedSet]:
        own = self.vision.tower
        if not ctx.trains:  # the tower of the plain base; that of the adapter may be another
            self.look_with(open_tower(ctx.plain_base))
        found = super().compare(ctx, sets)
        if not ctx.trains:
            self.look_with(own)
        return found

    def sums_of(self, tokens: TokenLosses) -> BatchSums:
        plain = super().sums_of(tokens)

        def sums(model: nn.Module, batch: Batch) -> AnswerSums:
            with self.shown(model, batch):
                return plain(model, batch)

        return sums

    @property
    def reference_facts(self) -> list[Any]:
        return [self.vision.identity(), tower_key(self.vision.tower, self.vision.processor)]


def vision_preference(settings: ObjectiveSettings) -> Preference:
    """Return a preference objective with --images; its options are those without."""
    plain = getattr(preference, settings.objective)(settings)
    return VisionPreference(**{one.name: getattr(plain, one.name) for one in dataclasses.fields(plain)})
