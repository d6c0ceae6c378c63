"""Put an adapter on a run's base: a new one, or one that was trained before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlx_lora.adapters.inject import Adapted, adapt_model
from mlx_lora.adapters.qat import begin_qat
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, put_start, read_adapter_config, read_start
from mlx_lora.models.head import SCORE_WEIGHT, put_score_head

if TYPE_CHECKING:
    from mlx_lora.config.settings import DataSettings, TrainSettings
    from mlx_lora.models.load import Base
    from mlx_lora.objectives.base import Objective


def adapt(
    settings: TrainSettings, base: Base, objective: Objective, chat_template: str | None
) -> tuple[Adapted, AdapterInfo]:
    """Adapt the base, and return the facts about the adapter.

    Args:
        settings: of the run.
        base: gets adapter layers.
        objective: of the run; one that scores gets a score head.
        chat_template: that the data were rendered with; kept with the adapter when it is not the model's own, so that
            generate renders prompts the same way.
    """
    own_template = chat_template == base.hf_tokenizer.chat_template
    adapter = settings.adapter
    scores = objective.scores
    start = read_start(base, adapter.resume_adapter_file, scores) if adapter.resume_adapter_file else None
    adapted, full = adapt_model(base.model, adapter, settings.loop.seed), ()
    if scores:
        put_score_head(base.model, base.config, settings.loop.seed, objective.outputs)
        full = (SCORE_WEIGHT,)
    if start:
        put_start(base.model, start, full)
    if adapter.qat:
        begin_qat(base.model)
    return adapted, AdapterInfo(
        method=adapter.method,
        rank=adapted.rank,
        alpha=adapter.alpha,
        scale=adapted.scale,
        dropout=adapter.dropout,
        num_layers=adapted.targets.num_layers,
        keys=adapted.targets.keys,
        base_model=base.model_id,
        base_revision=base.revision,
        base_fingerprint=base.fingerprint,
        chat_template=None if own_template else chat_template,
        full=adapted.full + full,
    )


def put_adapter(
    base: Base, folder: Path, data: DataSettings, objective: Objective, ignore_fingerprint: bool = False
) -> None:
    """Put a trained adapter on the base, and its chat template on the tokenizer unless the settings name another.

    Raises:
        InputError: the adapter cannot be read, or does not fit the base.
    """
    template = load_adapter(base, folder, ignore_fingerprint, objective.scores).chat_template
    if template and not data.chat_template:
        base.hf_tokenizer.chat_template = template


def adapter_template(folder: Path | None) -> str | None:
    """Return the chat template that an adapter was trained with, None where it is the model's own."""
    own = read_adapter_config(folder).get("mlx_lora") if folder else None
    return own.get("chat_template") if isinstance(own, dict) else None
