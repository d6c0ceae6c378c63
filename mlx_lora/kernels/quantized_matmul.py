"""Multiply by a quantized weight in one of two ways, chosen per call.

`mx.quantized_matmul` reads packed weights once per block of rows, which is best for few rows (generation).
Dequantizing first costs one pass over the weight, and then the dense kernel is best for many rows (training), by 100x on
an x86 CPU. The number of rows from which the second is faster is measured, never assumed;
`--quantized-matmul` forces one of them. While text is generated, a layer may hold a dense copy, which then always
multiplies (models/generator.py).

Shapes: x (..., in), packed weight (out, in * bits / 32) uint32, scales and biases (out, in / group_size); the weights of
experts have a first axis of E experts.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlx_lora.compat.functions import become
from mlx_lora.kernels.measure import best_s
from mlx_lora.planner.machine import KEPT_S, dense_experts_bytes
from mlx_lora.planner.memory import MAX_SLICE
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import read_store, write_store

# A layer's dense copy, (out, in). The underscore keeps it from being a parameter.
DENSE = "_dense"


def dequantized_matmul(x: mx.array, packed: list[mx.array], *, group_size: int, bits: int, mode: str) -> mx.array:
    """Return `x @ dequantize(packed).T`, and keep no dense weight between forward and backward pass.

    A large vocabulary's head is dequantized in slices of its rows: as a whole, Gemma 3's would take more memory than the
    rest of a run of its smallest model.

    Args:
        x: (..., in), float.
        packed: `[weight, scales]` or `[weight, scales, biases]`, as mx.quantize returns them.
        group_size, bits, mode: as given to mx.quantize.

    Returns:
        (..., out), in x's dtype. The vjp with respect to x dequantizes again; the packed arrays are frozen and get zero
        cotangents.
    """

    outputs = packed[0].shape[0]
    slices = [slice(start, start + MAX_SLICE) for start in range(0, outputs, MAX_SLICE)]

    def dense(arrays: list[mx.array], rows: slice, after: mx.array) -> mx.array:
        some = arrays if len(slices) == 1 else [array[rows] for array in arrays]
        some = [mx.depends(array, after) for array in some]
        return mx.dequantize(*some, group_size=group_size, bits=bits, mode=mode).astype(x.dtype)  # (rows, in)

    @mx.custom_function
    def product(x: mx.array, *arrays: mx.array) -> mx.array:
        # Depend on x: a checkpointed block's second pass has another x, and is not merged with the first. A further slice
        # depends on the one before, so that they are not all dense at a time.
        parts, before = [], x
        for rows in slices:
            before = x @ dense(list(arrays), rows, before).T
            parts.append(before)
        return before if len(parts) == 1 else mx.concatenate(parts, axis=-1)

    @product.vjp
    def product_vjp(primals, cotangent, _):
        _, *arrays = primals
        # Depend on the cotangent: otherwise compiling would merge this dequantization with the forward pass's, and keep
        # every layer's dense weight until the backward pass.
        first, *further = slices
        part = cotangent[..., first] if further else cotangent
        total = part @ dense(arrays, first, cotangent)
        for rows in further:
            total = total + cotangent[..., rows] @ dense(arrays, rows, total)
        return (total, *(mx.zeros_like(array) for array in arrays))

    return product(x, *packed)


def dequantized_gather_mm(
    x: mx.array, packed: list[mx.array], indices: mx.array, *, group_size: int, bits: int, mode: str
) -> mx.array:
    """Return each row of x times its expert's dequantized weight, and keep no dense weight for the backward pass.

    All experts are dequantized at once: rows are sorted on the device, so the host does not know which are used.

    Args:
        x: (N, M, in), float.
        packed: as in `dequantized_matmul`, each with the experts first.
        indices: (N,), the expert of each, ascending.
        group_size, bits, mode: as given to mx.quantize.

    Returns:
        (N, M, out), in x's dtype; differentiable in x, the packed arrays get zero cotangents.
    """

    def dense(arrays: list[mx.array]) -> mx.array:
        return mx.dequantize(*arrays, group_size=group_size, bits=bits, mode=mode).astype(x.dtype)  # (E, out, in)

    @mx.custom_function
    def product(x: mx.array, indices: mx.array, *arrays: mx.array) -> mx.array:
        transposed = dense([mx.depends(array, x) for array in arrays]).swapaxes(-1, -2)  # see `dequantized_matmul`
        return mx.gather_mm(x, transposed, rhs_indices=indices, sorted_indices=True)

    @product.vjp
    def product_vjp(primals, cotangent, _):
        _, indices, *arrays = primals
        again = dense([mx.depends(array, cotangent) for array in arrays])  # see `dequantized_matmul`
        d = mx.gather_mm(cotangent, again, rhs_indices=indices, sorted_indices=True)
        return (d, mx.zeros_like(indices), *(mx.zeros_like(array) for array in arrays))

    return product(x, indices, *packed)


def packed_arrays(layer: nn.Module) -> list[mx.array]:
    """Return a quantized layer's `[weight, scales]`, with `biases` in the affine mode."""
    arrays = [layer["weight"], layer["scales"]]
    return arrays if layer.get("biases") is None else [*arrays, layer["biases"]]


class MeasuredQuantizedLinear(nn.QuantizedLinear):
    """A QuantizedLinear that uses the dense path for at least `dense_from_rows` rows."""

    def __call__(self, x: mx.array) -> mx.array:
        if DENSE in self:
            y = x @ self[DENSE].T
            return y + self["bias"] if "bias" in self else y
        if math.prod(x.shape[:-1]) < self.dense_from_rows:
            return super().__call__(x)
        y = dequantized_matmul(x, packed_arrays(self), group_size=self.group_size, bits=self.bits, mode=self.mode)
        return y + self["bias"] if "bias" in self else y


class MeasuredQuantizedEmbedding(nn.QuantizedEmbedding):
    """A QuantizedEmbedding whose tied head uses the dense path for at least `dense_from_rows` rows."""

    def as_linear(self, x: mx.array) -> mx.array:
        if DENSE in self:
            return x @ self[DENSE].T
        if math.prod(x.shape[:-1]) < self.dense_from_rows:
            return super().as_linear(x)
        return dequantized_matmul(x, packed_arrays(self), group_size=self.group_size, bits=self.bits, mode=self.mode)


class MeasuredQuantizedSwitchLinear(QuantizedSwitchLinear):
    """Quantized experts that use the dense path if each has at least `dense_from_rows` rows on average.

    This requires sorted rows; mlx-lm sorts them if there are many. The bound is that of a plain product.
    """

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        many = math.prod(x.shape[:-1]) >= self.dense_from_rows * self.num_experts
        has_product = x.dtype == mx.float32 or device.multiplies_16_bit_experts()
        few_bytes = self.num_experts * self.output_dims * self.input_dims * x.dtype.size <= dense_experts_bytes()
        if not (sorted_indices and many and has_product and few_bytes):
            return super().__call__(x, indices, sorted_indices=sorted_indices)
        layout = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        y = dequantized_gather_mm(x, packed_arrays(self), indices, **layout)
        return y + mx.expand_dims(self["bias"][indices], -2) if "bias" in self else y


MEASURED = {
    nn.QuantizedLinear: MeasuredQuantizedLinear,
    nn.QuantizedEmbedding: MeasuredQuantizedEmbedding,
    QuantizedSwitchLinear: MeasuredQuantizedSwitchLinear,
}
FORCED_FROM_ROWS = {"packed": device.NEVER, "dense": 1}


@dataclass(frozen=True)
class MatmulPaths:
    """Which product a model's quantized layers use.

    Attributes:
        path: `auto`, `packed` or `dense`, as asked for.
        dense_from_rows: kind of weight (`4-bit/64 affine`) -> the numbers of rows from which its layers, of all shape
            classes, use the dense product; NEVER: they never do.
        others: type -> count of other quantized layers, which always use the packed product.
    """

    path: str
    dense_from_rows: dict[str, set[int]]
    others: dict[str, int]

    def describe(self) -> list[str]:
        """Return a line for each kind of weight, for the run header."""
        if self.path != "auto":
            lines = [f"{kind}: {self.path} product, forced" for kind in self.dense_from_rows]
        else:
            lines = []
            for kind, rows in self.dense_from_rows.items():
                found = sorted(rows - {device.NEVER})
                span = f"{found[0]}" if len(found) == 1 else f"{found[0]}-{found[-1]}" if found else ""
                shapes = ", depending on the shape" if len(rows) > 1 else ""
                lines.append(f"{kind}: " + (f"dense product from {span} rows{shapes}" if found else "packed product"))
        if self.path == "dense":
            lines += [
                f"{count} {name} layers: packed product, the only one for them" for name, count in self.others.items()
            ]
        return lines


def has_two_ways(layer: nn.Module) -> bool:
    """Return whether a layer's product can be computed both ways."""
    # Experts with scales of their own (nvfp4) only run on a GPU, packed.
    return type(layer) in (*MEASURED, *MEASURED.values()) and "global_scale" not in layer


def use_measured_matmul(model: nn.Module, path: str = "auto") -> MatmulPaths:
    """Make every quantized layer of `model` use the faster of the two paths for each row count, or a forced one.

    Only the class of each layer's instance changes, so names and parameters stay, and so do other models in this process.

    Args:
        model: an mlx-lm model.
        path: `packed` or `dense` to force that product for every row count; `auto` for the faster one.

    Raises:
        InputError: a path is forced on a model that has no quantized layer with both paths.
    """
    dense_from_rows: dict[str, set[int]] = {}
    others: Counter[str] = Counter()
    known: dict[tuple, int] = {}  # a model has many layers of a few kinds, and each lookup reads a file
    for _, layer in model.named_modules():
        if not has_two_ways(layer):
            others.update([type(layer).__name__] if "scales" in layer else [])
            continue
        shape = layer.weight.shape[-2], layer.weight.shape[-1] * 32 // layer.bits
        kind = (shape_class(shape), layer.bits, layer.group_size, layer.mode, layer.scales.dtype)
        if kind not in known:
            known[kind] = FORCED_FROM_ROWS.get(path) or dense_matmul_from_rows(*kind)
        layer.dense_from_rows = known[kind]
        become(layer, MEASURED.get(type(layer), type(layer)))
        dense_from_rows.setdefault(f"{layer.bits}-bit/{layer.group_size} {layer.mode}", set()).add(known[kind])
    if path != "auto" and not dense_from_rows:
        raise InputError(
            f"--quantized-matmul {path}: the model has no quantized linear layer; give a quantized model, or leave --quantized-matmul out"
        )
    return MatmulPaths(path, dense_from_rows, dict(others))


# What is measured

ROW_COUNTS = (1, 4, 16, 64, 256, 1024)
LEAST_ROUNDS = 5
STORE = "dense_matmul_from_rows"
# Weights are timed in classes of shapes with sides within these limits: a model has few classes, and timing one is quick.
SMALLEST_SIDE, LARGEST_SIDE = 128, 2048


def dense_matmul_from_rows(shape: tuple[int, int], bits: int, group_size: int, mode: str, dtype: mx.Dtype) -> int:
    """Return the number of rows from which dequantizing first beats `mx.quantized_matmul`; measured and kept.

    Other programs slow the dense product more, which uses all processor cores. So a result is measured again after KEPT_S, and the
    smaller number stays.

    Args:
        shape: (out, in) of the weight; its class is timed, see `shape_class`.
        bits, group_size, mode: as given to mx.quantize.
        dtype: of the scales; the microscaling modes have integer scales, and are timed in `device.compute_dtype()`.

    Returns:
        One of ROW_COUNTS, or NEVER, which no batch reaches, if the quantized kernel is always faster.
    """
    compute = dtype if mx.issubdtype(dtype, mx.floating) else device.compute_dtype()
    out, width = shape_class(shape)
    layout = f"{bits}|{group_size}|{mode}|{compute}"
    key = f"{device.measured_on()}|{layout}|{out}x{width}"
    known = read_store(STORE)
    entry = known.get(key)
    at, before = (entry.get("at"), entry.get("rows")) if isinstance(entry, dict) else (None, None)
    if not isinstance(at, int | float) or before not in (*ROW_COUNTS, device.NEVER):  # missing, or damaged
        at, before = 0.0, None
    if before is not None and 0 <= time.time() - at < KEPT_S:
        return before
    found = _measure_dense_matmul((out, width), bits, group_size, mode, compute)
    found = found if before is None else min(before, found)
    write_store(STORE, {**known, key: {"at": time.time(), "rows": found}})
    return found


def shape_class(shape: tuple[int, int]) -> tuple[int, int]:
    """Return the (out, in) of a weight's shape class: the nearest powers of two within the limits."""
    out, width = (min(max(1 << round(math.log2(side)), SMALLEST_SIDE), LARGEST_SIDE) for side in shape)
    return out, width


def _measure_dense_matmul(shape: tuple[int, int], bits: int, group_size: int, mode: str, dtype: mx.Dtype) -> int:
    """Time both paths on an (out, in) weight, fewest rows first, and return the first count at which dense is faster.

    This times what a training step does with a frozen weight: the product, and the gradient for its input.
    """
    layout = {"group_size": group_size, "bits": bits, "mode": mode}
    packed = mx.quantize(mx.random.normal(shape, key=mx.random.key(0)).astype(dtype), **layout)

    def quantized(x: mx.array, cotangent: mx.array) -> list[mx.array]:
        return [
            mx.quantized_matmul(x, *packed, transpose=True, **layout),
            mx.quantized_matmul(cotangent, *packed, transpose=False, **layout),
        ]

    def dense(x: mx.array, cotangent: mx.array) -> list[mx.array]:
        # Dequantize for each product, as in `dequantized_matmul`, where no dense weight is kept between them.
        once, again = (mx.dequantize(*packed, **layout).astype(dtype) for _ in range(2))
        return [x @ once.T, cotangent @ again]

    for rows in ROW_COUNTS:
        cotangent, x = (mx.random.normal((rows, side), key=mx.random.key(1)).astype(dtype) for side in shape)
        mx.eval(x, cotangent, packed)
        quantized_s, dense_s = best_s(
            [lambda f=f, x=x, c=cotangent: f(x, c) for f in (quantized, dense)], least_rounds=LEAST_ROUNDS
        )
        if dense_s < quantized_s:
            return rows
    return device.NEVER
