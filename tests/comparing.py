"""Whether arrays are equal but for rounding, whether weights are the same to the bit, and what a computation takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_lora.utils import device

T = TypeVar("T")


def by_dtype(float32: T, bfloat16: T) -> T:
    """Return the tolerance, or what else differs, for what a command computes in this machine's dtype: bfloat16 on a GPU."""
    return float32 if device.compute_dtype() == mx.float32 else bfloat16


def close(got: mx.array, expected: mx.array, tolerance: float) -> bool:
    """Return whether no value is further off than `tolerance` times the largest expected one."""
    scale = max(mx.abs(expected).max().item(), 1e-3)
    return np.allclose(np.array(got.astype(mx.float32)), np.array(expected.astype(mx.float32)), atol=tolerance * scale)


def assert_equal(got: dict[str, mx.array], expected: dict[str, mx.array]) -> None:
    """Assert that two sets of named gradients agree within 1e-5 of the largest value of each array."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(mx.abs(value).max().item(), 1e-4)
        assert np.allclose(got[name], value, atol=1e-5 * scale), name


def peak_bytes(compute: Callable[..., Any], *arrays: Any, waits: bool = True) -> int:
    """Return the most memory that computing takes beside its arguments.

    Args:
        compute: gives arrays, which are evaluated.
        arrays: its arguments, evaluated before.
        waits: set the lowest memory limit, until the end of the test: else the CPU backend allocates for operations that it
            has not run yet.
    """
    if waits:
        mx.set_memory_limit(1)
    mx.eval(arrays)
    mx.synchronize()
    mx.clear_cache()
    start = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(compute(*arrays))
    return mx.get_peak_memory() - start


def weights_checksum(model: nn.Module, skip: frozenset[str] = frozenset()) -> str:
    """Return the SHA-256 of every parameter's name and bytes: the proof that a base did not change.

    Args:
        model: any module.
        skip: last name parts to leave out (`lora_a`, `lora_b`).
    """
    digest = hashlib.sha256()
    for name, value in sorted(tree_flatten(model.parameters())):
        if name.rsplit(".", 1)[-1] in skip:
            continue
        digest.update(name.replace(".linear.", ".").replace(".embedding.", ".").encode())
        raw = value.view(mx.uint16) if value.dtype == mx.bfloat16 else value
        digest.update(np.array(raw).tobytes())
    return digest.hexdigest()
