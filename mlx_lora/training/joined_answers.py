"""Put the sampled answers to a prompt behind it in one row, so that a training pass computes the prompt once.

How long answers are is known only when they are sampled, so rows are joined batch by batch. A row's inputs (an answer's last
token is only a target):

    a row for each answer   p p p a a     joined   p p | p a a | p b     starts   2, 5
                            p p p b

The prompt's last token is repeated, because it is the one that predicts an answer's first token. models/shared_prefix.py
computes such rows. data/joining.py joins rows of known length, and plans those with room for answers.

Shapes: E prompts, K answers to each, B rows (E K, or E where they are joined), T columns, P slots for trained targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_lora.data.batches import EMPTY, SLOTS_STEP, Batch
from mlx_lora.training.memory_guard import SIZES
from mlx_lora.training.policy_task import LENGTHS
from mlx_lora.training.prefix_sharing import LEAST_SAVED

ROW_STEP = 64  # widths of joined rows are a multiple of this, so that few shapes occur


@dataclass(frozen=True)
class Joining:
    """When the answers to a prompt go into one row.

    Attributes:
        work: returns the work of a training pass over rows of these numbers of positions, (B,).
        always: in every batch; otherwise in each batch where that saves work.
    """

    work: Callable[[np.ndarray], float]
    always: bool

    def __call__(self, batch: Batch, begins: np.ndarray) -> Batch:
        """Return a batch of sampled answers, joined if that is asked for or saves work.

        Args:
            batch: a row for each answer.
            begins: (B,) the column of each row's first target.
        """
        together = joined_batch(batch, begins)
        return together if self.always or self.saved(batch, together) >= LEAST_SAVED else batch

    def saved(self, batch: Batch, together: Batch) -> float:
        """Return the share of a batch's work that joining its rows saves, padding included; below 0 if it costs more."""
        apart, joined = (self.work(np.full(*one.inputs.shape)) for one in (batch, together))
        return 1 - joined / apart


def joined_batch(batch: Batch, begins: np.ndarray) -> Batch:
    """Return a batch with one row for each prompt, followed by its answers; what a row does not need is cut.

    Args:
        batch: a row for each answer, with their lengths.
        begins: (B,) the column of each row's first target: that of the prompt's last token.
    """
    sampled, group, width = batch.sampled or {}, batch.group, batch.inputs.shape[1]
    lengths = sampled[LENGTHS].astype(np.int64).reshape(-1, group)  # (E, K), 0 in padding
    first = begins[::group]
    ends = first[:, None] + np.cumsum(lengths, axis=1)
    starts = ends - lengths
    columns = -(-int(ends.max()) // ROW_STEP) * ROW_STEP
    source = np.full((len(starts), columns), EMPTY)  # where each joined column is in the batch, flat
    for example, row in enumerate(range(0, len(batch.inputs), group)):
        source[example, : first[example]] = row * width + np.arange(first[example])
        for place, (start, end) in enumerate(zip(starts[example], ends[example], strict=True)):
            source[example, start:end] = (row + place) * width + first[example] + np.arange(end - start)

    def of(array: np.ndarray) -> np.ndarray:
        return np.where(source == EMPTY, 0, array.ravel()[source]).astype(array.dtype)

    numbers = None
    if batch.numbers is not None:
        numbers = np.where(batch.numbers[::group] == EMPTY, EMPTY, batch.numbers[::group] // group)
    mask = of(batch.mask)
    return Batch.of(
        of(batch.inputs), of(batch.targets), mask, int(ends[batch.real[::group], -1].sum()),
        min(len(batch.positions), mask.size), numbers=numbers, starts=starts.astype(np.int32),
        sampled={name: of(one) if one.ndim > 1 else one.reshape(-1, group) for name, one in sampled.items()},
    )  # fmt: skip


def apart(batch: Batch) -> Batch:
    """Return a planned batch with room for answers in joined rows as one with a row for each answer."""
    if batch.starts is None:
        return batch
    group, first = batch.starts.shape[1], batch.starts[:, :1]
    room = int((batch.starts[:, 1] - batch.starts[:, 0]).max()) - 1  # without the repeated token
    columns = int(first.max()) + room
    inside = (np.arange(columns) < first + room) & batch.real[:, None]

    def of(array: np.ndarray) -> np.ndarray:  # all answers are alike: there are none yet
        return np.repeat(np.where(inside, array[:, :columns], 0).astype(array.dtype), group, axis=0)

    numbers = None
    if batch.numbers is not None:
        own = batch.numbers[:, None] * group + np.arange(group)
        numbers = np.where(batch.real[:, None], own, EMPTY).ravel()
    slots = min(len(batch.positions), len(batch.inputs) * group * columns)
    return Batch.of(
        of(batch.inputs), of(batch.targets), of(batch.mask), batch.real_tokens, slots, group=group, numbers=numbers
    )


def slots_of(targets: int, planned: int, positions: int) -> int:
    """Return P of a filled batch: one of few sizes, so that few shapes occur, and little of the head's work is padding.

    Args:
        targets: that are trained.
        planned: P of the planned batch, at least as many.
        positions: B T, the most.
    """
    sizes = (-(-planned * n // SIZES // SLOTS_STEP) * SLOTS_STEP for n in range(1, SIZES + 1))
    return min(next(size for size in sizes if size >= targets), positions)


def sums_of_answers(batch: Batch, values: np.ndarray) -> np.ndarray:
    """Sum (B, T) numbers, which are 0 outside answers, to answers, (E K,)."""
    if batch.starts is None:
        return values.sum(axis=1)
    width = values.shape[1]
    ends = np.append(batch.starts[:, 1:], np.full((len(values), 1), width), axis=1)
    columns = np.arange(width)
    own = (columns >= batch.starts[..., None]) & (columns < ends[..., None])  # (E, K, T)
    return np.where(own, values[:, None], 0).sum(axis=2).ravel()


def by_answer(batch: Batch, answers: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return one number for each answer of a batch, in its own layout: (B,), or (E, K) where rows are joined; float32.

    Args:
        batch: of sampled answers.
        answers: (A,) the numbers of the real answers among all.
        values: (A,) theirs; others get 0.
    """
    found = np.zeros(len(batch.inputs) * batch.answers_per_row, np.float32)
    found[answers] = values
    return found if batch.starts is None else found.reshape(batch.starts.shape)
