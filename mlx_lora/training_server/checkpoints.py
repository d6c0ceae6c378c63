"""Write and read the checkpoints of clients' models, below one folder.

    tinker://RUN/weights/NAME            ROOT/RUN/weights/NAME            the adapter, with moments and steps: training goes on exactly
    tinker://RUN/sampler_weights/NAME    ROOT/RUN/sampler_weights/NAME    the adapter alone
    tinker://RUN/external_weights/NAME   ROOT/RUN/external_weights/NAME   the adapter alone, for download

    adapters.safetensors, adapter_config.json   an adapter folder, as `train` writes it: generate, serve, fuse and export read it
    state.safetensors                           factors and moments by name, float32 (weights only)
    state.json                                  what the model is, its steps, and a checksum of each file
    about.json                                  time, expiry and the client's metadata, which may change later

RUN is a model's id with a dot for each colon. Names never become paths unless they have the form that is checked here, so no request
reaches a file outside ROOT. Folders are written under another name, flushed to disk and renamed: a kill leaves the earlier ones whole.
"""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_lora import __version__
from mlx_lora.api.plan_clients import LoraShape
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, save_adapter
from mlx_lora.models.folder import read_safetensors_header, save_tensors
from mlx_lora.training_server.models import TrainedModel
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import flush_to_disk, replace_text, replacing_folder, sha256_of
from mlx_lora.utils.parsing import read_json

WEIGHTS, SAMPLER, EXTERNAL = "weights", "sampler_weights", "external_weights"
KINDS = (WEIGHTS, SAMPLER, EXTERNAL)
SCHEME = "tinker://"
# A model's id is SESSION:train:N, and a session's id is hexadecimal.
RUN = re.compile(r"[0-9a-f]{32}:train:\d{1,6}")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
STATE, ARRAYS, ABOUT = "state.json", "state.safetensors", "about.json"
VERSION = 1


@dataclass(frozen=True)
class Place:
    """A checkpoint's name: the model that wrote it, its kind, and its own name; all checked."""

    run: str
    kind: str
    name: str

    @property
    def path(self) -> str:
        """As clients write it."""
        return f"{SCHEME}{self.run}/{self.kind}/{self.name}"

    @classmethod
    def of(cls, run: str, kind: str, name: str) -> Place:
        """Check the three parts.

        Raises:
            InputError: one of them has another form.
        """
        if not RUN.fullmatch(run):
            raise InputError(
                f"training run {run[:80]!r}: no such run on this server; GET /api/v1/training_runs lists them"
            )
        if kind not in KINDS:
            raise InputError(f"checkpoint {kind[:40]!r}/...: must be one of {', '.join(KINDS)}")
        if not NAME.fullmatch(name):
            raise InputError(f"checkpoint name {name[:80]!r}: must be at most 128 letters, digits, . _ or -")
        return cls(run, kind, name)

    @classmethod
    def parse(cls, path: str) -> Place:
        """Read tinker://RUN/KIND/NAME.

        Raises:
            InputError: it has another form.
        """
        parts = path.removeprefix(SCHEME).split("/")
        if not path.startswith(SCHEME) or len(parts) != 3:
            raise InputError(f"checkpoint {path[:120]!r}: write it as {SCHEME}RUN/weights/NAME, as a save returned it")
        return cls.of(*parts)


@dataclass(frozen=True)
class Stored:
    """A checkpoint on disk.

    Attributes:
        place: its name.
        shape: of the model.
        base_model: the name that clients give the base.
        fingerprint: of the base.
        taken: optimizer steps.
        sums: checksums by file name.
        about: time, expiry and metadata.
        size_bytes: of its files.
        created, expires: UNIX times, None for never.
    """

    place: Place
    shape: LoraShape
    base_model: str
    fingerprint: str
    taken: int
    sums: dict[str, str]
    about: dict[str, Any]
    size_bytes: int
    created: float
    expires: float | None


class CheckpointFolder:
    """All checkpoints of a server."""

    def __init__(self, root: Path, base_model: str):
        """Use a folder, which may not exist yet.

        Args:
            root: the folder.
            base_model: the name that clients give the base.
        """
        self._root, self._base_model = root, base_model

    def save(self, model: TrainedModel, place: Place, about: dict[str, Any], overwrite: bool = False) -> Stored:
        """Write a checkpoint.

        Args:
            model: to save.
            place: its name.
            about: `expires` and `user_metadata`.
            overwrite: replace an earlier one of the same name.

        Raises:
            InputError: the name is taken.
            RunError: the disk is full.
        """
        folder = self._folder(place)
        if folder.exists() and not overwrite:
            raise InputError(f"{place.path}: exists already; choose another name, or pass overwrite=True")
        with replacing_folder(folder) as temporary:
            save_adapter(temporary, model.model, model.info())
            if place.kind == WEIGHTS:
                save_tensors(temporary / ARRAYS, model.state())
            sums = {path.name: sha256_of(path) for path in sorted(temporary.iterdir())}
            state = {
                "version": VERSION, "program": __version__, "base_model": self._base_model,
                "base_fingerprint": model.info().base_fingerprint, "shape": asdict(model.shape), "taken": model.taken, "sha256": sums,
            }  # fmt: skip
            (temporary / STATE).write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")
            (temporary / ABOUT).write_text(json.dumps({"created": time.time(), **about}) + "\n", encoding="utf-8")
            for path in (*temporary.iterdir(), temporary):
                flush_to_disk(path)
        flush_to_disk(folder.parent)
        return self.read(place)

    def read(self, place: Place) -> Stored:
        """Return what a checkpoint is, without its arrays.

        Raises:
            InputError: there is none, or its state is damaged.
        """
        folder = self._folder(place)
        if not (folder / STATE).is_file():
            raise InputError(f"{place.path}: no such checkpoint on this server; list_checkpoints shows what there is")
        state, about = (
            read_json(folder / STATE, "use another checkpoint"),
            read_json(folder / ABOUT, "use another checkpoint"),
        )
        try:
            shape, taken = LoraShape(**state["shape"]), int(state["taken"])
            sums = {str(key): str(value) for key, value in state["sha256"].items()}
            base_model, fingerprint = str(state["base_model"]), str(state["base_fingerprint"])
            created, expires = float(about.get("created", 0.0)), about.get("expires")
            words = about.get("user_metadata") or {}
            for moment in (created, 0.0 if expires is None else expires):
                datetime.fromtimestamp(moment, UTC)
            kinds = [type(value) for value in (*asdict(shape).values(), *words.values())]
            if state["version"] != VERSION or kinds != [int, int, bool, bool, bool] + [str] * len(words):
                raise ValueError("another version, or values of other types")
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, OSError):
            raise InputError(
                f"{place.path}: its {STATE} or {ABOUT} is damaged or of another version; use another checkpoint"
            ) from None
        size = sum(path.stat().st_size for path in folder.iterdir())
        return Stored(place, shape, base_model, fingerprint, taken, sums, about, size, created, expires)

    def arrays(self, stored: Stored) -> dict[str, mx.array]:
        """Return the arrays of a checkpoint from which training can go on, after checking the files.

        Raises:
            InputError: a file is damaged, or it is a checkpoint for sampling.
        """
        folder = self.checked(stored)
        if ARRAYS not in stored.sums:
            raise InputError(f"{stored.place.path}: is for sampling only; load one of save_state, under {WEIGHTS}/")
        read_safetensors_header(folder / ARRAYS)
        return mx.load(str(folder / ARRAYS))  # pyright: ignore[reportReturnType] # of a safetensors file: a dict

    def checked(self, stored: Stored) -> Path:
        """Return a checkpoint's folder, whose files are as they were written.

        Raises:
            InputError: a file is missing or damaged.
        """
        folder = self._folder(stored.place)
        for name in {CONFIG_FILE, WEIGHTS_FILE, *stored.sums}:
            path = folder / Path(name).name
            if not path.is_file() or sha256_of(path) != stored.sums.get(name):
                raise InputError(f"{stored.place.path}: {name} is missing or damaged; use another checkpoint")
        return folder

    def delete(self, place: Place) -> None:
        """Delete a checkpoint.

        Raises:
            InputError: there is none.
        """
        self.read(place)
        shutil.rmtree(self._folder(place))

    def set_expiry(self, place: Place, expires: float | None) -> None:
        """Set when a checkpoint may be deleted: UNIX time, None for never.

        Raises:
            InputError: there is none.
        """
        about = {**self.read(place).about, "expires": expires}
        replace_text(self._folder(place) / ABOUT, json.dumps(about) + "\n")

    def listed(self, run: str | None = None) -> list[Stored]:
        """Return all whole checkpoints, of one run or of all, the newest first."""
        found = []
        for own in sorted(self._root.glob("*.train.*/*/*")):
            try:
                place = Place.of(own.parts[-3].replace(".", ":"), own.parts[-2], own.name)
                if run in (None, place.run):
                    found.append(self.read(place))
            except InputError:
                continue  # another program's folder, or a damaged one: loading it says so
        return sorted(found, key=lambda one: -one.created)

    def delete_expired(self, now: float) -> list[Place]:
        """Delete the checkpoints whose time is over, as their clients asked, and return them."""
        gone = [one.place for one in self.listed() if one.expires is not None and one.expires <= now]
        for place in gone:
            self.delete(place)
        return gone

    def _folder(self, place: Place) -> Path:
        return self._root / place.run.replace(":", ".") / place.kind / place.name
