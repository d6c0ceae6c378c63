"""Save and restore the state of a run, in checkpoints that are written atomically.

A run that is resumed from a checkpoint takes the same steps, bit for bit, as one that never stopped. The state consists of
masters, moments and the schedule's step count, the method's own state (AdaLoRA's importance, ReLoRA's cycles), the random
key of dropout, and the number of consumed micro-batches (the plan is a pure function of data, seed and epoch).

    checkpoints/step-000100/   adapters.safetensors, adapter_config.json     the adapter, as in a run folder
                               state.safetensors                             the arrays that the next step reads
                               state.json                                    version, program, position, identity, checksums

Each checkpoint is written under another name, flushed to disk and renamed: a kill at any moment leaves the earlier ones
intact.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_lora import __version__
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.models.folder import read_safetensors_header, save_tensors
from mlx_lora.trainer.guards import VALIDATED, Position
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import flush_to_disk, replacing_folder, sha256_of
from mlx_lora.utils.parsing import read_json
from mlx_lora.utils.text import command_line

if TYPE_CHECKING:
    from mlx_lora.parallel.strategy import Strategy
    from mlx_lora.trainer.step import Step

log = logging.getLogger(__name__)

# Arrays

# Frozen factors that a method keeps in addition to the trained ones.
FROZEN = ("start_a", "start_b", "fixed_a", "fixed_b")


def run_arrays(step: Step) -> dict[str, mx.array]:
    """Return the arrays of a run by flat names."""
    arrays = {f"masters.{name}": value for name, value in step.masters.arrays.items()}
    arrays |= {f"optimizer.{name}": value for name, value in tree_flatten(step.optimizer.state)}
    arrays["random"] = mx.random.state[0]
    if step.events is not None:
        arrays |= {f"events.{name}": value for name, value in tree_flatten(step.events.state)}
        arrays |= {f"extras.{name}": value for name, value in step.events.extras().items()}
    for path, layer in adapter_layers(step.model).items():
        arrays |= {f"layers.{path}.{name}": layer[name] for name in FROZEN if name in layer}
    return arrays


def take_first_ranks(strategy: Strategy, step: Step) -> None:
    """Copy the arrays of rank 0's run to every rank, and say so unless they are already equal.

    Ranks start equal and apply the same sums, so they stay equal, except for rounding: if a backend adds in a different
    order on each rank, or different processors computed the initial factors.

    Args:
        strategy, step: of this run.
    """
    if send_first_ranks(strategy, step):
        log.info("The ranks' parameters were not exactly equal; all ranks continue with those of rank 0")


def send_first_ranks(strategy: Strategy, step: Step) -> bool:
    """Copy the arrays of rank 0's run to every rank, and return whether any of them had others.

    Args:
        strategy, step: of this run.
    """
    arrays = run_arrays(step)
    same = strategy.ranks.same_bits(
        {name: array for name, array in arrays.items() if name != "random"}
    )  # each has its own
    first = None if same else strategy.ranks.arrays_from_first(arrays)
    if first is not None and not strategy.ranks.leads:
        restore_arrays(step, first)
    return first is not None


def finite(step: Step) -> bool:
    """Return whether all trained parameters are finite."""
    return bool(mx.all(mx.stack([mx.isfinite(value).all() for value in step.masters.arrays.values()])).item())


def restore_arrays(step: Step, arrays: dict[str, mx.array]) -> None:
    """Restore the arrays of a run.

    Args:
        step: a new step with the same settings, and with a model adapted by them.
        arrays: as `run_arrays` returned them.

    Raises:
        InputError: they have other names, shapes or types than this run's.
    """
    layers = adapter_layers(step.model)
    _check_arrays(run_arrays(step), arrays, layers)

    def part(prefix: str) -> dict[str, mx.array]:
        return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}

    for path, layer in layers.items():
        for leaf in FROZEN:  # ReLoRA's factors of a cycle that had not ended
            if leaf in layer and f"layers.{path}.{leaf}" not in arrays:
                layer.pop(leaf)
    for name, value in part("layers.").items():
        path, _, leaf = name.rpartition(".")
        layers[path][leaf] = value
        layers[path].freeze(keys=[leaf], recurse=False)
    step.masters.put(part("masters."))
    # Everything is changed in place, because the compiled functions captured these containers.
    step.optimizer.state.update(_filled(step.optimizer.state, part("optimizer.")))
    # The random state cannot be assigned an array, but a seed is the key's two halves.
    high, low = arrays["random"].tolist()
    mx.random.seed(high << 32 | low)
    if step.events is not None:
        step.events.state.update(_filled(step.events.state, part("events.")))
        step.events.restore(part("extras."))
    step.taken = int(step.optimizer.state["step"].item())
    step.masters.hand_out()
    mx.eval(step.model.parameters(), step.masters.arrays, step.optimizer.state)


def _check_arrays(own: dict[str, mx.array], stored: dict[str, mx.array], layers: Mapping[str, nn.Module]) -> None:
    """Refuse arrays that differ from the run's, except those that a method adds during the run.

    Either may have such arrays alone: a resumed run gets them from its checkpoint, and AdaLoRA's best step may be from before
    the first cut of ranks.
    """
    added = [name for name in stored if name not in own]
    strange = [name for name in added if not name.startswith("extras.") and not _is_frozen(name, layers)]
    wrong = [
        name
        for name, value in own.items()
        if not _is_frozen(name, layers)
        and (
            not name.startswith("extras.")
            if name not in stored
            else (stored[name].shape, stored[name].dtype) != (value.shape, value.dtype)
        )
    ]
    if wrong or strange:
        raise InputError(
            f"--resume: the checkpoint's state does not match this run: {', '.join((wrong + strange)[:3])}; "
            "use an older checkpoint, or start a new run"
        )


def _is_frozen(name: str, layers: Mapping[str, nn.Module]) -> bool:
    path, _, leaf = name.removeprefix("layers.").rpartition(".")
    return name.startswith("layers.") and path in layers and leaf in FROZEN


def _filled(tree: dict, arrays: dict[str, mx.array]) -> dict:
    """Return a tree with this one's structure and other arrays; names contain dots, so they do not give the structure."""
    return tree_map_with_path(lambda path, _: arrays[path], tree)


# Files

STATE_FILE, ARRAYS_FILE, LOCK_FILE = "state.json", "state.safetensors", ".lock"
NAME, PROGRAM = re.compile(r"step-(\d{6,})"), re.compile(r"\d[\w.+]{0,30}")
VERSION = 2  # of the format; a program reads no other
MAX_EPOCHS, MAX_PARTS = 1e9, 10**6  # the bounds of --epochs and of rows in a batch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read and is complete.

    Attributes:
        folder: its folder.
        position: of the run.
        identity: everything that the run depends on; see `differences`.
        arrays: see `run_arrays`.
    """

    folder: Path
    position: Position
    identity: dict[str, Any]
    arrays: dict[str, mx.array]


class OtherVersionError(InputError):
    """A checkpoint is whole, and of a version of its format that this program does not read."""


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
        state = {"version": VERSION, "program": __version__}
        state |= {"position": asdict(position), "identity": identity, "sha256": sums}
        (temporary / STATE_FILE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            flush_to_disk(path)
    flush_to_disk(folder.parent)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check all of it.

    Raises:
        OtherVersionError: another version wrote it.
        InputError: something is missing or damaged.
    """
    if not (folder / STATE_FILE).is_file():
        raise InputError(f"{folder}: no checkpoint to resume from (no {STATE_FILE}); give a step-NNNNNN folder")
    state = read_json(folder / STATE_FILE, "use an older checkpoint")
    try:
        version = state["version"]
        if type(version) is int and version != VERSION and 0 < version < 1000:
            raise OtherVersionError(_other_version(folder, state))
        sums = dict(state["sha256"])
        stored = dict(state["position"])
        if "best_accuracy" in stored:  # its name until other numbers could choose the best
            stored["best_score"] = stored.pop("best_accuracy")
        position, identity = Position(**stored), dict(state["identity"])
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder}: no checkpoint to resume from ({type(error).__name__} in {STATE_FILE})") from None
    wrong = _position_problems(position) + ([] if version == VERSION else ["version"])
    epochs = identity.get("price_epochs")
    wrong += [] if isinstance(epochs, (int, float)) and 0 < epochs <= MAX_EPOCHS else ["price_epochs"]
    examples = identity.get(VALIDATED)
    wrong += [] if type(examples) is int and 0 <= examples < 2**53 else [VALIDATED]
    if wrong:
        raise InputError(f"{folder}: {STATE_FILE} has impossible values ({', '.join(wrong)}); use an older checkpoint")
    for name, expected in {ARRAYS_FILE: None, **sums}.items():
        path = folder / Path(name).name
        if not path.is_file() or sha256_of(path) != expected:
            raise InputError(f"{folder}: {name} is missing or damaged; use an older checkpoint")
    read_safetensors_header(folder / ARRAYS_FILE)
    return Checkpoint(folder, position, identity, mx.load(str(folder / ARRAYS_FILE)))


def _other_version(folder: Path, state: dict[str, Any]) -> str:
    """Return which program wrote a checkpoint of another version, and what to do."""
    program = str(state.get("program"))
    name = f"mlx-lora {program}" if PROGRAM.fullmatch(program) else "an mlx-lora that did not leave its version"
    command = command_line(["train", "--resume-adapter-file", str(folder), "..."])
    return (
        f"--resume {folder}: {name} wrote this checkpoint, in version {state['version']} of the format, and this program "
        f"({__version__}) reads version {VERSION}; finish the run with the program that began it, or begin a new run from its "
        f"adapter: {command}"
    )


def _position_problems(position: Position) -> list[str]:
    """Return the fields of a position with values that a run never writes."""
    wrong = []
    for name, value in asdict(position).items():
        if name.endswith(("_loss", "_score")):
            fits = value is None or isinstance(value, float)
        elif name == "parts":
            fits = type(value) is int and 1 <= value <= MAX_PARTS
        else:
            fits = (value is None and name.endswith("_at")) or (type(value) is int and 0 <= value < 2**53)
        wrong += [] if fits else [name]
    return wrong


def newest_checkpoint(room: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint, None if there is none; damaged ones are reported.

    Args:
        room: a run folder's `checkpoints`.

    Raises:
        OtherVersionError: another version wrote it; the run must not begin again in its folder.
    """
    for _, folder in numbered(room):
        try:
            return read_checkpoint(folder)
        except OtherVersionError:
            raise
        except InputError as error:
            log.info(f"Checkpoint skipped: {error}")
    return None


def numbered(room: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of the checkpoints in a run folder's `checkpoints`, newest first."""
    folders = room.iterdir() if room.is_dir() else ()
    found = [(int(match[1]), path) for path in folders if (match := NAME.fullmatch(path.name))]
    return sorted(found, reverse=True)


def thin_out(room: Path, keep: int, best_at: int | None, newest: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one; 0 keeps all.

    Those after `newest`, the step just saved, are of a run that went on from an earlier step another time.
    """
    found = numbered(room)
    for number, folder in found:
        if number > newest:
            shutil.rmtree(folder, ignore_errors=True)
    found = [(number, folder) for number, folder in found if number <= newest]
    for number, folder in found[keep:] if keep else []:
        if number != best_at:
            shutil.rmtree(folder, ignore_errors=True)


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the differences between a checkpoint's identity and this run's, as text."""
    return [
        f"{name} was {then.get(name)!r}, is now {now.get(name)!r}"
        for name in dict.fromkeys((*then, *now))
        if then.get(name) != now.get(name)
    ]


# Lock


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run folder against other runs; the lock ends with the process, even if that is killed.

    Raises:
        InputError: another run has locked it.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_FILE
    with ExitStack() as opened:
        while True:
            file = opened.enter_context(path.open("a"))  # not "w": another run's number is in it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(
                    f"--adapter-path {folder}: another run is writing to it; wait for that run, or choose another folder"
                ) from None
            # A run that ended in between has removed this file, and a third run may hold a new one.
            if os.fstat(file.fileno()).st_nlink:
                break
        file.truncate(0)
        file.write(f"{os.getpid()}\n")  # for who wants to end the run: the studio
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


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
