"""The forms of quantization, quantizing an mlx-lm model, and rounding with error feedback against a plain loop in float64."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import numpy as np
import pytest
from architectures.build import write_architecture
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten

from mlx_lora.models.convert import convert_model
from mlx_lora.models.folder import load_weights
from mlx_lora.models.gptq import Curvature, Grid, feedback_codes, round_weight
from mlx_lora.models.meta import outline_of_config
from mlx_lora.models.quantize import (
    HEADS_FROM_STORED,
    MICROSCALING,
    QuantFormat,
    choose_quantization,
    dequantize_model,
    quantize_model,
    relative_error,
)
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.hub import resolve_model

IDS = mx.array([[1, 2, 3, 4, 5]])


def test_defaults_and_fixed_modes() -> None:
    assert choose_quantization(None, None, None) == QuantFormat(4, 64, "affine")
    assert choose_quantization(3, 32, "affine") == QuantFormat(3, 32)
    assert choose_quantization(None, None, "mxfp4") == QuantFormat(4, 32, "mxfp4")
    assert choose_quantization(8, None, "mxfp8") == QuantFormat(8, 32, "mxfp8")
    assert choose_quantization(None, 16, "nvfp4") == QuantFormat(4, 16, "nvfp4")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((7, None, None), "--bits 7"),
        ((0, None, None), "--bits 0"),
        ((4, 48, None), "--group-size 48"),
        ((9, 7, None), r"--bits 9.*--group-size 7"),
        ((3, 64, "nvfp4"), r"--bits 3: nvfp4 always has 4.*--group-size 64: nvfp4 always has 16"),
        ((4, None, "mxfp8"), "--bits 4: mxfp8 always has 8"),
        ((None, None, "gguf"), "--mode gguf"),
    ],
)
def test_forms_mlx_lacks_are_refused(flags, words) -> None:
    with pytest.raises(InputError, match=words):
        choose_quantization(*flags)


@pytest.mark.parametrize("mode", MICROSCALING)
def test_fixed_modes_are_what_this_mlx_makes(mode: str) -> None:
    form = choose_quantization(None, None, mode)
    weight = mx.random.normal((8, 128), key=mx.random.key(0))
    packed = form.quantize(weight)
    assert packed.arrays[0].shape == (8, 128 * form.bits // 32)
    assert packed.arrays[1].shape == (8, 128 // form.group_size)
    assert 0 < relative_error(packed.dequantize(), weight) < 0.15


def test_more_bits_lose_less() -> None:
    weight = mx.random.normal((8, 128), key=mx.random.key(0))
    errors = [
        relative_error(QuantFormat(bits, 32).quantize(weight).dequantize(), weight) for bits in (2, 3, 4, 5, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@pytest.mark.parametrize(
    "form",
    [QuantFormat(3, 32), QuantFormat(8, 32), *MICROSCALING.values()],
    ids=str,
)
def test_quantized_model_is_close_to_the_float_one(form: QuantFormat) -> None:
    wanted = tiny_model()(IDS)
    model, config, skipped, errors = quantize_model(tiny_model(), TINY, form, measure=True)
    assert skipped == []
    assert config["quantization"] == config["quantization_config"] == form.layout
    assert "quantization" not in TINY
    assert set(errors) == {
        name.removesuffix(".scales") for name, _ in tree_flatten(model.parameters()) if "scales" in name
    }
    assert all(0 < error < 0.3 for error in errors.values())
    distance = relative_error(model(IDS), wanted)
    assert 0 < distance < 0.5
    back, plain = dequantize_model(model, config)
    assert "quantization" not in plain
    assert "quantization_config" not in plain
    assert relative_error(back(IDS), model(IDS)) < 0.05


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_latent_attention_becomes_float_too(mode, tmp_path):
    """The products of each head, which mlx-lm's own function leaves packed."""
    source = write_architecture(tmp_path / "float", "deepseek_v3")
    packed, plain, again = (tmp_path / name for name in ("packed", "plain", "again"))
    form = QuantFormat(4, 32, mode)
    convert_model(resolve_model(str(source)), packed, target=form)
    model, _ = load_weights(packed, trust_remote_code=False)
    bits = {path: layer.bits for path, layer in model.named_modules() if hasattr(layer, "bits")}
    assert any(path.endswith("unembed_out") for path in bits)
    convert_model(resolve_model(str(packed)), plain, target="float")
    back, _ = load_weights(plain, trust_remote_code=False)
    assert not any("scales" in layer for layer in back.modules())
    assert relative_error(back(IDS), model(IDS)) < 0.05
    convert_model(resolve_model(str(packed)), again, target=QuantFormat(8, 32))
    finer, _ = load_weights(again, trust_remote_code=False)
    assert {path: layer.bits for path, layer in finer.named_modules() if hasattr(layer, "bits")} == dict.fromkeys(
        bits, 8
    )


def test_layers_that_do_not_divide_are_skipped_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    model, _, skipped, _ = quantize_model(tiny_model(), TINY, QuantFormat(4, 64))
    assert sorted(skipped) == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert isinstance(model.layers[0].mlp.down_proj, nn.Linear)
    assert isinstance(model.layers[0].mlp.up_proj, nn.QuantizedLinear)
    assert capsys.readouterr().out == ""  # standard output belongs to the command


@pytest.mark.parametrize("kind", ["afm7", "qwen3_5", "seed_oss"])
def test_families_with_their_own_ideas_of_quantization_convert(kind, tmp_path):
    """A dense Qwen3.5's `quant_predicate` is None, a tied Seed-OSS multiplies by its embedding as it is stored, and
    AFM's joined layer takes no mode.
    """
    source = write_architecture(tmp_path / "float", kind, tied=True)
    out = tmp_path / "packed"
    conversion = convert_model(resolve_model(str(source)), out, target=QuantFormat(4, 32))
    assert conversion.requantized
    model, _ = load_weights(out, trust_remote_code=False)
    reference, _ = load_weights(source, trust_remote_code=False)
    ids = mx.array([[5, 9, 250, 3]])
    assert relative_error(model(ids), reference(ids)) < 0.5
    packed = {name for name, _ in tree_flatten(model.parameters()) if name.endswith(".scales")}
    outlined = tree_flatten(
        outline_of_config(json.loads((out / "config.json").read_text()), mx.float32).model.parameters()
    )
    assert {name for name, _ in outlined if name.endswith(".scales")} == packed
    assert any("embed_tokens" in name for name in packed) == (kind == "qwen3_5")
    assert not any("qkv_proj" in name for name in packed) or kind == "qwen3_5"


def test_heads_that_multiply_by_the_stored_embedding_are_known():
    """Of a new mlx-lm too."""
    files = Path(mlx_lm.models.__path__[0]).glob("*.py")
    found = {file.stem for file in files if "@ self.model.embed_tokens.weight.T" in file.read_text(encoding="utf-8")}
    assert found == set(HEADS_FROM_STORED)


AFFINE = [QuantFormat(bits, group) for bits, group in ((2, 64), (3, 32), (4, 64), (5, 32), (6, 32), (8, 64))]
FIXED = [QuantFormat(4, 32, "mxfp4"), QuantFormat(4, 16, "nvfp4"), QuantFormat(8, 32, "mxfp8")]


def correlated(inputs: int, tokens: int = 900, seed: int = 0) -> mx.array:
    """Return X X^T of inputs that depend on each other."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(inputs, inputs)) @ draw.normal(size=(inputs, tokens)) * draw.gamma(1.0, size=(inputs, 1))
    return mx.array((x @ x.T / inputs).astype(np.float32))


def weights(outputs: int, inputs: int, seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=(outputs, inputs)).astype(np.float32) * 0.05)


def plain_gptq(weight, hessian, order, scales, biases, size, most):
    """GPTQ in float64, one column at a time, each time with the inverse of what is left of H (equations 2 and 3)."""
    weight, found = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    left = list(order)
    while left:
        j = left[0]
        inverse = np.linalg.inv(hessian.astype(np.float64)[np.ix_(left, left)])
        group = j // size
        step = np.where(scales[:, group] == 0, 1, scales[:, group])
        code = np.clip(np.round((weight[:, j] - biases[:, group]) / step), 0, most)
        found[:, j] = code
        error = (weight[:, j] - (biases[:, group] + scales[:, group] * code)) / inverse[0, 0]
        weight[:, left] -= error[:, None] * inverse[0][None]
        left = left[1:]
    return found


@pytest.mark.parametrize("shape", [(5, 96), (33, 160)])
def test_codes_are_those_of_a_plain_loop_in_float64(shape):
    quantization = QuantFormat(4, 32)
    weight, curvature = weights(*shape), Curvature.of(correlated(shape[1]))
    grid = Grid.of_weight(weight, quantization, mx.float32)
    codes, values = feedback_codes(weight, curvature, grid)
    arrays = [np.array(a) for a in (weight, curvature.hessian)]
    wanted = plain_gptq(*arrays, curvature.order, np.array(grid.scales), np.array(grid.biases), 32, 15)
    assert (np.array(codes) == wanted).mean() > 0.98  # a tie that rounds otherwise moves what follows
    error = curvature.error(weight - values).sum().item()
    assert error == pytest.approx(curvature.error(weight - grid.values(mx.array(wanted))).sum().item(), rel=0.02)
    plain = np.clip(np.round((arrays[0] - np.repeat(grid.biases, 32, 1)) / np.repeat(grid.scales, 32, 1)), 0, 15)
    assert (plain == wanted).mean() < 0.9


@pytest.mark.parametrize("quantization", [*AFFINE, *FIXED], ids=str)
def test_the_outputs_error_is_below_plain_roundings(quantization):
    weight, curvature = weights(24, 192), Curvature.of(correlated(192))
    packed, measured = round_weight(weight, curvature, [Grid.of_weight(weight, quantization, mx.float32)])
    stored = packed.dequantize().astype(mx.float32)
    plain = quantization.quantize(weight).dequantize().astype(mx.float32)
    error, of_plain = (curvature.error(weight - w).sum().item() for w in (stored, plain))
    assert error == pytest.approx(measured.sum().item(), rel=1e-3)  # what is packed is what was measured
    assert error < 0.75 * of_plain
    # Each weight for itself is rounded worse: the gain is of the outputs, and only for these inputs.
    assert mx.square(weight - stored).sum().item() > mx.square(weight - plain).sum().item()
    independent = Curvature.of(mx.eye(192))
    assert independent.error(weight - stored).sum().item() > independent.error(weight - plain).sum().item()


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
def test_a_grid_of_more_bits_has_the_old_weight_exactly(bits):
    packed = QuantFormat(4, 32).quantize(weights(7, 96))
    old = packed.dequantize()
    grid = Grid.of_layer(packed.arrays[1], packed.arrays[2], packed.quantization).refined(bits)
    curvature = Curvature.of(correlated(96))
    codes, _ = feedback_codes(old, curvature, grid)
    assert mx.allclose(grid.packed(codes).dequantize(), old, atol=1e-6)
    moved = old + 0.01 * weights(7, 96, seed=2)
    assert not mx.allclose(grid.packed(feedback_codes(moved, curvature, grid)[0]).dequantize(), moved, atol=1e-6)


def test_scales_are_the_best_for_their_codes():
    weight, curvature = weights(3, 64), Curvature.of(correlated(64))
    grid = Grid.of_weight(weight, QuantFormat(3, 32), mx.float32)
    codes, _ = feedback_codes(weight, curvature, grid)
    fitted = grid.fitted(codes, weight, curvature.hessian)
    best = curvature.error(weight - fitted.values(codes))
    assert (best < curvature.error(weight - grid.values(codes))).all()
    q, h = np.array(codes, np.float64), np.array(curvature.hessian, np.float64)
    for row in range(3):
        features = np.zeros((64, 4))
        for group in range(2):
            own = slice(32 * group, 32 * (group + 1))
            features[own, group], features[own, 2 + group] = q[row, own], 1
        half = np.linalg.cholesky(h).T
        solved = np.linalg.lstsq(half @ features, half @ np.array(weight, np.float64)[row], rcond=None)[0]
        wanted = ((half @ (features @ solved - np.array(weight, np.float64)[row])) ** 2).sum()
        assert best[row].item() == pytest.approx(wanted, rel=1e-2)


def test_inputs_that_are_always_zero_do_no_harm():
    weight = weights(4, 64)
    hessian = correlated(64)
    hessian[3] = 0.0
    hessian[:, 3] = 0.0
    for one in (hessian, mx.zeros((64, 64))):
        packed, _ = round_weight(weight, Curvature.of(one), [Grid.of_weight(weight, QuantFormat(4, 32), mx.float32)])
        assert mx.isfinite(packed.dequantize()).all()
        assert mx.abs(packed.dequantize() - weight).max().item() < 0.2
