"""What classifiers and rerankers have in common: a score head over a language model or over an encoder.

An encoder cannot take a text that is longer than its table of positions, so --max-seq-length is at most that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_lora.models.encoder import ENCODERS, Model, ModelArgs
from mlx_lora.models.encoder_head import start_words
from mlx_lora.objectives.base import Objective
from mlx_lora.utils.errors import InputError

if TYPE_CHECKING:
    from datetime import date
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

    from mlx_lora.config.settings import DataSettings, TrainSettings
    from mlx_lora.data.dataset import EncodedSet
    from mlx_lora.data.load import DataSplits
    from mlx_lora.objectives.base import RunContext


@dataclass(eq=False)
class ScoredTexts(Objective):
    """An objective whose score head an encoder may have, too."""

    @property
    def on_encoders(self) -> bool:
        return True

    def open(self, ctx: RunContext) -> None:
        if ctx.settings.loop.cache_trunk == "on" and isinstance(ctx.base.model, Model):
            raise InputError(
                f"--cache-trunk on with --model {ctx.base.model_id}: an encoder's blocks depend on the length of a row; leave it out"
            )

    def load_data(self, ctx: RunContext) -> DataSplits:
        data = super().load_data(ctx)
        if words := start_words(ctx.base.model, self.outputs):
            ctx.record.lines.append(words)
        return data

    def read_data(self, ctx: RunContext, data: DataSettings, teacher_prompt: str | None = None) -> DataSplits:
        return super().read_data(ctx, within_positions(data, ctx.base.model), teacher_prompt)

    def read_set(self, ctx: RunContext, data: DataSettings) -> EncodedSet:
        return super().read_set(ctx, within_positions(data, ctx.base.model))

    def read_planned(
        self,
        settings: TrainSettings,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        config: dict[str, Any],
        today: date | None,
        records: str,
    ) -> DataSplits:
        if config.get("model_type") in ENCODERS:
            settings = replace(settings, data=_at_most(settings.data, ModelArgs.from_dict(config).longest))
        return super().read_planned(settings, tokenizer, folder, config, today, records)


def within_positions(data: DataSettings, model: nn.Module) -> DataSettings:
    """Return the settings with a length that the model can take."""
    return _at_most(data, model.args.longest) if isinstance(model, Model) else data


def _at_most(data: DataSettings, longest: int) -> DataSettings:
    return replace(data, max_seq_length=min(data.max_seq_length, longest))
