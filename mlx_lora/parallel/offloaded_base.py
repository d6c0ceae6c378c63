"""Train a base that is larger than memory: each block's frozen weights are read from the model's files just before their use.

    read       a block's arrays, as the files have them, in the forward pass and again in the backward pass, while the block
               before is computed (parallel/base_reader.py)
    compute    forward, or in the backward pass again and then backward: the block is checkpointed
    drop       the weights are freed when the block is computed

The host walks the blocks (parallel/block_walk.py): it waits for each one to be computed before it plans the next one, so that
two blocks are in memory, whatever the device plans ahead. Nothing is written: the safetensors files of the base are the store. Embedding and head stay in
the files, too (parallel/stored_tables.py). Arrays that mlx-lm changes while it loads them stay in memory.

Source: FlexGen, arXiv 2303.06865, and ZeRO-Infinity, arXiv 2104.07857, without what training a base takes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.models.folder import StoredTensor, read_rows
from mlx_lora.parallel.activation_files import ActivationFiles
from mlx_lora.parallel.base_reader import BaseReader, read_rate
from mlx_lora.parallel.block_walk import Mode, Walk, value_and_grad, walk_over
from mlx_lora.parallel.messages import Named
from mlx_lora.parallel.sharded_base import share_modules, units_of
from mlx_lora.parallel.stored_tables import StoredRows, StoredTable, stored_mixin
from mlx_lora.parallel.strategy import DISK_WAIT, Strategy, offloaded
from mlx_lora.planner.fit import hidden_from
from mlx_lora.planner.machine import ceilings_here, this_machine
from mlx_lora.planner.speed import Reading
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError, RunError

if TYPE_CHECKING:
    from mlx_lora.config.settings import TrainSettings
    from mlx_lora.models.load import Base
    from mlx_lora.planner.shapes import ModelShape

COPIED_BYTES, COPIED_ARRAYS = 1 << 26, 16  # to measure the rate of copying


class OffloadedUnit:
    """The frozen arrays of a block, most of which are in files.

    Attributes:
        bytes: of those, as the model has them.
        kept_bytes: of the others.
    """

    def __init__(self, offloaded: Sequence[tuple[str, StoredTensor, mx.Dtype]], kept: Named, reader: BaseReader):
        """Remember where arrays are stored.

        Args:
            offloaded: name, place and the model's dtype of each.
            kept: arrays that stay in memory.
            reader: reads the others.
        """
        self._offloaded, self._kept, self._reader = list(offloaded), list(kept), reader
        self._again: list[tuple[str, mx.array]] = []
        mx.eval([array for _, array in kept])
        self.bytes = sum(at.count * dtype.size for _, at, dtype in offloaded)
        self.kept_bytes = sum(array.nbytes for _, array in kept)
        self._number = reader.add([at for _, at, _ in offloaded]) if offloaded else None

    def gathered(self, before: Sequence[mx.array]) -> list[tuple[str, mx.array]]:
        """Return the arrays, after what is asked for before was computed."""
        if self._number is None:  # packed slices of a table are unpacked to be computed with: one at a time
            names, arrays = zip(*self._kept, strict=True)
            return list(zip(names, mx.depends(list(arrays), list(before)) if before else arrays, strict=True))
        made, self._again = self._again, []
        if made:
            self._reader.used(self._number)
        else:
            self._reader.fetch(self._number, lambda contents: made.extend(self._arrays(contents)))
        # The last block ends the forward pass and begins the backward pass; the first one, a step and the next.
        if self._reader.expected == self._number:
            self._again = made
        return [*made, *self._kept]

    def _arrays(self, contents: list[np.ndarray]) -> list[tuple[str, mx.array]]:
        return [
            (name, mx.array(content).view(at.dtype).reshape(at.shape).astype(dtype))
            for (name, at, dtype), content in zip(self._offloaded, contents, strict=True)
        ]


class BaseFiles:
    """The files of a base, from which blocks are read again and again.

    Attributes:
        flag: that asks for it, for messages.
        reader: reads them.
        tables: path -> rows of an embedding or a head that is read.
    """

    flag: ClassVar[str] = "--offload-base"

    def __init__(self, model: nn.Module, stored: Mapping[str, StoredTensor], reader: BaseReader | None = None):
        """Remember where the arrays of a model are stored.

        Args:
            model: adapted; its arrays are lazy.
            stored: by path, without what adapter layers add to it.
            reader: reads them; None: a new one.
        """
        self._stored: dict[int, StoredTensor] = {}
        for path, array in tree_flatten(model.parameters()):
            at = stored.get(path) or stored.get(path.replace(".linear.", ".").replace(".embedding.", "."))
            if at is not None and at.shape == array.shape:
                self._stored[id(array)] = at
        self._versions = {at.file: _version(at.file) for at in self._stored.values()}
        self.reader = reader or BaseReader(self.flag)
        self.tables: dict[str, StoredRows] = {}

    def unit(self, arrays: Named) -> OffloadedUnit:
        """Return a unit of arrays that are read when they are used, if they are stored as the model has them."""
        offloaded, kept = [], []
        for name, array in arrays:
            at = self._stored.pop(id(array), None)  # another array may get this id when this one is freed
            if at is None:
                kept.append((name, array))
            else:
                offloaded.append((name, at, array.dtype))
        return OffloadedUnit(offloaded, kept, self.reader)

    def table_unit(self, arrays: Named) -> OffloadedUnit:
        """Return a unit of arrays that stay in memory."""
        return OffloadedUnit([], arrays, self.reader)

    def rows_unit(self, path: str, arrays: Named, rows: slice, stored: Mapping[str, StoredTensor]) -> OffloadedUnit:
        """Return a unit of rows of a table, which are read when they are used, if all of its arrays are stored as the model has them."""
        places = [self._stored.get(id(array)) for _, array in arrays]
        if None in places:
            return self.table_unit([(name, read_rows(f"{path}.{name}", array, rows, stored)) for name, array in arrays])
        found = [(name, at, array.dtype) for (name, array), at in zip(arrays, places, strict=True) if at is not None]
        self.tables.setdefault(path, StoredRows(found, self.flag))
        return OffloadedUnit([(name, at.part(rows), dtype) for name, at, dtype in found], [], self.reader)

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


def copy_rate(size: int, rounds: int = 4) -> float:
    """Return the bytes per second at which a block's weights are copied from the buffer that they are read into, at best.

    Args:
        size: bytes of the block, of which up to COPIED_BYTES are copied.
        rounds: how often. In the first one the system has no memory at hand, which later blocks get from those before.
    """
    content, spent_s = np.ones((COPIED_ARRAYS, -(-min(size, COPIED_BYTES) // COPIED_ARRAYS)), np.uint8), math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        copied = [mx.array(row) for row in content]
        spent_s = min(spent_s, time.perf_counter() - start)
        del copied
    return content.size / spent_s


class OffloadedBase(Strategy):
    """One process, which reads each block's frozen weights from the base's files just before it computes the block."""

    divides_base = True
    whole_blocks = "it is read in whole"

    def __init__(self, seed: int = 0, reader: BaseReader | None = None, activations: Path | None = None):
        """Set up.

        Args:
            seed: of the run.
            activations: folder for files of what blocks keep for the backward pass; None: it stays in memory.
            reader: of the files, for benchmarks of other disks; None: a new one.
        """
        super().__init__(seed=seed)
        self._reader, self._activations = reader, activations
        self._files: BaseFiles | None = None
        self._walk: Walk | None = None
        self._blocks: Sequence[OffloadedUnit] = ()
        self._units: Sequence[OffloadedUnit] = ()
        self._head_bytes = 0
        self._tensors: Sequence[StoredTensor] = ()
        self._waited_s = 0.0

    def divide(self, base: Base, settings: TrainSettings) -> TrainSettings:
        if not base.stored:
            raise InputError(
                "--offload-base on: the base is in memory already, or its files cannot be read array by array; leave it out, or "
                "give the model's name instead of a loaded one"
            )
        parts = units_of(base.model)
        self._head_bytes = parts.head_bytes
        self._files = BaseFiles(base.model, base.stored, self._reader)
        units = share_modules(base.model, self._files, base.stored, stored_mixin)
        self._walk = walk_over(base.model.layers)
        for path, module in base.model.named_modules():
            if isinstance(module, StoredTable):
                module._walk, module._rows = self._walk, self._files.tables[path]
        if self._activations is not None:
            self._walk.files = ActivationFiles(self._activations)
        device.wait_beyond(mx.get_active_memory() + parts.largest)  # until the run has a plan
        read, held = sum(unit.bytes for unit in units), sum(unit.kept_bytes for unit in units)
        self._units, self._blocks, self._tensors = units, units[: len(base.model.layers)], list(base.stored.values())
        if not read:
            raise InputError(
                "--offload-base on: mlx-lm changes every array of this model while it loads it, so that none can be read alone; "
                "write the model as mlx-lm has it (mlx-lora convert), and give that folder"
            )
        self.words = f"base read from its files ({read / 1e6:,.0f} MB; {held / 1e6:,.0f} MB stay in memory)"
        if self._activations is not None:
            self.words += f"; what blocks keep for the backward pass is in {self._activations}"
        return offloaded(settings)

    def hidden_from(self, settings: TrainSettings, shape: ModelShape, width: int) -> int:
        blocks, dtype = [unit.bytes for unit in self._blocks], settings.model.dtype
        reading = Reading(
            blocks,
            shape.first_trained,
            read_rate(self._tensors),
            copy_rate(max(blocks)),
            "measured here",
            head=self._head_bytes,
        )
        return hidden_from(reading, settings, shape, this_machine(dtype), ceilings_here(dtype), width)

    def part_of(self, shape: ModelShape, model: nn.Module) -> ModelShape:
        return replace(
            shape, base_bytes=shape.base_bytes + sum(unit.kept_bytes for unit in self._units)
        )  # an outline does not know of these

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

    def value_and_grad(self, model: nn.Module, loss: Callable[..., Any]) -> Callable[..., tuple[Any, dict]]:
        if self._walk is None or self._files is None:
            return super().value_and_grad(model, loss)
        walked, reading = value_and_grad(self._walk, model, loss), self._files.reader.statistics

        def function(*args: Any) -> tuple[Any, dict]:
            before = reading.waited_s
            made = walked(*args)
            self._waited_s += reading.waited_s - before
            return made

        return function

    def measured_shares(self, spent_s: float) -> dict[str, float]:
        waited_s, self._waited_s = self._waited_s, 0.0
        return {DISK_WAIT: waited_s / spent_s}

    def only_planned(self, model: nn.Module) -> AbstractContextManager:
        return nullcontext() if self._walk is None else self._walk.set_to(Mode.PLANNED)

    def bound_memory(self, peak_bytes: int) -> None:
        device.wait_beyond(peak_bytes)

    def reseed(self, step: int) -> None:
        """Refuse files that were changed; a single process goes on with its random numbers."""
        if self._files is not None:
            self._files.check()
