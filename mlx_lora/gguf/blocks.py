"""Unpack GGUF blocks into MLX's affine layout, or requantize the ones MLX cannot hold.

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

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf.quants import Q4_K

from mlx_lora.gguf.reader import GGUFTensor
from mlx_lora.models.quantize import PackedWeight, Quantization

GROUP = 32
_BITS = {Kind.Q4_0: 4, Kind.Q4_1: 4, Kind.Q4_K: 4, Kind.Q5_0: 5, Kind.Q5_1: 5, Kind.Q5_K: 5, Kind.Q8_0: 8}
LOSSLESS = frozenset((*_BITS, Kind.MXFP4))
MXFP4 = Quantization(4, GROUP, "mxfp4")
FLOAT = frozenset({Kind.F32, Kind.F16, Kind.BF16, Kind.F64})
_CHUNK_BYTES = 1 << 25  # packed bytes unpacked at a time: temporaries stay at a few hundred MB


def block_quantization(kind: Kind) -> Quantization:
    """Return MLX's quantization that is equal to a type in LOSSLESS."""
    return MXFP4 if kind is Kind.MXFP4 else Quantization(_BITS[kind], GROUP)


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
    return PackedWeight([shaped[0], *(array.astype(dtype) for array in shaped[1:])], Quantization(bits, GROUP))


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


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return codes packed as MLX does: one little-endian stream of bits per row.

    Args:
        codes: (rows, width) uint8 below 2^bits; width a multiple of 32.
        bits: 4, 5 or 8.

    Returns:
        (rows, width * bits / 32) uint32.
    """
    rows, width = codes.shape
    if bits == 8:
        return np.ascontiguousarray(codes).view("<u4")
    if bits == 4:
        return np.ascontiguousarray(codes[:, 0::2] | codes[:, 1::2] << 4).view("<u4")
    # Eight codes fill a whole number of bytes: gather them in one 64-bit word and keep its low bytes.
    eights = codes.reshape(rows, width // 8, 8)
    words = np.zeros((rows, width // 8), "<u8")
    for i in range(8):
        words |= eights[..., i].astype("<u8") << np.uint64(bits * i)
    stream = words.view(np.uint8).reshape(rows, width // 8, 8)[..., :bits]
    return np.ascontiguousarray(stream).reshape(rows, width * bits // 8).view("<u4")


def _unpack(kind: Kind, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return codes (rows, groups, 32) uint8, scales and biases (rows, groups) float32 of rows of blocks."""
    n_rows = len(data)
    if kind in (Kind.Q4_K, Kind.Q5_K):
        codes, scales, biases = _unpack_k(kind, data)
    else:
        codes, scales, biases = _unpack_legacy(kind, data)
    return codes.reshape(n_rows, -1, GROUP), scales.reshape(n_rows, -1), biases.reshape(n_rows, -1)


# In bytes: Q4_0 d2 qs16 | Q4_1 d2 m2 qs16 | Q5_0 d2 qh4 qs16 | Q5_1 d2 m2 qh4 qs16 | Q8_0 d2 qs32
_BLOCK_BYTES = {Kind.Q4_0: 18, Kind.Q4_1: 20, Kind.Q5_0: 22, Kind.Q5_1: 24, Kind.Q8_0: 34}


def _unpack_legacy(kind: Kind, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    blocks = data.reshape(-1, _BLOCK_BYTES[kind])
    scales = _halves(blocks[:, 0:2])
    if kind is Kind.Q8_0:
        # Flipping the sign bit of a two's complement byte adds 128.
        return blocks[:, 2:] ^ np.uint8(0x80), scales, scales * np.float32(-128)
    quarters = blocks[:, -16:]
    codes = np.concatenate([quarters & 15, quarters >> 4], axis=1)  # (blocks, 32)
    if kind in (Kind.Q5_0, Kind.Q5_1):
        codes |= np.unpackbits(blocks[:, -20:-16], axis=1, bitorder="little") << 4
    if kind in (Kind.Q4_1, Kind.Q5_1):
        return codes, scales, _halves(blocks[:, 2:4])
    return codes, scales, scales * np.float32(-8 if kind is Kind.Q4_0 else -16)


def _unpack_k(kind: Kind, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Unpack blocks of 256 values in 8 groups of 32.

    In bytes: Q4_K d2 dmin2 scales12 qs128 | Q5_K d2 dmin2 scales12 qh32 qs128
    """
    blocks = data.reshape(-1, 144 if kind is Kind.Q4_K else 176)
    scale_codes, minimum_codes = Q4_K.get_scale_min(np.ascontiguousarray(blocks[:, 4:16]))  # (blocks, 8) each
    scales = _halves(blocks[:, 0:2])[:, None] * scale_codes.astype(np.float32)
    biases = -(_halves(blocks[:, 2:4])[:, None] * minimum_codes.astype(np.float32))
    quarters = blocks[:, -128:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([quarters & 15, quarters >> 4], axis=2).reshape(-1, 8, 32)
    if kind is Kind.Q5_K:
        # Bit g of byte i is the fifth bit of value i of group g.
        high = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")  # (blocks, 32, 8)
        codes |= high.transpose(0, 2, 1) << 4
    return codes, scales, biases


def _halves(pairs: np.ndarray) -> np.ndarray:
    """Return (n,) float32 read from (n, 2) bytes of little-endian float16."""
    return np.ascontiguousarray(pairs).view("<f2")[:, 0].astype(np.float32)
