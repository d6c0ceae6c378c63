"""Checkpoints: a complete adapter and everything that a run needs to resume, written atomically.

    checkpoints/step-000100/   adapters.safetensors, adapter_config.json     the adapter, as in a run folder
                               state.safetensors                             training/state.py's arrays
                               state.json                                    position, identity, checksums

Each is written under another name, flushed to disk and renamed: a kill at any moment leaves the earlier ones intact.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora.models.saving import save_tensors
from mlx_lora.sources.safetensors import read_safetensors_header
from mlx_lora.system.errors import InputError
from mlx_lora.system.files import replacing_folder, sha256_of
from mlx_lora.system.parsing import read_json
from mlx_lora.training.held_out import VALIDATED
from mlx_lora.training.state import Position

STATE_FILE, ARRAYS_FILE, LOCK_FILE = "state.json", "state.safetensors", ".lock"
NAME = re.compile(r"step-(\d{6,})")
VERSION = 1
MAX_EPOCHS, MAX_PARTS = 1e9, 10**6  # the bounds of --epochs and of rows in a batch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and is complete.

    Attributes:
        folder: its folder.
        position: of the run.
        identity: everything that the run depends on; see `differences`.
        arrays: as training/state.py returns them.
    """

    folder: Path
    position: Position
    identity: dict[str, Any]
    arrays: dict[str, mx.array]


def write_checkpoint(
    folder: Path,
    position: Position,
    identity: dict[str, Any],
    arrays: dict[str, mx.array],
    save_adapter: Callable[[Path], None],
) -> None:
    """Write a checkpoint atomically.

    Args:
        folder: `checkpoints/step-NNNNNN`; replaced if it exists.
        position, identity, arrays: see Checkpoint.
        save_adapter: writes the adapter into a folder.
    """
    with replacing_folder(folder) as temporary:
        save_adapter(temporary)
        save_tensors(temporary / ARRAYS_FILE, arrays)
        sums = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
        state = {"version": VERSION, "position": asdict(position), "identity": identity, "sha256": sums}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
    _flush(folder.parent)


def thin_out(room: Path, keep: int, best_at: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one; 0 keeps all."""
    found = numbered(room)
    for number, folder in found[keep:] if keep else []:
        if number != best_at:
            shutil.rmtree(folder, ignore_errors=True)


def numbered(room: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints in a run folder's `checkpoints`, newest first."""
    folders = room.iterdir() if room.is_dir() else ()
    found = [(int(match[1]), path) for path in folders if (match := NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def newest_checkpoint(room: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest complete checkpoint, None if there is none; damaged ones are reported.

    Args:
        room: a run folder's `checkpoints`.
        say: called with one line about each damaged checkpoint.
    """
    for _, folder in numbered(room):
        try:
            return read_checkpoint(folder)
        except InputError as error:
            say(f"Checkpoint skipped: {error}")
    return None


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check all of it.

    Raises:
        InputError: something is missing, damaged, or of another version.
    """
    if not (folder / STATE_FILE).is_file():
        raise InputError(f"{folder}: no checkpoint to resume from (no {STATE_FILE}); give a step-NNNNNN folder")
    state = read_json(folder / STATE_FILE, "use an older checkpoint")
    try:
        version, sums = state["version"], dict(state["sha256"])
        position, identity = Position(**state["position"]), dict(state["identity"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: no checkpoint to resume from ({type(error).__name__} in {STATE_FILE})") from None
    if version != VERSION:
        raise InputError(
            f"{folder}: the checkpoint has version {version}, this program reads {VERSION}; use the program that wrote it"
        )
    wrong = _position_problems(position)
    epochs = identity.get("price_epochs", 1.0)
    wrong += [] if isinstance(epochs, (int, float)) and 0 < epochs <= MAX_EPOCHS else ["price_epochs"]
    examples = identity.get(VALIDATED, 0)
    wrong += [] if type(examples) is int and 0 <= examples < 2**53 else [VALIDATED]
    if wrong:
        raise InputError(f"{folder}: {STATE_FILE} has impossible values ({', '.join(wrong)}); use an older checkpoint")
    for name, expected in {ARRAYS_FILE: None, **sums}.items():
        path = folder / Path(name).name
        if not path.is_file() or sha256_of(path) != expected:
            raise InputError(f"{folder}: {name} is missing or damaged; use an older checkpoint")
    read_safetensors_header(folder / ARRAYS_FILE)
    return Checkpoint(folder, position, identity, mx.load(str(folder / ARRAYS_FILE)))


def _position_problems(position: Position) -> list[str]:
    """Return the fields of a position with values that a run never writes."""
    wrong = []
    for name, value in asdict(position).items():
        if name.endswith(("_loss", "_accuracy")):
            fits = value is None or isinstance(value, float)
        elif name == "parts":
            fits = type(value) is int and 1 <= value <= MAX_PARTS
        else:
            fits = (value is None and name.endswith("_at")) or (type(value) is int and 0 <= value < 2**53)
        wrong += [] if fits else [name]
    return wrong


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between a checkpoint's identity and this run's, as text."""
    return [
        f"{name} was {then.get(name)!r}, is now {now.get(name)!r}"
        for name in dict.fromkeys((*then, *now))
        if then.get(name) != now.get(name)
    ]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder against other runs; the lock ends with the process, even if that is killed.

    Raises:
        InputError: another run has locked it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:  # not "w": another run's number is in it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"--adapter-path {folder}: another run is writing to it; wait for that run, or choose another folder"
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")  # for who wants to end the run: the studio
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK_FILE).unlink(missing_ok=True)


def lock_holder(folder: Path) -> int | None:
    """Return the process that writes to a run folder now; None: there is none."""
    import fcntl

    try:
        with (folder / LOCK_FILE).open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                text = file.read(32).strip()
                return int(text) if text.isdecimal() else 0  # 0: it is about to write its number
    except OSError:
        pass
    return None


def _flush(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
