"""List the kernels that training may replace in a model's layers, and replace them while a training step is traced.

mlx-lm's architectures share one attention function, one gated activation and one function for each common recurrence,
which each imports by name. A row of the table names one of these functions and the functions that may replace it, and tells
how to classify a call by its shapes and how to try out a class. Candidates are chosen by measurement (kernels/choose.py). The
names are replaced in the modules of this model's classes while the step is traced, and then restored, so generation and
evaluation do not change. A call's shapes decide which function takes it.

The candidates for the loss are in losses/cross_entropy.py. Recurrences of a single architecture (kernels/recurrent.py) have
no row: ours always replace them. Norms and rotations have none either: models call mx.fast.rms_norm and mx.fast.rope, and
ours would not be faster (docs/decisions.md).

Shapes: B batch, H query heads, N key heads, T positions, d head width, F width of the gated activation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import activations, base

from mlx_lora.kernels.activations import lean_swiglu, polynomial_swiglu
from mlx_lora.kernels.attention import AttentionCall, Tiles, attend
from mlx_lora.kernels.measure import MLX, POLYNOMIAL, Figures, Kernel, Outputs, ShapeClass, Trial, size_class
from mlx_lora.kernels.recurrent import gated_delta_row, recurrent_kernels, state_space_row
from mlx_lora.models.prefix_attention import SharedPrefix
from mlx_lora.planner.shapes import KernelTerms
from mlx_lora.utils import device

TRIAL_POSITIONS = 1024
TRIAL_NUMBERS = 1 << 20  # of one array of an elementwise trial
LONGEST = 1024  # keys of a trial; beyond that, the costs of both kernels grow at the same rate
# Kernels without a state that passes from token to token.
POSITIONWISE = frozenset({"attention", "gated activation"})
Choose = Callable[[Kernel, ShapeClass], str]
"""(row of the table, shape class of a call) -> name of the candidate that takes the call."""


# Table


def kernel_rows(attend: AttentionCall = attend) -> tuple[Kernel, ...]:
    """Return the table.

    Args:
        attend: computes attention by the kernel that its `Tiles` name; a checkpointing tape has its own.
    """
    return (
        Kernel(
            name="attention",
            shared="scaled_dot_product_attention",
            theirs=base.scaled_dot_product_attention,
            candidates={
                kernel: partial(_attention, attend, kernel) for kernel in (MLX, "tiled", *polynomial_candidates())
            },
            assumed="tiled",
            class_of=_attention_class,
            trial=_attention_trial,
            words=_attention_words,
            count=_count_attention,
        ),
        Kernel(
            name="gated activation",
            shared="swiglu",
            theirs=activations.swiglu,
            candidates={
                MLX: activations.swiglu,
                "lean": partial(lean_swiglu, True),
                "leanest": partial(lean_swiglu, False),
                **dict.fromkeys(polynomial_candidates(), polynomial_swiglu),
            },
            assumed="lean" if device.keep_exponentials() else "leanest",
            class_of=lambda gate, up: activation_class(gate.shape[-1]),
            trial=_swiglu_trial,
            words=lambda shape: f"{shape[0]:,} wide",
            count=_count_swiglu,
        ),
        gated_delta_row(),
        state_space_row(),
    )


def polynomial_candidates() -> tuple[str, ...]:
    """Return the name of the candidates with polynomials for exponentials (kernels/activations.py), if this device has any."""
    return (POLYNOMIAL,) if device.vectorizes_compiled_sums() else ()


# Replacement


def assumed(kernel: Kernel, shape: ShapeClass) -> str:
    """Return the candidate that is used without measuring, which is ours."""
    return kernel.assumed


@contextmanager
def training_kernels(model: nn.Module, attend: AttentionCall = attend, choose: Choose = assumed) -> Iterator[list[str]]:
    """Let the model's layers use the chosen kernels inside the block.

    Args:
        model: any mlx-lm model; layers that do not use the shared functions keep their own.
        attend: computes attention by the kernel that its `Tiles` name.
        choose: returns the candidate for a call.

    Yields:
        The names of the kernels that the model uses, those of the table first.
    """
    rows = {row.shared: row for row in kernel_rows(attend)}
    homes = [vars(sys.modules[name]) for name in {type(module).__module__ for module in model.modules()}]
    exchanged = [(home, name) for home in homes for name, row in rows.items() if home.get(name) is row.theirs]
    for home, name in exchanged:
        home[name] = _by_shape(rows[name], choose)
    try:
        with recurrent_kernels(model) as recurrent:
            yield [
                *(row.name for name, row in rows.items() if any(name == other for _, other in exchanged)),
                *recurrent,
            ]
    finally:
        for home, name in exchanged:
            home[name] = rows[name].theirs


def _by_shape(row: Kernel, choose: Choose) -> Callable[..., Any]:
    """Return a function that replaces mlx-lm's and passes each call to the candidate chosen for its shapes."""

    def call(*args: Any, **kwargs: Any) -> Any:
        shape = row.class_of(*args, **kwargs)
        if shape is None:
            return row.theirs(*args, **kwargs)
        return row.candidates[choose(row, shape)](*args, **kwargs)

    return call


def has_recurrence(model: nn.Module) -> bool:
    """Return whether any layer has a recurrence that we have a kernel for."""
    with training_kernels(model) as names:
        return not {*names} <= POSITIONWISE


# Attention


def _attention(
    attend: AttentionCall,
    kernel: str,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Return attention for mlx-lm's signature; only calls that have a shape class get here."""
    tiles = Tiles(scale, mask, kernel=kernel, backward=isinstance(cache, SharedPrefix))
    return attend(queries, keys, values, tiles, sinks)


def attention_class(
    heads: int, key_heads: int, width: int, value_width: int, keys: int, mask: str = "causal", sinks: bool = False
) -> ShapeClass:
    """Return the shape class of an attention.

    Args:
        heads, key_heads: H and N.
        width, value_width: d of queries and keys, and of values.
        keys: the number of keys of the longest row.
        mask: `causal`, `array` or `none`.
        sinks: whether logits without a value take part in the softmax.
    """
    return size_class(keys, 64, LONGEST), heads, key_heads, width, value_width, mask, "sinks" if sinks else ""


def _attention_class(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Any,
    scale: float,
    mask: mx.array | str | None,
    sinks: mx.array | None = None,
) -> ShapeClass | None:
    # A float mask may carry a gradient (DeepSeek's position scores); any other cache means generation.
    if not isinstance(cache, SharedPrefix | None) or (isinstance(mask, mx.array) and mask.dtype != mx.bool_):
        return None
    kind = "array" if isinstance(mask, mx.array) else mask or "none"
    (_, heads, _, width), (_, key_heads, seen, _) = queries.shape, keys.shape
    return attention_class(heads, key_heads, width, values.shape[-1], seen, kind, sinks is not None)


def _attention_words(shape: ShapeClass) -> str:
    keys, heads, key_heads, width, value_width, mask, sinks = shape
    wide = f"{width}" if width == value_width else f"{width}/{value_width}"
    extra = {"causal": "", "array": ", windowed", "none": ", all keys seen"}[mask] + (", sinks" if sinks else "")
    return f"{keys:,} keys, {heads}/{key_heads} heads of {wide}{extra}"


def _attention_trial(shape: ShapeClass, dtype: mx.Dtype) -> tuple[Trial, Outputs]:
    """Return a trial with rows of the class's length, and its exact outputs."""
    length, heads, key_heads, width, value_width, mask, sinks = shape
    group, (rows, n) = heads // key_heads, _trial_rows(shape)
    h, scale = n * group, width**-0.5
    keys = mx.random.split(mx.random.key(0), 5)
    sizes = [(rows, h, length, width), (rows, n, length, width), (rows, n, length, value_width)] + [(h,)] * bool(sinks)
    arrays = [mx.random.normal(size, key=key).astype(dtype) for size, key in zip(sizes, keys, strict=False)]
    cotangent = mx.random.normal((rows, h, length, value_width), key=keys[4]).astype(dtype)
    before = mx.arange(length)[:, None] - mx.arange(length)
    seen = {"none": before == before, "causal": before >= 0, "array": (before >= 0) & (before < max(1, length // 2))}[
        mask
    ]
    given = {"none": None, "causal": "causal", "array": seen}[mask]

    def wrap(function: Callable[..., mx.array]) -> Outputs:
        return lambda q, k, v, *s: [function(q, k, v, None, scale, given, *s)]

    return Trial(arrays, [cotangent], wrap), partial(_naive_attention, scale, seen)


def _trial_rows(shape: ShapeClass) -> tuple[int, int]:
    """Return the rows and key heads of a trial, as many as `device.trial_flops` allows."""
    length, heads, key_heads, width, value_width, *_ = shape
    # The forward pass, and a backward pass that computes the scores again.
    one = 7 * (heads // key_heads) * length**2 * (width + value_width)
    products = max(1, int(device.trial_flops() / one))
    n = min(key_heads, products)
    return min(max(1, TRIAL_POSITIONS // length), max(1, products // n)), n


def _naive_attention(
    scale: float, seen: mx.array, q: mx.array, k: mx.array, v: mx.array, sinks: mx.array | None = None
) -> list[mx.array]:
    """Return attention by its definition: softmax(scale Q K^T) V where `seen` (T, S); a sink adds a logit per row."""
    k, v = (mx.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = mx.where(seen, scale * q @ k.swapaxes(-1, -2), -mx.inf)  # (B, H, T, S)
    if sinks is not None:
        sunk = mx.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
        scores = mx.concatenate([scores, sunk], axis=-1)
    return [mx.softmax(scores, axis=-1)[..., : k.shape[2]] @ v]


def _count_attention(terms: KernelTerms, shape: ShapeClass, name: str, figures: Figures | None) -> KernelTerms:
    """Count our kernel by the tile (planner/memory.py), mlx's by the arrays of scores that it kept and used when measured."""
    if name != MLX:
        return replace(terms, tiled=(*terms.tiled, shape[0]))
    if figures is None:
        [(_, *arrays)] = KernelTerms.of_mlx(device.current_device().backend).attention
        return replace(terms, attention=(*terms.attention, (shape[0], *arrays)))
    length, heads, key_heads, width, value_width, *_ = shape
    rows, n = _trial_rows(shape)
    group = heads // key_heads
    number_bytes = figures.input_bytes / (rows * n * length * (group * width + width + value_width))
    scores = rows * n * group * length**2 * number_bytes
    output = rows * n * group * length * value_width * number_bytes
    kept = max(0.0, figures.kept_bytes - output) / scores
    ahead = (figures.peak_bytes - figures.kept_bytes) / scores
    return replace(terms, attention=(*terms.attention, (shape[0], kept, ahead)))


# Gated activation


def activation_class(width: int) -> ShapeClass:
    """Return the shape class of a gated activation of width F."""
    return (size_class(width, 256, 8192),)


def _swiglu_trial(shape: ShapeClass, dtype: mx.Dtype) -> tuple[Trial, Outputs]:
    width = shape[0]
    rows = max(1, min(TRIAL_POSITIONS, TRIAL_NUMBERS // width))
    *arrays, cotangent = (3 * mx.random.normal((rows, width), key=mx.random.key(n)).astype(dtype) for n in range(3))

    def naive(gate: mx.array, up: mx.array) -> list[mx.array]:
        return [gate / (1 + mx.exp(-gate)) * up]

    return Trial(arrays, [cotangent], lambda function: lambda gate, up: [function(gate, up)]), naive


def _count_swiglu(terms: KernelTerms, shape: ShapeClass, name: str, figures: Figures | None) -> KernelTerms:
    """Count the arrays that are kept in addition to gate, up and the product; the most of all classes counts."""
    assumed = {MLX: 2.0, "lean": 1.0, "leanest": 0.0, POLYNOMIAL: 0.0}[name]
    arrays = assumed if figures is None else max(0.0, 2 * figures.kept_bytes / figures.input_bytes - 1)
    return replace(terms, gate_arrays=max(arrays, terms.gate_arrays or 0.0))
