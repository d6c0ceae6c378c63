"""Convert a GGUF file's tensors to mlx-lm's parameters, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_lora.gguf.blocks import FLOAT, GROUP, LOSSLESS, block_quantization, carry_blocks
from mlx_lora.gguf.mapping import TensorMapping
from mlx_lora.gguf.reader import GGUFTensor
from mlx_lora.models.quantize import PackedWeight, Quantization, quantize_weight, relative_error
from mlx_lora.utils.errors import InputError

# How weights are stored: GGUF's blocks carried over unchanged, all as floats, or all quantized again in one way.
Target = Literal["carry", "float"] | Quantization


@dataclass(frozen=True)
class Imported:
    """One GGUF tensor, converted.

    Attributes:
        source: its GGUF name.
        source_type: its ggml type's name.
        parameters: {mlx-lm's name: array}.
        n_values: how many weights it holds.
        quantization: how it is packed now; None: float.
        lossless: whether it holds the file's values, up to the rounding of the compute dtype.
        error: the relative error of quantizing it again; 0 if lossless.
    """

    source: str
    source_type: str
    parameters: dict[str, mx.array]
    n_values: int
    quantization: Quantization | None
    lossless: bool
    error: float = 0.0


def import_weights(
    tensors: dict[str, GGUFTensor], mappings: dict[str, TensorMapping], target: Target, dtype: mx.Dtype
) -> Iterator[Imported]:
    """Yield every tensor as mlx-lm's parameters; memory holds one at a time, and what the caller keeps.

    Args:
        tensors: the file's tensors.
        mappings: from `weight_map`.
        target: `carry`, `float`, or how to quantize.
        dtype: of float weights, norms, scales and biases.

    Raises:
        InputError: a value does not fit the dtype.
    """
    for name, mapping in mappings.items():
        yield _import_tensor(tensors[name], mapping, target, dtype)


def _import_tensor(tensor: GGUFTensor, mapping: TensorMapping, target: Target, dtype: mx.Dtype) -> Imported:
    n_values = int(np.prod(tensor.shape))
    if target == "carry" and _carries(tensor, mapping):
        packed = _carried(tensor, mapping, dtype)
        _check_range(tensor, packed.arrays[1:])
        parameters = _split_packed(packed, mapping)
        return Imported(tensor.name, tensor.type.name, parameters, n_values, packed.quantization, lossless=True)
    values = _float_values(tensor, mapping)
    quantization = _quantization_for(tensor, mapping, target)
    if quantization is None:
        kept = values if mapping.values != "plain" else values.astype(dtype)  # mlx-lm keeps the others in float32
        _check_range(tensor, [kept])
        parts = [kept] if not mapping.then else mx.split(kept, len(mapping.names), axis=-2)
        parameters = dict(zip(mapping.names, parts, strict=True))
        return Imported(tensor.name, tensor.type.name, parameters, n_values, None, lossless=True)
    packed = _cast_scales(quantize_weight(values, quantization), dtype)
    _check_range(tensor, packed.arrays[1:])
    error = relative_error(packed.dequantize(), values)
    parameters = _split_packed(packed, mapping)
    return Imported(tensor.name, tensor.type.name, parameters, n_values, quantization, lossless=False, error=error)


def _split_packed(packed: PackedWeight, mapping: TensorMapping) -> dict[str, mx.array]:
    """Return a packed weight's arrays under its parameters' names; joined tensors are split by rows."""
    pieces = [mx.split(array, len(mapping.names), axis=-2) for array in packed.arrays]
    return {
        name: array
        for i, layer in enumerate(mapping.layers)
        for name, array in PackedWeight([piece[i] for piece in pieces], packed.quantization).parameters(layer).items()
    }


def _carries(tensor: GGUFTensor, mapping: TensorMapping) -> bool:
    """Return whether a tensor's blocks are carried over: moved at most, never requantized."""
    movable = mapping.columns is None or mapping.columns.in_groups(GROUP) is not None
    return len(tensor.shape) in (2, 3) and tensor.type in LOSSLESS and not mapping.exact and movable


def _carried(tensor: GGUFTensor, mapping: TensorMapping, dtype: mx.Dtype) -> PackedWeight:
    packed = carry_blocks(_reordered(tensor, mapping), dtype)
    if mapping.columns is None:
        return packed
    order: Any = mapping.columns.in_groups(GROUP)  # not None, because `_carries` has checked it
    n_groups = tensor.shape[-1] // GROUP
    index = mx.array(order.from_file(n_groups))
    groups = [array.reshape(*array.shape[:-1], n_groups, -1) for array in packed.arrays]
    moved = [mx.flatten(mx.take(array, index, axis=-2), -2) for array in groups]
    return PackedWeight(moved, packed.quantization)


def carried_quantization(tensor: GGUFTensor, mapping: TensorMapping) -> Quantization | None:
    """Return how a tensor is packed if GGUF's blocks are carried over, or None for float; reads no weight."""
    return block_quantization(tensor.type) if _carries(tensor, mapping) else _quantization_for(tensor, mapping, "carry")


def _quantization_for(tensor: GGUFTensor, mapping: TensorMapping, target: Target) -> Quantization | None:
    """Return how to pack a tensor that is not carried over, or None to keep it as float."""
    if len(tensor.shape) not in (2, 3) or target == "float" or mapping.exact:
        return None
    width = tensor.shape[-1]
    if isinstance(target, Quantization):
        return target if target.fits(width) else None
    if tensor.type in FLOAT:
        return None
    # MLX has no equivalent of this type: 8 bits lose little, and the caller reports how little.
    return next((choice for choice in (Quantization(8, 64), Quantization(8, 32)) if choice.fits(width)), None)


def _reordered(tensor: GGUFTensor, mapping: TensorMapping) -> GGUFTensor:
    """Return the tensor with its packed rows in mlx-lm's order: bytes are moved, nothing is rounded."""
    if mapping.rows is None:
        return tensor
    rows = tensor.data[mapping.rows.from_file(len(tensor.data))]
    return GGUFTensor(tensor.name, tensor.type, tensor.shape, rows)


def _float_values(tensor: GGUFTensor, mapping: TensorMapping) -> mx.array:
    """Return the tensor's float32 values as mlx-lm's parameter holds them."""
    if _carries(tensor, mapping):  # same values as ggml's, much faster; MXFP4's come as bfloat16, which is exact
        return _carried(tensor, mapping, mx.float32).dequantize().astype(mx.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # _check_range reports values that are not finite
        return mx.array(np.ascontiguousarray(mapping.from_file(tensor.dequantize())))


def _cast_scales(packed: PackedWeight, dtype: mx.Dtype) -> PackedWeight:
    """Return the weight with affine scales and biases cast; the microscaling modes keep their integer scales."""
    if packed.quantization.mode != "affine":
        return packed
    codes, *scales = packed.arrays
    return PackedWeight([codes, *(scale.astype(dtype) for scale in scales)], packed.quantization)


def _check_range(tensor: GGUFTensor, arrays: list[mx.array]) -> None:
    """Refuse values that are not finite: the file has such values, or they overflowed when they were cast."""
    for array in arrays:
        if not mx.issubdtype(array.dtype, mx.floating) or mx.isfinite(array).all().item():
            continue
        kind = str(array.dtype).removeprefix("mlx.core.")
        with np.errstate(invalid="ignore", over="ignore"):
            stored = tensor.dequantize()  # float32, which every type of GGUF fits into
        if not np.isfinite(stored).all() or array.dtype == mx.float32:
            raise InputError(
                f"tensor {tensor.name}: has values that are not finite numbers, so the file is damaged, or its parts were "
                "joined in the wrong order; download it again"
            )
        raise InputError(f"tensor {tensor.name}: {kind} cannot hold its values; use --dtype bfloat16 or float32")


def check_shapes(
    path: str, tensors: dict[str, GGUFTensor], mappings: dict[str, TensorMapping], expected: dict[str, Any]
) -> None:
    """Check every tensor's shape against mlx-lm's model before any work is done.

    Args:
        path: the file, for the message.
        tensors, mappings: as in `import_weights`.
        expected: {mlx-lm's parameter name: shape}.

    Raises:
        InputError: tensors have other shapes; the message names them.
    """
    wrong = []
    for name, mapping in mappings.items():
        ours = [tuple(expected.get(part, ())) for part in mapping.names]
        wanted = mapping.file_shape(ours[0]) if ours[0] else ()
        if mapping.then and all(shape == ours[0] for shape in ours) and len(wanted) > 1:
            wanted = (*wanted[:-2], len(ours) * wanted[-2], wanted[-1])
        if wanted != tensors[name].shape:
            wrong.append(f"{name} is {tensors[name].shape}, but the model needs {wanted}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(
            f"{path}: {'; '.join(wrong[:3])}{more}; its tensors do not match its metadata, so download it again"
        )
