"""fuse: the same outputs in one model, and a true account of what quantizing again swallowed."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from conftest import quantized, tiny_model, write_folder
from make_adapters import TOKENS, adapt_and_save, make_adapter
from run_cli import run

from mlx_lora.artifacts.adapter import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from mlx_lora.fuse import summarize, words
from mlx_lora.models.load import load_base
from mlx_lora.settings.config import ModelSettings
from mlx_lora.system.errors import InputError


def fuse(model, folder, *extra):
    ran = run("fuse", "--model", model, "--adapter-path", folder / "a", "--out", folder / "f", "--json", *extra)
    assert ran.code == 0, ran.err
    return json.loads(ran.out), np.array(load_base(ModelSettings(model=str(folder / "f"))).model(TOKENS))


@pytest.mark.parametrize("targets", ["all-linear", "all-linear,embed_tokens", "q_proj"])
@pytest.mark.parametrize(("model", "extra"), [("tiny_folder", ()), ("tiny_4bit_folder", ("--dequantize",))])
def test_a_float_result_gives_the_adapters_logits(model, extra, targets, tmp_path, request):
    folder = request.getfixturevalue(model)
    expected = adapt_and_save(folder, tmp_path / "a", targets)
    report, found = fuse(folder, tmp_path, *extra)
    assert np.allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, load_base(ModelSettings(model=str(folder))).model(TOKENS), atol=1e-2)
    assert report["kept_least"] == pytest.approx(1, abs=1e-4)
    assert "quantization" not in json.loads((tmp_path / "f" / "config.json").read_text())


def test_a_large_update_survives_4_bits_and_a_tiny_one_does_not(tiny_4bit_folder, tmp_path):
    adapt_and_save(tiny_4bit_folder, tmp_path / "a")
    large, _ = fuse(tiny_4bit_folder, tmp_path)
    assert json.loads((tmp_path / "f" / "config.json").read_text())["quantization"]["bits"] == 4
    stored = mx.load(str(tmp_path / "a" / WEIGHTS_FILE))
    small = {name: value * (1e-3 if name.endswith("lora_b") else 1) for name, value in stored.items()}
    mx.save_safetensors(str(tmp_path / "a" / WEIGHTS_FILE), small)
    tiny, _ = fuse(tiny_4bit_folder, tmp_path, "--force")
    assert large["error_mean"] < 0.2 * tiny["error_mean"]
    ran = run("fuse", "--model", tiny_4bit_folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "g")
    assert ("use --dequantize" in ran.err) == (tiny["kept_least"] < 0.9)


def test_an_existing_folder_is_kept_unless_forced(tiny_folder, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "a")
    fuse(tiny_folder, tmp_path)
    ran = run("fuse", "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "f")
    assert (ran.code, "--force" in ran.err) == (2, True)


def test_a_fused_folder_trains_and_generates(tiny_folder, chats, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "a")
    fuse(tiny_folder, tmp_path)
    assert run("generate", "--model", tmp_path / "f", "--prompt", "Say 1.", "--max-tokens", 3).code == 0


def test_a_module_trained_in_full_loses_its_layers_own_quantization(tiny_folder, chats, tmp_path):
    layout = {"group_size": 32, "bits": 4, "mode": "affine"}
    own = {**layout, "bits": 8}
    model = tiny_model(tie_word_embeddings=False)
    nn.quantize(
        model,
        **layout,
        class_predicate=lambda path, m: hasattr(m, "to_quantized") and (own if path == "lm_head" else True),
    )
    entries = {"quantization": {**layout, "lm_head": own}, "tie_word_embeddings": False}
    base = write_folder(tmp_path / "base", model, entries)
    ran = run(
        "train", "--model", base, "--data", chats, "--adapter-path", tmp_path / "a", "--iters", 4, "--rank", 4,
        "--batch-tokens", 256, "--learning-rate", 2e-2, "--val-batches", 0, "--modules-to-save", "lm_head",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    adapted = load_base(ModelSettings(model=str(base)))
    load_adapter(adapted, tmp_path / "a")
    _, found = fuse(base, tmp_path)
    assert json.loads((tmp_path / "f" / "config.json").read_text())["quantization"] == layout
    # The other layers are quantized anew, the head is not: it gives the trained one's logits of the same states.
    fused = load_base(ModelSettings(model=str(tmp_path / "f")))
    states = mx.random.normal((1, 5, 64))
    assert np.allclose(fused.model.lm_head(states), adapted.model.lm_head(states), atol=1e-5)
    assert not np.allclose(
        fused.model.lm_head(states), load_base(ModelSettings(model=str(base))).model.lm_head(states), atol=1e-3
    )
    assert np.isfinite(found).all()


def test_what_cannot_be_read_back_is_not_left_behind(tiny_folder, tmp_path, monkeypatch):
    adapt_and_save(tiny_folder, tmp_path / "a")
    # A family whose loading changes weights that were loaded before.
    shifted = lambda self, weights: {n: p + (1 if n.endswith("norm.weight") else 0) for n, p in weights.items()}  # noqa: E731
    monkeypatch.setattr("mlx_lm.models.llama.Model.sanitize", shifted)
    ran = run(
        "fuse",
        "--model",
        tiny_folder,
        "--adapter-path",
        tmp_path / "a",
        "--out",
        tmp_path / "f",
        "--ignore-fingerprint",
    )
    assert (ran.code, "back differently" in ran.err) == (1, True)
    assert not (tmp_path / "f").exists()


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_the_files_dtypes_are_kept_and_untouched_layers_bit_for_bit(stored, tmp_path):
    model = quantized(tiny_model())
    model.set_dtype(getattr(mx, stored))
    model.model.norm.weight = model.model.norm.weight.astype(mx.float32)
    base = write_folder(tmp_path / "base", model, {"quantization": {"group_size": 32, "bits": 4, "mode": "affine"}})
    before = mx.load(str(base / "model.safetensors"))
    for name, dtype in (("kept", ()), ("asked", ("--dtype", "bfloat16" if stored == "float16" else "float16"))):
        adapt_and_save(base, tmp_path / "a", "q_proj")
        ran = run("fuse", "--model", base, "--adapter-path", tmp_path / "a", "--out", tmp_path / name, *dtype)
        assert ran.code == 0, ran.err
        after = mx.load(str(tmp_path / name / "model.safetensors"))
        same = [n for n, p in before.items() if p.dtype == after[n].dtype and mx.array_equal(p, after[n])]
        assert {n.rpartition(".")[2] for n in before.keys() - set(same)} >= {"weight", "scales", "biases"}
        untouched = [n for n in before if "q_proj" not in n]
        assert (set(untouched) <= set(same)) == (name == "kept")
        assert (
            before.keys() == after.keys(),
            {p.dtype for p in after.values()} == {p.dtype for p in before.values()},
        ) == (True, name == "kept")


FUSED_FORMS = {
    "float": ("fuse", ()),
    "hf": ("export", ("--to", "hf")),
    "gguf": ("export", ("--to", "gguf", "--gguf-type", "q8_0")),
}


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("form", FUSED_FORMS)
def test_an_adapter_is_not_put_on_its_own_fused_model(form, marked, tmp_path, monkeypatch):
    base = write_folder(tmp_path / "base", tiny_model())
    byte_tokenizer(merges=(("a", "b"), ("Ġ", "t"), ("ab", "c"))).save_pretrained(base)  # GGUF knows none without
    adapter = make_adapter(base, tmp_path / "a", strength=0.1)
    command, flags = FUSED_FORMS[form]
    out = tmp_path / ("f.gguf" if form == "gguf" else "f")
    if not marked:  # as another program writes it
        monkeypatch.setattr("mlx_lora.models.fingerprint.fused_mark", lambda config: "")
        monkeypatch.setattr("mlx_lora.models.converting.fused_mark", lambda config: "")
    ran = run(command, "--model", base, "--adapter-path", adapter, "--out", out, *flags)
    assert ran.code == 0, ran.err
    models = [out]
    if form == "float":
        ran = run("convert", "--model", out, "--out", tmp_path / "f4", "--bits", 4, "--group-size", 32)
        assert ran.code == 0, ran.err
        models.append(tmp_path / "f4")
    said = "an adapter fused into it" if marked else "already contains this adapter"
    for model in models:
        with pytest.raises(InputError, match=said):
            load_adapter(load_base(ModelSettings(model=str(model))), adapter)
        load_adapter(load_base(ModelSettings(model=str(model))), adapter, ignore_fingerprint=True)
    # One base all the same: another adapter's mark is another, that of the quantized model is its float form's.
    if form == "float" and marked:
        marks = [load_base(ModelSettings(model=str(model))).fingerprint for model in (base, *models)]
        assert marks[1] == marks[2] != marks[0] == marks[1].partition("+")[0]


def test_an_adapter_trained_on_a_fused_model_by_an_earlier_version_still_loads(tiny_folder, tmp_path):
    fused = tmp_path / "f"
    first = make_adapter(tiny_folder, tmp_path / "a", strength=0.1)
    assert run("fuse", "--model", tiny_folder, "--adapter-path", first, "--out", fused).code == 0
    second = make_adapter(fused, tmp_path / "b", seed=5, strength=0.1)
    load_adapter(load_base(ModelSettings(model=str(fused))), second)
    with pytest.raises(InputError, match="a different base"):
        load_adapter(load_base(ModelSettings(model=str(tiny_folder))), second)
    config = json.loads((second / CONFIG_FILE).read_text())
    del config["mlx_lora"]["overlap"]
    config["mlx_lora"]["base_fingerprint"] = config["mlx_lora"]["base_fingerprint"].partition("+")[0]
    (second / CONFIG_FILE).write_text(json.dumps(config))
    load_adapter(load_base(ModelSettings(model=str(fused))), second)
    config["mlx_lora"]["base_model"] = str(tiny_folder)
    (second / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match="an adapter fused into it"):
        load_adapter(load_base(ModelSettings(model=str(fused))), second)


def test_what_became_of_an_adapter_is_said_in_plain_words():
    summary = {"layers": 4, "kept_mean": 0.84, "kept_least": -0.385, "least_layer": "q_proj", "error_mean": 161.005}
    assert words(summary) == (
        "4 layers fused; 84% of the adapter's effect survived (worst layer: -38%, q_proj). Rounding error is 161x the "
        "update; use --dequantize, or keep the adapter separate"
    )
    good = {**summary, "kept_mean": 1.0, "kept_least": 0.998, "error_mean": 0.012}
    assert words(good) == (
        "4 layers fused; 100% of the adapter's effect survived (worst layer: 100%, q_proj). Rounding error is 1.2% of the "
        "update"
    )
    assert (
        words(summarize({}))
        == "0 layers fused; 100% of the adapter's effect survived. Rounding error is 0.0% of the update"
    )
