"""Keep what blocks keep for the backward pass on the disk (--offload-activations), for rows whose block inputs do not fit in memory.

A block's call keeps its inputs, its outputs and the results on its tape. Each array is written to a file when the block is computed,
and an array that is lazy takes its place: MLX reads the file when something needs the numbers. What one block returns and the next
one gets is one file. The files are removed after the step.

Source: ZeRO-Infinity, arXiv 2104.07857, section 5.1.2 (activations on NVMe).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_lora.models.folder import save_tensors
from mlx_lora.utils.errors import RunError

LEAST_BYTES = 1 << 12  # a smaller array stays in memory
FOLDER, NAME = "activations", "0"  # in a run folder, and of the array in its file


@dataclass(frozen=True)
class InFile:
    """An array in a file."""

    path: Path

    def array(self) -> mx.array:
        """Return a lazy array, which is read when it is computed with; a new one, so that what is read can be freed."""
        found = mx.load(str(self.path))
        return found[NAME]  # pyright: ignore[reportCallIssue, reportArgumentType, reportIndexIssue] # a safetensors file is a dict


@dataclass(frozen=True)
class InMemory:
    """An array that stays in memory."""

    kept: mx.array

    def array(self) -> mx.array:
        return self.kept


class ActivationFiles:
    """The files of one step's activations.

    Attributes:
        bytes: written since the step began.
    """

    def __init__(self, folder: Path):
        """Remove what a run that was killed has left.

        Args:
            folder: of the run, in which a folder for the files is made for the duration of a step.
        """
        self._folder = folder / FOLDER
        shutil.rmtree(self._folder, ignore_errors=True)
        self._count = 0
        self._last: list[tuple[mx.array, InFile | InMemory]] = []
        self.bytes = 0

    def put(self, array: mx.array) -> InFile | InMemory:
        """Write a computed array, if it is large enough.

        Raises:
            RunError: the disk is full, or cannot be written.
        """
        if array.nbytes < LEAST_BYTES:
            return InMemory(array)
        path = self._folder / f"{self._count}.safetensors"
        self._count += 1
        try:
            self._folder.mkdir(exist_ok=True)
            save_tensors(path, {NAME: array})
        except (OSError, RunError) as error:
            raise RunError(
                f"--offload-activations: {error}; free space on that disk or give --adapter-path on another one, and continue "
                "with --resume auto"
            ) from error
        self.bytes += array.nbytes
        return InFile(path)

    def put_outputs(self, outputs: Sequence[mx.array]) -> list[InFile | InMemory]:
        """Write what a block returns, which the next block may get."""
        stored = [self.put(array) for array in outputs]
        self._last = list(zip(outputs, stored, strict=True))
        return stored

    def put_given(self, given: Sequence[mx.array], outputs: Sequence[mx.array]) -> list[InFile | InMemory]:
        """Return where the arrays are that a block got: those of the block before are in their files already.

        Args:
            given: the arrays.
            outputs: of the block. What does not have the shape of one of them is shared by blocks (a mask), and stays in memory.
        """
        places = {id(array): place for array, place in self._last}
        shapes = {array.shape for array in outputs}
        return [
            places.get(id(array)) or (self.put(array) if array.shape in shapes else InMemory(array)) for array in given
        ]

    def clear(self) -> None:
        """Remove the files."""
        self._last, self.bytes = [], 0
        self._count = 0
        shutil.rmtree(self._folder, ignore_errors=True)
