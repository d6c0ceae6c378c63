"""The folders that the studio may read and write, and the checks that what a request names lies in one of them."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_lora.config.fields import field_type, read_value
from mlx_lora.config.load import recipe_names
from mlx_lora.config.objectives import VERIFIERS
from mlx_lora.config.settings import FIELDS, ROWS
from mlx_lora.data.data_sets import TINY_SHAKESPEARE, find_splits, is_dataset_id, named_sets
from mlx_lora.studio.web import OWN
from mlx_lora.trainer.run_folder import KnownRun, known_runs
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import cache_dir
from mlx_lora.utils.http import ApiError
from mlx_lora.utils.hub import CONFIG_AND_TOKENIZER, HUB_ID, SMALL_MODEL, SMOLLM2_GGUF

# A run's, an upload's or an export's name: it becomes a folder or a file, and never a path.
NAME = re.compile(r"[\w][\w .+-]{0,99}")
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
# Settings whose text never names a file: names, patterns, numbers, and texts for the model.
WORDS = frozenset((
    "revision", "prompt_column", "completion_column", "system_column", "chat_column", "text_column", "label_column", "turn_names",
    "speaker", "chat_date", "rank_pattern", "alpha_pattern", "modules_to_save", "target_modules", "objective", "loss_type",
    "loss_weights", "reward_weights", "labels", "class_weights", "matryoshka_dims", "query_prompt", "document_prompt",
    "grad_checkpoint", "shard_base", "report_to", "project_name",
))  # fmt: skip
# All other texts may be a file or folder, also as FILE.py:NAME, which runs that file. So a new setting is checked, too.
PATHS = tuple(
    name
    for name, field in FIELDS.items()
    if field_type(field) is str and not ROWS[name].choices and name not in (*WORDS, *OWN, "model", "data")
)
DEPTH = 3  # of folders below one that is searched: PUBLISHER/REPO/file
# Of a folder: what tells a model's or an adapter's shape, tokenizer and templates.
TELLING = (*CONFIG_AND_TOKENIZER, "additional_chat_templates/*.jinja")
Stamps = tuple[tuple[str, int, int], ...]


class Folders:
    """The folders of one studio, all of them resolved.

    Attributes:
        home: has `data/` for uploads, `runs/` that the page starts, `exports/`, `models/` that were converted, `logs/` with the
            output of tasks, and the queue.
        all_runs: the folders whose subfolders are runs, the studio's own first.
        all_data, all_models: the folders that data sets and models may come from, besides the stores of other programs.
        known_runs: the list of runs that `train` keeps; None: it is not read.
    """

    def __init__(
        self, home: Path, model_folders: tuple[Path, ...] = (), data_folders: tuple[Path, ...] = (),
        runs_folders: tuple[Path, ...] = (), known_runs: Path | None = None,
    ):  # fmt: skip
        self.home, self.known_runs = home, known_runs
        own = (home / name for name in ("data", "runs", "exports", "models", "logs"))
        self.data, self.runs, self.exports, self.models, self.logs = own
        self.all_runs = tuple(dict.fromkeys((self.runs, *runs_folders)))
        self.all_data = tuple(dict.fromkeys((self.data, *data_folders)))
        self.all_models = tuple(dict.fromkeys((self.models, *model_folders)))

    def make(self) -> None:
        """Make the folders of the studio's own."""
        for folder in (self.data, self.runs, self.exports, self.models):
            folder.mkdir(parents=True, exist_ok=True)

    def noted_runs(self) -> dict[Path, KnownRun]:
        """What `train` noted of runs, by folder; each is still there and has a run.yaml."""
        return {one.folder: one for one in (known_runs(self.known_runs) if self.known_runs else [])}

    def runs_elsewhere(self) -> dict[Path, KnownRun]:
        """Those of them whose folders lie in none of the folders of runs."""
        return {folder: one for folder, one in self.noted_runs().items() if folder.parent not in self.all_runs}


def within(path: object, folders: Iterable[Path], field: str, named: Iterable[Path] = ()) -> Path:
    """Return a path of a request, with its links followed, if it lies in one of these folders.

    Args:
        path: as the request gave it.
        folders: resolved.
        field: of the request, for errors.
        named: resolved; files and folders that are allowed themselves, with what is in them.

    Raises:
        ApiError: 400 if it is not a path, 403 if it lies elsewhere, 404 if there is nothing.
    """
    if not isinstance(path, str) or not path or "\0" in path or len(path) > 4096:
        raise ApiError(400, f"{field}: must be the path of a file or folder that the studio lists", "invalid_value")
    try:
        found = Path(path).expanduser().resolve()
    except (OSError, RuntimeError):  # a circle of links, or a user that does not exist
        raise ApiError(400, f"{field}: not a usable path; choose one that the studio lists", "invalid_value") from None
    inside = any(found.is_relative_to(folder) and found != folder for folder in folders)
    if not inside and not any(found.is_relative_to(one) for one in named):
        raise ApiError(
            403, f"{field}: outside the folders of this studio; copy it there, or start the studio with its folder",
            "path_outside",
        )  # fmt: skip
    if not found.exists():
        raise ApiError(404, f"{field}: {found.name}: no such file or folder here; reload the list", "not_found")
    return found


def safe_name(name: object, field: str = "name") -> str:
    """Return a name that can be a file or folder of its own, below a folder that is given otherwise.

    Raises:
        ApiError: 400, it is none.
    """
    text = name.strip() if isinstance(name, str) else ""
    if not NAME.fullmatch(text) or text.endswith(".") or RESERVED.fullmatch(text):
        raise ApiError(
            400, f"{field}: must be 1 to 100 letters, digits, spaces, . _ + or -, and begin with a letter or digit",
            "invalid_value",
        )  # fmt: skip
    return text


def walk(root: Path, folder: Path | None = None, left: int = DEPTH) -> Iterator[tuple[Path, set[str], list[Path]]]:
    """Yield a folder, the names of all that is in it, and its entries but for hidden ones and links out of the root; then what
    is below. Folders that the caller takes out of the entries are not entered."""
    folder = folder or root
    with contextlib.suppress(OSError):
        found = sorted(folder.iterdir())
        entries = [one for one in found if not one.name.startswith(".") and one.resolve().is_relative_to(root)]
        yield folder, {one.name for one in found}, entries
        for entry in entries if left else ():
            if entry.is_dir():
                yield from walk(root, entry, left - 1)


def free_path(wanted: Path, fits: Callable[[Path], bool] = lambda path: False) -> Path:
    """Return the first of NAME, NAME-2, NAME-3 and so on that is not there yet, or fits as it is."""
    names = itertools.chain([wanted], (wanted.with_name(f"{wanted.name}-{number}") for number in itertools.count(2)))
    return next(path for path in names if not path.exists() or fits(path))


def is_hub_model(value: Any) -> bool:
    """Tell whether a request's model is a hub id, and neither a path nor a flag."""
    found = HUB_ID.fullmatch(value) if isinstance(value, str) else None
    return bool(found) and all(part[0].isalnum() for part in found["repo"].split("/")) and not Path(value).exists()


def whole_model(model: str, cwd: str = "") -> str:
    """Return a model as the commands resolve its name: a local one as a whole path, and `smollm2` without a folder as its file.

    Args:
        model: as `--model` takes it.
        cwd: where a relative name starts; empty: here.
    """
    local = Path(cwd, Path(model).expanduser())
    if local.exists():
        return str(local.absolute())  # links keep their name: a blob has no suffix
    return str(cache_dir("models") / SMOLLM2_GGUF.file_name) if model == SMALL_MODEL else model


class Checker:
    """Checks the names of models and files in requests."""

    def __init__(self, folders: Folders, model_roots: tuple[Path, ...], bases: Callable[[], list[Path]] = lambda: []):
        """Take the studio's folders, those of models, and what returns the base models of runs elsewhere."""
        self._folders, self._models, self._bases = folders, model_roots, bases

    def model(self, value: Any) -> str:
        """Return a model as `--model` takes it.

        Raises:
            ApiError: it is neither a hub id nor in a folder of this studio.
        """
        if is_hub_model(value):
            return value
        value = whole_model(value) if isinstance(value, str) and "\0" not in value else value
        within(value, (*self._models, self._folders.home), "model", self._bases())
        return value

    def adapter(self, value: Any) -> Path:
        """Return an adapter's folder below the folders of runs or the studio's home, or in a run that `train` noted.

        Raises:
            ApiError: it lies elsewhere, or is not there.
        """
        return within(value, (*self._folders.all_runs, self._folders.home), "adapter", self._folders.runs_elsewhere())

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
                place, asked, options = (name, "", "") if Path(name).expanduser().exists() else name.partition("?")
                book, mark, sheet = place.partition("#") if ".xlsx#" in place.lower() else (place, "", "")
                path = within(book, self._folders.all_data, "data")
                for file in _files_of(path, asked + options):  # a folder may hold links out of it
                    within(str(file), self._folders.all_data, "data")
                name = f"{path}{mark}{sheet}{asked}{options}"
            elif not known:
                _check_revision(name.partition("@")[2], "data")
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
        folders = (*self._folders.all_data, *self._folders.all_runs, *self._models, self._folders.home)
        elsewhere = self._folders.runs_elsewhere()
        for name in PATHS:
            for file, may_be_gone in _named_in(str(kept.get(name, ""))):
                if os.path.exists(file) or (may_be_gone and _is_path(file)):
                    path = within(file, folders, name, elsewhere)
                    for linked in _files_of(path) if name == "eval_tasks" else ():  # its folder is read as data
                        within(str(linked), folders, name, elsewhere)
        _check_revision(str(kept.get("revision", "")), "revision")
        kept |= {
            name: check(kept[name]) for name, check in (("model", self.model), ("data", self.data)) if name in kept
        }
        for name, value in list(kept.items()):
            with contextlib.suppress(ValueError):  # resolving the settings says what is wrong
                if read_value(FIELDS[name], value) == FIELDS[name].default:
                    del kept[name]
        return kept


def _named_in(value: str) -> Iterator[tuple[str, bool]]:
    """Yield what a value like FILE.py:NAME, json_schema:FILE, or several by comma may name, and whether it also does if it is not there.

    The whole value is a list, or the name of a file with commas in it, which is then there.
    """
    for part in dict.fromkeys((value, *value.split(","))):
        text = part.strip().removeprefix("json_schema:").removeprefix(VERIFIERS)
        path, colon, _ = text.rpartition(":")
        yield os.path.expanduser(path if colon and path.endswith(".py") else text), part != value or "," not in value


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", ".")) or ".." in text


def _check_revision(text: str, field: str) -> None:
    """Refuse a revision that is a path; without network the hub's client would read there."""
    if _is_path(text) or "\\" in text:
        raise ApiError(400, f"{field}: {text[:80]!r} is not a branch, tag or commit of the hub", "invalid_value", field)


def _files_of(path: Path, options: str = "") -> list[Path]:
    """Return the files that `train` reads of a data folder; none of a folder that it refuses, with the reason."""
    if not path.is_dir():
        return []
    try:
        return [file for files in find_splits(f"{path}{options}").values() for file in files]
    except InputError:
        return []


# Stamps of files, which change when the files do: what the studio keeps of earlier work, it keeps under them


def stamps(files: Iterable[Path]) -> Stamps:
    """Return path, size in bytes, and time of the last change in ns, of those files that are there."""
    found = ((file, file.stat()) for file in files if file.is_file())
    return tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in found)


def stamps_at(path: Path) -> Stamps:
    """Return the stamps of a file, or of a folder's small files; none if there is neither."""
    return stamps(sorted(file for pattern in TELLING for file in path.glob(pattern)) if path.is_dir() else [path])


def stamps_of_settings(settings: Mapping[str, Any]) -> Stamps:
    """Return the stamps of the files and folders that settings name, but for those of model and data."""
    named = {
        file: None for name in PATHS for file, _ in _named_in(str(settings.get(name) or "")) if os.path.exists(file)
    }
    return tuple(one for file in named for one in stamps_at(Path(file)))
