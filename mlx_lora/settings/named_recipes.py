"""The recipes that come with the package: settings files with their data, found by name from any folder."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from mlx_lora.system.errors import InputError

RECIPES = Path(__file__).parents[1] / "recipes"
FILES = ("data", "teacher_prompt")  # settings that name a recipe's own files


def recipe_names() -> list[str]:
    """Return the names that `--config` accepts beside files, sorted."""
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


def beside_recipes(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a recipe's settings with the paths of its files from anywhere.

    The recipes name them as a checkout sees them (`recipes/bard`), so that they can be given as files as well.
    """
    return settings | {name: str(RECIPES.parent / settings[name]) for name in FILES if name in settings}
