"""Turn flags and the contents of a settings file into checked settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lora.settings.checks import settings_problems
from mlx_lora.settings.config import FIELDS, SECTIONS, ModelSettings, TrainSettings
from mlx_lora.settings.other_names import OTHER_VALUES, instead_of
from mlx_lora.settings.serve_settings import ServeSettings
from mlx_lora.settings.setting_row import flag_of, read_value, row_of
from mlx_lora.system.errors import InputError

# Pairs of settings with the same meaning: a flag for either overrides both in the file.
TWO_NAMES = (
    ("iters", "epochs"), ("method", "fine_tune_type"), ("batch_size", "batch_tokens"), ("data", "own_prompts")
)  # fmt: skip


def decided_by(flags: Mapping[str, Any]) -> set[str]:
    """Return the settings that a file cannot change, because they were given as flags by either name."""
    return {*flags, *(name for pair in TWO_NAMES if not flags.keys().isdisjoint(pair) for name in pair)}


def train_settings(flags: Mapping[str, Any], content: Mapping[str, Any] | None = None) -> TrainSettings:
    """Resolve settings: flags override the settings file, which overrides the defaults.

    Args:
        flags: the flat settings that were given on the command line.
        content: the file's flat settings with our names, as `settings_file.read_settings` returns them.

    Raises:
        InputError: there are unknown keys or bad values; the message has all of them, in the flags' spelling.
    """
    decided = decided_by(flags)
    values = {key: value for key, value in (content or {}).items() if key not in decided} | dict(flags)
    problems = [
        f"{'settings' if key in flags else '--config'}: unknown setting {key!r}; {instead_of(key, FIELDS, repr)}"
        for key in values
        if key not in FIELDS
    ]
    values = _read(values, FIELDS, problems)
    values |= {name: value for name, value in _of_table(values).items() if name == "data" or name not in values}
    sections = {
        name: section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
        for name, section in SECTIONS.items()
    }
    settings = TrainSettings(**sections)
    problems = problems or settings_problems(settings.to_flat())
    if problems:
        raise InputError("; ".join(problems))
    return settings


def _of_table(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that LLaMA-Factory's dataset_info.json has for --data, if the folder that it names has one."""
    path = Path(values.get("data") or "").expanduser()
    if not any((folder / "dataset_info.json").is_file() for folder in (path, path.parent)):
        return {}
    from mlx_lora.settings.migration.dataset_info import settings_of_table  # few runs need it

    return settings_of_table(values["data"], FIELDS) if values.get("data") else {}


def serve_settings(flags: Mapping[str, Any]) -> tuple[ModelSettings, ServeSettings]:
    """Resolve a server's settings from its flags.

    Raises:
        InputError: there are bad values; the message has all of them.
    """
    fields, problems = {f.name: f for f in dataclasses.fields(ServeSettings)}, []
    settings = ServeSettings(**_read(flags, fields, problems))
    if problems:
        raise InputError("; ".join(problems))
    return train_settings({key: value for key, value in flags.items() if key not in fields}).model, settings


def _read(values: Mapping[str, Any], fields: Mapping[str, dataclasses.Field], problems: list[str]) -> dict[str, Any]:
    """Return the values of known settings in their types, and add the errors to `problems`."""
    read = {}
    for name, value in values.items():
        if name not in fields:
            continue
        try:
            read[name] = read_value(fields[name], value)
        except ValueError as error:
            other = OTHER_VALUES.get(str(value).lower()) if row_of(fields[name]).choices else None
            problems.append(f"{flag_of(name)} {f'{value!r}: {other}' if other else error}")
    return read
