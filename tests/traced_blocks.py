"""What a block keeps for its backward pass, remembered for as long as the test process lives.

Nearly every run of a tiny model traces the same few blocks (`mlx_lora/trainer/fit.py`), which is a third of the run's
time. A trace is remembered by all that it depends on. What is not plain data is traced anew, and so is a block with dropout: its
trace draws random numbers, and later ones depend on how many were drawn.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_lora.compat.functions import TAKERS
from mlx_lora.kernels.attention import Windows
from mlx_lora.trainer import fit as model_shape
from mlx_lora.utils import device

TRACE = model_shape._read_block
PLAIN = (bool, int, float, str, bytes, type(None), mx.Dtype)


class _NotPlain(Exception):
    """The key would not say all that a trace depends on."""


def _of(value: Any) -> Any:
    """Return plain data, and arrays by their form."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, mx.array):
        return (tuple(value.shape), str(value.dtype))
    if isinstance(value, list | tuple):
        return (type(value).__name__, *map(_of, value))
    if isinstance(value, dict):
        return tuple((key, _of(one)) for key, one in value.items())
    if is_dataclass(value) and not isinstance(value, type):
        return (_of_class(type(value)), _of(vars(value)))
    raise _NotPlain


def _of_class(kind: type) -> tuple:
    """Return a class's name; one that was made during the run, of the same name, is another."""
    found = getattr(sys.modules.get(kind.__module__), kind.__name__, None)
    return (kind.__module__, kind.__qualname__, found is kind)


def _of_module(module: nn.Module) -> tuple:
    """Return a module's class and its arrays and settings; those of its modules stand beside it."""
    own = {name: value for name, value in vars(module).items() if name not in ("_no_grad", "_training")}
    held = {name: value for name, value in dict.items(module) if not _holds_modules(value)}
    return (_of_class(type(module)), module.training, tuple(sorted(module._no_grad)), _of(own), _of(held))


def _holds_modules(value: Any) -> bool:
    return any(isinstance(leaf, nn.Module) for _, leaf in tree_flatten(value, is_leaf=nn.Module.is_module))


def key_of(
    block: nn.Module, choose: Callable[..., Any], lag: int, windows: Windows, args: tuple, kwargs: dict
) -> tuple | None:
    """Return all that a block's trace depends on, None if that is not known."""
    try:
        modules = tuple((path, _of_module(module)) for path, module in block.named_modules())
        chosen = choose if choose is model_shape.assumed else (type(choose).__name__, _of(vars(choose)))
        machine = (device.on_gpu(), device.keep_exponentials(), device.compiles_kernels())
        inside = {id(module) for module in block.modules()}
        taken = frozenset((*place[:2], len(place)) for place in TAKERS.get() if len(place) == 2 or place[2] in inside)
        seen = tuple(windows.of(leaf) for _, leaf in tree_flatten((args, kwargs)) if isinstance(leaf, mx.array))
        key = (modules, chosen, lag, seen, _of(args), _of(kwargs), machine, taken)
        hash(key)
    except (_NotPlain, TypeError):
        return None
    return key


@contextmanager
def remembered() -> Iterator[dict]:
    """Let traces of the same block, called in the same way, be made once."""
    known: dict[tuple, Any] = {}

    def read(
        block: nn.Module, choose: Callable[..., Any], lag: int, windows: Windows, args: tuple, kwargs: dict
    ) -> Any:
        key = key_of(block, choose, lag, windows, args, kwargs)
        if key in known:
            return known[key]
        drawn = mx.array(mx.random.state[0])
        found = TRACE(block, choose, lag, windows, args, kwargs)
        if key is not None and mx.array_equal(drawn, mx.random.state[0]).item():
            known[key] = found
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_shape, "_read_block", read)
        yield known
