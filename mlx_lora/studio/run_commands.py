"""Turn the page's settings into the command line of `train`, after checking the files that they name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlx_lora.config.fields import field_type, flag_of, read_value
from mlx_lora.config.load import recipe_names, train_settings
from mlx_lora.config.settings import FIELDS, TrainSettings
from mlx_lora.data.files import TINY_SHAKESPEARE, find_splits, is_dataset_id, named_sets
from mlx_lora.serving.schema import ApiError
from mlx_lora.studio.places import Places, within
from mlx_lora.studio.setting_groups import OWN
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import HUB_ID

# Settings whose value may be a file or folder; a reward may be FILE.py:FUNCTION, which runs that file.
PATHS = ("resume_adapter_file", "chat_template", "reference_adapter", "teacher", "teacher_prompt", "reward")


def is_hub_model(value: Any) -> bool:
    """Tell whether a request's model is a hub id, and neither a path nor a flag."""
    found = HUB_ID.fullmatch(value) if isinstance(value, str) else None
    return (
        found is not None and all(part[0].isalnum() for part in found["repo"].split("/")) and not Path(value).exists()
    )


class Checker:
    """Checks the names of models and files in requests."""

    def __init__(self, places: Places, model_roots: tuple[Path, ...], bases: Callable[[], list[Path]] = lambda: []):
        """Take the studio's folders, those of models, and what returns the base models of runs elsewhere."""
        self._places, self._models, self._bases = places, model_roots, bases

    def model(self, value: Any) -> str:
        """Return a model as `--model` takes it.

        Raises:
            ApiError: it is neither a hub id nor in a folder of this studio.
        """
        if is_hub_model(value):
            return value
        within(value, (*self._models, self._places.home), "model", self._bases())
        return str(Path(value).expanduser().absolute())  # links keep their name: a blob has no suffix

    def adapter(self, value: Any) -> Path:
        """Return an adapter's folder below the folders of runs or the studio's home, or in a run that `train` noted.

        Raises:
            ApiError: it lies elsewhere, or is not there.
        """
        return within(value, (*self._places.all_runs, self._places.home), "adapter", self._places.runs_elsewhere())

    def data(self, value: Any) -> str:
        """Return data as `--data` takes it, with local names made absolute.

        Raises:
            ApiError: a file lies outside the folders of this studio.
        """
        if not isinstance(value, str) or not value.strip() or len(value) > 20_000:
            raise ApiError(400, "data: choose a file or a hub data set first", "invalid_value", "data")
        parts = []
        for name, weight in named_sets(value):
            known = name == TINY_SHAKESPEARE or name in recipe_names()
            if not known and not (is_dataset_id(name) and not Path(name).expanduser().exists()):
                book, mark, sheet = name.partition("#") if ".xlsx#" in name.lower() else (name, "", "")
                path = within(book, self._places.all_data, "data")
                for file in _files_of(path):  # a folder may hold links out of it
                    within(str(file), self._places.all_data, "data")
                name = f"{path}{mark}{sheet}"
            parts.append(name if weight == 1 else f"{name}={weight:g}")
        return ",".join(parts)

    def settings(self, given: Any) -> dict[str, Any]:
        """Return the page's settings with checked paths, without those at their default.

        Raises:
            ApiError: a name is unknown, or a path lies elsewhere.
        """
        if not isinstance(given, dict):
            raise ApiError(400, "settings: must be an object of setting names and values", "invalid_value", "settings")
        refused = sorted(key for key in given if key not in FIELDS or key in OWN)
        if refused:
            raise ApiError(
                400, f"settings: {', '.join(map(str, refused))}: not a setting of the page; GET /api/settings lists them",
                "invalid_value", "settings",
            )  # fmt: skip
        kept = {name: value for name, value in given.items() if value is not None and value != ""}
        for name in PATHS:
            for part in str(kept.get(name, "")).split(","):
                self._named_file(name, part.strip())
        if "model" in kept:
            kept["model"] = self.model(kept["model"])
        if "data" in kept:
            kept["data"] = self.data(kept["data"])
        return {name: value for name, value in kept.items() if not _is_default(name, value)}

    def _named_file(self, name: str, value: str) -> None:
        """Refuse a value that names a file outside the folders of this studio."""
        file = re.sub(r"(?<=\.py):\w+$", "", value).removeprefix("json_schema:")
        if not file or not (Path(file).expanduser().exists() or file[0] in "/~." or ".." in file):
            return
        folders = (*self._places.all_data, *self._places.all_runs, *self._models, self._places.home)
        within(file, folders, name, self._places.runs_elsewhere())


def _files_of(path: Path) -> list[Path]:
    """Return the files that `train` reads of a data folder; none of a folder that it refuses, with the reason."""
    if not path.is_dir():
        return []
    try:
        return [file for files in find_splits(str(path)).values() for file in files]
    except InputError:
        return []


def _is_default(name: str, value: Any) -> bool:
    try:
        return read_value(FIELDS[name], value) == FIELDS[name].default
    except ValueError:
        return False  # resolving the settings says what is wrong


def train_words(settings: Mapping[str, Any], folder: Path, resume: bool = False) -> list[str]:
    """Return the words of the `train` command with these settings.

    Args:
        settings: by name, checked.
        folder: of the run.
        resume: continue from its newest checkpoint.
    """
    words = ["train"]
    first = [name for name in ("model", "data") if name in settings]
    for name in (*first, *(name for name in settings if name not in first)):
        value, flag = settings[name], flag_of(name)
        if field_type(FIELDS[name]) is bool:
            words.append(flag if value else f"--no-{flag[2:]}")
        elif str(value).startswith("-"):
            words.append(f"{flag}={value}")  # else it would be read as a flag
        else:
            words += [flag, f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)]
    words += ["--adapter-path", str(folder)]
    return [*words, "--resume"] if resume else words


def resolved(settings: Mapping[str, Any], folder: Path) -> TrainSettings:
    """Return the settings as the command of `train_words` resolves them.

    Raises:
        InputError: the command would refuse them.
    """
    return train_settings({**settings, "adapter_path": str(folder)})


def run_yaml(settings: TrainSettings) -> str:
    """Return run.yaml as the run will write it, before it chooses what is left to it (a date, shared prompts)."""
    return yaml.safe_dump({**settings.to_flat(), "resume": None, "force": False}, sort_keys=False, allow_unicode=True)
