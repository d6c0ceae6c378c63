"""Build a method's events (rank budgets, restarts) from a run's settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_lora.adapters.inject import adapter_layers, fresh_factors
from mlx_lora.settings.config import AdapterSettings
from mlx_lora.settings.methods import PRESETS
from mlx_lora.system.errors import InputError
from mlx_lora.training.method_hooks import Events, Restarts
from mlx_lora.training.rank_budget import BudgetSchedule, RankBudget


def restart_every(settings: AdapterSettings, total_steps: int) -> int | None:
    """Return the steps between ReLoRA's restarts, by default a quarter of the run; None for other methods."""
    if PRESETS[settings.method_name].events != "restarts":
        return None
    return settings.relora_every or max(1, -(-total_steps // 4))


def restart_warmup(settings: AdapterSettings, total_steps: int) -> int:
    """Return the warm-up steps after each restart, by default a tenth of a cycle; 0 for other methods."""
    if settings.relora_warmup is not None:
        return settings.relora_warmup
    return (restart_every(settings, total_steps) or 0) // 10


def budget_schedule(settings: AdapterSettings, model: nn.Module, total_steps: int) -> BudgetSchedule:
    """Return AdaLoRA's budget schedule for the run.

    Args:
        settings: give the phases in steps, or in fractions of the run.
        model: adapted with gains.
        total_steps: of the run.

    Raises:
        InputError: no step is left between the first and the final phase for reducing the rank.
    """
    gains = [layer.lora_e for layer in adapter_layers(model).values()]
    initial = sum(gain.size for gain in gains)
    target = sum(settings.rank * gain.size // gain.shape[-1] for gain in gains)

    def steps(value: float | None, default: float) -> int:
        value = default if value is None else value
        return round(value * total_steps) if value < 1 else round(value)

    warmup, final = steps(settings.adalora_tinit, 0.1), steps(settings.adalora_tfinal, 0.3)
    if warmup + final >= total_steps:
        raise InputError(
            f"--adalora-tinit and --adalora-tfinal: {warmup} and {final} of {total_steps} steps leave none to reduce the rank; "
            "lower them, or train longer"
        )
    every = settings.adalora_delta_t or max(1, total_steps // 100)
    return BudgetSchedule(initial, target, total_steps, warmup, final, every)


def make_events(
    settings: AdapterSettings, model: nn.Module, total_steps: int, seed: int
) -> Callable[[dict], Events] | None:
    """Return a function that creates the method's events for a step, or None if the method has none.

    Args:
        settings: of the adapter.
        model: adapted.
        total_steps: of the run.
        seed: for the new factors after ReLoRA's restarts.
    """
    kind = PRESETS[settings.method_name].events
    if every := restart_every(settings, total_steps):
        prune = 0.99 if settings.relora_prune_ratio is None else settings.relora_prune_ratio

        def fresh(path: str, layer: Any, cycle: int) -> tuple[mx.array, mx.array]:
            return fresh_factors(f"{path}#{cycle}", layer, seed)

        return lambda arrays: Restarts(model, every, total_steps, prune, fresh)
    if kind == "rank-budget":
        schedule = budget_schedule(settings, model, total_steps)
        weight = 0.5 if settings.orth_reg_weight is None else settings.orth_reg_weight
        return lambda arrays: RankBudget(model, arrays, schedule, weight)
    return None


def rates_of(adapter: AdapterSettings) -> Callable[[str], float] | None:
    """Return a function that gives each parameter's multiple of the learning rate by name, None if all rates are equal."""
    preset = PRESETS[adapter.method_name]
    ratio = preset.rate_of_b if adapter.loraplus_lr_ratio is None else adapter.loraplus_lr_ratio
    return None if ratio == 1 else lambda name: ratio if name.endswith("lora_b") else 1.0
