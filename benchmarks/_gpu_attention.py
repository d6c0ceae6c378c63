"""Stand for MLX's attention on Metal (mlx 0.32.4) while a graph is listed on a CPU: one kernel forward, and blocks backward.

It is used where the mask is causal or there is none, without sinks, and with heads of the widths below; elsewhere MLX differentiates
separate operations. The backward pass takes blocks of 1,024 queries and keys (`MLX_SDPA_VJP_BLOCK`), none of them above the diagonal:

    delta = rowsum(dO O)                                               once
    S = Q K^T, dP = dO V^T; one kernel: dS, dS^T, P^T                  for each block of queries and keys
    dQ += dS K, dK = dS^T Q, dV = P^T dO; dK and dV added over heads

Shapes: B batch, H query heads, N key heads, T positions, d head width.
Source: the release of mlx 0.32.4 for macOS; pull request ml-explore/mlx#4563.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import mlx.core as mx

from mlx_lora.compat.functions import exchanged, original
from mlx_lora.models.graph import stand_in

BLOCK = 1024
WIDTHS = frozenset([64, 72, 80, 96, 128, 192, 256])
Arrays = list[mx.array]


def as_on_metal() -> AbstractContextManager:
    """List MLX's attention as on Metal inside the block; before `as_on_gpu`, which has the other kernels."""
    return exchanged({(mx.fast, "scaled_dot_product_attention"): _attention})


def takes(q: mx.array, v: mx.array, mask: Any, sinks: Any) -> bool:
    """Return whether Metal has a kernel for an attention and its gradient."""
    return sinks is None and not isinstance(mask, mx.array) and q.shape[-1] == v.shape[-1] and v.shape[-1] in WIDTHS


def _attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, sinks: Any = None, **rest: Any) -> mx.array:
    if not takes(q, v, mask, sinks):
        theirs = original(mx.fast, "scaled_dot_product_attention")
        return theirs(q, k, v, mask=mask, sinks=sinks, **rest)
    attention = mx.custom_function(lambda q, k, v: stand_in(q, q, k, v))
    attention.vjp(lambda primals, d, output: _gradient(*primals, d, output, mask is not None))
    return attention(q, k, v)


def _gradient(q: mx.array, k: mx.array, v: mx.array, d: mx.array, output: mx.array, causal: bool) -> Arrays:
    heads = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1])
    delta = stand_in((q.shape[:3], mx.float32), output, d)
    by_head = [array.reshape(*heads, *array.shape[2:]) for array in (q, d)]
    parts: dict[str, dict[int, mx.array]] = {"q": {}, "k": {}, "v": {}}
    for i in range(0, q.shape[2], BLOCK):
        own, slope = (array[..., i : i + BLOCK, :] for array in by_head)
        for j in range(0, i + 1 if causal else k.shape[2], BLOCK):
            keys, values = (array[:, :, None, j : j + BLOCK] for array in (k, v))
            scores, slopes = own @ keys.swapaxes(-1, -2), slope @ values.swapaxes(-1, -2)
            made = stand_in(((3, *scores.shape), scores.dtype), scores, slopes, delta)
            scored, *turned = (part.reshape(scores.shape) for part in mx.split(made, 3))
            turned = [part.reshape(*heads, keys.shape[3], own.shape[3]) for part in turned]
            parts["q"][i] = mx.addmm(parts["q"][i], scored, keys) if i in parts["q"] else scored @ keys
            for name, by_key in zip("kv", (turned[0] @ own, turned[1] @ slope), strict=True):
                before = [parts[name][j]] if j in parts[name] else []
                parts[name][j] = stand_in(((*heads[:2], *by_key.shape[3:]), by_key.dtype), by_key, *before)
    return [
        mx.concatenate(list(parts[name].values()), axis=-2).reshape(like.shape)
        for name, like in zip("qkv", (q, k, v), strict=True)
    ]
