"""Count how often the host waits for the device: each wait is time in which a GPU has nothing to do."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

METHODS = ("item", "tolist", "__array__", "__bool__", "__float__", "__int__", "__index__", "__dlpack__")


@contextmanager
def counted_syncs() -> Iterator[Counter[str]]:
    """Count, inside the block, what makes the host wait, by the place that asks: `module:line function`.

    `mx.async_eval` does not wait, and an array that the host has waited for before is only read. A numpy conversion is one
    wait, as is a truth value.
    """
    counts: Counter[str] = Counter()
    finished: dict[int, mx.array] = {}  # the arrays themselves, so that no other one gets their number
    undo: list[Callable[[], None]] = []

    def arrays_of(args: tuple[Any, ...]) -> list[mx.array]:
        return [leaf for _, leaf in tree_flatten(list(args)) if isinstance(leaf, mx.array)]

    def put(owner: Any, name: str, waits: Callable[..., bool]) -> None:
        plain = getattr(owner, name)

        def counting(*args: Any, **named: Any) -> Any:
            if waits(args):
                caller = sys._getframe(1)
                counts[f"{caller.f_globals.get('__name__')}:{caller.f_lineno} {name}"] += 1
                finished.update((id(one), one) for one in arrays_of(args))
            return plain(*args, **named)

        setattr(owner, name, counting)
        undo.append(lambda: setattr(owner, name, plain))

    for name in METHODS:
        put(mx.array, name, lambda args: id(args[0]) not in finished)
    put(mx, "eval", lambda args: any(id(one) not in finished for one in arrays_of(args)))
    put(mx, "synchronize", lambda args: True)
    for name in ("array", "asarray"):
        put(np, name, lambda args: bool(args) and isinstance(args[0], mx.array) and id(args[0]) not in finished)
    try:
        yield counts
    finally:
        for back in reversed(undo):
            back()
