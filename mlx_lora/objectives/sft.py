"""Imitation: the mean of the cross-entropy over the tokens of the data's answers, which may be about pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_lora.objectives.base import BoundObjective, Objective, RunContext

if TYPE_CHECKING:
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.losses.cross_entropy import Loss


class SFT(Objective):
    """Supervised fine-tuning. The loss of tokens that was chosen for the model is the loss of this objective."""

    def load_data(self, ctx: RunContext) -> DataSplits:
        if ctx.settings.data.rephrase is None:
            return super().load_data(ctx)
        from mlx_lora.objectives.rephrase import read_rephrased  # few runs need it

        return read_rephrased(self, ctx)

    def bind(self, ctx: RunContext, loss: Loss, rows: EncodedSet) -> BoundObjective:
        bound = BoundObjective(loss)
        return bound if self.pictures is None else self.pictures.shown_to(bound, ctx.base.model)
