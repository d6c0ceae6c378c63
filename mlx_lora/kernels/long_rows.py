"""Compute the attention of long rows in tiles where a loss is measured without its gradient.

mlx's attention keeps the scores of all queries and keys wherever it has no fused kernel: always on a CPU, and on a GPU for
some widths of heads. A validation would then take more memory than the step, whose attention is tiled: 9 heads of 16,384 positions have
9.7 GB of scores. Shorter rows keep mlx's attention, which is as fast, so their losses keep their bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn

from mlx_lora.compat.functions import exchanged
from mlx_lora.kernels.attention import Windows, attend
from mlx_lora.kernels.measure import MLX, Kernel, ShapeClass
from mlx_lora.kernels.table import LONG_ROW, KernelBinding, kernel_rows
from mlx_lora.utils import device


@contextmanager
def long_row_kernels(model: nn.Module) -> Iterator[None]:
    """Let a model compute attention to `LONG_ROW` keys and more in tiles inside the block, unless mlx has a fused kernel for it.

    Args:
        model: any mlx-lm model; layers that do not use the shared function keep their own.
    """
    windows = Windows()
    rows = [row for row in kernel_rows(attend, windows) if row.name == "attention"]
    with exchanged(KernelBinding(model, rows, _by_length, windows).functions):
        yield


def _by_length(kernel: Kernel, shape: ShapeClass) -> str:
    """Return the candidate for a shape class of attention."""
    keys, _, _, width, value_width, mask, _ = shape
    # A fused kernel computes what a window hides, too, and reads a mask of all queries and keys.
    fused = mask != "window" and device.fuses_attention(width, value_width)
    return MLX if keys < LONG_ROW or fused else kernel.assumed
