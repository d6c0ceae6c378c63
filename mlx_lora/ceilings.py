"""Measure what this machine can do at most: the ceilings that predicted speed is counted against.

Seconds of work in all; each rate is the best of several rounds, since another program's load only slows.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from mlx_lora import device
from mlx_lora.speed import Ceilings

# Products of a training step: this many positions by a block's widths.
ROWS, INNER, OUTER = 1024, 576, 1536
ELEMENTS = 1 << 22  # 16 MB in float32: beyond any cache that a pass could live in


def measure_ceilings(dtype: str = "auto", rounds: int = 5) -> Ceilings:
    """Return this machine's rates in the run's compute dtype.

    Args:
        dtype: --dtype of the run.
        rounds: of each measurement; the best counts.
    """
    kind = device.compute_dtype(dtype)
    x, w = mx.random.normal((ROWS, INNER)).astype(kind), mx.random.normal((INNER, OUTER)).astype(kind)
    a, b = mx.random.normal((ELEMENTS,)).astype(kind), mx.random.normal((ELEMENTS,)).astype(kind)
    mx.eval(x, w, a, b)
    flops = 2 * ROWS * INNER * OUTER / _best_s(lambda: x @ w, rounds)
    moved = 3 * ELEMENTS * kind.size / _best_s(lambda: a * b, rounds)
    spent = _best_s(lambda: mx.exp(a), rounds) - 2 * ELEMENTS * kind.size / moved
    on_cpu = device.current_device().backend == "cpu"
    exponentials = ELEMENTS / max(spent, 1e-9) if on_cpu else float("inf")
    return Ceilings(flops, moved, exponentials, 0.0 if on_cpu else 5e-6, "measured here")


def _best_s(make: Callable[[], mx.array], rounds: int) -> float:
    mx.eval(make())
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval(make())
        best = min(best, time.perf_counter() - start)
    return best
