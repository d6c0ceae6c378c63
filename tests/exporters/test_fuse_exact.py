"""What fusing and exporting must not change, lose or accept: stored dtypes, exact weights, sizes, and the files of the adapter."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import quantized, tiny_model, write_folder
from make_adapters import OWN_TEMPLATE, adapt_and_save, loaded, make_adapter
from mlx.utils import tree_flatten
from run_cli import one_line, run, succeeds
from tiny_moe import tiny_moe, with_quantized_experts

import mlx_lora.api.fuse
from mlx_lora.adapters.base import exact_weight
from mlx_lora.adapters.inject import adapter_layers
from mlx_lora.adapters.lora import LoRALinear
from mlx_lora.api.fuse import calibration_tokens
from mlx_lora.exporters.adapter_folder import CONFIG_FILE
from mlx_lora.exporters.fuse import fuse_adapter

LAYOUT = {"group_size": 32, "bits": 4, "mode": "affine"}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    texts = [f"the {n} quick brown foxes jump over {n * n} lazy dogs" for n in range(12)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def fuse(model, adapter, out, *extra):
    return succeeds("fuse", "--model", model, "--adapter-path", adapter, "--out", out, "--force", *extra)


def stored_bytes(folder) -> int:
    return sum(array.nbytes for file in folder.glob("*.safetensors") for array in mx.load(str(file)).values())


def adapter_of_zero(layout, dtype):
    mx.random.seed(3)
    base = nn.QuantizedLinear.from_linear(nn.Linear(128, 64), **layout)
    base.scales, base.biases = base.scales.astype(dtype), base.biases.astype(dtype)
    model = nn.Module()
    model.layer = LoRALinear.from_base(base, (mx.random.normal((128, 4)), mx.zeros((4, 64))), 1.0)
    return model, base


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_an_adapter_of_zero_changes_nothing(bits, dtype):
    model, base = adapter_of_zero({**LAYOUT, "bits": bits}, dtype)
    fuse_adapter(model, False)
    assert all(mx.array_equal(model.layer[name], base[name]) for name in ("weight", "scales", "biases"))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32])
def test_more_bits_round_the_exact_weight(dtype):
    model, base = adapter_of_zero(LAYOUT, dtype)
    wanted = exact_weight(base)
    survival = fuse_adapter(model, False, bits=8)
    fused = model.layer
    assert (fused.bits, fused.scales.dtype) == (8, dtype)
    assert mx.array_equal(exact_weight(fused), wanted)  # the finer grid has all values of the base's
    assert survival["layer"].bits == 8


@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "extra"),
    [
        ({}, ()),
        pytest.param(MXFP4, ("--bits-budget", "+60%"), marks=pytest.mark.slow),
        pytest.param({}, ("--bits-budget", "+60%"), marks=pytest.mark.slow),
        pytest.param(MXFP4, (), marks=pytest.mark.slow),
    ],
    ids=["affine", "mxfp4, a budget", "affine, a budget", "mxfp4"],
)
def test_a_compensated_model_has_the_files_dtypes(mode, extra, rows, tmp_path):
    layout = mode or LAYOUT
    model = tiny_model(attention_bias=True, intermediate_size=128)
    nn.quantize(model, **layout)
    model.set_dtype(mx.bfloat16)
    base = write_folder(
        tmp_path / "base", model, {"attention_bias": True, "intermediate_size": 128, "quantization": layout}
    )
    make_adapter(base, tmp_path / "a", strength=0.05)
    fuse(base, tmp_path / "a", tmp_path / "f", "--compensate", rows, *extra)
    stored = mx.load(str(tmp_path / "f" / "model.safetensors"))
    floats = {str(p.dtype) for name, p in stored.items() if mx.issubdtype(p.dtype, mx.floating)}
    assert floats == {"mlx.core.bfloat16"}
    if extra:
        assert stored_bytes(base) < stored_bytes(tmp_path / "f") <= 1.6 * stored_bytes(base)


@pytest.mark.long
def test_a_budget_counts_what_was_trained_in_full(tiny_4bit_folder, chats, tmp_path):
    words = ("--model", tiny_4bit_folder, "--data", chats, "--iters", 2, "--rank", 2, "--batch-tokens", 128)
    succeeds("train", *words, "--modules-to-save", "embed_tokens", "--adapter-path", tmp_path / "a", "--val-batches", 0)
    fuse(tiny_4bit_folder, tmp_path / "a", tmp_path / "plain", "--no-compensate")
    fuse(tiny_4bit_folder, tmp_path / "a", tmp_path / "more", "--bits-budget", "+5%")
    own = stored_bytes(tmp_path / "plain")
    assert own < stored_bytes(tmp_path / "more") <= 1.05 * own
    size = f"{stored_bytes(tiny_4bit_folder) / 1e6 * 1.05:.3f}MB"  # the floats alone take more
    ran = run("fuse", *words[:2], "--adapter-path", tmp_path / "a", "--out", tmp_path / "x", "--bits-budget", size)
    one_line(ran, "--bits-budget", "already")


@pytest.mark.long
@pytest.mark.parametrize("flags", [pytest.param(("--method", "qa-lora"), marks=pytest.mark.slow), ("--qat",)])
def test_what_fuses_without_rounding_needs_no_compensation(flags, tiny_4bit_folder, chats, rows, tmp_path):
    words = ("--model", tiny_4bit_folder, "--data", chats, "--iters", 2, "--rank", 2, "--batch-tokens", 128)
    succeeds("train", *words, *flags, "--adapter-path", tmp_path / "a", "--val-batches", 0, "--sample-tokens", 0)
    given = ("fuse", "--model", tiny_4bit_folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "f")
    for flag, value in (("--compensate", rows), ("--bits-budget", "+10%")):
        one_line(run(*given, flag, value), flag, "without rounding")


def test_a_budget_needs_a_linear_layer(rows, tmp_path):
    base = write_folder(tmp_path / "base", *with_quantized_experts(*tiny_moe("qwen3_moe")))
    make_adapter(base, tmp_path / "a", targets="switch_mlp.up_proj")
    assert adapter_layers(loaded(base, tmp_path / "a").model)
    given = ("fuse", "--model", base, "--adapter-path", tmp_path / "a", "--out", tmp_path / "f", "--compensate", rows)
    one_line(run(*given), "--compensate", "linear")


def test_rows_are_read_with_the_adapters_template(tiny_4bit_folder, chats, tmp_path, monkeypatch):
    make_adapter(tiny_4bit_folder, tmp_path / "a", chat_template=OWN_TEMPLATE, strength=0.05)
    seen = []

    def spied(base, *args):
        seen.append(base.hf_tokenizer.chat_template)
        return calibration_tokens(base, *args)

    monkeypatch.setattr(mlx_lora.api.fuse, "calibration_tokens", spied)
    fuse(tiny_4bit_folder, tmp_path / "a", tmp_path / "f", "--compensate", chats, "--data", chats)
    assert seen == [OWN_TEMPLATE]


def test_an_adapter_is_not_written_over_by_what_is_made_of_it(tiny_folder, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "model" / "a")
    before = (tmp_path / "model" / "a" / CONFIG_FILE).read_bytes()
    given = ("--model", tiny_folder, "--adapter-path", tmp_path / "model" / "a", "--force")
    for out in (tmp_path / "model" / "a", tmp_path / "model"):
        one_line(run("fuse", *given, "--out", out), "--out", "holds the adapter")
        for form in ("peft", "mlx-lm", "hf"):
            one_line(run("export", *given, "--to", form, "--out", out), "--out", "holds the adapter")
    assert (tmp_path / "model" / "a" / CONFIG_FILE).read_bytes() == before


@pytest.mark.long
def test_an_adapter_of_qat_is_for_the_format_that_it_was_trained_in(tiny_4bit_folder, tiny_folder, chats, tmp_path):
    words = (
        "--data", chats, "--iters", 2, "--rank", 2, "--batch-tokens", 128, "--val-batches", 0, "--sample-tokens", 0,
    )  # fmt: skip
    succeeds("train", "--model", tiny_4bit_folder, *words, "--qat", "--adapter-path", tmp_path / "a")
    eight = {**LAYOUT, "bits": 8}
    other = write_folder(tmp_path / "eight", quantized(tiny_model(), **eight), {"quantization": eight})
    for model, found in ((other, "8-bit"), (tiny_folder, "float")):
        given = ("generate", "--model", model, "--adapter-path", tmp_path / "a", "--prompt", "1", "--max-tokens", 1)
        one_line(run(*given), "4-bit", found)
    assert run("generate", "--model", tiny_4bit_folder, *given[3:]).code == 0


# Stock mlx-lm


def test_what_mlx_lm_would_misread_is_not_exported_to_it(tiny_folder, chats, tmp_path):
    words = ("--model", tiny_folder, "--data", chats, "--iters", 1, "--val-batches", 0, "--sample-tokens", 0)
    assert run("train", *words, "--modules-to-save", "model.norm", "--adapter-path", tmp_path / "whole").code == 0
    adapt_and_save(tiny_folder, tmp_path / "table", "embed_tokens")
    given = ("--model", tiny_folder, "--force")
    assert (
        run("export", *given, "--adapter-path", tmp_path / "table", "--to", "peft", "--out", tmp_path / "p").code == 0
    )
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    stored = mx.load(str(tmp_path / "p" / "adapter_model.safetensors"))
    kept = {name: array for name, array in stored.items() if "lm_head" not in name}  # of PEFT, on the embedding alone
    assert len(kept) < len(stored)
    mx.save_safetensors(str(tmp_path / "p" / "adapter_model.safetensors"), kept)
    (tmp_path / "p" / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["embed_tokens"]}))
    moe = write_folder(tmp_path / "moe", *tiny_moe("qwen3_moe"))
    make_adapter(moe, tmp_path / "dora", form="dora")
    for model, adapter, word in (
        (tiny_folder, tmp_path / "whole", "in full"),
        (tiny_folder, tmp_path / "p", "head"),
        (moe, tmp_path / "dora", "experts"),
    ):
        ran = run("export", "--model", model, "--adapter-path", adapter, "--to", "mlx-lm", "--out", tmp_path / "m")
        one_line(ran, "--to mlx-lm", word)
        assert not (tmp_path / "m").exists()


def test_every_array_is_read(tiny_4bit_folder):
    """`exact_weight` is the stored weight, as numpy computes it."""
    model = loaded(tiny_4bit_folder).model
    layer = model.layers[0].self_attn.q_proj
    arrays = dict(tree_flatten(layer.parameters()))
    codes = np.array(arrays["weight"]).view("<u4")
    codes = np.stack([codes >> (4 * i) & 15 for i in range(8)], axis=-1).reshape(len(codes), -1, 32)
    wanted = codes * np.array(arrays["scales"].astype(mx.float32))[..., None]
    wanted = wanted + np.array(arrays["biases"].astype(mx.float32))[..., None]
    assert np.allclose(exact_weight(layer), wanted.reshape(len(codes), -1), atol=1e-6)
