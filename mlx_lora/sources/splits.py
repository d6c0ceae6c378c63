"""Find the files of each split that `--data` names."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from mlx_lora.settings.named_recipes import RECIPES, recipe_names
from mlx_lora.sources.records import DOCUMENTS, MARKDOWN, SUFFIXES
from mlx_lora.sources.shakespeare import tiny_shakespeare
from mlx_lora.system.errors import InputError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}
TINY_SHAKESPEARE = "tiny-shakespeare"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
SHARD = re.compile(r"(?P<split>[a-z]+)(-\d{5}-of-\d{5}.*)?")  # the hub's names for the parts of one split
NOT_DATA = re.compile(r"(readme|license|requirements|dataset_infos?|config|notice)\b.*", re.IGNORECASE)


def find_splits(data: str) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split that `--data` names.

    Args:
        data: A file, a folder, `tiny-shakespeare`, a recipe's name or a hub dataset id `owner/name` (`@revision` may follow).

    Returns:
        `train`, `valid`, `test` -> the split's files, ordered by name (one, unless a hub dataset has several
        parts). A single file, or the only data file of a folder, is `train`; so are all files of a folder of documents,
        those in its subfolders too.

    Raises:
        InputError: there are no data files, or two files have the name of the same split.
    """
    path = Path(data).expanduser()
    if path.is_file():
        return {"train": (path,)}
    if path.is_dir():
        return _folder_splits(path)
    if data == TINY_SHAKESPEARE:
        return {"train": (tiny_shakespeare(),)}
    if data in recipe_names():
        return _folder_splits(RECIPES / data)
    if is_dataset_id(data):
        from mlx_lora.sources.hub import download_dataset_files  # the hub client is slow to import

        dataset, _, revision = data.partition("@")
        return _folder_splits(download_dataset_files(dataset, revision or None))
    raise InputError(_not_found(data, path))


def is_dataset_id(data: str) -> bool:
    """Tell whether a text that names no file or folder can be the id of a hub dataset, `owner/name@revision`."""
    path, dataset = Path(data).expanduser(), data.partition("@")[0]
    return bool(HUB_ID.fullmatch(dataset)) and path.suffix.lower() not in SUFFIXES and not path.parent.is_dir()


def _folder_splits(folder: Path) -> dict[str, tuple[Path, ...]]:
    for subfolder in (folder, folder / "data", folder / "default"):
        splits = _named_splits(subfolder)
        if splits:
            return {name: splits[name] for name in ("train", "valid", "test") if name in splits}
    files = [file for file in _data_files(folder) if not NOT_DATA.fullmatch(file.name)]
    if len(files) == 1:
        return {"train": (files[0],)}
    if files and all(file.suffix.lower() in DOCUMENTS for file in files):
        return {"train": _documents(folder)}
    found = ", ".join(file.name for file in files[:8]) or ", ".join(sorted(p.name for p in folder.iterdir())[:8])
    raise InputError(
        f"{folder} has no train.jsonl (or train{' train'.join(SUFFIXES[1:])}); "
        f"found: {found or 'nothing'}; name the file itself, or rename it"
    )


def _named_splits(folder: Path) -> dict[str, tuple[Path, ...]]:
    """Return the files of each split: those with its name in `folder`, and all in subfolders with its name."""
    candidates: dict[str, list[Path]] = {}
    for file in _data_files(folder):
        match = SHARD.fullmatch(file.stem)
        if match and match["split"] in SPLIT_NAMES:
            candidates.setdefault(SPLIT_NAMES[match["split"]], []).append(file)
    for name, split in SPLIT_NAMES.items():
        candidates.setdefault(split, []).extend(_data_files(folder / name))
    for split, files in candidates.items():
        in_parts = all("-of-" in file.stem or file.parent != folder for file in files)
        if len(files) > 1 and not in_parts:
            names = ", ".join(file.name for file in files)
            raise InputError(f"{folder} has several {split} files: {names}; keep one, or name the file itself")
    return {split: tuple(files) for split, files in candidates.items() if files}


def _data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder; Markdown beside others than texts describes them."""
    if not folder.is_dir():
        return []
    files = sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if all(file.suffix.lower() in DOCUMENTS for file in files):
        return files
    return [file for file in files if file.suffix.lower() not in MARKDOWN]


def _documents(folder: Path) -> tuple[Path, ...]:
    """Return the texts in a folder and its subfolders, without hidden ones."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in DOCUMENTS and p.is_file())
    seen = [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    return tuple(sorted(p for p in seen if not NOT_DATA.fullmatch(p.name)))


def _not_found(data: str, path: Path) -> str:
    parent = path.parent
    near = [p.name for p in parent.iterdir()] if parent.is_dir() else []
    close = difflib.get_close_matches(path.name, near, n=3) or difflib.get_close_matches(data, ["tiny-shakespeare"])
    hint = f"similar names: {', '.join(close)}" if close else f"no similar name in {parent.resolve()}"
    return (
        f"--data {data}: no such file or folder, and no hub dataset id (owner/name); {hint}; "
        f"give a {' '.join(SUFFIXES)} file, a folder with train.jsonl, a dataset id or tiny-shakespeare"
    )
