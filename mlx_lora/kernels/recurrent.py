"""Replace the recurrent layers of mlx-lm's architectures by our scans while a training step is traced.

The scans of Mamba and Mamba-2 are here, the gated delta rule is in gated_delta.py.

A replacement has the signature of mlx-lm's function; SCANS lists them, and compat/foreign.py the functions. Calls during generation, which pass a state or a
mask for padded prompts, go to mlx-lm's function.

The gated delta rule and Mamba-2's state space also have rows in the table of kernels (kernels/choose.py). A trial of them has
short rows and few heads, because the costs of all candidates are linear in both. The planner needs no terms for their memory:
it reads the graph of the chosen candidate.

Shapes: B batch, T tokens, W channels, K key heads, H heads (value heads), k and v head widths, P width of a head, G groups,
N numbers of a state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gated_delta, ssm

from mlx_lora.compat import foreign
from mlx_lora.compat.foreign import Foreign
from mlx_lora.compat.functions import original
from mlx_lora.kernels.gated_delta import chunked_gated_delta_update, fused_gated_delta_update
from mlx_lora.kernels.measure import MLX, Figures, Kernel, Outputs, ShapeClass, TimingInputs, size_class
from mlx_lora.utils.device import exponential

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


# Compute state-space layers for training: Mamba-2's (one decay per head) by products, Mamba's (one per state) by a scan.
#
# Both are the recurrence  h_t = decay_t h_(t-1) + dt_t x_t B_t^T,  y_t = h_t C_t + D x_t.  mlx-lm computes the first in
# pieces of 256 tokens whose T x T matrices are kept for the backward pass, and the second token by token, keeping
# every state, often a hundred times the size of the layer's output. Here only the inputs, and at most one state per span of
# tokens, are kept between the passes:
#
#     forward    for each span:  y, state = span(inputs of the span, state)
#     backward   for each span, from the last:  the span again, and its gradient
#
# Shapes: B batch, T tokens of the sequence, t tokens of a span, H heads of width P, G groups of heads, N numbers of a state (per
# channel), W channels, K chunks of L tokens in a span.
# Source: arXiv 2405.21060, section 6 and listing 1 (Mamba-2); arXiv 2312.00752, section 3 (Mamba); arXiv 1604.06174
# (recomputation per segment).

CHUNK = 64  # tokens of a chunk, within which the recurrence is computed by matrix products
# A span's number of chunks, and the numbers in its largest array, of which about 40 are in memory in the backward pass.
# More would make fewer, larger products; these keep a span's work near 80 MB, and none were faster on a CPU.
MAX_CHUNKS = 16
DUAL_NUMBERS = 1 << 19
SCAN_NUMBERS = 1 << 20
SCAN_TOKENS = (16, 256)  # fewest and most tokens of a span of the selective scan; fewer would keep too many states
STEP_NUMBERS = 1 << 15  # numbers in one step of a scan that keep a device busy
Span = Callable[[list[mx.array], list[mx.array], mx.array], tuple[mx.array, mx.array]]
"""(inputs of a span, each (B, t, ...); weights; state before it) -> (output (B, t, ...), state after it)."""


# Mamba-2 and Mamba


def state_space_dual(
    x: mx.array,
    dt: mx.array,
    log_decay: mx.array,
    b: mx.array,
    c: mx.array,
    skip: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return Mamba-2's y and last state: h_t = exp(log_decay_t) h_(t-1) + dt_t x_t b_t^T, y_t = h_t c_t + skip x_t.

    Args:
        x: (B, T, H, P) float.
        dt: (B, T, H) float32, the weight of each token's input.
        log_decay: (B, T, H) float32, at most 0.
        b, c: (B, T, G, N) float, G dividing H.
        skip: (H,) float.
        state: (B, H, P, N) float32, h_0; None for zeros.

    Returns:
        (B, T, H, P) of x's dtype and (B, H, P, N) float32, differentiable in all arguments.
    """
    batch, _, heads, width = x.shape
    if state is None:
        state = mx.zeros((batch, heads, width, b.shape[-1]), mx.float32)
    chunks = min(max(DUAL_NUMBERS // (batch * heads * CHUNK * CHUNK), 1), MAX_CHUNKS)
    return run_in_spans(_dual_span, [x, dt, log_decay, b, c], [skip], state, chunks * CHUNK, keep_states=False)


def _dual_span(inputs: list[mx.array], weights: list[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
    """Return a span of `state_space_dual`, computed by products within chunks, and by states between them."""
    given, dt, log_decay, b, c = inputs
    batch, length, heads, width = given.shape
    groups, numbers = b.shape[2:]
    per_group, size = heads // groups, min(length, CHUNK)
    chunks = -(-length // size)

    def in_chunks(array: mx.array, *rest: int) -> mx.array:
        """Return (B, t, ...) as (B, K, G, L, *rest) in float32; padding at the end does not change the state."""
        pad = [(0, 0), (0, chunks * size - length), *((0, 0) for _ in array.shape[2:])]
        array = mx.pad(array, pad) if chunks * size > length else array
        return (
            array.astype(mx.float32)
            .reshape(batch, chunks, size, groups, -1)
            .swapaxes(2, 3)
            .reshape(batch, chunks, groups, size, *rest)
        )

    b, c = in_chunks(b, numbers), in_chunks(c, numbers)
    x = in_chunks(given.astype(mx.float32) * dt[..., None], per_group, width)  # (B, K, G, L, H/G, P)
    log_decay = in_chunks(log_decay, per_group).swapaxes(-1, -2)  # (B, K, G, H/G, L)
    # What each chunk has added to the state at its end.
    to_end = exponential(mx.cumsum(log_decay, axis=-1, reverse=True, inclusive=False)).swapaxes(-1, -2)
    faded = (x * to_end[..., None]).flatten(-2)  # (B, K, G, L, H/G P)
    added = (faded.swapaxes(-1, -2) @ b).reshape(batch, chunks, heads, width * numbers)
    # The states before each chunk and after the last: chunks in a span are treated like tokens in a chunk.
    added = mx.concatenate([state.reshape(batch, 1, heads, -1), added], axis=1).swapaxes(1, 2)  # (B, H, 1 + K, P N)
    whole = log_decay.sum(axis=-1).reshape(batch, chunks, heads).swapaxes(1, 2)
    states = _decay_between(mx.pad(whole, [(0, 0), (0, 0), (1, 0)])) @ added
    after = states[:, :, -1].reshape(state.shape)
    before = states[:, :, :-1].swapaxes(1, 2).reshape(batch, chunks, groups, per_group * width, numbers)

    within = (c @ b.swapaxes(-1, -2))[:, :, :, None] * _decay_between(log_decay)  # (B, K, G, H/G, L, L)
    y = (within @ x.swapaxes(-2, -3)).swapaxes(-2, -3)  # (B, K, G, L, H/G, P)
    from_start = exponential(mx.cumsum(log_decay, axis=-1)).swapaxes(-1, -2)[..., None]
    y = y + (c @ before.swapaxes(-1, -2)).reshape(y.shape) * from_start
    y = y.swapaxes(2, 3).reshape(batch, chunks * size, heads, width)[:, :length]
    return (y + given * weights[0][:, None]).astype(given.dtype), after


def _decay_between(log_decay: mx.array) -> mx.array:
    """Return exp(sum of log_decay over j+1 .. i) for all i >= j, 0 above the diagonal: (..., L) to (..., L, L).

    Each j has its own sum: differences of one running sum would lose a weak decay that follows a strong one.
    """
    size = log_decay.shape[-1]
    below = mx.tril(mx.ones((size, size), mx.float32), -1)  # (i, j), 1 where i > j
    return mx.tril(exponential(mx.cumsum(log_decay[..., None] * below, axis=-2)))


def selective_scan(
    x: mx.array,
    dt: mx.array,
    a: mx.array,
    b: mx.array,
    c: mx.array,
    skip: mx.array,
    state: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """Return Mamba's y and last state: h_t = exp(dt_t a) h_(t-1) + dt_t x_t b_t^T, y_t = h_t c_t + skip x_t.

    Args:
        x: (B, T, W) float.
        dt: (B, T, W) float, positive.
        a: (W, N) float, negative.
        b, c: (B, T, N) float.
        skip: (W,) float.
        state: (B, W, N) float, h_0; None for zeros.

    Returns:
        (B, T, W) of x's dtype and (B, W, N) float32, differentiable in all arguments.
    """
    state = mx.zeros((x.shape[0], *a.shape), mx.float32) if state is None else state.astype(mx.float32)
    return run_in_spans(_selective_span, [x, dt, b, c], [a, skip], state, scan_tokens(state.size), keep_states=True)


def _selective_span(inputs: list[mx.array], weights: list[mx.array], state: mx.array) -> tuple[mx.array, mx.array]:
    """Return a span of `selective_scan`, whose states (B, t, W, N) are only in memory during its work."""
    lanes = lanes_for(inputs[0].shape[1], state.size)
    # Padding tokens at the end have dt = 0, and do not change the state.
    x, dt, b, c = (in_lanes(array.astype(mx.float32), lanes) for array in inputs)  # (steps, lanes, B, W or N)
    a, skip = (array.astype(mx.float32) for array in weights)
    decay = exponential(dt[..., None] * a)  # (steps, lanes, B, W, N)
    h = linear_scan(decay, (dt * x)[..., None] * b[..., None, :], state)
    y = (h @ c[..., None]).squeeze(-1) + skip * x
    return out_of_lanes(y, inputs[0].shape[1]).astype(inputs[0].dtype), h[-1, -1]


# Spans of a sequence


def run_in_spans(
    span: Span,
    inputs: Sequence[mx.array],
    weights: Sequence[mx.array],
    state: mx.array,
    tokens: int,
    keep_states: bool,
) -> tuple[mx.array, mx.array]:
    """Return what `span` would return for all tokens at once, with the work of one span in memory at a time.

    Args:
        span: computes some tokens from the state before them; differentiable.
        inputs: (B, T, ...) each, split along T.
        weights: the arrays that all tokens share.
        state: the state before the first token.
        tokens: the number of tokens of a span; the last one may be shorter.
        keep_states: keep the state before each span for the backward pass. Otherwise, the backward pass computes the
            states again, which costs little if `span` can compute them without its output.

    Returns:
        The output (B, T, ...) and the state after the last token, differentiable in inputs, weights and state.
    """
    length, count = inputs[0].shape[1], len(inputs)
    edges = [*range(0, length, tokens), length]

    @mx.custom_function
    def forward(*primals: mx.array) -> list[mx.array]:
        given, (*shared, state) = list(primals[:count]), primals[count:]
        parts: list[mx.array] = []
        states: list[mx.array] = []
        for start, stop in pairwise(edges):
            # Force the order: otherwise the work of all spans may be in memory at once.
            part, state = span(_cut(given, start, stop, parts[-1:]), shared, state)
            parts.append(part)
            state = state * 1  # a copy: a view would keep the work of the whole span alive
            states.append(state)
        return [_joined(parts), state, *(states[:-1] if keep_states else [])]

    @forward.vjp
    def forward_vjp(primals, cotangents, outputs):
        # Depend on the cotangents: otherwise compiling may merge this with the forward pass, and keep its work.
        primals = mx.depends(list(primals), list(cotangents[:2]))
        given, (*shared, state) = primals[:count], primals[count:]
        states = [state, *outputs[2:]] if keep_states else [state]
        for start, stop in [] if keep_states else list(pairwise(edges))[:-1]:
            cut = _cut(given, start, stop, states[1:][-1:])
            states.append(span(cut, shared, states[-1])[1] * 1)  # a copy, as above
        d_out, d_state = cotangents[:2]
        d_parts: list[list[mx.array]] = []
        d_weights = [mx.zeros_like(weight) for weight in shared]
        done: list[mx.array] = []

        def again(*given: mx.array) -> list[mx.array]:
            return list(span(list(given[:count]), list(given[count:-1]), given[-1]))

        for (start, stop), before in reversed(list(zip(pairwise(edges), states, strict=True))):
            # Finish everything that this span adds to before the next one starts.
            own = [*_cut(given, start, stop, done), *shared, before]
            *d_own, d_state = mx.vjp(again, own, [*_cut([d_out], start, stop, done), d_state])[1]
            d_parts.append(d_own[:count])
            d_weights = [total + part for total, part in zip(d_weights, d_own[count:], strict=True)]
            done = [*d_own[:count], *d_weights, d_state]
        return [*(_joined(list(parts)[::-1]) for parts in zip(*d_parts, strict=True)), *d_weights, d_state]

    out, last, *_ = forward(*inputs, *weights, state)
    return out, last


def _cut(arrays: Sequence[mx.array], start: int, stop: int, after: Sequence[mx.array]) -> list[mx.array]:
    """Return the arrays' tokens from start to stop, to be computed only after `after`."""
    parts = [array[:, start:stop] for array in arrays]
    return mx.depends(parts, list(after)) if after else parts


def _joined(parts: list[mx.array]) -> mx.array:
    return mx.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def scan_tokens(numbers: int) -> int:
    """Return the tokens of a span of a scan whose state has this many numbers over all rows."""
    fewest, most = SCAN_TOKENS
    return min(max(SCAN_NUMBERS // numbers, fewest), most)


# A scan in lanes


def linear_scan(decay: mx.array, added: mx.array, state: mx.array) -> mx.array:
    """Return all h of h_t = decay_t h_(t-1) + added_t, elementwise, with the tokens divided into lanes (`in_lanes`).

    All lanes step together, first from zero; then again, each from the state in which the lane before it ended. So T
    tokens take 2 T / lanes + lanes sequential operations.

    Args:
        decay, added: (steps, lanes, B, ...) float, of one shape; decay within 0 to 1.
        state: (B, ...), h_0.

    Returns:
        (steps, lanes, B, ...), differentiable in all three. Its backward pass is a scan in the other direction:
        g_t = d_t + decay_(t+1) g_(t+1), the gradient for `added`; g_t h_(t-1), that for `decay`.
    """

    @mx.custom_function
    def forward(decay: mx.array, added: mx.array, state: mx.array) -> mx.array:
        return mx.stack(_scan([*decay], [*added], state))

    @forward.vjp
    def forward_vjp(primals, d, h):
        decay, _, state = primals
        # The factor from each token's state to the next; a lane's last token is followed by the next lane's first.
        onward = mx.concatenate([decay[0, 1:], mx.ones_like(decay[0, :1])])
        factors, terms = ([x[::-1] for x in steps[::-1]] for steps in ([*decay[1:], onward], [*d]))
        g = [x[::-1] for x in _scan(factors, terms, mx.zeros_like(state))[::-1]]
        before = [mx.concatenate([state[None], h[-1, :-1]]), *h[:-1]]
        return mx.stack([one * other for one, other in zip(g, before, strict=True)]), mx.stack(g), g[0][0] * decay[0, 0]

    return forward(decay, added, state)


def _scan(decay: list[mx.array], added: list[mx.array], state: mx.array) -> list[mx.array]:
    """Return the h of `linear_scan`, given the arrays (lanes, B, ...) of each step."""
    lanes = decay[0].shape[0]
    h = state[None]
    if lanes > 1:
        end, whole = added[0], decay[0]
        for factor, term in zip(decay[1:], added[1:], strict=True):
            end, whole = factor * end + term, factor * whole
        entering = [state]
        for lane in range(lanes - 1):
            entering.append(whole[lane] * entering[-1] + end[lane])
        h = mx.stack(entering)
    states: list[mx.array] = []
    for factor, term in zip(decay, added, strict=True):
        h = factor * h + term
        states.append(h)
    return states


def in_lanes(x: mx.array, lanes: int) -> mx.array:
    """Divide tokens into lanes: (B, T, ...) to (steps, lanes, B, ...), padded with zeros at the end."""
    batch, length, *rest = x.shape
    steps = -(-length // lanes)
    if steps * lanes > length:
        x = mx.pad(x, [(0, 0), (0, steps * lanes - length), *((0, 0) for _ in rest)])
    return x.reshape(batch, lanes, steps, *rest).swapaxes(0, 2)


def out_of_lanes(x: mx.array, length: int) -> mx.array:
    """Join lanes again: (steps, lanes, B, ...) to (B, T, ...)."""
    return x.swapaxes(0, 2).flatten(1, 2)[:, :length]


def lanes_for(length: int, numbers: int) -> int:
    """Return how many lanes suit a scan over `length` tokens whose state has this many numbers."""
    return max(1, min(-(-STEP_NUMBERS // numbers), math.isqrt(length)))
