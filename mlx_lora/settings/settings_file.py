"""Read the file of `--config`: ours, or with `migration/` another trainer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mlx_lora.settings.config import FIELDS
from mlx_lora.settings.migration.migrate import migrate
from mlx_lora.settings.named_recipes import beside_recipes, names_recipe, recipe_file
from mlx_lora.settings.resolve import decided_by
from mlx_lora.system.errors import InputError
from mlx_lora.system.parsing import MAX_YAML_CHARACTERS, parse_yaml


def read_settings(path: str | None, flags: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Return the settings in a file with our names; empty without a file.

    Args:
        path: the YAML file, or the name of a recipe.
        flags: the settings given on the command line; other trainers' defaults for these are not reported.
        say: takes a line about each setting of another trainer's file that we interpret differently.

    Raises:
        InputError: there is no such file or recipe, or the file is not UTF-8 YAML, not a mapping, or cannot be read as ours.
    """
    if not path:
        return {}
    content = beside_recipes(read_yaml(str(recipe_file(path)))) if names_recipe(path) else read_yaml(path)
    return migrate(content, FIELDS, decided_by(flags), path, say, flags.get("objective"))


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
