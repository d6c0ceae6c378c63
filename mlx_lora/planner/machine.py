"""Describe this machine for the planner: its memory, and its peak rates, from which speed is predicted.

Measuring the rates takes seconds. Each is the best of several rounds, since other programs can only slow a round down.
Plans read the rates of one measurement, which is kept on disk: two plans, made at the same time by two processes or an hour
apart, would otherwise predict speeds for one model that differ by a factor of three.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import reduce
from typing import Any

import mlx.core as mx

from mlx_lora.kernels import activations
from mlx_lora.planner.memory import Machine
from mlx_lora.planner.speed import Ceilings
from mlx_lora.utils import device
from mlx_lora.utils.device import compiles_from_steps, compute_dtype, current_device
from mlx_lora.utils.files import cache_dir, one_at_a_time, read_store, write_store

# The shape of a typical product in a training step: positions, and a block's widths.
ROWS, INNER, OUTER = 1024, 576, 1536
ELEMENTS = 1 << 22  # 16 MB in float32, larger than any cache
CHAIN = 200  # launches, each of which waits for the one before
STORE = "ceilings"
KEPT_S = 86_400.0  # after a day they are measured again, and the better of both figures is kept


def this_machine(dtype: str = "auto") -> Machine:
    """Return the planner's description of this device.

    Args:
        dtype: --dtype of the run.
    """
    here = current_device()
    return Machine(
        here.name,
        here.backend,
        here.memory_bytes,
        here.working_set_bytes,
        compute_dtype(dtype).size,
        compiles_from=compiles_from_steps(),
    )


def loss_tile_bytes() -> int:
    """Return the bytes that one tile of the fused loss's logits may take."""
    return this_machine().tile_bytes


def dense_experts_bytes() -> int:
    """Return the bytes that one layer's experts may take as floats during their product."""
    return this_machine().dense_experts_bytes


# Peak rates


def ceilings_here(
    dtype: str = "auto",
    polynomials: bool = True,
    measure: Callable[..., Ceilings] | None = None,
    now: Callable[[], float] = time.time,
) -> Ceilings:
    """Return this machine's rates, the same to every process; they are measured if there are none, or old ones.

    Args:
        dtype, polynomials: as for `measure_ceilings`.
        measure: measures them; None: `measure_ceilings`.
        now: returns the time in seconds since the epoch.
    """
    kind = str(device.compute_dtype(dtype)).rpartition(".")[2]
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "all")
    key = f"{device.measured_on()}|{threads} threads|{kind}|{'polynomials' if polynomials else 'functions'}"
    with one_at_a_time(cache_dir("measured") / STORE):  # two that measure at once would slow each other down
        before = None
        with suppress(TypeError, ValueError, KeyError):  # unknown, or damaged: measure again
            rates: dict[str, Any] = dict(read_store(STORE)[key])
            at = float(rates.pop("at"))
            before = Ceilings(**rates)
            if 0 <= now() - at < KEPT_S:
                return before
        found = (measure or measure_ceilings)(dtype, polynomials=polynomials)
        if before is not None:
            names = ("flops_per_s", "bytes_per_s", "exponentials_per_s")
            found = replace(found, **{name: max(getattr(one, name) for one in (before, found)) for name in names})
        write_store(STORE, {**read_store(STORE), key: {"at": now(), **asdict(found)}})
        return found


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
    power = activations.exp_minus if polynomials and activations.usable(a) else mx.exp
    powers = _exponentials_per_s(power, a, 2 / 3 * times[0], rounds, clock) if on_cpu else float("inf")
    launch_s = 0.0 if on_cpu else _best_s(lambda: reduce(mx.add, [a[:1]] * CHAIN), rounds, clock) / CHAIN
    return Ceilings(flops, moved, powers, launch_s, "measured here")


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
