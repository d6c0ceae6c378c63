"""A call that is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_lora.utils.errors import InputError


def refuses(
    words: str,
    function: Callable[..., Any],
    *args: Any,
    kind: type[Exception] = InputError,
    most: int = 2000,
    **named: Any,
) -> None:
    """Assert that a call ends with an error of one line in which a regular expression is found.

    Args:
        words: the expression.
        function, args, named: the call.
        kind: of the error.
        most: characters of the line.
    """
    with pytest.raises(kind, match=words) as refused:
        function(*args, **named)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < most
