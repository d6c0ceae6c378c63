"""Measure a loss without training: its mean over batches, and whether a change from one measurement to another could be chance.

Rows differ far more from each other than a row differs before and after training, so two measurements are compared row by
row. The change of the mean loss per token is a ratio of sums over rows, because the tokens of one row are not independent.
utils/statistics.py has its interval, and docs/measurements.md says how often it holds.

Shapes: R rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lora.parallel.strategy import SINGLE_DEVICE, Strategy
from mlx_lora.utils.parsing import parse_json
from mlx_lora.utils.statistics import ratio_error
from mlx_lora.utils.text import counted

if TYPE_CHECKING:
    from mlx_lora.data.batch import Batch
    from mlx_lora.objectives.base import BoundObjective

# Mean loss


@dataclass(frozen=True)
class Measured:
    """A loss on data that are not trained on.

    Attributes:
        loss: mean over `count`; NaN without any.
        count: trained tokens, or examples if the objective's loss is a mean over examples.
        reports: the numbers that the objective reports, as means over `count`.
        rows: the loss of each row that the ranks measured, for a loss that is a mean over tokens; None: another loss.
        details: what was found besides numbers (`BoundObjective.details`).
    """

    loss: float
    count: int
    reports: dict[str, float] = field(default_factory=dict)
    rows: RowLosses | None = None
    details: dict[str, Any] = field(default_factory=dict)


def mean_loss(
    model: nn.Module, bound: BoundObjective, batches: Iterable[Batch], strategy: Strategy = SINGLE_DEVICE
) -> Measured:
    """Return the mean loss over the batches of all ranks, to each of which `batches` gives its own.

    Meanwhile, the model is in eval mode (no dropout), and long rows have attention in tiles.
    """
    training = model.training
    model.eval()
    try:
        with bound.loss.measuring(model):
            if bound.whole_set:
                loss, count, means = bound.whole_set(model, bound.arrays_of, batches, strategy)
                return Measured(loss, count, bound.finish(means) if count else {}, details=bound.details())
            sums, rows = mx.zeros((2 + len(bound.reports),)), []
            tokens = bound.loss.measure_tokens or bound.loss.tokens
            for part in (part for batch in batches for part in bound.prepare([batch], SINGLE_DEVICE)):
                arrays = bound.arrays_of(part)
                if bound.reports:
                    loss, count, reports = bound.loss.measure(model, arrays)
                    sums = sums + mx.stack([loss, count, *(reports[name] for name in bound.reports)])
                    mx.eval(sums)
                else:
                    losses = tokens(model, arrays)  # (P,)
                    sums = sums + mx.stack([losses.sum(), arrays["weights"].sum()])
                    mx.eval(sums, losses)
                    rows.append(of_batch(part, np.array(losses)))
            # Ranks finish at different times. On a GPU, the host must wait for the others, not the device: see
            # `SeveralRanks.sum`.
            total, count, *reported = strategy.ranks.sum(sums).tolist()
    finally:
        model.train(training)
    if not count:
        return Measured(math.nan, 0)
    if bound.reports:
        means = {name: value / count for name, value in zip(bound.reports, reported, strict=True)}
        return Measured(total / count, int(count), bound.finish(means))
    if strategy.ranks.size > 1:  # those of all ranks, in the order in which one process has them
        own = [[column.tolist() for column in part] for part in rows]
        told = [part for of_rank in strategy.ranks.everyone(own) for part in of_rank]
        rows = [(np.array(a, np.int64), np.array(b, np.float64), np.array(c, np.int64)) for a, b, c in told]
    numbers, losses, counts = (np.concatenate(column) for column in zip(*rows, strict=True))
    order = np.argsort(numbers, kind="stable")
    return Measured(total / count, int(count), bound.finish({}), RowLosses(losses[order], counts[order]))


# Losses of single rows

ROWS_FILE = "held_out_rows.jsonl"
SOUND_ROWS = 20  # from so many on, words have the interval, and a run is judged by it
FEWEST_ROWS = 3  # fewer give no interval that is worth a word


@dataclass(frozen=True)
class RowLosses:
    """The losses of the held-out rows in one validation.

    Attributes:
        sums: (R,) float64, nats: each row's loss, summed over its trained tokens; rows are in the order of their numbers.
        tokens: (R,) int64, the trained tokens of each row.
    """

    sums: np.ndarray
    tokens: np.ndarray

    @property
    def loss(self) -> float:
        """The mean per token."""
        return float(self.sums.sum() / self.tokens.sum())


def of_batch(batch: Batch, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers, summed losses and trained tokens of a batch's rows; rows without a trained token are left out.

    Args:
        batch: of an encoded set.
        losses: (P,) nats, of its positions.
    """
    width, count = batch.inputs.shape[1], len(batch.inputs)
    owners, weights = batch.positions // width, batch.weights
    tokens = np.bincount(owners, weights, count)
    sums = np.bincount(owners, losses.astype(np.float64) * weights, count)
    numbers = np.arange(count) if batch.numbers is None else batch.numbers
    own = batch.real & (tokens > 0)
    return numbers[own], sums[own], tokens[own].astype(np.int64)


@dataclass(frozen=True)
class Change:
    """A change of the mean loss per token from one model to another, on the same rows.

    Attributes:
        change: nats; below 0 the second model is better.
        low, high: the ends of its 95% interval; infinite if there are too few rows for one.
        rows: how many.
        choices: the second model was chosen among so many by these rows, and the interval is wider for it.
    """

    change: float
    low: float
    high: float
    rows: int
    choices: int = 1

    @property
    def certain(self) -> bool:
        """Whether the interval is on one side of 0."""
        return self.low > 0 or self.high < 0

    def words(self) -> str:
        """Return the change of the perplexity: `35% lower (95% interval 31% to 39% lower, 24 rows)`; few rows have no interval."""
        ratio, low, high = (math.exp(min(nats, 700.0)) for nats in (self.change, self.low, self.high))
        words = f"{ratio:.3g} times as high" if ratio > 2 else _percent(ratio)
        if self.rows < SOUND_ROWS or not math.isfinite(self.low):
            return f"{words} ({counted(self.rows, 'row')})" if self.rows else words
        first, last = (high, low) if high <= 1 else (low, high)
        interval = f"{low:.3g} to {high:.3g} times" if ratio > 2 else f"{_percent(first)} to {_percent(last)}"
        if ratio <= 2 and (low <= 1) == (high <= 1):
            interval = f"{abs(1 - first):.0%} to {_percent(last)}"
        chosen = f" for the best of {self.choices} measurements" if self.choices > 1 else ""
        return f"{words} (95% interval {interval}{chosen}, {counted(self.rows, 'row')})"


def _percent(ratio: float) -> str:
    return f"{abs(1 - ratio):.0%} {'lower' if ratio <= 1 else 'higher'}"


def paired_change(before: RowLosses, after: RowLosses, choices: int = 1) -> Change:
    """Return the change of the mean loss from one measurement of some rows to another of the same rows; see `Change`."""
    differences, tokens, rows = after.sums - before.sums, after.tokens, len(after.tokens)
    change = float(differences.sum() / tokens.sum())
    half = math.inf if rows < FEWEST_ROWS else ratio_error(differences, tokens, choices)[1]
    return Change(change, change - half, change + half, rows, choices)


class RowsFile:
    """Appends the row losses of each validation to a run folder's file, one flushed line each."""

    def __init__(self, path: Path, resumed_at: int | None = None):
        """Open the file.

        Args:
            path: of the file.
            resumed_at: keep the lines up to this step; None: start an empty file.
        """
        kept = {} if resumed_at is None else read_rows_file(path)
        self._file = path.open("w", encoding="utf-8")
        for step, rows in kept.items():
            if step <= (resumed_at or 0):
                self(step, rows)

    def __call__(self, step: int, rows: RowLosses | None) -> None:
        """Write a line, unless there are no row losses or one is not finite."""
        if rows is None or not np.isfinite(rows.sums).all():
            return
        line = {"step": step, "loss_sums": np.round(rows.sums, 5).tolist(), "tokens": rows.tokens.tolist()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows_file(path: Path) -> dict[int, RowLosses]:
    """Return the row losses of each validation by its step, without lines that are not whole."""
    found: dict[int, RowLosses] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            record = parse_json(line)
            sums, tokens = np.array(record["loss_sums"], np.float64), np.array(record["tokens"], np.int64)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if sums.ndim == 1 and sums.shape == tokens.shape and len(sums) and (tokens > 0).all():
            found[step] = RowLosses(sums, tokens)
    return found
