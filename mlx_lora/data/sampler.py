"""Plan batches: which rows of token ids share a batch, at which width, and in which order.

The plan is a pure function of (data, seed, epoch), so a run is repeatable and a position in it is two integers
(epoch, batch). Every row occurs exactly once per epoch. Several ranks have the same plan and share each batch's rows
(parallel/strategy.py), so a run may be resumed with another number of ranks.

Rows of similar length share a batch, so there is little padding; batches are shuffled, so that lengths do not follow an
order that would show in the loss. Padding is on the right: under a causal mask it cannot affect a real token, so no
attention mask is needed.

Batches are padded to a few widths. Every width is another shape, which is traced and compiled once; every position of
padding is computed once per epoch. The widths are chosen so that both together cost the least time.

An example may have several rows (a pair's two answers): they go into the same batch, next to each other.

Shapes: E examples, K rows of each, B = E K rows, T columns, P slots for trained targets. A class has all rows with one
shape. The rows of a class stay the same, and each epoch distributes them anew over the class's batches, with about the
same number of targets in each batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlx_lora.data.batch import EMPTY, SLOTS_STEP, Batch, collate, rows_of

if TYPE_CHECKING:
    from mlx_lora.config.settings import LoopSettings
    from mlx_lora.data.dataset import EncodedSet

# The search uses at most this many rows, evenly spaced by length: 0.2 s, and within 0.1% of the result for all rows.
SAMPLED_ROWS = 3000
DEALS = 4  # tries at a distribution whose targets fit into P


# Widths


@dataclass(frozen=True)
class ShapePrice:
    """What a shape and a padded position cost.

    The defaults were measured on a 2-core CPU with a 135M model (docs/development/performance.md): a new shape costs as
    much as 110 tokens. They are the same for every device, because the plan must not depend on the device;
    a GPU computes far more tokens in the time of a retrace, but pays it only once per run and shape.

    Attributes:
        retrace_s: seconds that the first step with a new shape takes longer, for tracing and for new buffers.
        tokens_per_s: positions computed per second, padding included.
        epochs: passes over the data in which a shape is used.
        max_shapes: the most shapes allowed.
    """

    retrace_s: float = 0.6
    tokens_per_s: float = 180.0
    epochs: float = 1.0
    max_shapes: int = 48


def rows_per_batch(width: int, batch_tokens: int, batch_size: int | None) -> int:
    """Return how many rows of `width` one batch has: `batch_size`, or what the token budget allows, but at least 1."""
    return batch_size or max(1, batch_tokens // int(width))


def choose_widths(
    lengths: np.ndarray,
    batch_tokens: int,
    batch_size: int | None = None,
    price: ShapePrice = ShapePrice(),
) -> np.ndarray:
    """Choose the widths for these lengths, and how many of them.

    Args:
        lengths: (R,) positions of each row, 1 or more.
        batch_tokens: The most positions per batch; a longer row gets a batch of its own.
        batch_size: Rows per batch instead.
        price: What shapes and positions cost.

    Returns:
        (k,) int64 widths, ascending; each is the length of some row, the last of the longest row.
    """
    ordered = np.sort(lengths)[::-1].astype(np.int64)
    sample = ordered[:: -(-len(ordered) // SAMPLED_ROWS)]
    shapes = min(price.max_shapes, len(np.unique(sample)) + 1)  # one more for the rows that are left over
    positions, step_to = _fewest_positions(sample, batch_tokens, batch_size, shapes)
    scale = len(ordered) / len(sample)
    # Seconds that the positions of an epoch cost over the run in so many shapes.
    cost_s = positions[0] * scale / price.tokens_per_s * price.epochs + np.arange(shapes + 1) * price.retrace_s
    k = int(np.argmin(cost_s))
    widths = []
    row = 0
    while row < len(sample):
        widths.append(int(sample[row]))
        row, k = step_to[row, k], k - 1
    return np.unique(widths)


def _fewest_positions(
    ordered: np.ndarray, batch_tokens: int, batch_size: int | None, shapes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find, by dynamic programming, the fewest positions for the rows from each row on.

    Rows are taken from the longest to the shortest. A shape starts at some row, is as wide as that row, and has one or
    more whole batches; only the very last batch may have empty rows.

    Args:
        ordered: (n,) lengths, descending.
        batch_tokens, batch_size: As in `choose_widths`.
        shapes: The most shapes, K.

    Returns:
        (n + 1, K + 1) positions for the rows from i on in exactly k shapes (inf: impossible), and the row
        at which the next shape starts.
    """
    n = len(ordered)
    positions = np.full((n + 1, shapes + 1), np.inf)
    positions[n, 0] = 0.0
    step_to = np.zeros((n + 1, shapes + 1), np.int64)
    columns = np.arange(shapes)
    for row in range(n - 1, -1, -1):
        width = ordered[row]
        count = min(rows_per_batch(width, batch_tokens, batch_size), n - row)
        batches = np.arange(1, -(-(n - row) // count) + 1)
        following = np.minimum(row + count * batches, n)
        totals = positions[following, :shapes] + (count * width * batches)[:, None]  # (batches, K)
        best = totals.argmin(axis=0)
        positions[row, 1:] = totals[best, columns]
        step_to[row, 1:] = following[best]
    return positions, step_to


# Batches


@dataclass(frozen=True)
class WidthClass:
    """The rows that share one shape.

    Attributes:
        width: columns, T.
        count: examples per batch, E.
        slots: the number of slots for trained targets, P.
        dealt: (batches, E) example numbers, or EMPTY, of a distribution whose targets fit into P.
        group: rows per example, K.
    """

    width: int
    count: int
    slots: int
    dealt: np.ndarray
    group: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape (B, T, P)."""
        return self.count * self.group, self.width, self.slots


class BatchPlan:
    """Batches of one encoded set under a row or token budget."""

    def __init__(
        self,
        rows: EncodedSet,
        *,
        batch_tokens: int,
        batch_size: int | None,
        seed: int,
        price: ShapePrice = ShapePrice(),
    ):
        """Plan batches.

        Args:
            rows: the encoded set; rows shorter than two tokens hold no target and must not be in it.
            batch_tokens: the limit for width x rows of a batch, which has at least one row.
            batch_size: examples per batch instead, as in mlx-lm and TRL.
            seed: of the shuffles.
            price: what a shape costs compared to padding, which decides the number of widths.
        """
        self.rows = rows
        self.seed = seed
        group = rows.group
        # A row of n tokens has n - 1 (input, target) pairs; an example is as long as its longest row.
        self._lengths = (rows.lengths - 1).reshape(-1, group).max(axis=1)
        counts = rows.supervised_counts.reshape(-1, group).sum(axis=1)
        self._counts = np.append(counts, 0)  # EMPTY, which is -1, gets the last entry, 0
        budget = max(1, batch_tokens // group)
        widths = choose_widths(self._lengths, budget, batch_size, price) if len(rows) else np.zeros(0, int)
        self.classes = self._make_classes(widths, budget, batch_size)
        self._epoch_cache: tuple[int, list[tuple[WidthClass, np.ndarray]]] | None = None

    def __len__(self) -> int:
        """Return the number of batches per epoch, which is the same in every epoch."""
        return sum(len(part.dealt) for part in self.classes)

    @property
    def shapes(self) -> set[tuple[int, int, int]]:
        """All (B, T, P) that occur."""
        return {part.shape for part in self.classes}

    @property
    def most_positions(self) -> int:
        """The positions of the largest batch, padding included; 0 without rows."""
        return max((count * width for count, width, _ in self.shapes), default=0)

    @property
    def padding_fraction(self) -> float:
        """The fraction of an epoch's positions that hold no token; 0 without rows."""
        positions = sum(part.dealt.size * part.group * part.width for part in self.classes)
        return 1 - int((self.rows.lengths - 1).sum()) / positions if positions else 0.0

    def batch(self, epoch: int, index: int) -> Batch:
        """Return batch `index` of `epoch`."""
        part, numbers = self._epoch(epoch)[index]
        return collate(self.rows, numbers, part.width, part.slots)

    def examples_of(self, limit: int = -1) -> np.ndarray:
        """Return the numbers of the examples in the first `limit` batches of epoch 0 (-1: all)."""
        found = [numbers for _, numbers in self._epoch(0)[: len(self) if limit < 0 else limit]]
        numbers = np.concatenate(found) if found else np.zeros(0, np.int64)
        return numbers[numbers != EMPTY]

    def layout(self, epoch: int) -> list[tuple[int, np.ndarray]]:
        """Return the width and the row numbers, (B,), of each batch of an epoch."""
        return [(part.width, rows_of(numbers, part.group)) for part, numbers in self._epoch(epoch)]

    def batches(self, limit: int = -1, first: int = 0, every: int = 1) -> Iterator[Batch]:
        """Yield the first `limit` batches of epoch 0 (-1: all), the fixed sample that validation uses.

        Args:
            limit: of the whole sample.
            first, every: yield only every so many of them, from number `first` on; so ranks divide them.
        """
        count = len(self) if limit < 0 else min(limit, len(self))
        return (self.batch(0, i) for i in range(first, count, every))

    def _make_classes(self, widths: np.ndarray, batch_tokens: int, batch_size: int | None) -> list[WidthClass]:
        """Return the class of each width, from the widest to the narrowest.

        A class has whole batches: its last batch is filled with the longest rows of the next class, which wastes less
        than empty rows. Only the narrowest class may need empty rows.
        """
        order = np.argsort(-self._lengths, kind="stable")
        ordered = self._lengths[order]
        classes = []
        start = 0
        for narrower in [*widths[-2::-1], 0]:
            end = int(np.searchsorted(-ordered, -narrower, side="left"))  # the first row that fits a narrower class
            if end <= start:
                continue
            width = int(ordered[start])
            count = min(rows_per_batch(width, batch_tokens, batch_size), len(order) - start)
            room = -(-(end - start) // count) * count
            taken = order[start : start + room]
            taken = np.append(taken, np.full(room - len(taken), EMPTY))
            slots, dealt = self._fix_slots(taken, count, width)
            classes.append(WidthClass(width, count, slots, dealt, self.rows.group))
            start += room
        return classes

    def _fix_slots(self, taken: np.ndarray, count: int, width: int) -> tuple[int, np.ndarray]:
        """Return P of a class, and a distribution of its rows that fits into P."""
        random = np.random.default_rng([self.seed, width])
        deals = [deal(self._counts, taken, count, random) for _ in range(DEALS)]
        most = [int(self._counts[dealt].sum(axis=1).max()) for dealt in deals]
        # Take the median: with the smallest P, most epochs would have to fall back on that one distribution.
        middle = int(np.argsort(most, kind="stable")[DEALS // 2])
        slots = -(-max(1, most[middle]) // SLOTS_STEP) * SLOTS_STEP
        return min(slots, count * self.rows.group * width), deals[middle]

    def _epoch(self, epoch: int) -> list[tuple[WidthClass, np.ndarray]]:
        """Return the class and the row numbers of each batch of one epoch, shuffled."""
        if self._epoch_cache is None or self._epoch_cache[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            dealt = ((part, random.permutation(self._deal_again(part, random))) for part in self.classes)
            batches = [(part, numbers) for part, rows in dealt for numbers in rows]
            self._epoch_cache = (epoch, [batches[i] for i in random.permutation(len(self))])
        return self._epoch_cache[1]

    def _deal_again(self, part: WidthClass, random: np.random.Generator) -> np.ndarray:
        """Return a new distribution of a class's rows whose targets fit into P, or the known one if none is found."""
        for _ in range(DEALS):
            dealt = deal(self._counts, part.dealt.ravel(), part.count, random)
            if self._counts[dealt].sum(axis=1).max() <= part.slots:
                return dealt
        return part.dealt


def deal(counts: np.ndarray, taken: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """Distribute rows over batches so that all batches have about the same number of trained targets.

    Rows are roughly sorted by their number of targets and divided into `count` strata. Each batch gets one row of each
    stratum; the batch with the fewest targets so far gets the row with the most.

    Args:
        counts: trained targets by row number; the last entry, EMPTY's, is 0.
        taken: (batches * count,) row numbers.
        count: rows per batch.
        random: breaks ties and blurs the strata.

    Returns:
        (batches, count) row numbers.
    """
    batches = len(taken) // count
    targets = counts[taken]
    # Blur by the span of a stratum, so that each epoch combines other rows.
    blur = max(1.0, np.ptp(targets) / count)
    strata = taken[np.argsort(targets + blur * random.random(len(taken)))[::-1]].reshape(count, batches)
    sums = np.zeros(batches, np.int64)
    dealt = np.empty((count, batches), np.int64)
    for i, stratum in enumerate(strata):
        most_first = stratum[np.lexsort((random.random(batches), -counts[stratum]))]
        fewest_first = np.lexsort((random.random(batches), sums))
        dealt[i, fewest_first] = most_first
        sums[fewest_first] += counts[most_first]
    return dealt.T


# The steps of a run


def total_steps(plan: BatchPlan, settings: LoopSettings, updates: int = 1) -> int:
    """Return the number of optimizer steps of the run: --iters, or the steps that --epochs (default: 1) take.

    Args:
        plan: the batches of an epoch.
        settings: of the run.
        updates: steps on the same batches (`ObjectiveSettings.updates`).
    """
    if settings.iters is not None:
        return settings.iters
    return math.ceil(_most_batches(plan, settings, updates) / settings.grad_accumulation_steps)


def _most_batches(plan: BatchPlan, settings: LoopSettings, updates: int) -> int:
    """Return the micro-batches of all steps of --epochs, each as often as it is trained on."""
    return max(1, math.ceil(len(plan) * updates * (settings.epochs or 1.0)))


def rounds(plan: BatchPlan, settings: LoopSettings, updates: int, start: int = 0) -> Iterator[tuple[list[Batch], int]]:
    """Yield the planned batches of each of an objective's rounds of `updates` steps, and the number of the first one.

    With --epochs, the last step accumulates the batches that are left, even if there are fewer than usual: no row is
    dropped, and none is taken from a further epoch.

    Args:
        plan: the batches of an epoch.
        settings: of the run.
        updates: steps on the same batches.
        start: micro-batches that are done, each as often as it was trained on; the end of a round.
    """
    a_step, end = settings.grad_accumulation_steps, _most_batches(plan, settings, updates)
    begin = start
    while settings.iters is not None or begin < end:
        wanted = a_step if settings.iters is not None else min(a_step, end - begin)
        first = begin // updates
        yield [plan.batch(*divmod(first + place, len(plan))) for place in range(wanted)], first
        begin += a_step * updates
