"""Count the memory of the reward models that a run holds beside its base, without reading their weights."""

from __future__ import annotations

import math
from pathlib import Path

from mlx.utils import tree_flatten

from mlx_lora.models.folder import CONFIG_FILE
from mlx_lora.models.outline import outline_of
from mlx_lora.objectives.user_rewards import reward_folders
from mlx_lora.settings.config import TrainSettings
from mlx_lora.sources.safetensors import read_safetensors_header
from mlx_lora.system import device
from mlx_lora.system.parsing import read_json

ADAPTER_CONFIG = "adapter_config.json"
SINGLE_BYTES = 4  # of a number of an adapter, and of a score head


def beside_bytes(settings: TrainSettings) -> int:
    """Return the bytes of a run's reward models: their adapters, and a base for those that are not the run's own.

    A base that is named otherwise than --model is counted, though the run shares it if it turns out to be the same.

    Raises:
        InputError: a folder's files cannot be read.
    """
    if not settings.objective.samples:
        return 0
    dtype, total = device.compute_dtype(settings.model.dtype), 0
    bases: list[tuple[str, str | None]] = []
    for folder in reward_folders(settings.objective):
        file = folder / ADAPTER_CONFIG
        if not file.is_file():
            total += _numbers(folder, "model*.safetensors") * dtype.size if (folder / CONFIG_FILE).is_file() else 0
            continue
        total += _numbers(folder, "adapter*.safetensors") * SINGLE_BYTES
        named = base_named(file)
        known = [settings.model.model or "", *(name for name, _ in bases)]
        if named is not None and not any(is_same_model(named[0], name) for name in known):
            bases.append(named)
    for name, revision in bases:
        outline = outline_of(name, revision, dtype)
        total += sum(array.nbytes for _, array in tree_flatten(outline.model.parameters()))
    return total


def base_named(file: Path) -> tuple[str, str | None] | None:
    """Return the model that an adapter_config.json, ours or PEFT's, names, with its revision; None if it names none."""
    config = read_json(file, "restore it from a checkpoint")
    own = config.get("mlx_lora")
    if isinstance(own, dict) and own.get("base_model"):
        return str(own["base_model"]), own.get("base_revision")
    name = config.get("base_model_name_or_path") or config.get("model")
    return (str(name), None) if name else None


def is_same_model(one: str, other: str) -> bool:
    """Tell whether two names are the same, or lead to the same file or folder."""
    if one == other:
        return True
    paths = Path(one).expanduser(), Path(other).expanduser()
    return all(path.exists() for path in paths) and paths[0].resolve() == paths[1].resolve()


def _numbers(folder: Path, pattern: str) -> int:
    """Return how many numbers the files of a folder hold."""
    headers = [read_safetensors_header(file) for file in sorted(folder.glob(pattern))]
    return sum(math.prod(entry["shape"]) for header in headers for entry in header.values())
