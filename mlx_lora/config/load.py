"""Turn flags and the file of `--config` into checked settings: flags override the file, which overrides the defaults.

The file is ours, or with `migrate/` another trainer's. A bare word names a recipe: a settings file with its data that comes
with the package, found from any folder.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_lora.config.aliases import GONE, OTHER_VALUES, instead_of
from mlx_lora.config.checks import settings_problems
from mlx_lora.config.fields import flag_of, read_value, row_of
from mlx_lora.config.settings import FIELDS, SECTIONS, ModelSettings, ServeSettings, TrainSettings
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.parsing import MAX_YAML_CHARACTERS, parse_yaml

# Pairs of settings with the same meaning: a flag for either overrides both in the file.
TWO_NAMES = (
    ("iters", "epochs"), ("batch_size", "batch_tokens"), ("data", "own_prompts")
)  # fmt: skip
RECIPES = Path(__file__).parents[1] / "recipes"
FILES = ("data", "teacher_prompt")  # settings that name a recipe's own files


def train_settings(flags: Mapping[str, Any], content: Mapping[str, Any] | None = None) -> TrainSettings:
    """Resolve settings: flags override the settings file, which overrides the defaults.

    Args:
        flags: the flat settings that were given on the command line.
        content: the file's flat settings with our names, as `read_settings` returns them.

    Raises:
        InputError: there are unknown keys or bad values; the message has all of them, in the flags' spelling.
    """
    decided = decided_by(flags)
    content = {key: value for key, value in (content or {}).items() if value not in GONE.get(key, ())}
    values = {key: value for key, value in content.items() if key not in decided} | dict(flags)
    problems = [
        f"{'settings' if key in flags else '--config'}: unknown setting {key!r}; {instead_of(key, FIELDS, repr)}"
        for key in values
        if key not in FIELDS
    ]
    values = _read(values, FIELDS, problems)
    values |= {name: value for name, value in _table_settings(values).items() if name == "data" or name not in values}
    sections = {
        name: section(**{f.name: values[f.name] for f in dataclasses.fields(section) if f.name in values})
        for name, section in SECTIONS.items()
    }
    settings = TrainSettings(**sections)
    problems = problems or settings_problems(settings.to_flat())
    if problems:
        raise InputError("; ".join(problems))
    return settings


def decided_by(flags: Mapping[str, Any]) -> set[str]:
    """Return the settings that a file cannot change, because they were given as flags by either name."""
    return {*flags, *(name for pair in TWO_NAMES if not flags.keys().isdisjoint(pair) for name in pair)}


def _table_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that LLaMA-Factory's dataset_info.json has for --data, if the folder that it names has one."""
    path = Path(values.get("data") or "").expanduser()
    if not any((folder / "dataset_info.json").is_file() for folder in (path, path.parent)):
        return {}
    from mlx_lora.config.migrate.llama_factory import settings_of_table  # few runs need it

    return settings_of_table(values["data"]) if values.get("data") else {}


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


# The file of --config


def read_settings(path: str | None, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings in a file with our names; empty without a file.

    Args:
        path: the YAML file, or the name of a recipe.
        flags: the settings given on the command line; other trainers' defaults for these are not reported.

    Raises:
        InputError: there is no such file or recipe, or the file is not UTF-8 YAML, not a mapping, or cannot be read as ours.
    """
    if not path:
        return {}
    content = with_recipe_paths(read_yaml(str(recipe_file(path)))) if names_recipe(path) else read_yaml(path)
    from mlx_lora.config.migrate import migrate  # only files need it

    return migrate(content, decided_by(flags), path, flags.get("objective"))


def read_yaml(path: str) -> dict[str, Any]:
    """Read a flat YAML settings file; keys come back with underscores.

    Raises:
        InputError: the file is missing, not UTF-8 YAML, or not a mapping.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file.read(MAX_YAML_CHARACTERS + 1))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror}); give a YAML file") from None
    except ValueError as error:  # not UTF-8 either
        raise InputError(f"--config {path}: not usable YAML ({' '.join(str(error).split())}); fix the file") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: has no settings; write one `flag_name: value` per line")
    return {str(key).replace("-", "_"): value for key, value in content.items()}


# Recipes


def recipe_names() -> list[str]:
    """Return the names that `--config` accepts in place of a file, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def names_recipe(config: str) -> bool:
    """Tell whether a value of `--config` is a recipe's name: a bare word, and no file of that name is here."""
    return not Path(config).suffix and os.sep not in config and not os.path.isfile(config)


def recipe_file(name: str) -> Path:
    """Return a recipe's settings file.

    Raises:
        InputError: there is no such recipe; the message lists those there are.
    """
    names = recipe_names()
    if name not in names:
        close, listed = difflib.get_close_matches(name, names, n=1), ", ".join(names)
        advice = f"did you mean {close[0]}? There are {listed}" if close else f"the recipes are {listed}"
        raise InputError(f"--config {name}: no such file, and no recipe of that name; {advice}")
    return RECIPES / f"{name}.yaml"


def with_recipe_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings with the paths of its files from anywhere.

    The recipes name them as a checkout sees them (`recipes/bard`), so that they can be given as files as well.
    """
    return settings | {name: str(RECIPES.parent / settings[name]) for name in FILES if name in settings}
