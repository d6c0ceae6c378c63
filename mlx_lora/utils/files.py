"""Find the cache folders, and write files so that a crash, a full disk or Ctrl-C never leaves an incomplete file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlx_lora.utils.errors import InputError

GIVEN = "the list that was given"


def shown_data(data: str) -> str:
    """Return what a person calls a data set: records that Python gave are a file in the cache that they never saw."""
    return GIVEN if Path(data).is_relative_to(cache_dir("records")) else data


def cache_dir(kind: str) -> Path:
    """Return the cache folder for one kind of file; it may not exist yet.

    Args:
        kind: `models`, `data`, `converted`, `encoded`, `runs`, `records`, `reference`, `teacher`, `trunk`, `prompts`,
            `answers`, `wordings`, `pictures`, `code`, `downloads`, `blas`, `bin`, `measured` or `locks`.

    Returns:
        `$MLX_LORA_CACHE/<kind>`, by default `~/.cache/mlx_lora/<kind>`.
    """
    root = os.environ.get("MLX_LORA_CACHE") or Path.home() / ".cache" / "mlx_lora"
    return Path(root) / kind


# The cache

MOST_KEPT_BYTES = 4 * 10**9  # of all folders of a kind together, once no run uses them
STALE_S = 24 * 3600.0  # a temporary folder this old belongs to a process that was killed


def used_bytes(folder: Path) -> int:
    """Return the bytes that a folder's files take on disk, without holes; 0 if it does not exist."""
    return sum(512 * file.stat().st_blocks for file in folder.iterdir()) if folder.is_dir() else 0


def evict(
    room: Path, most_bytes: int = MOST_KEPT_BYTES, spared: Collection[Path] = (), most: int | None = None
) -> None:
    """Remove the folders that were used longest ago, until the others are few and small enough.

    A run that still uses one keeps its open files; only a later run has to compute the rows again.

    Args:
        room: has one folder for each key.
        most_bytes: of all folders that are not spared.
        spared: folders that stay.
        most: folders, spared ones included; None: any number.
    """
    found = room.iterdir() if room.is_dir() else ()
    folders = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    kept, kept_bytes = len(spared), 0
    for folder in (one for one in folders if one not in spared):
        if folder.name.startswith("."):
            if time.time() - folder.stat().st_mtime > STALE_S:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        kept, kept_bytes = kept + 1, kept_bytes + used_bytes(folder)
        if kept_bytes > most_bytes or (most is not None and kept > most):
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_to_disk(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace_text(path: Path, text: str) -> None:
    """Write a text file, which replaces `path` completely or not at all."""
    with replacing_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_store(name: str) -> dict[str, Any]:
    """Return the content of a store of measurements, empty if it is missing or damaged."""
    try:
        content = json.loads((cache_dir("measured") / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_store(name: str, known: Mapping[str, Any]) -> None:
    """Write the content of a store of measurements; if the cache cannot be written, the next run only has to measure again."""
    with suppress(OSError):
        replace_text(cache_dir("measured") / f"{name}.json", json.dumps(known, indent=1))


def cannot_move(folder: Path) -> bool:
    """Return whether a folder exists and cannot be renamed: it is a mount point, or the folder around it cannot be written."""
    return folder.is_dir() and (folder.is_mount() or not os.access(folder.parent, os.W_OK))


def check_replaceable(folder: Path) -> None:
    """Refuse to replace a folder with files that cannot be renamed, before the work.

    Raises:
        InputError: it is one.
    """
    if cannot_move(folder) and any(folder.iterdir()):
        raise InputError(
            f"--out {folder}: not empty, and cannot be replaced (a mount point, or the folder around it cannot be written); "
            "give a folder inside it"
        )


def check_new_folder(folder: Path, force: bool, marker: str = "") -> None:
    """Refuse to write --out over something else, before the work.

    Args:
        folder: a new or an empty one, or with `force` one that is replaced.
        force: whether --force is given.
        marker: a file that a folder must have to be replaced.

    Raises:
        InputError: it is a file, is not empty, or cannot be replaced.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise InputError(f"--out {folder}: is a file; give a new folder")
    check_replaceable(folder)
    if not force:
        raise InputError(f"--out {folder}: exists and is not empty; give a new folder, or --force to replace it")
    if marker and not (folder / marker).is_file():
        raise InputError(f"--out {folder}: --force only replaces a folder that has a {marker}; give another folder")


def place_beside(folder: Path) -> Path:
    """Return where a temporary folder can be made whose files are moved into `folder` later: beside it, or in it."""
    return folder if cannot_move(folder) else folder.parent


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`, which replaces `path` when the block ends without an error.

    The earlier folder is renamed, and deleted only when the new one has its name; if that fails, it gets its name back.
    If `path` cannot be renamed, the temporary folder is in it, and its files replace those of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=place_beside(path)))
    earlier = temporary.with_name(f"{temporary.name}.earlier")
    try:
        temporary.chmod(0o755)
        yield temporary
        if temporary.parent == path:
            _replace_files(path, temporary, earlier)
            return
        if path.exists():
            path.replace(earlier)
        try:
            temporary.replace(path)
        except OSError:
            if earlier.exists():
                earlier.replace(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)


def _replace_files(folder: Path, new: Path, earlier: Path) -> None:
    """Move the entries of a folder to `earlier`, and those of `new` up in their place; both are in the folder."""
    there, made = [one for one in folder.iterdir() if one != new], list(new.iterdir())
    earlier.mkdir()
    try:
        for entry in there:
            entry.replace(earlier / entry.name)
        for entry in made:
            entry.replace(folder / entry.name)
    except OSError:
        for entry in made:
            if not (new / entry.name).exists():
                (folder / entry.name).replace(new / entry.name)
        for entry in list(earlier.iterdir()):
            entry.replace(folder / entry.name)
        raise


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process at a time make the file or folder `path`; the others wait, and then find it finished.

    If the cache cannot be written, processes do not wait.
    """
    import fcntl

    try:
        folder = cache_dir("locks")
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / sha256_of(str(path.absolute()))[:32]).open("w")
    except OSError:
        yield
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the system releases it if the process dies
        yield


def check_writable(folder: Path, flag: str, needed_bytes: int) -> None:
    """Check that `folder` can hold what will be written, before the work is done.

    Args:
        folder: may not exist yet; then its nearest existing parent is checked.
        flag: the flag that gave it, for the message.
        needed_bytes: a lower bound of what will be written.

    Raises:
        InputError: it is not a folder, is not writable, or has too little space.
    """
    parent = _existing(folder)
    if not parent.is_dir():
        raise InputError(f"{flag} {folder}: {parent} is a file; give a folder")
    try:
        # os.access tells root that a read-only mount is writable, so try to write.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot write there ({error.strerror}); choose another folder") from None
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise InputError(
            f"{flag} {folder}: needs {needed_bytes / 1e6:.1f} MB, but only {free / 1e6:.1f} MB are free; free up space "
            "or choose another disk"
        )


def free_on_disk(folder: Path) -> int:
    """Return the free bytes of the disk on which a folder lies, or will lie."""
    return shutil.disk_usage(_existing(folder)).free


def _existing(path: Path) -> Path:
    """Return a path, or its nearest parent that exists."""
    parent = path.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    return parent


def sha256_of(content: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, or of a text, in hexadecimal."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
