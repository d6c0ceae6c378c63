"""mlx-lm's own Metal kernels: where a model asks for one, it gets the same numbers, and no gradient, as from Metal.

A kernel that `mx.fast.metal_kernel` makes has no vjp, so a training step that reaches one ends with an error. On a CPU, mlx-lm
never makes them, and such a model trains. Kimi K3 and BitNet have kernels, too: the first only outside of training, and the
second cannot be trained at all, nor can DeepSeek V4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import gated_delta, rwkv7, ssm

from rehearsal.fake_metal import FakeMetal

NO_GRADIENT = "[Primitive::vjp] Not implemented for CustomKernel."
_undo: list[Callable[[], None]] = []


def without_gradient(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes the same, and whose gradient is refused as that of a Metal kernel is."""

    def kernel(*args: Any, **named: Any) -> Any:
        places = [place for place, value in enumerate(args) if isinstance(value, mx.array)]

        def compute(*arrays: mx.array) -> Any:
            given = list(args)
            for place, array in zip(places, arrays, strict=True):
                given[place] = array
            return function(*given, **named)

        made = mx.custom_function(compute)

        @made.vjp
        def refuse(*_: Any) -> Any:
            raise ValueError(NO_GRADIENT)

        return made(*(args[place] for place in places))

    return kernel


def _wkv7(r: mx.array, w: mx.array, k: mx.array, v: mx.array, a: mx.array, b: mx.array, state: mx.array) -> Any:
    ys = []
    for t in range(r.shape[1]):
        y, state = rwkv7._wkv7_step_ops(r[:, t], w[:, t], k[:, t], v[:, t], a[:, t], b[:, t], state)
        ys.append(y)
    return mx.stack(ys, axis=1).astype(r.dtype), state


def install() -> None:
    """Let mlx-lm's models find a GPU and their kernels."""
    for module in (gated_delta, rwkv7, ssm):
        _put(module, "mx", FakeMetal())
    _put(gated_delta, "gated_delta_kernel", without_gradient(gated_delta.gated_delta_ops))
    _put(ssm, "ssm_update_kernel", without_gradient(ssm.ssm_attn))
    _put(rwkv7, "wkv7_kernel", without_gradient(_wkv7))


def remove() -> None:
    """Bring mlx-lm's models back."""
    while _undo:
        _undo.pop()()


def _put(owner: Any, name: str, value: Any) -> None:
    before = getattr(owner, name)
    setattr(owner, name, value)
    _undo.append(lambda: setattr(owner, name, before))
