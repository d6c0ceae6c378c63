"""Measure a machine's peak rates, in a process of its own: `python -m mlx_lora.suite.rates`.

It prints one JSON object with the device, as MLX describes it, and the rates. Each rate is the best of several rounds,
since other programs can only slow it down. Products grow until one takes long enough to be timed well, so that a slow
dtype does not take minutes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_lora.planner.ceilings import measure_ceilings
from mlx_lora.system import device

SIDES = (512, 1024, 2048, 4096)
ENOUGH_S = 0.1
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
QUANTIZED_SIDE = 2048
# Larger than every cache of a GPU. On a CPU, MLX allocates large outputs anew each time, and their page faults would be
# measured.
PASS_BYTES, CPU_PASS_BYTES = 256 << 20, 16 << 20
LAYOUT: dict[str, Any] = {"group_size": 64, "bits": 4}


def measure_rates(rounds: int = 5, sides: tuple[int, ...] = SIDES, pass_bytes: int | None = None) -> dict[str, Any]:
    """Return the rates of this machine.

    Args:
        rounds: of each measurement.
        sides: of the square products, smallest first.
        pass_bytes: size of the array that bandwidth is measured on; default: 256 MB, on a CPU 16 MB.

    Returns:
        `gemm_flops_per_s` by dtype; `quantized_matmul_flops_per_s` of 4-bit weights by rows (`1` is limited by reading
        weights, `1024` by computing) and of `dequantize_then_gemm`; `copy_bytes_per_s` and `triad_bytes_per_s` (read
        and written); `ceilings`: the rates that predictions use (mlx_lora/planner/ceilings.py).
    """
    kind = device.compute_dtype()
    on_cpu = device.current_device().backend == "cpu"
    pass_bytes = pass_bytes or (CPU_PASS_BYTES if on_cpu else PASS_BYTES)
    ceilings = measure_ceilings(rounds=rounds)
    return {
        "gemm_flops_per_s": {name: _gemm(dtype, rounds, sides) for name, dtype in DTYPES.items()},
        "quantized_matmul_flops_per_s": _quantized(kind, rounds, min(QUANTIZED_SIDE, max(sides))),
        "copy_bytes_per_s": _pass(lambda a, b: a + 1, 2, kind, rounds, pass_bytes),
        "triad_bytes_per_s": _pass(lambda a, b: a + b, 3, kind, rounds, pass_bytes),
        "ceilings": {
            "dtype": str(kind).removeprefix("mlx.core."),
            "flops_per_s": ceilings.flops_per_s,
            "bytes_per_s": ceilings.bytes_per_s,
            # On a GPU they take no longer than reading their argument; JSON has no infinity.
            "exponentials_per_s": ceilings.exponentials_per_s if math.isfinite(ceilings.exponentials_per_s) else None,
            "launch_s": ceilings.launch_s,
        },
    }


def describe_device() -> dict[str, Any]:
    """Return the default device as MLX describes it."""
    here = device.current_device()
    return {
        "name": here.name,
        "backend": here.backend,
        "memory_bytes": here.memory_bytes,
        "working_set_bytes": here.working_set_bytes,
        "blas": here.blas or None,
        "compute_dtype": str(device.compute_dtype()).removeprefix("mlx.core."),
    }


def _gemm(dtype: mx.Dtype, rounds: int, sides: tuple[int, ...]) -> float:
    """Return the best rate over square products, in floating-point operations per second."""
    best = 0.0
    for side in sides:
        a, b = (mx.random.normal((side, side), key=mx.random.key(n)).astype(dtype) for n in (0, 1))
        mx.eval(a, b)
        spent = _best_s(lambda a=a, b=b: a @ b, rounds)
        best = max(best, 2 * side**3 / spent)
        if spent > ENOUGH_S:
            break
    return best


def _quantized(dtype: mx.Dtype, rounds: int, side: int) -> dict[str, float]:
    """Return the rates of both ways to multiply by a 4-bit weight (side, side)."""
    packed = mx.quantize(mx.random.normal((side, side), key=mx.random.key(0)).astype(dtype), **LAYOUT)
    mx.eval(packed)
    rates = {}
    for rows in (1, 1024):
        x = mx.random.normal((rows, side), key=mx.random.key(1)).astype(dtype)
        mx.eval(x)
        # The packed kernel takes a second for 1,024 rows on a CPU; fewer rows give the same rate.
        few = x[:64] if rows > 1 and device.current_device().backend == "cpu" else x
        spent = _best_s(lambda x=few: mx.quantized_matmul(x, *packed, transpose=True, **LAYOUT), rounds)
        rates[str(rows)] = 2 * len(few) * side**2 / spent
    spent = _best_s(lambda x=x: x @ mx.dequantize(*packed, **LAYOUT).T, rounds)
    rates["dequantize_then_gemm"] = 2 * len(x) * side**2 / spent
    return rates


def _pass(make: Callable, passes: int, dtype: mx.Dtype, rounds: int, pass_bytes: int) -> float:
    """Return the bytes per second of an elementwise operation over `pass_bytes`."""
    a, b = (mx.random.normal((pass_bytes // dtype.size,), key=mx.random.key(n)).astype(dtype) for n in (0, 1))
    mx.eval(a, b)
    return passes * a.nbytes / _best_s(lambda: make(a, b), rounds)


def _best_s(make: Callable[[], mx.array], rounds: int) -> float:
    mx.eval(make())  # pays for compilation
    best = math.inf
    for _ in range(rounds):
        start = time.perf_counter()
        mx.eval(make())
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    print(json.dumps({"device": describe_device(), "rates": measure_rates()}))
