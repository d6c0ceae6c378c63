"""The adapter folder: round trip, stock mlx-lm reads it, and everything that does not fit is named."""

from __future__ import annotations

import json
import shutil

import mlx.core as mx
import numpy as np
import pytest
from conftest import quantized, tiny_model, write_folder
from make_adapters import TOKENS, adapt_and_save, loaded
from mlx_lm.utils import load as mlx_lm_load
from mlx_lm.utils import load_model
from run_cli import holds

from mlx_lora.adapters.inject import adapter_parameters
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from mlx_lora.utils import device
from mlx_lora.utils.errors import InputError


@pytest.mark.parametrize(
    ("targets", "num_layers"),
    [
        ("all-linear", -1),
        ("q_proj,v_proj", 1),
        ("all-linear,embed_tokens", -1),
        ("layers.0.mlp.*,layers.1.self_attn.q_proj", -1),
    ],
)
@pytest.mark.parametrize("model", ["tiny_folder", "tiny_4bit_folder"])
def test_round_trip_here_and_in_stock_mlx_lm(model, targets, num_layers, tmp_path, request):
    folder = request.getfixturevalue(model)
    expected = adapt_and_save(folder, tmp_path / "a", targets, num_layers)
    base = loaded(folder)
    bare = base.model(TOKENS)
    info = load_adapter(base, tmp_path / "a")
    assert np.allclose(base.model(TOKENS), expected, atol=1e-5)
    assert not np.allclose(bare, expected, atol=1e-2)
    assert info.scale == 1.5
    stock, _ = mlx_lm_load(str(folder), adapter_path=str(tmp_path / "a"))
    assert np.allclose(stock(TOKENS), expected, atol=1e-4)


def test_adapter_of_stock_mlx_lm_loads_here(tiny_folder, tmp_path):
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = load_model(tiny_folder)
    model.freeze()
    shape = {"rank": 8, "scale": 20.0, "dropout": 0.0}
    linear_to_lora_layers(model, 1, shape)
    factors = [(n, 0.02 * mx.random.normal(v.shape)) for n, v in adapter_parameters(model).items()]
    model.load_weights(factors, strict=False)
    mx.save_safetensors(str(tmp_path / WEIGHTS_FILE), dict(factors))
    (tmp_path / CONFIG_FILE).write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": shape})
    )
    base = loaded(tiny_folder, tmp_path)
    assert np.allclose(base.model(TOKENS), model(TOKENS), atol=1e-4)


def test_qlora_adapter_goes_onto_its_float_base_but_not_onto_another(tiny_folder, tiny_4bit_folder, tmp_path):
    adapt_and_save(tiny_4bit_folder, tmp_path / "a")
    load_adapter(loaded(tiny_folder), tmp_path / "a")
    stranger = write_folder(tmp_path / "stranger", tiny_model(seed=5))
    base = loaded(stranger)
    with pytest.raises(InputError, match=r"trained on a different base.*--ignore-fingerprint"):
        load_adapter(base, tmp_path / "a")
    load_adapter(base, tmp_path / "a", ignore_fingerprint=True)


def test_every_mismatch_is_gathered_into_one_error(tiny_folder, tmp_path):
    adapt_and_save(tiny_folder, tmp_path)
    stored = mx.load(str(tmp_path / WEIGHTS_FILE))
    names = sorted(stored)
    stored.pop(names[0])
    stored[names[1]] = mx.zeros((3, 5))
    stored["model.layers.9.bogus.lora_a"] = mx.zeros((2, 2))
    mx.save_safetensors(str(tmp_path / WEIGHTS_FILE), stored)
    with pytest.raises(InputError) as raised:
        load_adapter(loaded(tiny_folder), tmp_path)
    message = str(raised.value)
    holds(message, f"{names[0]} is missing", f"{names[1]} is (3, 5)", "layers.9.bogus.lora_a is not in the model")


def test_saving_replaces_whole_files(tiny_folder, tmp_path):
    adapt_and_save(tiny_folder, tmp_path)
    adapt_and_save(tiny_folder, tmp_path, "q_proj")
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    load_adapter(loaded(tiny_folder), tmp_path)


def test_the_compute_dtype_does_not_make_it_another_base(tiny_folder):
    # Norms are float32 here: rounded to float16 first, they would not round to the same bfloat16.
    marks = {loaded(tiny_folder, dtype=d).fingerprint for d in ("float16", "float32")}
    assert len(marks) == 1
    other = write_folder(tiny_folder.parent / "other", tiny_model(seed=4))
    assert loaded(other).fingerprint not in marks


def test_float16_scales_are_cast_once_at_load(tmp_path):
    model = quantized(tiny_model())
    model.set_dtype(mx.float16)
    config = {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}}
    folder = write_folder(tmp_path / "half", model, config)
    base = loaded(folder)
    assert base.model.model.embed_tokens.scales.dtype == device.compute_dtype()
    assert base.model(TOKENS).dtype == device.compute_dtype()
    assert loaded(folder, dtype="bfloat16").model(TOKENS).dtype == mx.bfloat16
    shutil.rmtree(folder)
