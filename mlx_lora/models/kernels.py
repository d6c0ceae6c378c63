"""Where a model's own layers get our training kernels from, while a step is traced.

mlx-lm's architectures share one attention function, one gated activation and one gated delta rule, which each
imports by name.
Those names are exchanged in the modules of this model's classes for as long as the step is traced, and put
back: generation and evaluation never see it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base, gated_delta

from mlx_lora import device
from mlx_lora.models.activations import lean_swiglu
from mlx_lora.models.attention import AttentionCall, Tiles, tiled_attention
from mlx_lora.models.gated_delta import chunked_gated_delta_update
from mlx_lora.models.recurrent_layers import recurrent_kernels


@contextmanager
def training_kernels(model: nn.Module, attend: AttentionCall = tiled_attention) -> Iterator[bool]:
    """Let the model's layers use our attention, activation, gated delta rule and scans inside the block.

    Args:
        model: any mlx-lm model; layers that do not use the shared functions keep their own.
        attend: computes attention.

    Yields:
        Whether any layer of the model uses an exchanged function.
    """
    ours = {
        "scaled_dot_product_attention": (base.scaled_dot_product_attention, _with_mlx_lm_signature(attend)),
        "swiglu": (activations.swiglu, partial(lean_swiglu, device.keep_exponentials())),
        "gated_delta_update": (gated_delta.gated_delta_update, _unless_generating(chunked_gated_delta_update)),
    }
    homes = [vars(sys.modules[name]) for name in {type(module).__module__ for module in model.modules()}]
    exchanged = [(home, name) for home in homes for name, (theirs, _) in ours.items() if home.get(name) is theirs]
    for home, name in exchanged:
        home[name] = ours[name][1]
    try:
        with recurrent_kernels(model) as recurrent:
            yield bool(exchanged or recurrent)
    finally:
        for home, name in exchanged:
            home[name] = ours[name][0]


def _with_mlx_lm_signature(attend: AttentionCall) -> Callable[..., mx.array]:
    """Return `attend` as mlx-lm calls its attention."""

    def attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | str | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        # A float mask may carry a gradient (DeepSeek's position scores); a cache means generation.
        if cache is not None or (isinstance(mask, mx.array) and mask.dtype != mx.bool_):
            return base.scaled_dot_product_attention(queries, keys, values, cache, scale, mask, sinks)
        return attend(queries, keys, values, Tiles(scale, mask), sinks)

    return attention


def _unless_generating(update: Callable[..., tuple[mx.array, mx.array]]) -> Callable[..., tuple[mx.array, mx.array]]:
    """Return `update` with mlx-lm's signature of it, which a state from a cache leaves to mlx-lm's own."""

    def gated_delta_update(
        q: mx.array,
        k: mx.array,
        v: mx.array,
        a: mx.array,
        b: mx.array,
        A_log: mx.array,
        dt_bias: mx.array,
        state: mx.array | None = None,
        mask: mx.array | None = None,
        **options: Any,
    ) -> tuple[mx.array, mx.array]:
        own = update if state is None else gated_delta.gated_delta_update
        return own(q, k, v, a, b, A_log, dt_bias, state, mask, **options)

    return gated_delta_update
