"""Turn keyword arguments into a run's settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from mlx_lora.objectives.rewards import RewardFunction
from mlx_lora.objectives.user_rewards import IN_PYTHON
from mlx_lora.settings.config import ModelSettings, TrainSettings
from mlx_lora.settings.resolve import train_settings
from mlx_lora.system.errors import InputError

OF_THE_MODEL = tuple(field.name for field in fields(ModelSettings))
# Settings that only the command has -> what Python does instead.
ONLY_COMMAND = {
    "train": "call mlx_lora.evaluate to measure only",
    "test": "call mlx_lora.evaluate(base, data, adapter=run.adapter)",
    "test_batches": "call mlx_lora.evaluate(base, data, adapter=run.adapter)",
    "max_restarts": "it restarts the process; use the command `mlx-lora train`",
    "short_buffers": "it restarts the process; use the command `mlx-lora train`",
}


def run_settings(model: ModelSettings, given: Mapping[str, Any]) -> TrainSettings:
    """Return the settings of a run on a loaded model.

    Args:
        model: that the base was loaded with.
        given: settings by name, as the caller wrote them.

    Raises:
        InputError: unknown names, values that are not allowed, or settings of `load` or of the command.
    """
    problems = [f"{name}: belongs to the model; give it to mlx_lora.load" for name in given if name in OF_THE_MODEL]
    problems += [f"{name}: not available in Python; {advice}" for name, advice in ONLY_COMMAND.items() if name in given]
    if problems:
        raise InputError("; ".join(problems))
    return replace(train_settings(plain(given)), model=model)


def named_rewards(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, RewardFunction]]:
    """Return settings in which names replace reward functions, and the functions by these names.

    Args:
        given: settings by name; `reward` is a function, or a list of functions and of texts as --reward has them.
    """
    asked = given.get("reward")
    rewards: list[Any] = list(asked) if isinstance(asked, list | tuple) else [asked]
    functions: dict[str, Any] = {}
    texts = []
    for reward in rewards:
        if callable(reward):
            name = str(getattr(reward, "__name__", type(reward).__name__)).replace(",", " ")
            alike = sum(known.split("#")[0] == IN_PYTHON + name for known in functions)
            text = IN_PYTHON + name + (f"#{alike + 1}" if alike else "")
            functions[text] = reward
            reward = text
        texts.append(reward)
    if not functions:
        return dict(given), {}
    return {**given, "reward": ",".join(map(str, texts))}, functions


def plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with paths as text and sequences as lists, as a settings file has them."""
    values: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        values[name] = list(value) if isinstance(value, tuple | set | frozenset) else value
    return values
