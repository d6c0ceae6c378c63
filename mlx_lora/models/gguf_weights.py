"""From a GGUF file's tensors to mlx-lm's parameters, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_lora.models.gguf_blocks import FLOAT, GROUP, LOSSLESS, block_form, carry_blocks
from mlx_lora.models.gguf_places import Weight
from mlx_lora.models.quantize import PackedWeight, Quantization, quantize_weight, relative_error
from mlx_lora.sources.gguf_reader import GGUFTensor
from mlx_lora.system.errors import InputError

# What is made of the weights: GGUF's blocks as they are, all float, or all quantized anew in one form.
Target = Literal["carry", "float"] | Quantization


@dataclass(frozen=True)
class Imported:
    """One tensor's way from GGUF to MLX.

    Attributes:
        source: its GGUF name and type.
        source_type: ggml type name.
        parameters: mlx-lm's names to arrays.
        n_values: how many weights it holds.
        form: how it is packed now; None: float.
        lossless: whether it holds the file's values, up to the rounding of the compute dtype.
        error: relative error made by quantizing anew; 0 when lossless.
    """

    source: str
    source_type: str
    parameters: dict[str, mx.array]
    n_values: int
    form: Quantization | None
    lossless: bool
    error: float = 0.0


def import_weights(
    tensors: dict[str, GGUFTensor], places: dict[str, Weight], target: Target, dtype: mx.Dtype
) -> Iterator[Imported]:
    """Yield every tensor in mlx-lm's form; memory holds one at a time beside what the caller keeps.

    Args:
        tensors: the file's.
        places: from `weight_map`.
        target: `carry`, `float`, or how to quantize.
        dtype: of float weights, norms, scales and biases.

    Raises:
        InputError: when a value does not fit the dtype.
    """
    for name, place in places.items():
        yield _import_tensor(tensors[name], place, target, dtype)


def _import_tensor(tensor: GGUFTensor, place: Weight, target: Target, dtype: mx.Dtype) -> Imported:
    n_values = int(np.prod(tensor.shape))
    if target == "carry" and _carries(tensor, place):
        packed = _carried(tensor, place, dtype)
        _check_range(tensor, packed.arrays[1:])
        parameters = _split_packed(packed, place)
        return Imported(tensor.name, tensor.type.name, parameters, n_values, packed.form, lossless=True)
    values = _float_values(tensor, place)
    form = _form_for(tensor, place, target)
    if form is None:
        kept = values if place.values != "plain" else values.astype(dtype)  # what mlx-lm too keeps in float32
        _check_range(tensor, [kept])
        parts = [kept] if not place.then else mx.split(kept, len(place.names), axis=-2)
        parameters = dict(zip(place.names, parts, strict=True))
        return Imported(tensor.name, tensor.type.name, parameters, n_values, None, lossless=True)
    packed = _cast_scales(quantize_weight(values, form), dtype)
    _check_range(tensor, packed.arrays[1:])
    error = relative_error(packed.dequantize(), values)
    parameters = _split_packed(packed, place)
    return Imported(tensor.name, tensor.type.name, parameters, n_values, form, lossless=False, error=error)


def _split_packed(packed: PackedWeight, place: Weight) -> dict[str, mx.array]:
    """Return a packed weight's arrays under its parameters' names; joined ones are cut by rows."""
    pieces = [mx.split(array, len(place.names), axis=-2) for array in packed.arrays]
    return {
        name: array
        for i, layer in enumerate(place.layers)
        for name, array in PackedWeight([piece[i] for piece in pieces], packed.form).parameters(layer).items()
    }


def _carries(tensor: GGUFTensor, place: Weight) -> bool:
    """Tell whether a tensor's blocks stay as they are, up to moving them."""
    movable = place.columns is None or place.columns.in_groups(GROUP) is not None
    return len(tensor.shape) in (2, 3) and tensor.type in LOSSLESS and not place.exact and movable


def _carried(tensor: GGUFTensor, place: Weight, dtype: mx.Dtype) -> PackedWeight:
    packed = carry_blocks(_reordered(tensor, place), dtype)
    if place.columns is None:
        return packed
    order = place.columns.in_groups(GROUP)
    n_groups = tensor.shape[-1] // GROUP
    index = mx.array(order.from_file(n_groups))
    groups = [array.reshape(*array.shape[:-1], n_groups, -1) for array in packed.arrays]
    moved = [mx.flatten(mx.take(array, index, axis=-2), -2) for array in groups]
    return PackedWeight(moved, packed.form)


def carried_form(tensor: GGUFTensor, place: Weight) -> Quantization | None:
    """Return how a tensor is packed when GGUF's blocks are carried over; None: it is float. Reads no weight."""
    return block_form(tensor.type) if _carries(tensor, place) else _form_for(tensor, place, "carry")


def _form_for(tensor: GGUFTensor, place: Weight, target: Target) -> Quantization | None:
    """Choose how a tensor that is not carried over is packed; None: kept as float."""
    if len(tensor.shape) not in (2, 3) or target == "float" or place.exact:
        return None
    width = tensor.shape[-1]
    if isinstance(target, Quantization):
        return target if target.fits(width) else None
    if tensor.type in FLOAT:
        return None
    # A type MLX has no form for: 8 bits lose little, and the caller reports how little.
    return next((form for form in (Quantization(8, 64), Quantization(8, 32)) if form.fits(width)), None)


def _reordered(tensor: GGUFTensor, place: Weight) -> GGUFTensor:
    """Undo the order of packed rows: bytes move, nothing is rounded."""
    if place.rows is None:
        return tensor
    rows = tensor.data[place.rows.from_file(len(tensor.data))]
    return GGUFTensor(tensor.name, tensor.type, tensor.shape, rows)


def _float_values(tensor: GGUFTensor, place: Weight) -> mx.array:
    """Return the tensor's values in mlx-lm's order and convention, float32."""
    if _carries(tensor, place):  # same values as ggml's, much faster; MXFP4's come as bfloat16, which holds them
        return _carried(tensor, place, mx.float32).dequantize().astype(mx.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # what is not finite is refused by name
        return mx.array(np.ascontiguousarray(place.from_file(tensor.dequantize())))


def _cast_scales(packed: PackedWeight, dtype: mx.Dtype) -> PackedWeight:
    """Cast affine scales and biases; the microscaling modes keep their integer scales."""
    if packed.form.mode != "affine":
        return packed
    codes, *scales = packed.arrays
    return PackedWeight([codes, *(scale.astype(dtype) for scale in scales)], packed.form)


def _check_range(tensor: GGUFTensor, arrays: list[mx.array]) -> None:
    """Refuse values that overflowed on the cast, or that the file itself has broken."""
    for array in arrays:
        if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
            kind = str(array.dtype).removeprefix("mlx.core.")
            raise InputError(
                f"tensor {tensor.name}: values {kind} cannot hold; use --dtype float32, or download it again"
            )


def check_shapes(
    path: str, tensors: dict[str, GGUFTensor], places: dict[str, Weight], expected: dict[str, Any]
) -> None:
    """Check every tensor's shape against mlx-lm's model before any work is done.

    Args:
        path: the file, for the message.
        tensors, places: as in `import_weights`.
        expected: mlx-lm's parameter names to shapes.

    Raises:
        InputError: naming the tensors that differ.
    """
    wrong = []
    for name, place in places.items():
        ours = [tuple(expected.get(part, ())) for part in place.names]
        wanted = place.file_shape(ours[0]) if ours[0] else ()
        if place.then and all(shape == ours[0] for shape in ours) and len(wanted) > 1:
            wanted = (*wanted[:-2], len(ours) * wanted[-2], wanted[-1])
        if wanted != tensors[name].shape:
            wrong.append(f"{name} is {tensors[name].shape}, the model needs {wanted}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path}: {'; '.join(wrong[:3])}{more}; its metadata and tensors disagree, download it again")
