"""Refuse what Metal refuses: float64 and factorizations outside the CPU's stream (docs/development/metal.md).

Where Metal computes more exactly than mlx's CPU, the products do as well.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from typing import Any

import mlx.core as mx

# mlx's own words, in its Metal backend and in array.cpp.
NO_FLOAT64 = "float64 is not supported on the GPU"
FACTORIZATIONS = (
    "cholesky", "cholesky_inv", "eig", "eigh", "eigvals", "eigvalsh", "inv", "lu", "lu_factor", "pinv", "qr", "solve",
    "solve_triangular", "svd", "tri_inv",
)  # fmt: skip

_streams = threading.local()
_plain_stream = mx.stream
_plain_gather = mx.gather_mm


def on_cpu(stream: Any) -> bool:
    """Return whether an operation with this `stream` argument would run on the CPU of a Mac."""
    if stream is None:
        inner = getattr(_streams, "stack", [])
        return bool(inner) and inner[-1]
    device = getattr(stream, "device", stream)
    return device == mx.cpu or device == mx.Device(mx.cpu)


class _Stream:
    """mx.stream, which remembers whether the block that it opens computes on the CPU."""

    def __init__(self, stream: Any):
        self._cpu = on_cpu(stream)
        # This build has no GPU: what would run there runs on the CPU.
        self._context = _plain_stream(stream if self._cpu else mx.cpu)

    def __enter__(self) -> None:
        _streams.stack = [*getattr(_streams, "stack", []), self._cpu]
        self._context.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)
        _streams.stack = _streams.stack[:-1]


def _factorization(name: str) -> Callable[..., Any]:
    plain = getattr(mx.linalg, name)

    @functools.wraps(plain)
    def refusing(*args: Any, **named: Any) -> Any:
        if not on_cpu(named.get("stream")):
            raise ValueError(
                f"[linalg::{name}] This op is not yet supported on the GPU. Explicitly pass a CPU stream to run it."
            )
        return plain(*args, **named)

    return refusing


def _no_float64(name: str) -> mx.Dtype:
    """The module's attributes that are not there: float64 is removed, so that whoever reads it asks here."""
    if name == "float64":
        reader = sys._getframe(1).f_globals.get("__name__", "")
        if reader.startswith("mlx_lora") and not on_cpu(None):
            raise ValueError(NO_FLOAT64)
        return _float64
    raise AttributeError(f"module 'mlx.core' has no attribute '{name}'")


def _gather_mm(a: mx.array, b: mx.array, *args: Any, **named: Any) -> mx.array:
    """Metal multiplies by 16-bit experts, which mlx's CPU cannot: computed in float32, rounded as Metal's result is."""
    if a.dtype == mx.float32 == b.dtype:
        return _plain_gather(a, b, *args, **named)
    return _plain_gather(a.astype(mx.float32), b.astype(mx.float32), *args, **named).astype(b.dtype)


def _wide(value: Any) -> Any:
    """Return float32 for an array of 16 bits, and anything else as it is."""
    return (
        value.astype(mx.float32) if isinstance(value, mx.array) and value.dtype in (mx.bfloat16, mx.float16) else value
    )


def _float_sums(plain: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Metal's quantized products add up in float32; those of mlx's CPU add up in x's dtype, which loses 3 to 17 % in bfloat16."""

    @functools.wraps(plain)
    def product(x: mx.array, *args: Any, **named: Any) -> mx.array:
        if x.dtype == mx.float32:
            return plain(x, *args, **named)
        found = plain(_wide(x), *map(_wide, args), **{name: _wide(value) for name, value in named.items()})
        return found.astype(x.dtype)

    return product


_float64 = mx.float64


def install() -> None:
    """Replace these functions of mlx.core for the rest of this process."""
    mx.stream, mx.gather_mm = _Stream, _gather_mm
    mx.quantized_matmul, mx.gather_qmm = _float_sums(mx.quantized_matmul), _float_sums(mx.gather_qmm)
    for name in FACTORIZATIONS:
        if hasattr(mx.linalg, name):
            setattr(mx.linalg, name, _factorization(name))
    del mx.float64
    mx.__getattr__ = _no_float64
