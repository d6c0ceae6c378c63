"""Give single instances of other packages' classes another class, so that all others keep theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any


def become(instance: Any, kind: type) -> None:
    """Give one instance another class, which computes with the attributes that it has."""
    instance.__class__ = kind


def mix_in(mixin: type, instance: Any, module: str | None = None) -> None:
    """Give one instance a class in which `mixin` comes before its own, unless it has; arguments as for `mixed`."""
    if not isinstance(instance, mixin):
        become(instance, mixed(mixin, type(instance), module))


@cache
def mixed(mixin: type, own: type, module: str | None = None) -> type:
    """Return the class in which `mixin` comes before `own`: the same one for all blocks, which are compared by their classes.

    Args:
        mixin, own: classes.
        module: the class's module; None: that of `own`, by which a model's kernels are found.
    """
    return type(f"{mixin.__name__}{own.__name__}", (mixin, own), {"__module__": module or own.__module__})


@contextmanager
def classes_put_back(instances: Sequence[Any]) -> Iterator[None]:
    """Give instances the classes back that they have now at the end of the block."""
    kinds = [type(instance) for instance in instances]
    try:
        yield
    finally:
        for instance, kind in zip(instances, kinds, strict=True):
            become(instance, kind)
