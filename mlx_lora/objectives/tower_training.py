"""What is trained of a vision tower and its connector, and the tower of a model that is only planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import LINEAR
from mlx_lora.adapters.targets import has_weights
from mlx_lora.models.folder import FOREIGN_ERRORS
from mlx_lora.models.tower_files import of_connector, of_tower
from mlx_lora.models.vision import VisionTower, arrays_of, build_tower, image_token, without_language_model
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_config
from mlx_lora.utils.parsing import read_json

if TYPE_CHECKING:
    from mlx_lora.config.settings import AdapterSettings, TrainSettings
    from mlx_lora.data.image_tokens import ImageTable

# Arrays of Gemma 4's tower that nobody trains: bounds of its clipped layers, and what standardizes its output.
BUFFERS = frozenset({"input_min", "input_max", "output_min", "output_max", "std_bias", "std_scale"})


def trains_tower(adapter: AdapterSettings) -> bool:
    """Return whether tower or connector are trained."""
    return bool(adapter.train_connector or adapter.train_vision)


def tower_targets(tower: nn.Module, adapter: AdapterSettings) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the layers of tower and connector that get factors, and the modules that are trained in full.

    Args:
        tower: mlx-vlm's model.
        adapter: says which.

    Raises:
        InputError: a part has no such layer.
    """
    found: dict[str, list[str]] = {"lora": [], "full": []}
    parts = {name: module for name, module in tower.named_modules() if of_tower(name)}
    for flag, way, is_connector in (
        ("--train-connector", adapter.train_connector, True),
        ("--train-vision", adapter.train_vision, False),
    ):
        if way is None:
            continue
        fits = _is_trainable if way == "full" else _is_linear
        names = [name for name, module in parts.items() if of_connector(name) == is_connector and fits(module)]
        if not names:
            raise InputError(f"{flag} {way}: this model has no linear layer there; give {flag} full")
        found[way] += names
    return tuple(found["lora"]), tuple(found["full"])


def _is_trainable(module: nn.Module) -> bool:
    return has_weights(module) and BUFFERS.isdisjoint(module)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, LINEAR)


def outlined_tower(settings: TrainSettings) -> VisionTower | None:
    """Return the tower of a model by its config alone, without weights; None if it cannot be made: loading reports why.

    Args:
        settings: of the run.
    """
    try:
        file = resolve_config(settings.model.model or "", settings.model.revision) / "config.json"
        config = read_json(file, "download the model again")
        dtype = device.compute_dtype(settings.model.dtype)
        return without_language_model(build_tower(config), config, image_token(config), dtype)
    except (InputError, *FOREIGN_ERRORS):
        return None


def frozen_tower_bytes(tower: VisionTower, deep: int, table: ImageTable, most_bytes: int) -> int:
    """Return the bytes of a tower that is not trained, and of what it saw, as far as they stay in memory.

    Args:
        tower: loaded or outlined.
        deep: how many blocks get more of a picture than its embeddings.
        table: of the pictures.
        most_bytes: that are kept of what it saw (objectives/image_features.py).
    """
    of_token = tower.width * dtype_of(tower).size * (1 + deep)
    return tower.size_bytes + min(most_bytes, of_token * sum(shown.tokens for shown in table.shown.values()))


def dtype_of(tower: VisionTower) -> mx.Dtype:
    """Return the dtype of a tower's weights."""
    floats = (a for a in arrays_of(tower.model).values() if mx.issubdtype(a.dtype, mx.floating))
    return max(floats, key=lambda array: array.size).dtype
