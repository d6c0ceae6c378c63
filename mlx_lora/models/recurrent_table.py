"""The rows for recurrences in the table of kernels: the gated delta rule and Mamba-2's state space.

A trial has short rows and few heads, because the costs of all candidates are linear in both. The planner needs no terms
for their memory: it reads the graph of the chosen candidate.

Shapes: B batch, T tokens, K key heads, H heads (value heads), k and v head widths, P width of a head, G groups, N numbers
of a state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.models import gated_delta, ssm

from mlx_lora.models.gated_delta import chunked_gated_delta_update, fused_gated_delta_update
from mlx_lora.models.kernel_row import MLX, Kernel, ShapeClass, size_class
from mlx_lora.models.recurrent_layers import dual
from mlx_lora.planner.shapes import KernelTerms
from mlx_lora.system.measuring import Figures, Outputs, Trial

SHORTEST, LONGEST = 64, 128  # tokens of a trial of the gated delta rule; mlx-lm's loop keeps states of every token
LONGEST_SPACE = 256  # tokens of a trial of a state space; mlx-lm computes it in pieces of this length
MOST_HEADS = 4  # of a trial, at the model's ratio of value heads to key heads


def gated_delta_row() -> Kernel:
    """Return the gated delta rule's row: mlx-lm's loop, ours in chunks, and MLX's fused kernel."""
    return Kernel(
        name="gated delta",
        shared="gated_delta_update",
        theirs=gated_delta.gated_delta_update,
        candidates={
            MLX: gated_delta.gated_delta_update,
            "chunked": chunked_gated_delta_update,
            "fused": fused_gated_delta_update,
        },
        assumed="chunked",
        class_of=_delta_class,
        trial=_delta_trial,
        words=lambda shape: f"{shape[0]:,} tokens, {shape[2]}/{shape[1]} heads of {shape[3]}/{shape[4]}, {shape[5]}",
        count=_no_terms,
    )


def state_space_row() -> Kernel:
    """Return Mamba-2's row: mlx-lm's pieces of 256 tokens, and ours in spans."""
    return Kernel(
        name="state space",
        shared="ssm_update",
        theirs=ssm.ssm_update,
        candidates={MLX: ssm.ssm_update, "spans": dual(ssm.ssm_update)},
        assumed="spans",
        class_of=_space_class,
        trial=_space_trial,
        words=lambda shape: (
            f"{shape[0]:,} tokens, {shape[1]} heads of {shape[2]}, {shape[4]} numbers in {shape[3]} groups"
        ),
        count=_no_terms,
    )


def _no_terms(terms: KernelTerms, shape: ShapeClass, name: str, figures: Figures | None) -> KernelTerms:
    return terms


def _delta_class(
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
) -> ShapeClass | None:
    if state is not None:  # generation
        return None
    (_, tokens, key_heads, width), (heads, value_width) = k.shape, v.shape[2:]
    gate = "a gate per channel" if a.ndim == 4 else "a gate per head"
    return size_class(tokens, SHORTEST, LONGEST), key_heads, heads, width, value_width, gate


def _delta_trial(shape: ShapeClass, dtype: mx.Dtype) -> tuple[Trial, Outputs]:
    tokens, key_heads, heads, width, value_width, gate = shape
    ratio = heads // key_heads
    n = max(1, min(key_heads, MOST_HEADS // ratio))
    h, keys = n * ratio, iter(mx.random.split(mx.random.key(0), 8))

    def normal(*size: int) -> mx.array:
        return mx.random.normal(size, key=next(keys))

    q, k = (x / mx.linalg.norm(x, axis=-1, keepdims=True) for x in (normal(1, tokens, n, width) for _ in range(2)))
    a = normal(1, tokens, h, width) if "channel" in gate else normal(1, tokens, h)
    rates, biases = (
        mx.zeros((h, 1) if "channel" in gate else (h,)),
        normal(*((h, width) if "channel" in gate else (h,))),
    )
    narrow = [q * width**-0.5, k, normal(1, tokens, h, value_width), a, normal(1, tokens, h)]
    arrays = [*(array.astype(dtype) for array in narrow), rates, biases]

    def wrap(function: Callable[..., Any]) -> Outputs:
        # mlx-lm's own Metal kernel has no gradient, so its models do not use it in training.
        return lambda *arrays: [function(*arrays, use_kernel=False)[0]]

    return Trial(arrays, [normal(1, tokens, h, value_width).astype(dtype)], wrap), wrap(gated_delta.gated_delta_update)


def _space_class(
    hidden_states: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    dt: mx.array,
    dt_bias: mx.array,
    state: mx.array | None = None,
    time_step_limit: tuple[float, float] = (0.001, 100.0),
    mask: mx.array | None = None,
    lengths: mx.array | None = None,
) -> ShapeClass | None:
    if state is not None or mask is not None or lengths is not None:  # generation
        return None
    (_, tokens, heads, width), (groups, numbers) = hidden_states.shape, B.shape[2:]
    return size_class(tokens, SHORTEST, LONGEST_SPACE), heads, width, groups, numbers


def _space_trial(shape: ShapeClass, dtype: mx.Dtype) -> tuple[Trial, Outputs]:
    tokens, heads, width, groups, numbers = shape
    ratio = min(heads // groups, MOST_HEADS)  # heads of a group are independent of each other
    g = max(1, min(groups, MOST_HEADS // ratio))
    h, keys = g * ratio, iter(mx.random.split(mx.random.key(0), 7))

    def normal(*size: int) -> mx.array:
        return mx.random.normal(size, key=next(keys)).astype(dtype)

    x, b, c = normal(1, tokens, h, width), normal(1, tokens, g, numbers), normal(1, tokens, g, numbers)
    arrays = [x, mx.zeros((h,), dtype), b, c, normal(h), normal(1, tokens, h), normal(h)]

    def wrap(function: Callable[..., Any]) -> Outputs:
        return lambda *arrays: [function(*arrays)[0]]

    return Trial(arrays, [normal(1, tokens, h, width)], wrap), _naive_space


def _naive_space(
    x: mx.array, A_log: mx.array, B: mx.array, C: mx.array, D: mx.array, dt: mx.array, dt_bias: mx.array
) -> list[mx.array]:
    """Return y by the definition, token by token: h_t = exp(dt A) h_(t-1) + dt x B^T, y_t = h_t C + D x."""
    ratio = x.shape[2] // B.shape[2]
    dt = mx.clip(mx.logaddexp(dt + dt_bias, mx.array(0.0)), 0.001, 100.0)  # (B, T, H)
    B, C = (mx.repeat(part, ratio, axis=2) for part in (B, C))  # (B, T, H, N)
    decay, state, outputs = mx.exp(-mx.exp(A_log) * dt), mx.zeros((*x.shape[::2], x.shape[3], B.shape[3])), []
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]  # (B, H, P, N)
        state = decay[:, t, :, None, None] * state + added
        outputs.append((state @ C[:, t, :, :, None]).squeeze(-1) + D[:, None] * x[:, t])
    return [mx.stack(outputs, axis=1)]
