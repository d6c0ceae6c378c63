"""Exchange functions of other packages, and calls of single modules, for the thread that computes.

`become` and `mix_in` give single instances another class.

mlx-lm's architectures import shared functions by name, and MLX's layers look theirs up when they are called, so another
function takes such a call only if it stands under that name. Putting it there for a while would change the results of
every other thread of the process. So a name gets a dispatcher once, for good, which asks what the present context has:

    exchanged    a function takes the calls of a module's function, or of a class's method, inside a block
    answering    a function takes the calls of one instance of a class inside a block

MLX calls Python while it traces a function and its backward pass, always in the thread that asked for them. What is
differentiated later than it was called (a checkpointed block) keeps its context: `keeps_context`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import cache, partial, wraps
from types import MappingProxyType
from typing import Any

Place = tuple[Any, str]
"""(module or class, the name of its function)."""
TAKERS: ContextVar[Mapping[tuple[Any, ...], Callable[..., Any]]] = ContextVar(
    "what takes calls", default=MappingProxyType({})
)
_INSTALLING = threading.Lock()
OWN = "own_of_dispatcher"


def original(owner: Any, name: str) -> Any:
    """Return what a module or class has under a name, even if it is exchanged; None: it has no such name of its own."""
    own = vars(owner).get(name)
    return getattr(own, OWN, own)


@contextmanager
def exchanged(functions: Mapping[Place, Callable[..., Any]]) -> Iterator[None]:
    """Let other functions take the calls of these places inside the block, in this thread."""
    for place in functions:
        _dispatch(*place)
    token = TAKERS.set({**TAKERS.get(), **functions})
    try:
        yield
    finally:
        TAKERS.reset(token)


@contextmanager
def answering(
    *calls: tuple[Any, Callable[..., Any]], name: str = "__call__", below: type | None = None
) -> Iterator[None]:
    """Let functions take the calls of some modules inside the block, in this thread; others of their class keep their own.

    Args:
        calls: modules, each with the function that takes its calls: of the module's own function, and then of the arguments.
        name: of the method that is taken.
        below: a class of the modules: the mixins in front of it are still called first; None: nothing is.
    """
    takers = {**TAKERS.get()}
    for module, call in calls:
        owner = next(kind for kind in (below or type(module)).__mro__ if name in vars(kind))
        _dispatch(owner, name)
        key = owner, name, id(module)
        takers[key] = partial(call, takers.get(key) or partial(original(owner, name), module))
    with exchanged({}):
        TAKERS.set(takers)
        yield


def keeps_context(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes with what is exchanged now, whenever it is called."""
    context = copy_context()
    return lambda *args, **kwargs: context.copy().run(function, *args, **kwargs)


def _dispatch(owner: Any, name: str) -> None:
    """Put a dispatcher in a function's place, if there is none yet."""
    with _INSTALLING:
        own = vars(owner)[name]
        if hasattr(own, OWN):
            return

        @wraps(own, updated=())
        def dispatcher(*args: Any, **kwargs: Any) -> Any:
            takers = TAKERS.get()
            if taker := takers.get((owner, name)):
                return taker(*args, **kwargs)
            if args and (taker := takers.get((owner, name, id(args[0])))):
                return taker(*args[1:], **kwargs)
            return own(*args, **kwargs)

        setattr(dispatcher, OWN, own)
        setattr(owner, name, dispatcher)


# Give single instances of other packages' classes another class, so that all others keep theirs.


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
