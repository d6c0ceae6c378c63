"""The list of runs of this user's machine, in the cache, so that the studio finds those that were started in a terminal.

runs.jsonl has one line for each run folder: `path`, `cwd` (names in its run.yaml are relative to it) and `at`, a UNIX time.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from mlx_lora.system.cache import cache_dir
from mlx_lora.system.files import one_at_a_time, replacing_file

MOST_RUNS = 1000  # the newest


@dataclass(frozen=True)
class KnownRun:
    """A run folder, the folder in which its command was given, and when it began."""

    path: str
    cwd: str
    at: float

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.path)


def runs_file() -> Path:
    """Return where the list is."""
    return cache_dir("runs") / "runs.jsonl"


def note_run(folder: Path) -> None:
    """Put a run at the end of the list; a cache that cannot be written costs the run its place there, and nothing else."""
    new = KnownRun(str(folder.resolve()), os.getcwd(), time.time())
    with contextlib.suppress(OSError):
        _change(runs_file(), lambda known: [*(one for one in known if one.path != new.path), new])


def forget_run(folder: Path, file: Path | None = None) -> None:
    """Take a run off the list; its folder stays."""
    _change(file or runs_file(), lambda known: [one for one in known if one.path != str(folder)])


def known_runs(file: Path) -> list[KnownRun]:
    """Return the runs whose folder is still there: the folder itself, not a link to another one."""
    return [one for one in _read(file) if _is_there(one)]


def _change(file: Path, change: Callable[[list[KnownRun]], list[KnownRun]]) -> None:
    """Write the changed list, without the runs that are gone."""
    with one_at_a_time(file):
        kept = [one for one in change(_read(file)) if _is_there(one)][-MOST_RUNS:]
        with replacing_file(file) as temporary:
            temporary.write_text("".join(f"{json.dumps(asdict(one))}\n" for one in kept), encoding="utf-8")


def _read(file: Path) -> list[KnownRun]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            one = KnownRun(**json.loads(line))
            if isinstance(one.path, str) and isinstance(one.cwd, str):
                found.append(one)
    return found


def _is_there(one: KnownRun) -> bool:
    try:
        return (one.folder / "run.yaml").is_file() and str(one.folder.resolve()) == one.path
    except (OSError, RuntimeError, ValueError):
        return False
