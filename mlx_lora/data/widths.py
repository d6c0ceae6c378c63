"""Choose the few widths that batches are padded to, from the lengths of rows.

Every width is another shape, and every shape is traced and compiled once; every position of padding is
computed once per epoch. The widths are chosen so that both together cost the least time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# The search uses at most this many rows, evenly spaced by length: 0.2 s, and within 0.1% of the result for all rows.
SAMPLED_ROWS = 3000


@dataclass(frozen=True)
class ShapePrice:
    """What a shape and a padded position cost.

    The defaults were measured on a 2-core CPU with a 135M model (docs/performance.md): a new shape costs as
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

    def cost_s(self, positions: np.ndarray | float, shapes: np.ndarray | int) -> np.ndarray | float:
        """Return the seconds that `positions` per epoch, in this many shapes, cost over the run."""
        return positions / self.tokens_per_s * self.epochs + shapes * self.retrace_s


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
    k = int(np.argmin(price.cost_s(positions[0] * scale, np.arange(shapes + 1))))
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
