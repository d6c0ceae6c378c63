"""Check the quantized formats: packing, unpacking, and both products of a quantized weight, forward and backward.

The reference is the same packed weight, unpacked and multiplied in float32 on the CPU.

Shapes: x (N, in), weight (out, in); experts (E, out, in), N rows in the experts' order.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_lora.models.matmul import dequantized_gather_mm, dequantized_matmul, packed_arrays
from mlx_lora.owner_kit.kit_check import Finding, Kit, KitCheck, bounded
from mlx_lora.owner_kit.kit_compare import (
    apart,
    compare_passes,
    dtype_name,
    dtypes_of,
    exact_passes,
    normal,
    on_cpu,
)
from mlx_lora.system import device
from mlx_lora.system.measuring import TOLERANCE

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


def check_layouts(layouts: list[dict[str, Any]], kit: Kit) -> Iterator[Finding]:
    """Check formats that differ in their group size."""
    for layout in layouts:
        words = f"group {layout['group_size']}"
        for dtype in dtypes_of(kit):
            label = words if dtype == dtypes_of(kit)[0] else f"{words}, {dtype_name(dtype)}"
            yield from check_layout(label, layout, dtype)


def check_layout(label: str, layout: dict[str, Any], dtype: mx.Dtype) -> Iterator[Finding]:
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


def check_experts(layout: dict[str, Any], kit: Kit) -> Iterator[Finding]:
    """Check quantized experts: mlx's gather of packed weights, and ours of dense ones."""
    for dtype in dtypes_of(kit):
        if not (dtype == mx.float32 or device.multiplies_16_bit_experts()):
            yield Finding(f"{dtype_name(dtype)}", "skipped", "mlx has no 16-bit experts on this device")
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
) -> Iterator[Finding]:
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
