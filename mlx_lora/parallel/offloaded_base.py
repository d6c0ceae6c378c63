"""Train a base that is larger than memory: each block's frozen weights are read from the model's files just before their use.

    read       a block's arrays, as the files have them, in the forward pass and again in the backward pass
    compute    forward, or in the backward pass again and then backward: the block is checkpointed
    drop       the weights are freed as soon as nothing that is still to be computed reads them

Nothing is written: the safetensors files of the base are the store. MLX reads an array when it gets to it, on threads of its own,
while blocks before it are computed; what it may allocate ahead is bounded by the run's plan. Embedding and head stay in memory as
they are stored, and are computed with in slices. So do arrays that mlx-lm changes while it loads them.

A disk that fails, or a file that was replaced, must not go unnoticed: MLX would compute with whatever is in the buffer. So
the bytes of each array are added up when the run begins, and a block whose sum is another one later computes NaN, with which
no step updates anything.

Source: FlexGen, arXiv 2303.06865, and ZeRO-Infinity, arXiv 2104.07857, without what training a base takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_lora.models.folder import StoredTensor
from mlx_lora.parallel.messages import Named
from mlx_lora.parallel.sharded_base import share_modules, units_of
from mlx_lora.parallel.strategy import Strategy
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.models.load import Base
    from mlx_lora.planner.shapes import ModelShape


class BaseFiles:
    """The files of a base, from which arrays are read again and again.

    Attributes:
        flag: that asks for it, for messages.
        read_bytes, read_s: of the arrays that were added up when units were made, which is the first time that they are read.
    """

    flag: ClassVar[str] = "--offload-base"

    def __init__(self, model: nn.Module, stored: Mapping[str, StoredTensor]):
        """Remember where the arrays of a model are stored.

        Args:
            model: adapted; its arrays are lazy.
            stored: by path, without what adapter layers add to it.
        """
        self._stored: dict[int, StoredTensor] = {}
        for path, array in tree_flatten(model.parameters()):
            at = stored.get(path) or stored.get(path.replace(".linear.", ".").replace(".embedding.", "."))
            if at is not None and at.shape == array.shape:
                self._stored[id(array)] = at
        self._unread: dict[Path, dict[str, mx.array]] = {}
        self._before: list[mx.array] = []
        self._versions = {at.file: _version(at.file) for at in self._stored.values()}
        self.read_bytes, self.read_s = 0, 0.0

    def unit(self, arrays: Named) -> OffloadedUnit:
        """Return a unit of arrays, whose bytes are read and added up here."""
        start, offloaded, kept = time.perf_counter(), [], []
        for name, array in arrays:
            at = self._stored.pop(id(array), None)  # another array may get this id when this one is freed
            if at is None:
                kept.append((name, array))
            else:
                offloaded.append((name, Offloaded.of(at, array.dtype, self)))
        self.read_bytes += sum(one.at.bytes for _, one in offloaded)
        self.read_s += time.perf_counter() - start
        return OffloadedUnit(offloaded, kept, self)

    def table_unit(self, arrays: Named) -> OffloadedUnit:
        """Return a unit of arrays that stay in memory."""
        return OffloadedUnit([], arrays, self)

    def unread(self, at: StoredTensor) -> mx.array:
        """Return a stored array that MLX reads when it computes with it, and that nothing else keeps."""
        arrays = self._unread.get(at.file, {})
        if at.name not in arrays:
            arrays = self._unread[at.file] = dict(mx.load(str(at.file)))
        return arrays.pop(at.name)

    def in_turn(self, arrays: list[mx.array], before: Sequence[mx.array]) -> list[mx.array]:
        """Let arrays wait for what the unit before started from, so that they are read while that one is computed."""
        waited, self._before = self._before, list(before)
        return mx.depends(arrays, waited) if waited and arrays else arrays

    def forget(self) -> None:
        """Forget what was planned and is not computed."""
        self._before = []

    def check(self) -> None:
        """Refuse files that were changed since the run began.

        Raises:
            RunError: naming one.
        """
        for file, version in self._versions.items():
            if _version(file) != version:
                raise RunError(
                    f"{file}: was changed or removed while the run reads its base from it (--offload-base on); put it "
                    "back, and continue with --resume auto"
                )


def _version(file: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Offloaded:
    """An array that is in a file.

    Attributes:
        at: where.
        dtype: that the model has it in.
        total: (,) uint32, of its bytes; see `_total`.
    """

    at: StoredTensor
    dtype: mx.Dtype
    total: mx.array

    @classmethod
    def of(cls, at: StoredTensor, dtype: mx.Dtype, files: BaseFiles) -> Offloaded:
        """Read an array to add up its bytes."""
        total = _total(files.unread(at))
        mx.eval(total)
        return cls(at, dtype, total)


def _total(array: mx.array) -> mx.array:
    """Return the sum of an array's 32-bit words, modulo 2^32; of its bytes, if it has no whole number of words."""
    flat = array.reshape(-1).view(mx.uint8)
    return flat.view(mx.uint32).sum() if flat.size % 4 == 0 else flat.astype(mx.uint32).sum()


class OffloadedUnit:
    """The frozen arrays of a block, most of which are in files.

    Attributes:
        bytes: of those, as the model has them.
        kept_bytes: of the others.
    """

    def __init__(self, offloaded: Sequence[tuple[str, Offloaded]], kept: Named, files: BaseFiles):
        self._offloaded, self._kept, self._files = list(offloaded), list(kept), files
        mx.eval([array for _, array in kept])
        self.bytes = sum(one.at.count * one.dtype.size for _, one in offloaded)
        self.kept_bytes = sum(array.nbytes for _, array in kept)

    def gathered(self, before: Sequence[mx.array]) -> list[tuple[str, mx.array]]:
        """Return the arrays, lazily.

        Args:
            before: arrays that the computation of this unit starts from.
        """
        every = [self._files.unread(one.at) for _, one in self._offloaded] + [array for _, array in self._kept]
        every = self._files.in_turn(every, before)  # what is kept as well, because it is packed
        read, held = every[: len(self._offloaded)], every[len(self._offloaded) :]
        same = mx.array(True)
        for array, (_, one) in zip(read, self._offloaded, strict=True):
            same = same & (_total(array) == one.total)
        arrays = [(name, array.astype(one.dtype)) for array, (name, one) in zip(read, self._offloaded, strict=True)]
        floats = [number for number, (_, array) in enumerate(arrays) if mx.issubdtype(array.dtype, mx.floating)]
        if floats:
            smallest = min(floats, key=lambda number: arrays[number][1].size)
            name, array = arrays[smallest]
            arrays[smallest] = name, mx.where(same, array, mx.array(float("nan"), array.dtype))
        return [*arrays, *((name, array) for (name, _), array in zip(self._kept, held, strict=True))]


def offloaded(settings: TrainSettings) -> TrainSettings:
    """Return the settings of a run that reads its base from files.

    Each block is computed again, no texts are written, and the output of frozen blocks is not kept.
    """
    loop = settings.loop
    checkpointing = "block" if loop.grad_checkpoint == "auto" else loop.grad_checkpoint
    given = {"offload_base": "on", "grad_checkpoint": checkpointing, "sample_tokens": 0, "cache_trunk": "off"}
    return replace(settings, loop=replace(loop, **given))


class OffloadedBase(Strategy):
    """One process, which reads each block's frozen weights from the base's files just before it computes the block."""

    divides_base = True
    whole_blocks = "it is read in whole"

    def __init__(self, seed: int = 0):
        super().__init__(seed=seed)
        self._files: BaseFiles | None = None
        self._kept_bytes = 0

    def divide(self, base: Base, settings: TrainSettings) -> TrainSettings:
        if not base.stored:
            raise InputError(
                "--offload-base on: the base is in memory already, or its files cannot be read array by array; leave it out, or "
                "give the model's name instead of a loaded one"
            )
        alive = units_of(base.model).largest
        self._files = BaseFiles(base.model, base.stored)
        units = share_modules(base.model, self._files, base.stored)
        blocks = units[: len(base.model.layers)]
        device.wait_beyond(mx.get_active_memory() + alive)  # until the run has a plan
        read, held = sum(unit.bytes for unit in units), sum(unit.kept_bytes for unit in units)
        self._kept_bytes = sum(unit.kept_bytes for unit in blocks)
        if not read:
            raise InputError(
                "--offload-base on: mlx-lm changes every array of this model while it loads it, so that none can be read alone; "
                "write the model as mlx-lm has it (mlx-lora convert), and give that folder"
            )
        speed = self._files.read_bytes / max(self._files.read_s, 1e-9)
        self.words = (
            f"base read from its files ({read / 1e6:,.0f} MB in blocks, {held / 1e6:,.0f} MB stay in memory; "
            f"first read at {speed / 1e9:.1f} GB/s)"
        )
        return offloaded(settings)

    def part_of(self, shape: ModelShape, model: nn.Module) -> ModelShape:
        return replace(shape, base_bytes=shape.base_bytes + self._kept_bytes)  # an outline does not know of these

    def check_checkpointing(self, config: dict, left_out: bool) -> None:
        """Refuse blocks that are not checkpointed: each would keep its weights until the backward pass.

        Raises:
            InputError: there are some, because they pass a state to each other.
        """
        if left_out:
            raise InputError(
                f"--offload-base: blocks of {config.get('model_type')} pass a state to the next block, so every block "
                "would have to keep its weights until the backward pass; leave --offload-base out"
            )

    def check_read(self, bad: mx.array, config: dict) -> None:
        if bad.any().item():
            raise InputError(
                f"--offload-base: mlx-lm's {config.get('model_type')} reads weights of its blocks outside of them, where "
                "they are not in memory; leave it out"
            )

    def end_of_trial(self, model: nn.Module) -> None:
        if self._files is not None:
            self._files.forget()

    def bound_memory(self, peak_bytes: int) -> None:
        device.wait_beyond(peak_bytes)

    def reseed(self, step: int) -> None:
        """Refuse files that were changed; a single process goes on with its random numbers."""
        if self._files is not None:
            self._files.check()
