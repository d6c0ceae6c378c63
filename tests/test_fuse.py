"""fuse: the same outputs in one model, and a true account of what quantising again swallowed."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from run_cli import run
from test_adapter_folder import TOKENS, make_adapter

from mlx_lora.artifacts.adapter import WEIGHTS_FILE
from mlx_lora.config import ModelSettings
from mlx_lora.models.load import load_base


def fuse(model, folder, *extra):
    ran = run("fuse", "--model", model, "--adapter-path", folder / "a", "--out", folder / "f", "--json", *extra)
    assert ran.code == 0, ran.err
    return json.loads(ran.out), np.array(load_base(ModelSettings(model=str(folder / "f"))).model(TOKENS))


@pytest.mark.parametrize("targets", ["all-linear", "all-linear,embed_tokens", "q_proj"])
@pytest.mark.parametrize(("model", "extra"), [("tiny_folder", ()), ("tiny_4bit_folder", ("--dequantize",))])
def test_a_float_result_gives_the_adapters_logits(model, extra, targets, tmp_path, request):
    folder = request.getfixturevalue(model)
    expected = make_adapter(folder, tmp_path / "a", targets)
    report, found = fuse(folder, tmp_path, *extra)
    assert np.allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, load_base(ModelSettings(model=str(folder))).model(TOKENS), atol=1e-2)
    assert report["kept_least"] == pytest.approx(1, abs=1e-4)
    assert "quantization" not in json.loads((tmp_path / "f" / "config.json").read_text())


def test_a_large_update_survives_4_bits_and_a_tiny_one_does_not(tiny_4bit_folder, tmp_path):
    make_adapter(tiny_4bit_folder, tmp_path / "a")
    large, _ = fuse(tiny_4bit_folder, tmp_path)
    assert json.loads((tmp_path / "f" / "config.json").read_text())["quantization"]["bits"] == 4
    stored = mx.load(str(tmp_path / "a" / WEIGHTS_FILE))
    small = {name: value * (1e-3 if name.endswith("lora_b") else 1) for name, value in stored.items()}
    mx.save_safetensors(str(tmp_path / "a" / WEIGHTS_FILE), small)
    tiny, _ = fuse(tiny_4bit_folder, tmp_path, "--force")
    assert large["error_mean"] < 0.2 * tiny["error_mean"]
    ran = run("fuse", "--model", tiny_4bit_folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "g")
    assert ("--dequantize keeps all" in ran.err) == (tiny["kept_least"] < 0.9)


def test_an_existing_folder_is_kept_unless_forced(tiny_folder, tmp_path):
    make_adapter(tiny_folder, tmp_path / "a")
    fuse(tiny_folder, tmp_path)
    ran = run("fuse", "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "f")
    assert (ran.code, "--force" in ran.err) == (2, True)


def test_a_fused_folder_trains_and_generates(tiny_folder, chats, tmp_path):
    make_adapter(tiny_folder, tmp_path / "a")
    fuse(tiny_folder, tmp_path)
    assert run("generate", "--model", tmp_path / "f", "--prompt", "Say 1.", "--max-tokens", 3).code == 0
