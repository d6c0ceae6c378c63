"""Losses of positions that ranks divide: the same losses and gradients, from a part of the products."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_lora.adapters.base import Wire
from mlx_lora.losses.fused import fused_token_losses, row_token_losses
from mlx_lora.models.head import Head
from mlx_lora.parallel.tensor import divided

V, D = 97, 32
KERNELS = {"tiles": fused_token_losses, "rows": row_token_losses}


def alone(x: mx.array) -> mx.array:
    """Add up nothing: what a rank sends is what it would add."""
    return x


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize(("positions", "ranks"), [(24, 2), (23, 4), (3, 4), (1, 2), (0, 2)])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_parts_add_up_to_the_whole(kernel, positions, ranks, dtype):
    head = Head(nn.Module(), nn.Embedding(V, D))
    head.layer.set_dtype(dtype)
    seen: list[int] = []

    def losses_of(head, hidden, targets, weights, gradient=True):
        seen.append(len(hidden))
        return kernel(head, hidden, targets, weights, tile_bytes=4 * 5 * 40, gradient=gradient)

    hidden, targets = mx.random.normal((positions, D)).astype(dtype), mx.random.randint(0, V, (positions,))
    weights = (mx.arange(positions) % 5 != 4).astype(mx.float32)
    share = mx.random.uniform(shape=(positions,))  # a loss that is more than a sum of positions

    def through(function, gradient=True):
        return lambda h: (function(head, h, targets=targets, weights=weights, gradient=gradient) * share).sum()

    whole = losses_of(head, hidden, targets, weights)
    slopes = mx.grad(through(losses_of))(hidden)
    seen.clear()
    parts = [divided(losses_of, Wire(alone, rank, ranks)) for rank in range(ranks)]
    found = [part(head, hidden, targets, weights) for part in parts]
    assert max(seen, default=0) == -(-positions // ranks)
    assert sum(seen) == positions
    assert mx.allclose(sum(found), whole, rtol=1e-6, atol=1e-7)
    assert all(one.shape == (positions,) for one in found)
    measured = [part(head, hidden, targets, weights, gradient=False) for part in parts]
    assert mx.allclose(sum(measured), whole, rtol=1e-6, atol=1e-7)
    grads = [mx.grad(through(part))(hidden) for part in parts]
    assert all(one.dtype == dtype for one in grads)
    relative, absolute = (1e-5, 1e-6) if dtype == mx.float32 else (2**-6, 2**-9)  # of numbers around 0.1
    assert mx.allclose(sum(grads).astype(mx.float32), slopes.astype(mx.float32), rtol=relative, atol=absolute)


def test_the_second_message_is_sent_after_the_first():
    sent: list[str] = []

    def noted(x: mx.array) -> mx.array:
        return mx.custom_function(lambda x: x)(x) if not sent.append(str(x.shape)) else x

    head = Head(nn.Module(), nn.Embedding(V, D))
    hidden, targets, weights = mx.random.normal((6, D)), mx.arange(6), mx.ones((6,))
    losses_of = divided(lambda *words, **more: fused_token_losses(*words, tile_bytes=4000, **more), Wire(noted, 0, 2))
    slope = mx.grad(lambda h: losses_of(head, h, targets, weights).sum())(hidden)
    mx.eval(slope)
    assert sent == ["(6,)", f"(6, {D})"]
