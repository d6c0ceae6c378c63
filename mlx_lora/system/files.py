"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_lora.system.cache import cache_dir
from mlx_lora.system.errors import InputError


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` that takes its place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder that takes `path`'s place when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one process at a time make `path`, be it a file or a folder; the others wait, and then find it made.

    Where the cache cannot be written, nobody waits.
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
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        yield


def check_writable(folder: Path, flag: str, needed_bytes: int) -> None:
    """Fail before the work, not after it, when `folder` cannot take what will be written.

    Args:
        folder: may not exist yet; its nearest existing parent is asked.
        flag: the option that named it, for the message.
        needed_bytes: a lower bound of what will be written.

    Raises:
        InputError: not a folder, not writable, or too little room.
    """
    parent = folder.absolute()
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{flag} {folder}: {parent} is a file; name a folder")
    try:
        # os.access says yes to root on a read-only mount; only trying tells.
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot write there ({error.strerror}); choose another folder") from None
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise InputError(
            f"{flag} {folder}: needs {needed_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB are free; free some or choose another disk"
        )


def sha256_of(content: Path | str) -> str:
    """Return the SHA-256 of a file's bytes, or of a text, in hexadecimal."""
    if isinstance(content, str):
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
