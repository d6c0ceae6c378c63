"""The forms of quantization, and quantizing an mlx-lm model."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
import pytest
from architectures.build import write_architecture
from conftest import TINY, tiny_model
from mlx.utils import tree_flatten

from mlx_lora.models.convert import convert_model
from mlx_lora.models.folder import load_weights
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
