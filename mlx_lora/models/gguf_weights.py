"""From a GGUF file's tensors to mlx-lm's parameters, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlx_lora.errors import InputError
from mlx_lora.models.gguf_arch import Weight, undo_rope_order
from mlx_lora.models.gguf_blocks import FLOAT, LOSSLESS, block_form, carry_blocks
from mlx_lora.models.quantize import PackedWeight, Quantisation, quantise_weight, relative_error
from mlx_lora.sources.gguf import GGUFTensor

# What is made of the weights: GGUF's blocks as they are, all float, or all quantised anew in one form.
Target = Literal["carry", "float"] | Quantisation


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
        error: relative error made by quantising anew; 0 when lossless.
    """

    source: str
    source_type: str
    parameters: dict[str, mx.array]
    n_values: int
    form: Quantisation | None
    lossless: bool
    error: float = 0.0


def import_weights(
    tensors: dict[str, GGUFTensor], places: dict[str, Weight], target: Target, dtype: mx.Dtype
) -> Iterator[Imported]:
    """Yield every tensor in mlx-lm's form; memory holds one at a time beside what the caller keeps.

    Args:
        tensors: the file's.
        places: from `weight_map`.
        target: `carry`, `float`, or how to quantise.
        dtype: of float weights, norms, scales and biases.

    Raises:
        InputError: when a value does not fit the dtype.
    """
    for name, place in places.items():
        yield _import_tensor(tensors[name], place, target, dtype)


def _import_tensor(tensor: GGUFTensor, place: Weight, target: Target, dtype: mx.Dtype) -> Imported:
    n_values = int(np.prod(tensor.shape))
    if len(tensor.shape) == 2 and target == "carry" and tensor.type in LOSSLESS:
        packed = carry_blocks(_reordered(tensor, place), dtype)
        _check_range(tensor, packed.arrays[1:])
        parameters = packed.parameters(place.name.removesuffix(".weight"))
        return Imported(tensor.name, tensor.type.name, parameters, n_values, packed.form, lossless=True)
    values = _float_values(tensor, place)
    form = _form_for(tensor, target)
    if form is None:
        kept = values.astype(dtype)
        _check_range(tensor, [kept])
        return Imported(tensor.name, tensor.type.name, {place.name: kept}, n_values, None, lossless=True)
    packed = _cast_scales(quantise_weight(values, form), dtype)
    _check_range(tensor, packed.arrays[1:])
    error = relative_error(packed.dequantise(), values)
    parameters = packed.parameters(place.name.removesuffix(".weight"))
    return Imported(tensor.name, tensor.type.name, parameters, n_values, form, lossless=False, error=error)


def carried_form(tensor: GGUFTensor) -> Quantisation | None:
    """Return how a tensor is packed when GGUF's blocks are carried over; None: it is float. Reads no weight."""
    if len(tensor.shape) == 2 and tensor.type in LOSSLESS:
        return block_form(tensor.type)
    return _form_for(tensor, "carry")


def _form_for(tensor: GGUFTensor, target: Target) -> Quantisation | None:
    """Choose how a tensor that is not carried over is packed; None: kept as float."""
    if len(tensor.shape) != 2 or target == "float":
        return None
    width = tensor.shape[-1]
    if isinstance(target, Quantisation):
        return target if target.fits(width) else None
    if tensor.type in FLOAT:
        return None
    # A type MLX has no form for: 8 bits lose little, and the caller reports how little.
    return next((form for form in (Quantisation(8, 64), Quantisation(8, 32)) if form.fits(width)), None)


def _reordered(tensor: GGUFTensor, place: Weight) -> GGUFTensor:
    """Undo the RoPE permutation on the packed rows: bytes move, nothing is rounded."""
    if not place.rope_heads:
        return tensor
    rows = undo_rope_order(tensor.data, place.rope_heads)
    return GGUFTensor(tensor.name, tensor.type, tensor.shape, rows)


def _float_values(tensor: GGUFTensor, place: Weight) -> mx.array:
    """Return the tensor's values in mlx-lm's order and convention, float32."""
    if len(tensor.shape) == 2:
        tensor = _reordered(tensor, place)
        if tensor.type in LOSSLESS:
            return carry_blocks(tensor, mx.float32).dequantise()  # same values as ggml's, much faster
        return mx.array(tensor.dequantise())
    values = tensor.dequantise() - np.float32(place.offset)
    return mx.array(undo_rope_order(values, place.rope_heads) if place.rope_heads else values)


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
    wrong = [
        f"{name} is {tensors[name].shape}, the model needs {tuple(expected.get(place.name, ()))}"
        for name, place in places.items()
        if tuple(expected.get(place.name, ())) != tensors[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{path}: {'; '.join(wrong[:3])}{more}; its metadata and tensors disagree, download it again")
