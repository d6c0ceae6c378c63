"""Measure this machine's peak rates, from which speed is predicted.

This takes seconds. Each rate is the best of several rounds, since other programs can only slow a round down.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from mlx_lora.planner.speed import Ceilings
from mlx_lora.system import device, exponentials

# The shape of a typical product in a training step: positions, and a block's widths.
ROWS, INNER, OUTER = 1024, 576, 1536
ELEMENTS = 1 << 22  # 16 MB in float32, larger than any cache


def measure_ceilings(
    dtype: str = "auto", rounds: int = 5, clock: Callable[[], float] = time.perf_counter, polynomials: bool = True
) -> Ceilings:
    """Return this machine's rates in the run's compute dtype.

    Args:
        dtype: --dtype of the run.
        rounds: the number of times that each rate is measured; the best one counts.
        clock: returns seconds; use `time.process_time` on a machine with other load.
        polynomials: whether a run may choose kernels that compute exponentials by polynomials, where this machine has
            them; otherwise they are mlx's, which take several times as long on a CPU.
    """
    kind = device.compute_dtype(dtype)
    x, w = mx.random.normal((ROWS, INNER)).astype(kind), mx.random.normal((INNER, OUTER)).astype(kind)
    a, b = mx.random.normal((ELEMENTS,)).astype(kind), mx.random.normal((ELEMENTS,)).astype(kind)
    mx.eval(x, w, a, b)
    flops = 2 * ROWS * INNER * OUTER / _best_s(lambda: x @ w, rounds, clock)
    # The kinds of passes in a step: elementwise, reordering (heads), and along rows (norms, softmax). mlx's CPU backend
    # reaches 20, 9 and 5 GB/s in the three; on a GPU they hardly differ.
    rows = a.reshape(1, -1, 16, 64)
    passes = (
        (3, lambda: a * b),
        (2, lambda: mx.contiguous(rows.swapaxes(1, 2))),
        (1, lambda: a.reshape(-1, 1024).sum(-1)),
    )
    times = [_best_s(make, rounds, clock) for _, make in passes]
    moved = sum(arrays for arrays, _ in passes) * ELEMENTS * kind.size / sum(times)
    on_cpu = device.current_device().backend == "cpu"
    power = exponentials.exp_minus if polynomials and exponentials.usable(a) else mx.exp
    powers = _exponentials_per_s(power, a, 2 / 3 * times[0], rounds, clock) if on_cpu else float("inf")
    return Ceilings(flops, moved, powers, 0.0 if on_cpu else 5e-6, "measured here")


def _exponentials_per_s(
    power: Callable[[mx.array], mx.array], a: mx.array, passing_s: float, rounds: int, clock: Callable[[], float]
) -> float:
    """Return the exponentials per second of a function, without its pass over memory.

    Args:
        power: the function.
        a: its arguments.
        passing_s: the time of reading and writing an array of this size.
        rounds, clock: as above.
    """
    spent = _best_s(lambda: power(a), rounds, clock)
    return a.size / max(spent - passing_s, spent / 10)  # the shortest rounds of a fast one may differ by little


def _best_s(make: Callable[[], mx.array], rounds: int, clock: Callable[[], float]) -> float:
    mx.eval(make())
    best = float("inf")
    for _ in range(rounds):
        start = clock()
        mx.eval(make())
        best = min(best, clock() - start)
    return best
