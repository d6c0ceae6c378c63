"""The trunk's output for batches: computed when a row is first needed, kept on disk, and read from then on.

What a row gets is always what was computed for it in its batch of epoch 0, at that batch's shape, and a loss always reads
it from the store. So a step does not depend on what had been stored before: a resumed run whose store was lost, or is from
a run that was interrupted in its first epoch, takes the same steps bit for bit as one that never stopped.

Shapes: B rows, T columns, D the trunk's width, W bytes of a position.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.data.batches import EMPTY, Batch
from mlx_lora.data.encode import EncodedSet
from mlx_lora.data.row_store import RowStore
from mlx_lora.models.trunk import Trunk
from mlx_lora.system.errors import RunError
from mlx_lora.training.objective_loss import Task

Result = TypeVar("Result")

# numpy has no bfloat16: an array's bytes pass as integers of its size.
CARRIERS = {2: (np.uint16, mx.uint16), 4: (np.uint32, mx.uint32)}


@dataclass(frozen=True)
class Record:
    """What is kept for a position.

    Attributes:
        shape: of the array; (D,) for nearly all models.
        dtype: of its numbers, which are kept as they are.
    """

    shape: tuple[int, ...]
    dtype: mx.Dtype

    @classmethod
    def of(cls, output: mx.array) -> Record:
        """Return the record of a trunk's output, (B, T, D)."""
        return cls(tuple(output.shape[2:]), output.dtype)

    @property
    def bytes(self) -> int:
        """The size of a record, W."""
        return int(np.prod(self.shape)) * self.dtype.size

    def to_bytes(self, output: mx.array) -> np.ndarray:
        """Return a trunk's output as (B, T, W) uint8."""
        carried = np.array(output.view(CARRIERS[self.dtype.size][1]))
        return carried.reshape(*output.shape[:2], -1).view(np.uint8)

    def to_array(self, values: np.ndarray) -> mx.array:
        """Return what `to_bytes` was given."""
        carrier, device_type = CARRIERS[self.dtype.size]
        carried = mx.array(values.view(carrier).reshape(*values.shape[:2], *self.shape))
        return carried if self.dtype == device_type else carried.view(self.dtype)


class TrunkRows:
    """The trunk's output for the rows of one encoded set."""

    def __init__(
        self,
        rows: EncodedSet,
        layout: list[tuple[int, np.ndarray]],
        store: RowStore,
        record: Record,
        outputs: Callable[[mx.array], mx.array],
    ):
        """Set up; nothing is computed.

        Args:
            rows: the set.
            layout: width and row numbers of each batch of epoch 0.
            store: of these rows.
            record: what it keeps.
            outputs: token ids (B, T) -> the trunk's output.
        """
        self._rows, self._layout, self._store, self._record, self._outputs = rows, layout, store, record, outputs
        self._batch_of = {int(row): index for index, (_, numbers) in enumerate(layout) for row in numbers}

    def of(self, batch: Batch) -> mx.array:
        """Return the trunk's output for a batch of these rows, (B, T, D).

        Raises:
            RunError: there is no space left on the disk.
        """
        numbers: Any = batch.numbers  # there are some: the batch is of a set
        found = np.empty((*batch.inputs.shape, self._record.bytes), np.uint8)
        real = numbers[batch.real]
        for i, number in enumerate(numbers):
            # Padding gets values that occur: layers that divide by a vector's length cannot take zeros.
            values = self._values(int(number if number != EMPTY else real[0] if len(real) else 0))
            found[i, : len(values)] = values
            found[i, len(values) :] = values[-1]
        return self._record.to_array(found)

    def _values(self, row: int) -> np.ndarray:
        values = self._store.read(row)
        if values is None:
            self._compute(self._batch_of[row])
            values = self._store.read(row)
        if values is None:
            raise RunError(
                "--cache-trunk: what was just written to the disk of the cache cannot be read; check that disk"
            )
        return values

    def _compute(self, index: int) -> None:
        """Compute a batch of epoch 0 and store its rows."""
        width, numbers = self._layout[index]
        inputs = np.zeros((len(numbers), width), np.int32)
        texts = [self._rows.row(int(number))[0][:-1] if number != EMPTY else () for number in numbers]
        for i, text in enumerate(texts):
            inputs[i, : len(text)] = text
        output = self._outputs(mx.array(inputs))
        mx.eval(output)
        found = self._record.to_bytes(output)
        try:
            for i, number in enumerate(numbers):
                if number != EMPTY:
                    self._store.write(int(number), found[i, : len(texts[i])])
        except OSError as error:
            raise RunError(
                f"--cache-trunk: the outputs of frozen blocks could not be kept ({error.strerror}); make room on the disk "
                "of the cache"
            ) from error


def with_trunk(task: Task, trunk: Trunk, rows: TrunkRows) -> Task:
    """Return the task on a model that starts at its first adapted block.

    Args:
        task: of an objective, on rows that hold one text each.
        trunk: of the model.
        rows: the trunk's output for the rows of the batches.
    """

    def above(function: Callable[..., Result]) -> Callable[..., Result]:
        def of_kept(model: nn.Module, *arrays: mx.array) -> Result:
            with trunk.given(arrays[-1]):
                return function(model, *arrays[:-1])

        return of_kept

    of_tokens = above(task.loss.measure_tokens or task.loss.tokens)
    loss = replace(task.loss, train=above(task.loss.train), measure=above(task.loss.measure), measure_tokens=of_tokens)
    whole = task.whole_set and replace(task.whole_set, sums=above(task.whole_set.sums))
    return replace(task, loss=loss, whole_set=whole, arrays_of=lambda batch: (*task.arrays_of(batch), rows.of(batch)))
