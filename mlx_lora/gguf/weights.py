"""Convert a GGUF file's tensors to mlx-lm's parameters, one tensor at a time, without changing a block that MLX can hold.

MLX keeps a quantized (out, in) weight as w = scale * q + bias over groups of the last axis:
    weight (out, in * bits / 32) uint32, q packed as one little-endian stream of bits
    scales, biases (out, in / group)
These ggml types have that layout already, in groups of 32:
    Q4_0 Q5_0 Q8_0      d * (q - 2^(bits-1))        scale = d,       bias = -2^(bits-1) * d
    Q4_1 Q5_1           d * q + m                   scale = d,       bias = m
    Q4_K Q5_K           d * sc * q - dmin * mn      scale = d * sc,  bias = -dmin * mn
    MXFP4            2^(e - 127) * code, a microscaling format that MLX has too, with the same scales and codes
Their codes carry over unchanged. Scales and biases are exact in float32 (the two K products are rounded
once, as ggml itself rounds them); a 16-bit dtype rounds them once more.
A 3-axis tensor of experts is the same, expert by expert.
Q6_K, Q3_K, Q2_K and the IQ types have 16-wide groups or code books: they are requantized at 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import Q4_K

from mlx_lora.gguf.mapping import TensorMapping
from mlx_lora.gguf.reader import GGUFTensor
from mlx_lora.models.quantize import AFFINE, MXFP4, PackedWeight, QuantFormat, pack_codes, relative_error
from mlx_lora.utils.errors import InputError, first_of

GROUP = 32
_BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q4_K: 4, Kind.Q5_0: 5, Kind.Q5_1: 5, Kind.Q5_K: 5, Kind.Q8_0: 8}
LOSSLESS = frozenset((*_BITS, Kind.MXFP4))
FLOAT = frozenset({Kind.F32, Kind.F16, Kind.BF16, Kind.F64})
_CHUNK_BYTES = 1 << 25  # packed bytes unpacked at a time: temporaries stay at a few hundred MB


def carry_blocks(tensor: GGUFTensor, dtype: mx.Dtype) -> PackedWeight:
    """Repack a tensor of a type in LOSSLESS without touching its codes.

    Args:
        tensor: (out, in), or (E, out, in) for experts.
        dtype: of scales and biases; MXFP4's scales are exponents and stay bytes.

    Returns:
        The same values, group 32.
    """
    if tensor.type is Kind.MXFP4:
        return _carry_mxfp4(tensor)
    bits, (n_rows, row_bytes) = _BITS[tensor.type], tensor.data.shape
    width = tensor.shape[-1]
    packed = np.empty((n_rows, width * bits // 32), np.uint32)
    scales = np.empty((n_rows, width // GROUP), np.float32)
    biases = np.empty((n_rows, width // GROUP), np.float32)
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, n_rows, step):
        rows = slice(start, start + step)
        codes, scale, bias = _unpack(tensor.type, tensor.data[rows])
        packed[rows] = pack_codes(codes.reshape(len(codes), width), bits)
        scales[rows], biases[rows] = scale, bias
    shaped = [mx.array(array.reshape(*tensor.shape[:-1], -1)) for array in (packed, scales, biases)]
    return PackedWeight([shaped[0], *(array.astype(dtype) for array in shaped[1:])], QuantFormat(bits, GROUP))


_MXFP4_BYTES = 17  # e1 qs16: code i in the low half of byte i, code 16 + i in the high half


def _carry_mxfp4(tensor: GGUFTensor) -> PackedWeight:
    """Repack MXFP4: ggml's codes of a block lie 16 apart in a byte, MLX's are neighbors."""
    blocks = tensor.data.reshape(-1, _MXFP4_BYTES)
    packed = np.empty((len(blocks), GROUP // 8), np.uint32)
    step = max(1, _CHUNK_BYTES // _MXFP4_BYTES)
    for start in range(0, len(blocks), step):
        quarters = blocks[start : start + step, 1:]
        packed[start : start + step] = pack_codes(np.concatenate([quarters & 15, quarters >> 4], axis=1), 4)
    arrays = [packed, np.ascontiguousarray(blocks[:, 0])]
    return PackedWeight([mx.array(array.reshape(*tensor.shape[:-1], -1)) for array in arrays], MXFP4)


def mxfp4_blocks(packed: PackedWeight) -> np.ndarray:
    """Return a weight in MLX's mxfp4 as ggml's blocks, bit for bit: the inverse of `carry_blocks`.

    Args:
        packed: (..., in) in groups of 32.

    Returns:
        (..., in / 32 * 17) uint8.
    """
    weight, scales = (np.array(array) for array in packed.arrays)
    pairs = weight.reshape(-1, GROUP // 8).view(np.uint8)  # (blocks, 16), code 2 i in the low half of byte i
    codes = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(-1, GROUP)
    blocks = np.concatenate([scales.reshape(-1, 1), codes[:, :16] | codes[:, 16:] << 4], axis=1)
    return blocks.reshape(*scales.shape[:-1], -1)


def stored_kind(packed: PackedWeight, symmetric: bool | None = None) -> Kind | None:
    """Return the ggml type whose blocks hold an affine weight with its codes; None: none does.

    Scales and biases are float16 there. Groups of 64 or 128 are divided into blocks of 32 with the same scale and bias.

    Args:
        packed: (..., in), affine.
        symmetric: whether its biases are -2^(bits - 1) times its scales, so that the type needs none; None: it is tested.
    """
    quantization = packed.quantization
    if quantization.mode != AFFINE or quantization.bits not in (2, 3, 4, 5, 8):
        return None
    bits = max(4, quantization.bits)
    if symmetric is None:
        _, scales, biases = (array.astype(mx.float32) for array in packed.arrays)
        symmetric = bits == quantization.bits and mx.array_equal(biases, scales * -(2.0 ** (bits - 1))).item() is True
    if bits == 8:
        return Kind.Q8_0 if symmetric else None
    return {4: (Kind.Q4_1, Kind.Q4_0), 5: (Kind.Q5_1, Kind.Q5_0)}[bits][symmetric]


def affine_blocks(packed: PackedWeight, kind: Kind) -> np.ndarray:
    """Return an affine weight as ggml's blocks with the same codes: the inverse of `carry_blocks`.

    Args:
        packed: (..., in).
        kind: what `stored_kind` returned.

    Returns:
        (..., in / 32 * bytes of a block) uint8.
    """
    weight, scales, biases = packed.arrays
    ones, zeros = mx.ones(scales.shape), mx.zeros(scales.shape)
    codes = np.array(packed.quantization.dequantize(weight, ones, zeros).astype(mx.uint8)).reshape(-1, GROUP)
    times = packed.quantization.group_size // GROUP
    d, m = (
        np.repeat(np.array(array.astype(mx.float32)).reshape(-1, 1), times, axis=0).astype("<f2").view(np.uint8)
        for array in (scales, biases)
    )
    if kind is Kind.Q8_0:
        parts = [d, codes ^ np.uint8(0x80)]
    else:
        high = [np.packbits(codes >> 4, axis=1, bitorder="little")] if kind in (Kind.Q5_0, Kind.Q5_1) else []
        low = codes & 15
        parts = [d, *([m] if kind in (Kind.Q4_1, Kind.Q5_1) else []), *high, low[:, :16] | low[:, 16:] << 4]
    return np.concatenate(parts, axis=1).reshape(*weight.shape[:-1], -1)


def _unpack(kind: Kind, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes (rows, groups, 32) uint8, scales and biases (rows, groups) float32 of rows of blocks.

    K types have blocks of 256 values in 8 groups of 32. In bytes: Q4_K d2 dmin2 scales12 qs128 | Q5_K d2 dmin2 scales12
    qh32 qs128 | Q4_0 d2 qs16 | Q4_1 d2 m2 qs16 | Q5_0 d2 qh4 qs16 | Q5_1 d2 m2 qh4 qs16 | Q8_0 d2 qs32.
    """
    blocks = data.reshape(-1, GGML_QUANT_SIZES[kind][1])
    scales = _halves(blocks[:, 0:2])
    if kind in (Kind.Q4_K, Kind.Q5_K):
        scale_codes, minimum_codes = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))  # (blocks, 8) each
        scales = scales[:, None] * scale_codes.astype(np.float32)
        biases = -(_halves(blocks[:, 2:4])[:, None] * minimum_codes.astype(np.float32))
        quarters = blocks[:, -128:].reshape(-1, 4, 1, 32)
        codes = np.concatenate([quarters & 15, quarters >> 4], axis=2).reshape(-1, 8, 32)
        if kind is Kind.Q5_K:
            # Bit g of byte i is the fifth bit of value i of group g.
            high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")  # (blocks, 32, 8)
            codes |= high.transpose(0, 2, 1) << 4
    elif kind is Kind.Q8_0:
        # Flipping the sign bit of a two's complement byte adds 128.
        codes, biases = blocks[:, 2:] ^ np.uint8(0x80), scales * np.float32(-128)
    else:
        quarters = blocks[:, -16:]
        codes = np.concatenate([quarters & 15, quarters >> 4], axis=1)  # (blocks, 32)
        if kind in (Kind.Q5_0, Kind.Q5_1):
            codes |= np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little") << 4
        least = np.float32(-8 if kind is Kind.Q4_0 else -16)
        biases = _halves(blocks[:, 2:4]) if kind in (Kind.Q4_1, Kind.Q5_1) else scales * least
    return codes.reshape(len(data), -1, GROUP), scales.reshape(len(data), -1), biases.reshape(len(data), -1)


def _halves(pairs: np.ndarray) -> np.ndarray:
    """Return (n,) float32 read from (n, 2) bytes of little-endian float16."""
    return np.ascontiguousarray(pairs).view("<f2")[:, 0].astype(np.float32)


# Blocks of llama.cpp's formats
# How weights are stored: GGUF's blocks carried over unchanged, all as floats, or all quantized again in one way.
Target = Literal["carry", "float"] | QuantFormat


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
    quantization: QuantFormat | None
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
    if _carries(tensor, mapping):  # same values as ggml's, much faster; MXFP4's come as bfloat16, which is exact
        values = _carried(tensor, mapping, mx.float32).dequantize().astype(mx.float32)
    else:
        with np.errstate(invalid="ignore", divide="ignore"):  # _check_range reports values that are not finite
            values = mx.array(np.ascontiguousarray(mapping.from_file(tensor.dequantize())))
    quantization = _quantization_for(tensor, mapping, target)
    if quantization is None:
        kept = values if mapping.values != "plain" else values.astype(dtype)  # mlx-lm keeps the others in float32
        _check_range(tensor, [kept])
        parts = [kept] if not mapping.then else mx.split(kept, len(mapping.names), axis=-2)
        parameters = dict(zip(mapping.names, parts, strict=True))
        return Imported(tensor.name, tensor.type.name, parameters, n_values, None, lossless=True)
    packed = quantization.quantize(values)
    if quantization.mode == AFFINE:  # microscaling modes keep their integer scales
        codes, *scales = packed.arrays
        packed = PackedWeight([codes, *(scale.astype(dtype) for scale in scales)], quantization)
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
    if mapping.rows is not None:  # packed rows in mlx-lm's order: bytes are moved, nothing is rounded
        tensor = replace(tensor, data=tensor.data[mapping.rows.from_file(len(tensor.data))])
    packed = carry_blocks(tensor, dtype)
    if mapping.columns is None:
        return packed
    order: Any = mapping.columns.in_groups(GROUP)  # not None, because `_carries` has checked it
    n_groups = tensor.shape[-1] // GROUP
    index = mx.array(order.from_file(n_groups))
    groups = [array.reshape(*array.shape[:-1], n_groups, -1) for array in packed.arrays]
    moved = [mx.flatten(mx.take(array, index, axis=-2), -2) for array in groups]
    return PackedWeight(moved, packed.quantization)


def carried_quantization(tensor: GGUFTensor, mapping: TensorMapping) -> QuantFormat | None:
    """Return how a tensor is packed if GGUF's blocks are carried over, or None for float; reads no weight."""
    if not _carries(tensor, mapping):
        return _quantization_for(tensor, mapping, "carry")
    return MXFP4 if tensor.type is Kind.MXFP4 else QuantFormat(_BITS[tensor.type], GROUP)


def _quantization_for(tensor: GGUFTensor, mapping: TensorMapping, target: Target) -> QuantFormat | None:
    """Return how to pack a tensor that is not carried over, or None to keep it as float."""
    if len(tensor.shape) not in (2, 3) or target == "float" or mapping.exact:
        return None
    width = tensor.shape[-1]
    if isinstance(target, QuantFormat):
        return target if target.fits(width) else None
    if tensor.type in FLOAT:
        return None
    # MLX has no equivalent of this type: 8 bits lose little, and the caller reports how little.
    return next((choice for choice in (QuantFormat(8, 64), QuantFormat(8, 32)) if choice.fits(width)), None)


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
        raise InputError(f"{path}: {first_of(wrong, 3)}; its tensors do not match its metadata, so download it again")
