"""Build an objective from a run's settings, by the table in `mlx_lora.config.objectives`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from mlx_lora.config.fields import flag_of
from mlx_lora.config.objectives import ObjectiveSettings
from mlx_lora.config.rules import problems_with
from mlx_lora.models.config import is_encoder
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_config
from mlx_lora.utils.parsing import read_json

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.objectives.base import Objective


def objective_of(settings: ObjectiveSettings) -> Objective:
    """Return the objective that the settings ask for.

    Raises:
        InputError: an unknown objective or loss type.
    """
    file, _, name = settings.row.made_by.partition(".")
    objective: Objective = getattr(import_module(f"mlx_lora.objectives.{file}"), name)(settings)
    if settings.images:
        from mlx_lora.objectives.pictures import Pictures  # few runs need it

        objective.pictures = Pictures(settings)
    return objective


def with_pictures(settings: TrainSettings, config: Mapping[str, Any] | None = None) -> TrainSettings:
    """Return the settings with --images if the model sees pictures, and the data on this disk have some.

    Args:
        settings: of a run, a plan, or a measurement.
        config: the model's config.json; None: it is read.

    Raises:
        InputError: a setting cannot be combined with pictures, or needs some.
    """
    asked, data, model = settings.objective, settings.data, settings.model
    if asked.images or not asked.row.pictures or not data.data or not model.model:
        return settings
    if config is None:
        file = resolve_config(model.model, model.revision) / "config.json"  # a GGUF file has none, and sees nothing
        config = read_json(file, "download the model again") if file.is_file() else {}
    if "vision_config" in config:
        from mlx_lora.data.images import have_pictures  # few runs need it

        if have_pictures(data):
            if problems := problems_with(settings.to_flat(), "images", True):
                raise InputError(problems[0])
            return replace(settings, objective=replace(asked, images=True))
    needing = [name for name in ("fetch_images", "max_pixels") if getattr(data, name)]
    needing += [name for name in ("train_connector", "train_vision") if getattr(settings.adapter, name)]
    if needing:
        raise InputError(
            f"{flag_of(needing[0])}: the first rows of --data {data.data} have no pictures that {model.model} sees; leave it "
            "out, or give --images if later rows have some, or if the data are on the Hub"
        )
    return settings


def other_models_bytes(settings: TrainSettings, objective: Objective) -> int:
    """Return the bytes of models that stay in memory beside the base: reward models, and a tower that is not trained."""
    found = 0
    if settings.objective.rewarded:
        from mlx_lora.rollouts.reward_models import beside_bytes  # few runs need it

        found = beside_bytes(settings)
    return found if objective.pictures is None else found + objective.pictures.tower_bytes(settings)


def check_kind(model: nn.Module, model_id: str, objective: Objective) -> None:
    """Refuse an encoder for an objective that does not mask the padding, which every token of an encoder would see.

    Raises:
        InputError: it is one.
    """
    if is_encoder(model) and not objective.options.row.on_encoders:
        raise InputError(
            f"--objective {objective.options.objective} with --model {model_id}: it is an encoder, which writes no text; train it "
            "with --objective embed, rerank or classify, or choose a language model"
        )
