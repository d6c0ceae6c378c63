"""Count how often the host waits for the device: each wait is time in which a GPU has nothing to do."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

METHODS = ("item", "tolist", "__array__", "__bool__", "__float__", "__int__", "__index__", "__dlpack__")


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Count, inside the block, what makes the host wait, by the place that asks: `file:line name`.

    `mx.async_eval` does not wait. A numpy conversion is one wait, as is a truth value.
    """
    counts: Counter[str] = Counter()
    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, waits: Callable[..., bool]) -> None:
        plain = getattr(owner, name)

        def counting(*args: Any, **named: Any) -> Any:
            if waits(*args):
                caller = sys._getframe(1)
                counts[f"{caller.f_globals.get('__name__')}:{caller.f_lineno} {name}"] += 1
            return plain(*args, **named)

        setattr(owner, name, counting)
        undo.append(lambda: setattr(owner, name, plain))

    for name in METHODS:
        put(mx.array, name, lambda *_: True)
    for name in ("eval", "synchronize"):
        put(mx, name, lambda *_: True)
    for name in ("array", "asarray"):
        put(np, name, lambda *args: bool(args) and isinstance(args[0], mx.array))
    try:
        yield counts
    finally:
        for back in reversed(undo):
            back()
