"""Write sizes, counts, command lines, versions and suggestions for people, and read facts about processes; without mlx.

A person starts this program with `mlx-lora X` where that script is installed, else with `python -m mlx_lora X`.
"""

from __future__ import annotations

import difflib
import os
import platform
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_lora import __version__
from mlx_lora.utils.errors import InputError

# Numbers

GIB = 1 << 30


def parse_size(text: str) -> int:
    """Return the number of bytes for `512MB`, `2GB`, `1.5GiB` or a plain number.

    Raises:
        InputError: the text is not a size.
    """
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    digits = text.strip().rstrip("KMGIBkmgib ")
    unit = text.strip()[len(digits) :].strip().upper()
    try:
        size = float(digits) * units[unit]
    except (ValueError, KeyError):
        raise InputError(f"size {text!r}: not a number of bytes; write it as 512MB or 2GB") from None
    if not 0 <= size < 2**63:
        raise InputError(f"size {text!r}: out of range; give a size such as 512MB or 2GB")
    return int(size)


def gigabytes(size_bytes: float) -> str:
    """Return a size as text, such as `1.25 GB`."""
    return f"{size_bytes / 1e9:.2f} GB" if size_bytes < 1e11 else f"{size_bytes / 1e9:.0f} GB"


def counted(number: int, one: str, several: str | None = None) -> str:
    """Return a count as text: 1 step, 2 steps or 1,000 steps."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def format_duration(seconds: float) -> str:
    """Return a duration as text, such as 1m15s for 75."""
    minutes, rest = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def words_of(name: str) -> str:
    """Return a number's name as words; one with a slash (reward/my_rule) holds a name of the user's, which stays whole."""
    return name if "/" in name else name.replace("_", " ")


# Misspelled names


def closest(name: str, known: Iterable[str], most: int = 1) -> list[str]:
    """Return the known names that are most similar to a name, the closest first; none if none is similar."""
    plain: dict[str, str] = {}
    for one in known:
        plain.setdefault(one.lower(), one)
    return [plain[found] for found in difflib.get_close_matches(name.lower(), plain, n=most)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean X?` for the closest known name, or nothing if none is similar."""
    found = closest(name, known)
    return f"; did you mean {found[0]}?" if found else ""


def unknown_name(name: str, known: Iterable[str]) -> str:
    """Return what an error says of a name that is none of the known ones: the closest, or all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"not one of {', '.join(known)}"


def similar_paths(path: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Return the paths that are similar to one that does not exist, the closest first; its folders may be misspelled too.

    Args:
        path: the path that does not exist.
        wanted: tells whether a path is of the right kind.
    """
    parents = [path.parent] if path.parent.is_dir() or path.parent == path else similar_paths(path.parent, Path.is_dir)
    found = []
    for parent in map(Path, parents):
        try:
            names = [entry.name for entry in parent.iterdir() if wanted(entry)]
        except OSError:
            continue
        # Below a folder that is only similar, the name itself may be right.
        found += [str(parent / name) for name in closest(path.name, names, most=3)]
    return found[:3]


# Command lines

SCRIPT = "mlx-lora"
MODULE = "mlx_lora"


def command_line(words: list[str]) -> str:
    """Return a command that can be pasted into a shell, such as `mlx-lora chat --model smollm2`.

    Args:
        words: the command's name, and its arguments.
    """
    if os.environ.get("UV") and any(part.startswith("archive-v") for part in Path(sys.prefix).parts):
        return f"uvx {SCRIPT} {shlex.join(words)}"  # in uvx's own environment, which the user's shell does not search
    beside = Path(sys.executable).parent / SCRIPT
    has_script = Path(sys.argv[0]).name == SCRIPT or beside.exists() or shutil.which(SCRIPT) is not None
    return f"{SCRIPT} {shlex.join(words)}" if has_script else f"python -m {MODULE} {shlex.join(words)}"


def model_flags(settings: Mapping[str, Any]) -> list[str]:
    """Return the words of a command that load the model that a run was trained on.

    Args:
        settings: of the run, by name.
    """
    words = [
        word
        for name in ("model", "revision", "bits")
        if settings.get(name)
        for word in (f"--{name}", str(settings[name]))
    ]
    return [*words, *(["--trust-remote-code"] if settings.get("trust_remote_code") else [])]


def this_command() -> str:
    """Return the command that started this process; a program of the user's own stays as it is."""
    words = sys.orig_argv[1:]
    if words[:1] == ["-m"] and words[1:2] and words[1].startswith(f"{MODULE}."):
        return command_line([words[1].removeprefix(f"{MODULE}."), *words[2:]])
    if words[:2] == ["-m", MODULE] or (words and Path(words[0]).name == SCRIPT):
        return command_line(words[2 if words[0] == "-m" else 1 :])
    return shlex.join(["python", *words])


# Versions

PACKAGES = ("mlx", "mlx-metal", "mlx-lm", "transformers", "tokenizers", "huggingface-hub", "numpy", "gguf")


def installed_versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter, None for those not installed."""
    return {"mlx-lora": __version__, "python": platform.python_version(), **package_versions(PACKAGES)}


@cache
def package_version(name: str) -> str:
    """Return the version of an installed package, which is read once per process: each run asks some twenty times.

    Raises:
        PackageNotFoundError: it is not installed.
    """
    return metadata.version(name)


def package_versions(names: Iterable[str]) -> dict[str, str | None]:
    """Return the versions of these packages, None for those not installed."""
    versions: dict[str, str | None] = {}
    for name in names:
        try:
            versions[name] = package_version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


# Processes


def peak_bytes() -> int:
    """Return the process's largest resident size so far, in bytes; MLX only counts its own buffers."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts in bytes, Linux in KiB


def start_mark(number: int) -> str | None:
    """Return what tells a process from a later one with the same number: when it started; None if it is not there.

    A process that has ended, and whose parent has not asked for its result yet, counts as not there.
    """
    if sys.platform == "linux":
        try:
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    asked = subprocess.run(
        ["ps", "-o", "stat=", "-o", "lstart=", "-p", str(number)], capture_output=True, text=True, check=False
    )
    state, _, started = asked.stdout.strip().partition(" ")
    return None if asked.returncode or state.startswith("Z") else " ".join(started.split())
