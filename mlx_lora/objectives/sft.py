"""Imitation: cross-entropy on the tokens of the data's answers. Nearly all of it is what `Objective` does by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_lora.objectives.base import Objective, RunContext

if TYPE_CHECKING:
    from mlx_lora.config.objectives import ObjectiveSettings
    from mlx_lora.data.load import DataSplits


class Imitation(Objective):
    """Imitation, whose questions a model may first put into other words (--rephrase)."""

    def load_data(self, ctx: RunContext) -> DataSplits:
        if ctx.settings.data.rephrase is None:
            return super().load_data(ctx)
        from mlx_lora.objectives.rephrase import read_rephrased  # few runs need it

        return read_rephrased(self, ctx)


def sft(settings: ObjectiveSettings) -> Objective:
    """Return the objective of --objective sft, which has no options of its own."""
    return Imitation("sft")
