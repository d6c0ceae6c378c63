"""Stand for MLX's kernels on Metal (mlx 0.32.4) while a graph is listed on a CPU: attention, and the gated delta rule.

Attention: one kernel forward, and blocks of 1,024 queries and keys backward (`MLX_SDPA_VJP_BLOCK`), none above the diagonal:

    delta = rowsum(dO O)                                               once
    S = Q K^T, dP = dO V^T; one kernel: dS, dS^T, P^T                  for each block of queries and keys
    dQ += dS K, dK = dS^T Q, dV = P^T dO; dK and dV added over heads

It is used where the mask is causal or there is none, without sinks, and with heads of WIDTHS; elsewhere MLX differentiates
separate operations. The gated delta rule: one kernel forward, two backward, which begin from the states of every 16th token. Its
operations are not counted.

Shapes: B batch, H query heads, N key heads, T positions, d head width.
Source: the release of mlx 0.32.4 for macOS; pull requests ml-explore/mlx#4563 and #4565.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import mlx.core as mx

from mlx_lora.compat.functions import exchanged, original
from mlx_lora.models.graph import one_kernel

BLOCK, STATES = 1024, 16
WIDTHS = frozenset([64, 72, 80, 96, 128, 192, 256])
Arrays = list[mx.array]


def as_on_metal() -> AbstractContextManager:
    """List these two as on Metal inside the block; `as_on_gpu` has the other kernels."""
    return exchanged(
        {(mx.fast, "scaled_dot_product_attention"): _attention, (mx.fast, "gated_delta_update"): _gated_delta}
    )


def takes(q: mx.array, v: mx.array, mask: Any, sinks: Any) -> bool:
    """Return whether Metal has a kernel for an attention and its gradient."""
    return sinks is None and not isinstance(mask, mx.array) and q.shape[-1] == v.shape[-1] and v.shape[-1] in WIDTHS


def _attention(q: mx.array, k: mx.array, v: mx.array, *, mask: Any = None, sinks: Any = None, **rest: Any) -> mx.array:
    if not takes(q, v, mask, sinks):
        theirs = original(mx.fast, "scaled_dot_product_attention")
        return theirs(q, k, v, mask=mask, sinks=sinks, **rest)
    attention = mx.custom_function(lambda q, k, v: one_kernel(q, q, k, v))
    attention.vjp(lambda primals, d, output: _gradient(*primals, d, output, mask is not None))
    return attention(q, k, v)


def _gradient(q: mx.array, k: mx.array, v: mx.array, d: mx.array, output: mx.array, causal: bool) -> Arrays:
    heads = (q.shape[0], k.shape[1], q.shape[1] // k.shape[1])
    delta = one_kernel((q.shape[:3], mx.float32), output, d)
    by_head = [array.reshape(*heads, *array.shape[2:]) for array in (q, d)]
    parts: dict[str, dict[int, mx.array]] = {"q": {}, "k": {}, "v": {}}
    for i in range(0, q.shape[2], BLOCK):
        own, slope = (array[..., i : i + BLOCK, :] for array in by_head)
        for j in range(0, i + 1 if causal else k.shape[2], BLOCK):
            keys, values = (array[:, :, None, j : j + BLOCK] for array in (k, v))
            scores, slopes = own @ keys.swapaxes(-1, -2), slope @ values.swapaxes(-1, -2)
            made = one_kernel(((3, *scores.shape), scores.dtype), scores, slopes, delta)
            scored, *turned = (part.reshape(scores.shape) for part in mx.split(made, 3))
            turned = [part.reshape(*heads, keys.shape[3], own.shape[3]) for part in turned]
            parts["q"][i] = mx.addmm(parts["q"][i], scored, keys) if i in parts["q"] else scored @ keys
            for name, by_key in zip("kv", (turned[0] @ own, turned[1] @ slope), strict=True):
                before = [parts[name][j]] if j in parts[name] else []
                parts[name][j] = one_kernel(((*heads[:2], *by_key.shape[3:]), by_key.dtype), by_key, *before)
    return [
        mx.concatenate(list(parts[name].values()), axis=-2).reshape(like.shape)
        for name, like in zip("qkv", (q, k, v), strict=True)
    ]


def _gated_delta(q: mx.array, k: mx.array, v: mx.array, gamma: mx.array, beta: mx.array, *_: Any) -> Arrays:
    batch, length, heads, width = v.shape
    states = (batch, length // STATES + 1, heads, q.shape[-1], width)

    def backward(primals: Arrays, cotangents: Arrays, _: Any) -> Arrays:
        kept = one_kernel((states, mx.float32), *primals)
        sizes = [array.size for array in primals]
        whole = one_kernel(((sum(sizes),), primals[0].dtype), kept, cotangents[0], *primals)
        parts = mx.split(whole, list(accumulate(sizes))[:-1])
        return [part.reshape(array.shape).astype(array.dtype) for part, array in zip(parts, primals, strict=True)]

    rule = mx.custom_function(
        lambda *primals: [one_kernel(v, *primals), one_kernel((states[:1] + states[2:], mx.float32), *primals)]
    )
    rule.vjp(backward)
    return rule(q, k, v, gamma, beta)
