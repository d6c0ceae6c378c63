"""What is trained of a vision tower and its connector, and the memory that the tower takes in a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.base import LINEAR, base_dims
from mlx_lora.adapters.targets import has_weights
from mlx_lora.config.settings import DEFAULT_BATCH_TOKENS
from mlx_lora.models.folder import FOREIGN_ERRORS
from mlx_lora.models.tower_files import of_connector, of_tower
from mlx_lora.models.vision import LANGUAGE, arrays_of, build_tower
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_config
from mlx_lora.utils.parsing import read_json

if TYPE_CHECKING:
    from mlx_lora.config.settings import AdapterSettings, TrainSettings
    from mlx_lora.data.image_tokens import ImageTable

TRAINED_BYTES = 16  # of a trained number: its float32 master, gradient and two moments
# Arrays of Gemma 4's tower that nobody trains: bounds of its clipped layers, and what standardizes its output.
BUFFERS = frozenset({"input_min", "input_max", "output_min", "output_max", "std_bias", "std_scale"})
AT_ENDS = 34  # arrays as wide as the tower that a picture takes besides its blocks
OF_CONNECTOR = 4  # those of a trained connector behind a frozen tower


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


def planned_tower_bytes(settings: TrainSettings, table: ImageTable) -> int:
    """Return the bytes of a model's tower, and of its training, by its config alone; 0 if that does not tell.

    Args:
        settings: of the run.
        table: of the pictures, as far as the data were read.

    Raises:
        InputError: a part that is to be trained has no such layer.
    """
    try:
        file = resolve_config(settings.model.model or "", settings.model.revision) / "config.json"
        config = read_json(file, "download the model again")
        tower = build_tower(config)
    except (InputError, *FOREIGN_ERRORS):
        return 0  # loading reports what is wrong with the model
    size = device.compute_dtype(settings.model.dtype).size
    stored = sum(array.size * size for name, array in arrays_of(tower).items() if not name.startswith(LANGUAGE))
    adapter = settings.adapter
    if not (adapter.train_connector or adapter.train_vision):
        return stored
    (layers, whole), modules = tower_targets(tower, adapter), dict(tower.named_modules())
    numbers = sum(value.size for path in whole for value in modules[path].values() if isinstance(value, mx.array))
    numbers += sum(adapter.rank * sum(base_dims(modules[path])) for path in layers)
    return stored + TRAINED_BYTES * numbers + kept_by_tower(config, settings, table)


def kept_by_tower(config: Mapping[str, Any], settings: TrainSettings, table: ImageTable) -> int:
    """Return the bytes that a trained tower keeps of a batch's pictures from its forward to its backward pass.

    An estimate: numbers per patch, fitted to towers of 4 and 8 blocks without checkpointing. With a frozen tower and a trained
    connector, nothing of the tower is kept.
    """
    vision, loop = config["vision_config"], settings.loop
    tokens = sum(shown.tokens for shown in table.shown.values())
    rows = [sum(table.shown[digest].tokens for digest in row) for row in table.rows]
    most = loop.batch_size * max(rows, default=0) if loop.batch_size else loop.batch_tokens or DEFAULT_BATCH_TOKENS
    width = vision.get("embed_dim") or vision["hidden_size"]
    inner = vision.get("intermediate_size") or int(vision.get("mlp_ratio", 4) * width)
    blocks = vision.get("num_hidden_layers") or vision.get("depth") or 1
    whole = AT_ENDS * width + blocks * (6 * width + 3 * inner)
    each = whole if settings.adapter.train_vision else OF_CONNECTOR * width
    return int(min(tokens, most) * _patches_of_token(config) * each * device.compute_dtype(settings.model.dtype).size)


def _patches_of_token(config: Mapping[str, Any]) -> float:
    """Return how many patches of a picture become one token."""
    vision = config["vision_config"]
    if "spatial_merge_size" in vision:
        return vision["spatial_merge_size"] ** 2
    if "pooling_kernel_size" in vision:  # Gemma 4
        return vision["pooling_kernel_size"] ** 2
    if config.get("model_type") == "mistral3":
        return config.get("spatial_merge_size", 2) ** 2
    if "mm_tokens_per_image" in config:
        return (vision["image_size"] // vision["patch_size"]) ** 2 / config["mm_tokens_per_image"]
    return config.get("scale_factor", 1) ** 2
