"""Whether arrays are equal but for rounding."""

from __future__ import annotations

import mlx.core as mx
import numpy as np


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
