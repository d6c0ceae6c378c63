"""Random examples for the training server, and a tiny model that it trains."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.api.plan_clients import LoraShape
from mlx_lora.config.settings import ModelSettings
from mlx_lora.models.load import Base, load_base
from mlx_lora.training_server.worker import Example, ModelLimits, TrainedModel

LIMITS = ModelLimits(288, 512)
LENGTHS = (5, 9, 7)


def loaded(folder: Path) -> Base:
    """Return the model of a folder as the server has it."""
    return load_base(ModelSettings(model=str(folder)))


def trained_model(base: Base, move_b: bool = True, **shape) -> TrainedModel:
    """Return a model with factors away from their start: a zero lora_b hides every gradient of lora_a."""
    model = TrainedModel(base, LoraShape(**{"rank": 4, "seed": 3, "unembed": False, **shape}), LIMITS)
    if move_b:
        random = np.random.default_rng(5)
        moved = {
            name: mx.array(random.normal(0, 0.02, value.shape).astype(np.float32)) if name.endswith("lora_b") else value
            for name, value in model.masters.by_name().items()
        }
        model.masters.put_by_name(moved)
        model.masters.hand_out()
    return model


def examples(seed: int = 0, columns: int | None = None, **given) -> list[Example]:
    """Return random examples; `given` are names and functions of (random, shape)."""
    random = np.random.default_rng(seed)
    made = []
    for length in LENGTHS:
        shape = (length,) if columns is None else (length, columns)
        tokens, targets = random.integers(0, 256, length).astype(np.int32), random.integers(0, 256, shape)
        made.append(
            Example(tokens, targets, {name: make(random, shape).astype(np.float32) for name, make in given.items()})
        )
    return made


def factors(model: TrainedModel) -> dict[str, np.ndarray]:
    """Return a model's factors by name."""
    return {name: np.array(value) for name, value in tree_flatten(model.model.trainable_parameters())}


def gradients(model: TrainedModel) -> dict[str, mx.array]:
    """The summed gradient by parameter name."""
    assert model._gradients is not None
    return model.masters.by_name(model._gradients)
