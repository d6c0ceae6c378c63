"""Let numpy read 16-bit arrays of mlx, and compare them within their own rounding: a GPU computes in bfloat16.

numpy has no bfloat16, so `np.array(model(tokens))` is an error where a model computes in it, and 1e-5 is no tolerance there.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import mlx.core as mx
import numpy as np

# Of the largest number: some roundings of bfloat16, which has eight bits.
ROUNDING = 3e-2
TESTS = os.path.dirname(os.path.realpath(__file__)) + os.sep


def _floats(value: Any) -> Any:
    """Return float32 for an array of bfloat16, also inside lists, and anything else as it is."""
    if isinstance(value, mx.array):
        return value.astype(mx.float32) if value.dtype == mx.bfloat16 else value
    if isinstance(value, list) and value and isinstance(value[0], mx.array):
        return [_floats(one) for one in value]
    return value


def let_numpy_read_halves() -> None:
    """Replace the functions of numpy and mlx that tests compare with, for calls from tests and the rest of this process."""
    for name in ("array", "asarray", "abs", "isfinite", "array_equal", "concatenate", "stack"):
        setattr(np, name, _reading(getattr(np, name)))
    np.allclose, mx.allclose = _rounding(np.allclose), _rounding(mx.allclose)


def _of_a_test() -> bool:
    """Return whether a test calls: what this project's own code does wrong with bfloat16 must stay an error."""
    return os.path.realpath(sys._getframe(2).f_code.co_filename).startswith(TESTS)


def _reading(plain: Any) -> Any:
    def function(*args: Any, **named: Any) -> Any:
        return plain(*map(_floats, args), **named) if _of_a_test() else plain(*args, **named)

    return function


def _rounding(plain: Any) -> Any:
    def allclose(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-8, **named: Any) -> Any:
        if _of_a_test() and any(isinstance(one, mx.array) and one.dtype == mx.bfloat16 for one in (a, b)):
            a, b = _floats(a), _floats(b)
            largest = max(float(np.abs(np.array(one)).max(initial=0)) for one in (a, b))
            rtol, atol = max(rtol, ROUNDING), max(atol, ROUNDING * largest)
        return plain(a, b, rtol=rtol, atol=atol, **named)

    return allclose
