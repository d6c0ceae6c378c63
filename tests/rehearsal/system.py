"""What macOS lacks or does otherwise, for code of ours: no /proc, no fork, no affinity, other units, folders without case."""

from __future__ import annotations

import multiprocessing
import os
import resource
import sys
import unicodedata
from types import SimpleNamespace
from typing import Any

OURS = f"{os.sep}mlx_lora{os.sep}"
STANDARD = (os.path.dirname(os.__file__) + os.sep, "<frozen ")
LINUX_ONLY = ("sched_getaffinity", "sched_setaffinity", "posix_fadvise", "posix_fallocate", "memfd_create")
PLATFORM_READERS = (
    "mlx_lora.bench.run", "mlx_lora.bench.machine", "mlx_lora.utils.device", "mlx_lora.utils.text",
    "mlx_lora.trainer.guards",
)  # fmt: skip


class OtherSpelling(OSError):
    """A name was written beside one that is the same file on a Mac."""


class Darwin:
    """The module `sys`, on a Mac."""

    platform = "darwin"

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)


def ours_called() -> bool:
    """Return whether code of ours, or the standard library on its behalf, is what calls."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        library = name.startswith(STANDARD) and f"{os.sep}site-packages{os.sep}" not in name
        if not library and os.path.dirname(name) != os.path.dirname(__file__):
            return OURS in name and f"{os.sep}tests{os.sep}" not in name
        frame = frame.f_back
    return False


def _watch(event: str, args: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir", "os.chdir"):
        path = args[0]
        if isinstance(path, (str, bytes, os.PathLike)):
            text = os.fsdecode(path)
            if (text == "/proc" or text.startswith(("/proc/", "/sys/"))) and ours_called():
                raise FileNotFoundError(2, "No such file or directory", text)
            if event == "open" and isinstance(args[2], int) and args[2] & os.O_CREAT:
                _same_spelling(text)
    elif event == "os.mkdir":
        _same_spelling(args[0])
    elif event == "os.rename":
        _same_spelling(args[1], args[0])
    elif event == "os.fork" and ours_called():
        raise RuntimeError("fork: a process with a Metal device must not be forked; start a new one (spawn)")


def _same_spelling(path: Any, leaving: Any = None) -> None:
    if not isinstance(path, (str, bytes, os.PathLike)):
        return
    folder, name = os.path.split(os.path.abspath(os.fsdecode(path)))
    try:
        others = os.listdir(folder)
    except OSError:
        return
    if name in others:
        return
    folded = folded_name(name)
    for other in others:
        if folded_name(other) == folded and (leaving is None or os.path.basename(os.fsdecode(leaving)) != other):
            raise OtherSpelling(17, f"on a Mac this is the same file as {other}", os.path.join(folder, name))


def folded_name(name: str) -> str:
    """Return the form in which APFS compares names: without case, in one Unicode normal form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _usage(who: int) -> Any:
    """getrusage with the largest resident size in bytes, as macOS counts."""
    plain = _plain_usage(who)
    return SimpleNamespace(
        **{name: getattr(plain, name) for name in dir(plain) if name.startswith("ru_")}
        | {"ru_maxrss": plain.ru_maxrss * 1024}
    )


_plain_usage = resource.getrusage


def install() -> None:
    """Take from this process what a Mac lacks, for the rest of it."""
    for name in LINUX_ONLY:
        if hasattr(os, name):
            delattr(os, name)
    multiprocessing.set_start_method("spawn", force=True)
    sys.addaudithook(_watch)


def tell(module: Any) -> None:
    """Let a module of PLATFORM_READERS read macOS's platform, and macOS's units of memory."""
    module.sys = Darwin()
    if hasattr(module, "resource"):
        module.resource = SimpleNamespace(getrusage=_usage, RUSAGE_SELF=resource.RUSAGE_SELF)
