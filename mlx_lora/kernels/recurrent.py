"""Replace the recurrent layers of mlx-lm's architectures by our scans while a training step is traced.

A replacement has the signature of mlx-lm's function; SCANS lists them, and compat/foreign.py the functions. Calls during generation, which pass a state or a
mask for padded prompts, go to mlx-lm's function.

The gated delta rule and Mamba-2's state space also have rows in the table of kernels (kernels/choose.py). A trial of them has
short rows and few heads, because the costs of all candidates are linear in both. The planner needs no terms for their memory:
it reads the graph of the chosen candidate.

Shapes: B batch, T tokens, W channels, K key heads, H heads (value heads), k and v head widths, P width of a head, G groups,
N numbers of a state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta, ssm

from mlx_lora.compat import foreign
from mlx_lora.compat.foreign import Foreign
from mlx_lora.compat.functions import original
from mlx_lora.kernels.gated_delta import chunked_gated_delta_update, fused_gated_delta_update
from mlx_lora.kernels.measure import MLX, Figures, Kernel, Outputs, ShapeClass, TimingInputs, size_class
from mlx_lora.kernels.state_space import (
    in_lanes,
    lanes_for,
    linear_scan,
    out_of_lanes,
    run_in_spans,
    scan_tokens,
    selective_scan,
    state_space_dual,
)

if TYPE_CHECKING:
    from mlx_lora.planner.memory import KernelTerms

# Replacements

WKV_TOKENS = 32  # tokens of a span of RWKV-7: all states of one span are in memory, and one per span is kept
WithState = tuple[mx.array, mx.array]
"""(output, state after the last token)."""


def dual(
    own: Callable[..., Any],
    /,
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
) -> WithState:
    """Replace `ssm_update`, Mamba-2's recurrence."""
    if state is not None or mask is not None or lengths is not None:
        return own(hidden_states, A_log, B, C, D, dt, dt_bias, state, time_step_limit, mask=mask, lengths=lengths)
    dt = ssm.compute_dt(dt, dt_bias, time_step_limit)  # (B, T, H) float32
    return state_space_dual(hidden_states, dt, dt * -mx.exp(A_log.astype(mx.float32)), B, C, D)


def mamba_sequence(
    own: Callable[..., Any], /, block: nn.Module, x: mx.array, conv_cache: mx.array | None, state_cache: mx.array | None
) -> tuple[mx.array, WithState]:
    """Replace `MambaBlock._process_sequence`, to project all tokens together, not one by one."""
    if conv_cache is not None or state_cache is not None:
        return own(block, x, conv_cache, state_cache)
    x, z = mx.split(block.in_proj(x), 2, axis=-1)  # (B, T, W)
    padded = mx.pad(x, [(0, 0), (block.conv_kernel_size - 1, 0), (0, 0)])
    x = nn.silu(block.conv1d(padded))
    rank, numbers = block.time_step_rank, block.ssm_state_size
    dt, b, c = mx.split(block.x_proj(x), [rank, rank + numbers], axis=-1)
    if block.use_bcdt_rms:
        dt, b, c = (mx.fast.rms_norm(part, weight=None, eps=block.args.mixer_rms_eps) for part in (dt, b, c))
    y, state = selective_scan(x, nn.softplus(block.dt_proj(dt)), -mx.exp(block.A_log), b, c, block.D)
    # Look the activation up by mlx-lm's name, which may be replaced by ours (kernels/choose.py).
    out = block.out_proj(own.__globals__["swiglu"](z, y))
    return out, (padded[:, -(block.conv_kernel_size - 1) :], state)


def jamba_scan(
    own: Callable[..., Any], /, mixer: nn.Module, x: mx.array, A: mx.array, state: mx.array | None = None
) -> WithState:
    """Replace `JambaMambaMixer.ssm_step`."""
    if state is not None:
        return own(mixer, x, A, state)
    rank, numbers = mixer.time_step_rank, mixer.ssm_state_size
    dt, b, c = mx.split(mixer.x_proj(x), [rank, rank + numbers], axis=-1)
    dt, b, c = mixer.dt_layernorm(dt), mixer.b_layernorm(b), mixer.c_layernorm(c)
    return selective_scan(x, nn.softplus(mixer.dt_proj(dt)), A, b, c, mixer.D)


def lightning(
    own: Callable[..., Any],
    /,
    q: mx.array,
    k: mx.array,
    v: mx.array,
    g: mx.array,
    scale: float,
    h: mx.array | None = None,
    **rest: Any,
) -> WithState:
    """Replace Bailing's `recurrent_gla`: Mamba-2's recurrence with one decay per head for all tokens."""
    if h is not None or any(value is not None for value in rest.values()):
        return own(q, k, v, g, scale=scale, h=h, **rest)
    q, k, v = (array.swapaxes(1, 2) for array in (q * scale, k, v))  # (B, T, H, width)
    log_decay = mx.broadcast_to(g.astype(mx.float32), v.shape[:3])
    y, state = state_space_dual(v, mx.ones_like(log_decay), log_decay, k, q, mx.zeros(g.shape, v.dtype))
    return y.swapaxes(1, 2), state.swapaxes(-1, -2)


def _gated_span(inputs: list[mx.array], weights: list[mx.array], state: mx.array) -> WithState:
    length = inputs[0].shape[1]
    decay, added = (in_lanes(array.astype(mx.float32), lanes_for(length, state.size)) for array in inputs)
    h = out_of_lanes(linear_scan(decay, added, state), length)
    return h.astype(inputs[0].dtype), h[:, -1]


def gated_recurrence(own: Callable[..., Any], /, x: mx.array, a: mx.array, h0: mx.array | None) -> WithState:
    """Replace RecurrentGemma's `rnn_scan`: h_t = a_t h_(t-1) + x_t."""
    if h0 is not None:
        return own(x, a, h0)
    state = mx.zeros((x.shape[0], x.shape[2]), mx.float32)
    y, last = run_in_spans(_gated_span, [a, x], [], state, scan_tokens(state.size), keep_states=True)
    return y, last.astype(x.dtype)


def gates_in_float32(
    own: Callable[..., Any], /, layer: nn.Module, x: mx.array, cache: mx.array | None = None
) -> WithState:
    """Replace RecurrentGemma's `RGLRU.__call__`, to compute gates in float32.

    In 16 bits the square of a decay near one is one; there, sqrt(1 - a^2) has no slope, and every gradient becomes NaN.
    """
    if cache is not None:
        return own(layer, x, cache)
    y, last = own(layer, x.astype(mx.float32), cache)
    return y.astype(x.dtype), last.astype(x.dtype)


def _rwkv7_span(inputs: list[mx.array], weights: list[mx.array], state: mx.array) -> WithState:
    # Split instead of indexing: the gradient of each index would be an array as large as all tokens.
    tokens = [mx.split(array.astype(mx.float32).swapaxes(1, 2), array.shape[1], axis=2) for array in inputs]
    outputs = []
    for r, w, k, v, a, b in zip(*tokens, strict=True):  # (B, H, 1, width)
        r, v, a = (array.swapaxes(-1, -2) for array in (r, v, a))  # columns
        state = state * w + v @ k + (state @ a) @ b
        outputs.append((state @ r).swapaxes(-1, -2))
    return mx.concatenate(outputs, axis=2).swapaxes(1, 2).astype(inputs[0].dtype), state


def rwkv7_scan(own: Callable[..., Any], /, layer: nn.Module, *given: Any) -> WithState:
    """Replace `Rwkv7TimeMixing._wkv7`.

    S_t = S_(t-1) (diag(w_t) + a_t b_t^T) + v_t k_t^T, y_t = S_t r_t.
    """
    *inputs, state = given  # r, w, k, v, a, b
    if state is not None:
        return own(layer, *given)
    batch, _, heads, width = inputs[0].shape
    zeros = mx.zeros((batch, heads, width, width), mx.float32)
    y, last = run_in_spans(_rwkv7_span, inputs, [], zeros, WKV_TOKENS, keep_states=True)
    return y, last.astype(inputs[0].dtype)


SCANS: dict[Foreign, tuple[str, Callable[..., Any]]] = {
    foreign.STATE_SPACE: ("state space", dual),
    foreign.MAMBA: ("selective scan", mamba_sequence),  # also Falcon Mamba
    foreign.JAMBA: ("selective scan", jamba_scan),
    foreign.LIGHTNING: ("lightning attention", lightning),
    foreign.LIGHTNING_HYBRID: ("lightning attention", lightning),
    foreign.GATED_SCAN: ("gated recurrence", gated_recurrence),
    foreign.GATED_LAYER: ("gated recurrence", gates_in_float32),
    foreign.WKV: ("RWKV-7's recurrence", rwkv7_scan),
}
"""Description for the run's header, and our replacement, which takes the function's own before its arguments."""


# Rows of the table of kernels

SHORTEST, LONGEST = 64, 128  # tokens of a trial of the gated delta rule; mlx-lm's loop keeps states of every token
LONGEST_SPACE = 256  # tokens of a trial of a state space; mlx-lm computes it in pieces of this length
MOST_HEADS = 4  # of a trial, at the model's ratio of value heads to key heads


def recurrent_rows() -> tuple[Kernel, Kernel]:
    """Return the rows of the gated delta rule (mlx-lm's loop, ours in chunks, MLX's fused kernel), and of Mamba-2."""
    delta, space = original(gated_delta, "gated_delta_update"), original(ssm, "ssm_update")
    return (
        Kernel(
            name="gated delta",
            shared="gated_delta_update",
            theirs=delta,
            candidates={MLX: delta, "chunked": chunked_gated_delta_update, "fused": fused_gated_delta_update},
            assumed="chunked",
            class_of=_delta_class,
            trial=_delta_trial,
            words=lambda shape: (
                f"{shape[0]:,} tokens, {shape[2]}/{shape[1]} heads of {shape[3]}/{shape[4]}, {shape[5]}"
            ),
            count=_no_terms,
        ),
        Kernel(
            name="state space",
            shared="ssm_update",
            theirs=space,
            candidates={MLX: space, "spans": partial(dual, space)},
            assumed="spans",
            class_of=_space_class,
            trial=_space_trial,
            words=lambda shape: (
                f"{shape[0]:,} tokens, {shape[1]} heads of {shape[2]}, {shape[4]} numbers in {shape[3]} groups"
            ),
            count=_no_terms,
        ),
    )


def _no_terms(terms: KernelTerms, shape: ShapeClass, name: str, figures: Figures | None) -> KernelTerms:
    return terms


def _delta_class(
    q: mx.array, k: mx.array, v: mx.array, a: mx.array, *rest: Any, state: mx.array | None = None, **options: Any
) -> ShapeClass | None:
    """Return the shape class of a call of `gated_delta_update`; b, A_log, dt_bias, the state and a mask are the rest."""
    if state is not None or any(given is not None for given in rest[3:4]):  # generation
        return None
    (_, tokens, key_heads, width), (heads, value_width) = k.shape, v.shape[2:]
    gate = "a gate per channel" if a.ndim == 4 else "a gate per head"
    return size_class(tokens, SHORTEST, LONGEST), key_heads, heads, width, value_width, gate


def _delta_trial(shape: ShapeClass, dtype: mx.Dtype) -> tuple[TimingInputs, Outputs]:
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

    return TimingInputs(arrays, [normal(1, tokens, h, value_width).astype(dtype)], wrap), wrap(
        gated_delta.gated_delta_update
    )


def _space_class(
    hidden_states: mx.array, A_log: mx.array, B: mx.array, *rest: Any, **options: Any
) -> ShapeClass | None:
    """Return the shape class of a call of `ssm_update`; C, D, dt, dt_bias, and what only generation gives, are the rest."""
    given = [*rest[4:5], *rest[6:], *(options.get(name) for name in ("state", "mask", "lengths"))]
    if any(one is not None for one in given):  # generation
        return None
    (_, tokens, heads, width), (groups, numbers) = hidden_states.shape, B.shape[2:]
    return size_class(tokens, SHORTEST, LONGEST_SPACE), heads, width, groups, numbers


def _space_trial(shape: ShapeClass, dtype: mx.Dtype) -> tuple[TimingInputs, Outputs]:
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

    return TimingInputs(arrays, [normal(1, tokens, h, width)], wrap), _naive_space


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
