"""Which cases of a parametrized test run by default; the others wait for the night (`make test-all`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest


def by_default(cases: Iterable[Any], *kept: Any) -> list[Any]:
    """Return parameters for pytest, of which all but `kept` are marked slow.

    Args:
        cases: single values, or tuples of values.
        kept: some of the cases.
    """
    cases = list(cases)
    assert all(one in cases for one in kept), f"not among the cases: {[one for one in kept if one not in cases]}"
    return [
        pytest.param(*(one if isinstance(one, tuple) else (one,)), marks=() if one in kept else pytest.mark.slow)
        for one in cases
    ]


def named(cases: Mapping[str, Any], *kept: str) -> list[Any]:
    """Return the values of named cases as parameters, with their names as ids, of which all but `kept` are marked slow."""
    assert set(kept) <= set(cases), f"not among the cases: {set(kept) - set(cases)}"
    return [pytest.param(one, id=name, marks=() if name in kept else pytest.mark.slow) for name, one in cases.items()]
