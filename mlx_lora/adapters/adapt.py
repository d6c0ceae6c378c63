"""Put an adapter on a model as a run's settings say: targets, ranks, layer type, init, and what is trained in full."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn

from mlx_lora.adapters.inject import full_parameters, inject, train_biases, train_in_full
from mlx_lora.adapters.targets import Targets, has_weights, layer_shapes, select_targets
from mlx_lora.settings.checks import parse_pattern
from mlx_lora.settings.config import AdapterSettings
from mlx_lora.settings.methods import PRESETS, Method
from mlx_lora.system.errors import InputError


@dataclass(frozen=True)
class Adapted:
    """The adapter that was put on a model.

    Attributes:
        method: the preset.
        targets: adapted layers; for `full`, the trained modules.
        rank, scale: of layers without a pattern; for AdaLoRA, the initial rank.
        full: names of parameters trained in addition to the factors.
    """

    method: Method
    targets: Targets
    rank: int
    scale: float
    full: tuple[str, ...]


def starting_rank(settings: AdapterSettings) -> int:
    """Return the layers' initial rank, which for AdaLoRA is 1.5 times its target (arXiv 2303.10512, 4.1)."""
    if settings.method_name != "adalora":
        return settings.rank
    return settings.adalora_init_rank or -(-3 * settings.rank // 2)


def adapt_model(model: nn.Module, settings: AdapterSettings, seed: int) -> Adapted:
    """Freeze `model`, adapt it as the settings say, and unfreeze the parameters that are trained in full.

    Args:
        model: an unadapted mlx-lm model; changed in place.
        settings: already checked.
        seed: of the initial factors.

    Raises:
        InputError: the settings name layers, modules or biases that the model does not have, or contradict each other.
    """
    method = PRESETS[settings.method_name]
    model.freeze()
    rank = starting_rank(settings)
    scale = method.scale_of(settings.alpha, rank)
    if method.layer_type == "full":
        targets = select_targets(model, settings.target_modules, settings.num_layers, has_weights)
        train_in_full(model, targets.paths)
        return Adapted(method, targets, rank, scale, tuple(full_parameters(model)))
    targets = select_targets(model, settings.target_modules, settings.num_layers)
    whole: tuple[str, ...] = ()
    if settings.modules_to_save:
        whole = select_targets(model, settings.modules_to_save, -1, has_weights, "--modules-to-save").paths
        both = [path for path in whole if path in targets.paths]
        if both:
            raise InputError(
                f"--modules-to-save {', '.join(both)}: also in --target-modules; train it in full or adapt it, not both"
            )
    shapes = layer_shapes(
        targets.paths,
        method,
        rank,
        settings.alpha,
        parse_pattern(settings.rank_pattern),
        parse_pattern(settings.alpha_pattern),
    )
    inject(model, targets.paths, rank, scale, settings.dropout, seed, shapes, method.layer_type, method.init)
    train_in_full(model, whole)
    train_biases(model, settings.bias)
    return Adapted(method, targets, rank, scale, tuple(full_parameters(model)))
