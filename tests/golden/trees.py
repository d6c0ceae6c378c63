"""The commit that the working tree is compared with."""

from __future__ import annotations

import subprocess
import tarfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = Path(__file__).with_name("BASE")


class NoTreeError(Exception):
    """The commit cannot be read: no git, no checkout, or one that is too shallow."""


def base_commit() -> str:
    """Return the commit in tests/golden/BASE; a change that is meant to change results names a newer one there."""
    return BASE.read_text(encoding="utf-8").split()[0]


def unpacked(commit: str, folder: Path) -> Path:
    """Unpack the package of a commit into a folder and return it; the checkout itself stays as it is.

    Raises:
        NoTreeError: git or the commit is missing.
    """
    try:
        archive = subprocess.run(["git", "archive", commit, "mlx_lora"], cwd=ROOT, capture_output=True, check=True)
    except FileNotFoundError:
        raise NoTreeError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip().splitlines()
        raise NoTreeError(f"commit {commit} cannot be read: {words[-1] if words else error}") from None
    with tarfile.open(fileobj=BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return folder
