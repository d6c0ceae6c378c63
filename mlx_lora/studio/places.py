"""The folders that the studio may read and write, and the check that a path of a request lies in one of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlx_lora.serving.schema import ApiError
from mlx_lora.trainer.run_folder import KnownRun, known_runs

# A run's, an upload's or an export's name: it becomes a folder or a file, and never a path.
NAME = re.compile(r"[\w][\w .+-]{0,99}")
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


@dataclass(frozen=True)
class Places:
    """The folders of one studio, all of them resolved.

    Attributes:
        home: has `data/`, `runs/`, `exports/`, `models/` and the queue.
        model_folders: also searched for models.
        data_folders: also searched for data sets.
        runs_folders: also searched for runs that were started elsewhere.
        known_runs: the list of runs that `train` keeps; None: it is not read.
    """

    home: Path
    model_folders: tuple[Path, ...] = ()
    data_folders: tuple[Path, ...] = ()
    runs_folders: tuple[Path, ...] = ()
    known_runs: Path | None = None

    @property
    def data(self) -> Path:
        """Where uploads go."""
        return self.home / "data"

    @property
    def runs(self) -> Path:
        """Where runs go that the page starts."""
        return self.home / "runs"

    @property
    def exports(self) -> Path:
        """Where exports go."""
        return self.home / "exports"

    @property
    def models(self) -> Path:
        """Where converted models go."""
        return self.home / "models"

    def make(self) -> None:
        """Make the folders of the studio's own."""
        for folder in (self.data, self.runs, self.exports, self.models):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def all_runs(self) -> tuple[Path, ...]:
        """The folders whose subfolders are runs, the studio's own first."""
        return tuple(dict.fromkeys((self.runs, *self.runs_folders)))

    def runs_elsewhere(self) -> dict[Path, KnownRun]:
        """The listed runs whose folders lie in none of those, by folder; each is still there and has a run.yaml."""
        listed = known_runs(self.known_runs) if self.known_runs else []
        return {one.folder: one for one in listed if one.folder.parent not in self.all_runs}

    @property
    def all_data(self) -> tuple[Path, ...]:
        """The folders that data sets may come from."""
        return tuple(dict.fromkeys((self.data, *self.data_folders)))

    @property
    def all_models(self) -> tuple[Path, ...]:
        """The folders that models may come from, besides the stores of other programs."""
        return tuple(dict.fromkeys((self.models, *self.model_folders)))


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
