"""Check every candidate of every kernel, and the quantized formats, against a float32 reference on the CPU.

Of kernels, output and gradients are compared. The training run does the same before it takes a kernel, and does not take a
wrong one; here each is named, in shapes that published models have. Of formats, packing, unpacking, and both products of a
quantized weight are compared, forward and backward, with the same packed weight, unpacked.

Shapes: x (N, in), weight (out, in); experts (E, out, in), N rows in the experts' order; P positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_lora.doctor.check import (
    CheckFinding,
    Kit,
    KitCheck,
    apart,
    bounded,
    compare_passes,
    dtype_name,
    dtypes_of,
    exact_passes,
    normal,
    on_cpu,
)
from mlx_lora.kernels import activations as exponentials
from mlx_lora.kernels.measure import TOLERANCE, Kernel, ShapeClass
from mlx_lora.kernels.quantized_matmul import dequantized_gather_mm, dequantized_matmul, packed_arrays
from mlx_lora.kernels.table import activation_class, attention_class, kernel_rows
from mlx_lora.losses.cross_entropy import log_sum_exp
from mlx_lora.losses.fused import NAME, HeadLosses, loss_kernels
from mlx_lora.models.head import Head
from mlx_lora.planner.machine import loss_tile_bytes
from mlx_lora.utils import device

# Kernels

# Heads of SmolLM2, Llama 3, Gemma 3, DeepSeek (values narrower than keys), GPT-OSS (a window and sinks).
ATTENTION: tuple[ShapeClass, ...] = (
    attention_class(9, 3, 64, 64, 128),
    attention_class(32, 8, 128, 128, 256),
    attention_class(4, 1, 256, 256, 256),
    attention_class(4, 4, 192, 128, 128),
    attention_class(8, 1, 64, 64, 256, "array", sinks=True),
    attention_class(4, 2, 64, 64, 128, "none"),
)
ACTIVATION: tuple[ShapeClass, ...] = (activation_class(1536), activation_class(8192))
DELTA: tuple[ShapeClass, ...] = (
    (64, 2, 4, 128, 128, "a gate per head"),
    (64, 2, 2, 64, 64, "a gate per channel"),
)
SPACE: tuple[ShapeClass, ...] = ((64, 4, 64, 1, 128), (128, 8, 64, 2, 64))
SHAPES = {"attention": ATTENTION, "gated activation": ACTIVATION, "gated delta": DELTA, "state space": SPACE}
ADVICE = "training does not use it where it is wrong; with --kernels mlx it is never used; report it"
ADVICE_FOR_MLX = "mlx's own kernel: try another mlx version, and report it to mlx"


def kernel_checks() -> list[KitCheck]:
    """Return a check for each kernel and shape, and for the loss and the exponentials."""
    rows = {row.name: row for row in kernel_rows()}
    checks = [
        KitCheck("kernels", f"{name}, {rows[name].words(shape)}", partial(check_kernel, name, shape), quick=number == 0)
        for name, shapes in SHAPES.items()
        for number, shape in enumerate(shapes)
    ]
    for number, (words, make) in enumerate(HEADS.items()):
        checks.append(KitCheck("kernels", f"{NAME}, {words}", partial(check_loss, make), quick=number < 2))
    return [
        *checks,
        KitCheck("kernels", "exponentials", check_exponentials),
        KitCheck("kernels", "tanh, power, sums", check_substitutes),
    ]


def check_kernel(name: str, shape: ShapeClass, kit: Kit) -> Iterator[CheckFinding]:
    """Compare all candidates of one row of the table in one shape."""
    row: Kernel = next(row for row in kernel_rows() if row.name == name)
    for dtype in dtypes_of(kit):
        trial, reference = row.trial(shape, dtype)
        exact = exact_passes(reference, trial.arrays, trial.cotangents)
        for candidate, function in row.candidates.items():
            label = f"{candidate} {name}" + ("" if dtype == dtypes_of(kit)[0] else f", {dtype_name(dtype)}")
            advice = ADVICE_FOR_MLX if candidate == "mlx" else ADVICE
            # Recurrences multiply roundings over their tokens.
            times = 2.0 if name in ("gated delta", "state space") else 1.0
            yield from compare_passes(label, trial.wrap(function), exact, trial.arrays, trial.cotangents, advice, times)


class _Body(nn.Module):
    """A body that no loss calls: the hidden states are given."""


def _filled(layer: Any, dtype: mx.Dtype) -> Any:
    """Return a layer with random numbers in its weight and its bias."""
    layer.weight = normal(*layer.weight.shape, seed=1, dtype=dtype, size=0.3)
    if "bias" in layer:
        layer.bias = normal(*layer.bias.shape, seed=2, dtype=dtype)
    return layer


HEADS: dict[str, Callable[[mx.Dtype], Head]] = {
    "a head with a bias": lambda dtype: Head(_Body(), _filled(nn.Linear(96, 4000), dtype)),
    "a 4-bit tied head": lambda dtype: Head(_Body(), _filled(nn.Embedding(4000, 128), dtype).to_quantized(64, 4)),
    "a tied head with a soft cap": lambda dtype: Head(
        _Body(), _filled(nn.Embedding(4000, 96), dtype), scale=0.5, soft_cap=30.0
    ),
    # As large as Gemma's: its inner side has ended processes on Metal (mlx#1363).
    "a vocabulary of 262,144": lambda dtype: Head(_Body(), _filled(nn.Embedding(262_144, 64), dtype)),
}


def check_loss(make: Callable[[mx.Dtype], Head], kit: Kit) -> Iterator[CheckFinding]:
    """Compare the loss kernels on one head with all logits at once in float32."""
    for dtype in dtypes_of(kit):
        yield from _compare_losses(make(dtype), dtype, "" if dtype == dtypes_of(kit)[0] else f", {dtype_name(dtype)}")


def _compare_losses(head: Head, dtype: mx.Dtype, after: str) -> Iterator[CheckFinding]:
    width = head.dense(head.arrays, mx.float32).shape[-1]
    positions = 33 if head.vocabulary > 10_000 else 150
    hidden = normal(positions, width, seed=3, dtype=dtype)
    targets = mx.array([(7919 * n) % head.vocabulary for n in range(positions)])
    weights, ones = mx.ones((positions,)), [mx.ones((positions, 1))]
    # Small tiles, so that several are joined whatever this machine's own are.
    tile_bytes = min(loss_tile_bytes(), 400_000)

    def exactly(hidden: mx.array) -> list[mx.array]:
        logits = head.finish(hidden @ head.dense(head.arrays, mx.float32).T, slice(None)).astype(mx.float32)
        own = mx.take_along_axis(logits, targets[:, None], axis=-1)
        return [log_sum_exp(logits)[:, None] - own]

    exact = exact_passes(exactly, [hidden], ones)
    for name, kernel in loss_kernels().items():

        def losses(hidden: mx.array, kernel: HeadLosses = kernel) -> list[mx.array]:
            return [kernel(head, hidden, targets, weights, tile_bytes=tile_bytes)[:, None]]

        # mx.fast.cross_entropy adds a row's exponentials one after the other on a CPU.
        times = 3.0 if head.vocabulary > 10_000 else 1.0
        yield from compare_passes(f"{name} {NAME}{after}", losses, exact, [hidden], ones, ADVICE, times)


def check_exponentials(kit: Kit) -> Iterator[CheckFinding]:
    """Compare the polynomials for exponentials with mlx's own exponential."""
    x = normal(64, 512, seed=4, size=4.0)
    if not exponentials.usable(x) or not device.vectorizes_compiled_sums():
        yield CheckFinding("polynomials", "skipped", "used on a CPU that compiles kernels only")
        return
    made = [
        ("exp(-x)", exponentials.exp_minus(x * exponentials.SCALE), mx.exp(-mx.abs(x))),
        ("softmax", exponentials.softmax(x * exponentials.SCALE), mx.softmax(x, axis=-1)),
        ("gated SiLU", exponentials.gated_silu(x, x)[0], x * mx.sigmoid(x) * x),
    ]
    for name, found, exact in made:
        yield bounded(f"polynomial {name}", apart(found, exact), 2e-5, "float32 against mlx's exponential", ADVICE)


def check_substitutes(kit: Kit) -> Iterator[CheckFinding]:
    """Compare what device.py computes differently on each backend with its definition."""
    advice = "mlx_lora/utils/device.py chooses it by backend; report it"
    for dtype in dtypes_of(kit):
        x = normal(33, 5000, seed=5, dtype=dtype, size=2.0)
        below = -mx.abs(x)
        mx.eval(x, below)
        with on_cpu():
            wide = x.astype(mx.float32)
            exact = [
                1 / (1 + mx.exp(-wide)), mx.exp(below.astype(mx.float32)),
                mx.exp(below.astype(mx.float32)).sum(axis=-1, keepdims=True),
            ]  # fmt: skip
            mx.eval(exact)
        made = [device.sigmoid(x), device.exponential(below), device.row_sums(mx.exp(below.astype(mx.float32)))]
        for name, found, wanted in zip(("sigmoid", "exponential", "row sums"), made, exact, strict=True):
            label = f"{name}, {dtype_name(dtype)}"
            what = "the device's form against its definition on the CPU"
            yield bounded(label, apart(found, wanted), TOLERANCE[dtype], what, advice)


# Quantized formats

AFFINE_BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
FLOATS = {"mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits and group, which are fixed
ROWS, WIDE, OUT = 70, 256, 128  # 70 rows: not a multiple of a tile
EXPERTS = 4
DENSE = "with --quantized-matmul packed it is never used; report it"
PACKED = "with --quantized-matmul dense it is not used for training; try another mlx version, and report it to mlx"


def format_checks() -> list[KitCheck]:
    """Return a check for each number of bits of the affine format, for each other format, and for experts."""
    affine = [
        KitCheck(
            "formats",
            f"{bits}-bit affine",
            partial(check_layouts, [{"bits": bits, "group_size": group, "mode": "affine"} for group in GROUPS]),
            quick=bits == 4,
        )
        for bits in AFFINE_BITS
    ]
    floats = [
        KitCheck(
            "formats",
            mode,
            partial(check_layouts, [{"bits": bits, "group_size": group, "mode": mode}]),
            quick=mode == "mxfp4",
        )
        for mode, (bits, group) in FLOATS.items()
    ]
    experts = [
        KitCheck("formats", f"experts in {words}", partial(check_experts, layout), quick=number == 0)
        for number, (words, layout) in enumerate(EXPERT_LAYOUTS.items())
    ]
    return [*affine, *floats, *experts]


EXPERT_LAYOUTS: dict[str, dict[str, Any]] = {
    "4-bit affine": {"bits": 4, "group_size": 64, "mode": "affine"},
    "mxfp4": {"bits": 4, "group_size": 32, "mode": "mxfp4"},
}


def check_layouts(layouts: list[dict[str, Any]], kit: Kit) -> Iterator[CheckFinding]:
    """Check formats that differ in their group size."""
    for layout in layouts:
        words = f"group {layout['group_size']}"
        for dtype in dtypes_of(kit):
            label = words if dtype == dtypes_of(kit)[0] else f"{words}, {dtype_name(dtype)}"
            yield from check_layout(label, layout, dtype)


def check_layout(label: str, layout: dict[str, Any], dtype: mx.Dtype) -> Iterator[CheckFinding]:
    """Check one format in one dtype.

    Args:
        label: of the findings.
        layout: `group_size`, `bits` and `mode`.
        dtype: of the activations and scales.
    """
    weight, x = normal(OUT, WIDE, seed=1, dtype=dtype), normal(ROWS, WIDE, seed=2, dtype=dtype)
    cotangent = [normal(ROWS, OUT, seed=3, dtype=dtype)]
    mx.eval(weight, x, cotangent)
    with on_cpu():
        packed = list(mx.quantize(weight, **layout))
        plain = mx.dequantize(*packed, **layout, dtype=dtype).astype(mx.float32)
        mx.eval(packed, plain)
    found = mx.dequantize(*mx.quantize(weight, **layout), **layout, dtype=dtype)
    # A weight in the middle of two steps may be rounded either way.
    yield bounded(f"packing, {label}", apart(found, plain), 0.02, "the device's packing against the CPU's", PACKED)
    found = mx.dequantize(*packed, **layout, dtype=dtype)
    yield bounded(f"unpacking, {label}", apart(found, plain), TOLERANCE[dtype], "the device against the CPU", PACKED)
    exact = exact_passes(lambda x: [x @ plain.T], [x], cotangent)

    def by_packed(x: mx.array) -> list[mx.array]:
        return [mx.quantized_matmul(x, *packed, transpose=True, **layout)]

    yield from compare_passes(f"packed product, {label}", by_packed, exact, [x], cotangent, PACKED)
    few = apart(mx.quantized_matmul(x[:3], *packed, transpose=True, **layout), exact[0][0][:3])
    yield bounded(f"packed product of 3 rows, {label}", few, TOLERANCE[dtype], "against float32 on the CPU", PACKED)
    yield from compare_passes(
        f"dense product, {label}", lambda x: [dequantized_matmul(x, packed, **layout)], exact, [x], cotangent, DENSE
    )


def check_experts(layout: dict[str, Any], kit: Kit) -> Iterator[CheckFinding]:
    """Check quantized experts: mlx's gather of packed weights, and ours of dense ones."""
    for dtype in dtypes_of(kit):
        if not (dtype == mx.float32 or device.multiplies_16_bit_experts()):
            yield CheckFinding(f"{dtype_name(dtype)}", "skipped", "mlx has no 16-bit experts on this device")
            continue
        layer = SwitchLinear(WIDE, OUT, EXPERTS, bias=False)
        layer.weight = normal(EXPERTS, OUT, WIDE, seed=1, dtype=dtype)
        quantized = layer.to_quantized(**layout)
        packed = packed_arrays(quantized)
        mx.eval(packed)
        with on_cpu():
            plain = mx.dequantize(*packed, **layout, dtype=dtype).astype(mx.float32)  # (E, out, in)
            mx.eval(plain)
        yield from _compare_experts(quantized, packed, plain, layout, dtype, dtype == dtypes_of(kit)[0])


def _compare_experts(
    quantized: QuantizedSwitchLinear,
    packed: list[mx.array],
    plain: mx.array,
    layout: dict[str, Any],
    dtype: mx.Dtype,
    first: bool,
) -> Iterator[CheckFinding]:
    x, cotangent = normal(ROWS, 1, WIDE, seed=2, dtype=dtype), [normal(ROWS, 1, OUT, seed=3, dtype=dtype)]
    chosen = mx.array([EXPERTS * n // ROWS for n in range(ROWS)])  # ascending, as mlx-lm sorts them
    exact = exact_passes(lambda x: [x @ plain[chosen].swapaxes(-1, -2)], [x], cotangent)
    after = "" if first else f", {dtype_name(dtype)}"
    functions = {
        "packed, sorted rows": (lambda x: [quantized(x, chosen, sorted_indices=True)], PACKED),
        "packed, unsorted rows": (lambda x: [quantized(x, chosen, sorted_indices=False)], PACKED),
        "dense": (lambda x: [dequantized_gather_mm(x, packed, chosen, **layout)], DENSE),
    }
    for name, (function, advice) in functions.items():
        yield from compare_passes(f"{name}{after}", function, exact, [x], cotangent, advice)
