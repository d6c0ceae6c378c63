"""fuse: the same outputs in one model, and a true account of what quantizing again swallowed."""

from __future__ import annotations

import json
import re
import shutil

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from comparing import by_dtype
from conftest import quantized, tiny_model, write_folder
from make_adapters import TOKENS, adapt_and_save, loaded, make_adapter
from run_cli import holds, one_line, run, succeeds

from mlx_lora.api.fuse import Fused, FuseSettings, Gain, GainMeter, ways_to_round
from mlx_lora.cli.fuse import words
from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import CONFIG_FILE, WEIGHTS_FILE, load_adapter
from mlx_lora.exporters.fuse import Rounding, write_fused
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import InputError


@pytest.fixture(autouse=True)
def _short_general_text(monkeypatch, tmp_path):
    """Without data of its run, an adapter is measured on general texts: here, on a short one."""
    (tmp_path / "text.jsonl").write_text('{"text": "The Danube is the second-longest river in Europe."}\n')
    monkeypatch.setattr("mlx_lora.api.fuse.GENERAL", tmp_path)


def fuse(model, folder, *extra):
    ran = succeeds("fuse", "--model", model, "--adapter-path", folder / "a", "--out", folder / "f", "--json", *extra)
    return json.loads(ran.out), np.array(loaded(folder / "f").model(TOKENS))


@pytest.mark.parametrize("targets", ["all-linear", "all-linear,embed_tokens", "q_proj"])
@pytest.mark.parametrize(("model", "extra"), [("tiny_folder", ()), ("tiny_4bit_folder", ("--dequantize",))])
def test_a_float_result_gives_the_adapters_logits(model, extra, targets, tmp_path, request):
    folder = request.getfixturevalue(model)
    expected = adapt_and_save(folder, tmp_path / "a", targets)
    report, found = fuse(folder, tmp_path, *extra)
    assert np.allclose(found, expected, atol=1e-4)
    assert not np.allclose(found, loaded(folder).model(TOKENS), atol=1e-2)
    assert report["error_most"] < by_dtype(1e-4, 2e-2)
    assert "quantization" not in json.loads((tmp_path / "f" / "config.json").read_text())


@pytest.mark.long
def test_a_large_update_survives_4_bits_and_a_tiny_one_does_not(tiny_4bit_folder, tmp_path):
    adapt_and_save(tiny_4bit_folder, tmp_path / "a")
    large, _ = fuse(tiny_4bit_folder, tmp_path)
    assert json.loads((tmp_path / "f" / "config.json").read_text())["quantization"]["bits"] == 4
    stored = mx.load(str(tmp_path / "a" / WEIGHTS_FILE))
    small = {name: value * (1e-3 if name.endswith("lora_b") else 1) for name, value in stored.items()}
    mx.save_safetensors(str(tmp_path / "a" / WEIGHTS_FILE), small)
    tiny, _ = fuse(tiny_4bit_folder, tmp_path, "--force")
    assert large["error_mean"] < 0.5 * tiny["error_mean"]
    assert 0.5 < tiny["error_mean"] < 1.01  # most of it is lost, and the base loses nothing
    ran = run("fuse", "--model", tiny_4bit_folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "g")
    holds(ran.err, "--dequantize", "--data")


@pytest.mark.long
@pytest.mark.parametrize("strength", [0.02, 0.3])
def test_the_grid_that_keeps_more_is_taken(strength, tiny_4bit_folder, tmp_path):
    make_adapter(tiny_4bit_folder, tmp_path / "a", strength=strength)
    model, kl = ModelSettings(model=str(tiny_4bit_folder)), {}
    meter = GainMeter(model, tmp_path / "a", None)
    for new_grid in (False, True):
        base = load_base(model)
        info = load_adapter(base, tmp_path / "a")
        assert ways_to_round(base, tmp_path / "a", FuseSettings(tmp_path)) == [Rounding(), Rounding(new_grid=True)]
        write_fused(base, tmp_path / str(new_grid), info, Rounding(new_grid=new_grid), force=False)
        kl[new_grid] = meter.compare(loaded(tmp_path / str(new_grid))).kl
    assert kl[False] != kl[True]
    report, _ = fuse(tiny_4bit_folder, tmp_path)
    assert report["kl"] == pytest.approx(min(kl.values()))
    better = mx.load(str(tmp_path / str(kl[True] < kl[False]) / "model.safetensors"))
    written = mx.load(str(tmp_path / "f" / "model.safetensors"))
    assert all(mx.array_equal(array, better[name]) for name, array in written.items())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_existing_folder_is_kept_unless_forced(tiny_folder, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "a")
    fuse(tiny_folder, tmp_path)
    ran = run("fuse", "--model", tiny_folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "f")
    assert (ran.code, "--force" in ran.err) == (2, True)


def test_a_fused_folder_trains_and_generates(tiny_folder, chats, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "a")
    fuse(tiny_folder, tmp_path)
    assert run("generate", "--model", tmp_path / "f", "--prompt", "Say 1.", "--max-tokens", 3).code == 0


@pytest.mark.long
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
    succeeds(
        "train", "--model", base, "--data", chats, "--adapter-path", tmp_path / "a", "--iters", 4, "--rank", 4,
        "--batch-tokens", 256, "--learning-rate", 2e-2, "--val-batches", 0, "--modules-to-save", "lm_head",
    )  # fmt: skip
    adapted = loaded(base, tmp_path / "a")
    _, found = fuse(base, tmp_path)
    assert json.loads((tmp_path / "f" / "config.json").read_text())["quantization"] == layout
    # The other layers are quantized anew, the head is not: it gives the trained one's logits of the same states.
    fused = loaded(tmp_path / "f")
    states = mx.random.normal((1, 5, 64))
    limit = by_dtype(1e-5, 5e-2)
    assert mx.allclose(fused.model.lm_head(states), adapted.model.lm_head(states), atol=limit)
    plain = loaded(base).model.lm_head(states)
    assert not mx.allclose(fused.model.lm_head(states), plain, atol=100 * by_dtype(1e-5, 1e-3))
    assert np.isfinite(found).all()


def test_what_cannot_be_read_back_is_not_left_behind(tiny_folder, tmp_path, monkeypatch):
    adapt_and_save(tiny_folder, tmp_path / "a")
    # A family whose loading changes weights that were loaded before.
    shifted = lambda self, weights: {n: p + (1 if n.endswith("norm.weight") else 0) for n, p in weights.items()}  # noqa: E731
    monkeypatch.setattr("mlx_lm.models.llama.Model.sanitize", shifted)
    given = ("--model", tiny_folder, "--adapter-path", tmp_path / "a", "--out", tmp_path / "f")
    ran = run("fuse", *given, "--ignore-fingerprint")
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
        succeeds("fuse", "--model", base, "--adapter-path", tmp_path / "a", "--out", tmp_path / name, *dtype)
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
        monkeypatch.setattr("mlx_lora.models.folder.fused_mark", lambda config: "")
        monkeypatch.setattr("mlx_lora.models.convert.fused_mark", lambda config: "")
    succeeds(command, "--model", base, "--adapter-path", adapter, "--out", out, *flags)
    models = [out]
    if form == "float":
        succeeds("convert", "--model", out, "--out", tmp_path / "f4", "--bits", 4, "--group-size", 32)
        models.append(tmp_path / "f4")
    said = "an adapter fused into it" if marked else "already contains this adapter"
    for model in models:
        with pytest.raises(InputError, match=said):
            load_adapter(loaded(model), adapter)
        load_adapter(loaded(model), adapter, ignore_fingerprint=True)
    # One base all the same: another adapter's mark is another, that of the quantized model is its float form's.
    if form == "float" and marked:
        marks = [loaded(model).fingerprint for model in (base, *models)]
        assert marks[1] == marks[2] != marks[0] == marks[1].partition("+")[0]


def test_an_adapter_trained_on_a_fused_model_by_an_earlier_version_still_loads(tiny_folder, tmp_path):
    fused = tmp_path / "f"
    first = make_adapter(tiny_folder, tmp_path / "a", strength=0.1)
    assert run("fuse", "--model", tiny_folder, "--adapter-path", first, "--out", fused).code == 0
    second = make_adapter(fused, tmp_path / "b", seed=5, strength=0.1)
    load_adapter(loaded(fused), second)
    with pytest.raises(InputError, match="a different base"):
        load_adapter(loaded(tiny_folder), second)
    config = json.loads((second / CONFIG_FILE).read_text())
    del config["mlx_lora"]["overlap"]
    config["mlx_lora"]["base_fingerprint"] = config["mlx_lora"]["base_fingerprint"].partition("+")[0]
    (second / CONFIG_FILE).write_text(json.dumps(config))
    load_adapter(loaded(fused), second)
    config["mlx_lora"]["base_model"] = str(tiny_folder)
    (second / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(InputError, match="an adapter fused into it"):
        load_adapter(loaded(fused), second)


def test_what_rounding_costs_is_not_claimed_unmeasured():
    rounding = {"layers": 4, "bits": 4, "error_mean": 51.005, "error_most": 161.0, "most_layer": "q_proj"}
    unknown = words(rounding, Gain(2.1, 1.8, 2.0, 32, "rows", 0.1, "no data"))
    named = ("51 times", "4 bits", "no data", "--data", "--dequantize", "--fused-bits 8", "KL 0.100", "--compensate")
    holds(unknown, *named)
    assert Gain(2.1, 1.8, 2.0, 32, "rows", 0.1, "no data").kept is None  # nobody trained for these rows
    assert not re.search(r"keeps \d+%", unknown)  # no share of the effect
    little = words({**rounding, "error_mean": 0.012}, None)
    assert "1.2%" in little
    assert "--dequantize" not in little
    assert "0 layers" in words(Fused("m", 0, Rounding(), {}).summary(), None)


def test_the_share_that_is_kept_is_that_of_the_gain_in_loss():
    rounding = {"layers": 4, "bits": 4, "error_mean": 51.0, "error_most": 161.0, "most_layer": "q_proj"}
    faded = words(rounding, Gain(2.1, 1.8, 2.0, 32, "32 rows of x.jsonl"))
    remedies = ("--dequantize", "--fused-bits 8", "--compensate", "--bits-budget", "--qat", "--method qa-lora")
    holds(faded, "33%", "2.10", "1.80", "2.00", "Warning", *remedies)
    again = words(rounding, Gain(2.1, 1.8, 2.0, 32, "32 rows of x.jsonl"), ("--compensate",))
    assert "--compensate FILE" not in again
    whole = words(rounding, Gain(2.1, 1.8, 1.8, 32, "32 rows of x.jsonl"))
    assert "keeps all" in whole
    assert "keeps nothing" in words(rounding, Gain(2.1, 1.8, 2.2, 32, "rows"))
    assert "--dequantize" not in whole
    assert Gain(2.1, 2.1, 2.4, 32, "rows").kept is None  # there is no gain to have a share of
    assert "keeps" not in words(rounding, Gain(2.1, 2.2, 2.1, 32, "rows"))
    eight = words({**rounding, "bits": 8}, Gain(2.1, 1.8, 2.0, 32, "rows"))
    assert ("--dequantize" in eight, "--fused-bits" in eight) == (True, False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_4bit_folder, chats):
    """An adapter that has learned something, on a 4-bit base."""
    folder = tmp_path_factory.mktemp("trained") / "a"
    succeeds(
        "train", "--model", tiny_4bit_folder, "--data", chats, "--adapter-path", folder, "--iters", 30, "--rank", 4,
        "--batch-tokens", 256, "--learning-rate", 1e-2, "--val-batches", 0, "--sample-tokens", 0,
    )  # fmt: skip
    return folder


@pytest.mark.long
def test_fuse_measures_on_the_rows_that_the_run_held_out(trained, tiny_4bit_folder, chats, tmp_path):
    given = ("--model", tiny_4bit_folder, "--adapter-path", trained, "--json")
    four = succeeds("fuse", *given, "--out", tmp_path / "four")
    found = json.loads(four.out)
    gain = found["loss_base"] - found["loss_adapter"]
    assert gain > 0.1
    assert found["kept"] == pytest.approx((found["loss_base"] - found["loss_fused"]) / gain)
    assert "with adapter" in four.err
    assert "held-out" in found["of"]
    eight = json.loads(run("fuse", *given, "--out", tmp_path / "eight", "--fused-bits", 8, "--data", chats).out)
    assert eight["bits"] == 8
    assert eight["kept"] == pytest.approx(1, abs=0.05)
    assert eight["error_mean"] < found["error_mean"] / 4
    # The losses are those that `evaluate` finds on the same rows.
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(True)[:20]))
    again = json.loads(run("fuse", *given, "--out", tmp_path / "again", "--fused-bits", 8, "--data", few).out)
    plain = ("--data", few, "--json")
    fused = json.loads(run("evaluate", "--model", tmp_path / "again", *plain).out)
    adapted = json.loads(run("evaluate", "--model", tiny_4bit_folder, "--adapter-path", trained, *plain).out)
    assert again["rows"] == fused["rows"] == 20
    assert again["loss_fused"] == pytest.approx(fused["loss"], rel=by_dtype(1e-3, 5e-3))
    assert again["loss_adapter"] == pytest.approx(adapted["loss"], rel=by_dtype(1e-3, 5e-3))
    assert again["loss_adapter"] != pytest.approx(again["loss_base"], rel=1e-2)


@pytest.mark.long
def test_the_rows_of_the_run_compensate_the_rounding(trained, tiny_4bit_folder, tmp_path):
    given = ("fuse", "--model", tiny_4bit_folder, "--adapter-path", trained, "--json")
    default = run(*given, "--out", tmp_path / "default")
    plain = run(*given, "--out", tmp_path / "plain", "--no-compensate")
    assert "Compensated" in default.err
    assert "Compensated" not in plain.err
    assert json.loads(default.out)["kept"] >= json.loads(plain.out)["kept"]
    fine = run(*given, "--out", tmp_path / "fine", "--fused-bits", 8)  # which needs none
    assert "Compensated" not in fine.err


def test_fuse_says_why_it_did_not_measure(trained, tiny_4bit_folder, tmp_path):
    copied = tmp_path / "a"
    shutil.copytree(trained, copied)
    settings = (copied / "run.yaml").read_text()
    for text, why in (
        ("{}", "does not name its data"),
        (re.sub(r"(?m)^data: .*$", "data: gone.jsonl", settings), "disk"),
    ):
        (copied / "run.yaml").write_text(text)
        ran = run(
            "fuse", "--model", tiny_4bit_folder, "--adapter-path", copied, "--out", tmp_path / "f", "--force", "--json"
        )
        assert (ran.code, json.loads(ran.out)["kept"]) == (0, None)
        assert why in ran.err
        assert "--data" in ran.err


def test_fused_bits_are_only_for_layers_that_have_fewer(trained, tiny_4bit_folder, tiny_folder, tmp_path):
    adapt_and_save(tiny_folder, tmp_path / "a")
    out = ("--out", tmp_path / "f", "--fused-bits", 8)
    one_line(
        run("fuse", "--model", tiny_folder, "--adapter-path", tmp_path / "a", *out), "--fused-bits", "not quantized"
    )
    given = ("fuse", "--model", tiny_4bit_folder, "--adapter-path", trained)
    assert run(*given, *out).code == 0
    config = json.loads((tmp_path / "f" / "config.json").read_text())["quantization"]
    changed = {path: own["bits"] for path, own in config.items() if isinstance(own, dict)}
    assert config["bits"] == 4
    assert set(changed.values()) == {8}
    assert not any("embed" in path or "norm" in path for path in changed)  # they have no update
    assert (
        json.loads(run("generate", "--model", tmp_path / "f", "--prompt", "1", "--max-tokens", 2, "--json").out)["text"]
        is not None
    )
