"""GGUF blocks in MLX's affine layout hold the values that ggml's own unpacking gives."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from gguf_tensors import ROWS, WIDTH, random_tensor
from run_cli import holds

from mlx_lora.gguf.mapping import TensorMapping
from mlx_lora.gguf.reader import GGUFTensor
from mlx_lora.gguf.weights import LOSSLESS, affine_blocks, carry_blocks, import_weights, stored_kind
from mlx_lora.models.quantize import PackedWeight, QuantFormat, pack_codes
from mlx_lora.utils.errors import InputError


def values_of(packed: PackedWeight) -> np.ndarray:
    """Return a packed weight's values; numpy has no bfloat16."""
    return np.array(packed.dequantize().astype(mx.float32))


@pytest.mark.parametrize("kind", sorted(LOSSLESS), ids=lambda kind: kind.name)
def test_values_are_kept(kind: Kind) -> None:
    tensor = random_tensor(kind)
    packed = carry_blocks(tensor, mx.float32)
    found, wanted = values_of(packed), tensor.dequantize()
    if kind is Kind.MXFP4:  # a power of two times a code: nothing to round
        np.testing.assert_array_equal(found, wanted)
        return
    scales = np.repeat(np.abs(np.array(packed.arrays[1])), packed.quantization.group_size, axis=1)
    largest = np.abs(wanted) + scales * 2**packed.quantization.bits  # what one rounding of scale * code is relative to
    assert (np.abs(found - wanted) <= largest * 2.0**-23).all()


@pytest.mark.parametrize("kind", sorted(LOSSLESS), ids=lambda kind: kind.name)
def test_another_code_gives_another_value(kind: Kind) -> None:
    tensor = random_tensor(kind)
    changed = GGUFTensor("t", kind, tensor.shape, tensor.data.copy())
    changed.data[2, -1] ^= 0x11
    before, after = (values_of(carry_blocks(t, mx.float32)) for t in (tensor, changed))
    differing = np.argwhere(before != after)
    assert 1 <= len(differing) <= 2
    assert (differing[:, 0] == 2).all()


@pytest.mark.parametrize("kind", sorted(LOSSLESS), ids=lambda kind: kind.name)
def test_bfloat16_scales_round_once(kind: Kind) -> None:
    exact, rounded = (carry_blocks(random_tensor(kind), dtype) for dtype in (mx.float32, mx.bfloat16))
    assert mx.array_equal(exact.arrays[0], rounded.arrays[0])
    for a, b in zip(exact.arrays[1:], rounded.arrays[1:], strict=True):
        assert mx.array_equal(a if kind is Kind.MXFP4 else a.astype(mx.bfloat16), b)


@pytest.mark.parametrize("kind", sorted(LOSSLESS), ids=lambda kind: kind.name)
def test_experts_are_carried_one_after_the_other(kind: Kind) -> None:
    whole = random_tensor(kind)
    experts = GGUFTensor("t", kind, (2, ROWS // 2, WIDTH), whole.data)
    found, wanted = carry_blocks(experts, mx.float32), carry_blocks(whole, mx.float32)
    for a, b in zip(found.arrays, wanted.arrays, strict=True):
        assert a.shape[:2] == (2, ROWS // 2)
        assert mx.array_equal(a[1], b[ROWS // 2 :])
        assert not mx.array_equal(a[0], b[ROWS // 2 :])


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_codes_come_back_from_mlx(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (3, 96)).astype(np.uint8)
    ones, zeros = mx.ones((3, 3)), mx.zeros((3, 3))
    back = mx.dequantize(mx.array(pack_codes(codes, bits)), ones, zeros, group_size=32, bits=bits)
    np.testing.assert_array_equal(np.array(back), codes)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0], ids=lambda kind: kind.name)
def test_carried_blocks_are_written_back_byte_for_byte(kind: Kind) -> None:
    tensor = random_tensor(kind)
    packed = carry_blocks(tensor, mx.float32)
    assert stored_kind(packed) is kind
    np.testing.assert_array_equal(affine_blocks(packed, kind).reshape(tensor.data.shape), tensor.data)


@pytest.mark.parametrize(("bits", "group"), [(2, 64), (3, 32), (4, 32), (4, 64), (4, 128), (5, 32), (5, 64)])
def test_affine_weights_of_mlx_become_blocks_with_their_values(bits: int, group: int) -> None:
    """Scales and biases are float16 there; so they are here, and nothing is lost."""
    weight = mx.random.normal((5, 256), key=mx.random.key(1)).astype(mx.float16)
    packed = QuantFormat(bits, group).quantize(weight)
    kind = stored_kind(packed)
    assert kind in (Kind.Q4_1, Kind.Q5_1)
    found = GGUFTensor("t", kind, (5, 256), affine_blocks(packed, kind)).dequantize()
    whole = [packed.arrays[0], *(array.astype(mx.float32) for array in packed.arrays[1:])]
    np.testing.assert_allclose(
        found, np.array(PackedWeight(whole, packed.quantization).dequantize()), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize(("bits", "mode"), [(6, "affine"), (8, "affine"), (4, "mxfp4"), (8, "mxfp8")])
def test_other_weights_have_no_blocks(bits: int, mode: str) -> None:
    weight = mx.random.normal((5, 256), key=mx.random.key(1))
    assert stored_kind(QuantFormat(bits, 32, mode).quantize(weight)) is None


def test_many_rows_are_unpacked_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = carry_blocks(random_tensor(Kind.Q5_1), mx.float32)
    monkeypatch.setattr("mlx_lora.gguf.weights._CHUNK_BYTES", 1)
    for a, b in zip(whole.arrays, carry_blocks(random_tensor(Kind.Q5_1), mx.float32).arrays, strict=True):
        assert mx.array_equal(a, b)


@pytest.mark.parametrize("kind", [Kind.Q2_K, Kind.Q3_K, Kind.Q6_K, Kind.F16], ids=lambda kind: kind.name)
def test_other_types_are_requantized_or_kept_float(kind: Kind) -> None:
    tensor = random_tensor(kind)
    (imported,) = import_weights({"t": tensor}, {"t": TensorMapping("x.weight")}, "carry", mx.float32)
    if kind is Kind.F16:
        assert (imported.quantization, imported.lossless) == (None, True)
        np.testing.assert_array_equal(np.array(imported.parameters["x.weight"]), tensor.dequantize())
        return
    assert imported.quantization == QuantFormat(8, 64)
    found = mx.dequantize(*imported.parameters.values(), **imported.quantization.layout)
    error = np.linalg.norm(np.array(found) - tensor.dequantize()) / np.linalg.norm(tensor.dequantize())
    assert 0 < imported.error < 0.01
    assert imported.error == pytest.approx(error, rel=1e-3)


def test_quantize_anew_and_float_targets() -> None:
    tensor = random_tensor(Kind.Q4_0)
    mapping = {"t": TensorMapping("x.weight")}
    (as_float,) = import_weights({"t": tensor}, mapping, "float", mx.float32)
    np.testing.assert_array_equal(np.array(as_float.parameters["x.weight"]), tensor.dequantize())
    (three,) = import_weights({"t": tensor}, mapping, QuantFormat(3, 32), mx.float32)
    (six,) = import_weights({"t": tensor}, mapping, QuantFormat(6, 32), mx.float32)
    assert three.error > six.error > 0
    (kept,) = import_weights({"t": random_tensor(Kind.F32)}, mapping, QuantFormat(4, 1024), mx.float32)
    assert kept.quantization is None  # 512 columns do not divide into groups of 1024


def test_values_that_overflow_are_refused() -> None:
    tensor = GGUFTensor("big", Kind.F32, (1, 1), np.array([[1e30]], "<f4").view(np.uint8))
    with pytest.raises(InputError, match=r"big.*float16"):
        list(import_weights({"big": tensor}, {"big": TensorMapping("x.weight")}, "float", mx.float16))


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("target", ["carry", "float"])
def test_a_tensor_with_values_that_are_no_numbers_is_called_damaged(kind, target):
    """The advice was another dtype, which is for values that are too large for the one that was asked for."""
    tensor = random_tensor(kind)
    data = tensor.data.copy()
    data.view(np.uint8)[1] = 0xFF  # NaN in floats, and in a block's scale
    damaged = GGUFTensor("blk.0.attn_q.weight", kind, tensor.shape, data)
    with pytest.raises(InputError) as error:
        list(import_weights({"t": damaged}, {"t": TensorMapping("x.weight")}, target, mx.float32))
    holds(str(error.value), "blk.0.attn_q.weight", "damaged")
    assert "--dtype" not in str(error.value)


def test_a_tensor_too_large_for_a_dtype_is_not_damaged():
    values = np.full((ROWS, WIDTH), 1e6, np.float32)
    tensor = GGUFTensor("t", Kind.F32, values.shape, values.view(np.uint8).reshape(ROWS, -1))
    with pytest.raises(InputError, match="--dtype") as error:
        list(import_weights({"t": tensor}, {"t": TensorMapping("x.weight")}, "float", mx.float16))
    assert "damaged" not in str(error.value)
    list(import_weights({"t": tensor}, {"t": TensorMapping("x.weight")}, "float", mx.float32))
