"""What lies beside a PEFT adapter: its chat template, what an earlier adapter left there, and a run that starts from it."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from make_adapters import OWN_TEMPLATE, make_adapter
from run_cli import run
from transformers import AutoTokenizer

from mlx_lora.adapters.inject import adapt_model, adapter_layers, adapter_parameters
from mlx_lora.config.settings import AdapterSettings, ModelSettings
from mlx_lora.exporters.adapter_config import LABELS_FILE, TEMPLATE_FILE, template_beside
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, put_start, read_start, run_of, save_adapter
from mlx_lora.exporters.peft import write_peft
from mlx_lora.models.load import load_base
from mlx_lora.trainer.adapter import adapter_template
from mlx_lora.utils.errors import InputError


def loaded(folder):
    return load_base(ModelSettings(model=str(folder)))


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """An adapter with a chat template of its own."""
    return make_adapter(tiny_folder, tmp_path_factory.mktemp("own") / "a", chat_template=OWN_TEMPLATE)


def export(folder, adapter, to, out, *more):
    ran = run("export", "--model", folder, "--adapter-path", adapter, "--to", to, "--out", out, *more)
    assert ran.code == 0, ran.err
    return ran.err


def test_an_adapters_own_chat_template_goes_to_peft_and_comes_back(tiny_folder, adapter, tmp_path):
    out = tmp_path / "p"
    said = export(tiny_folder, adapter, "peft", out)
    assert "template" not in said
    assert AutoTokenizer.from_pretrained(out).chat_template == OWN_TEMPLATE
    base = loaded(tiny_folder)
    assert base.hf_tokenizer.chat_template != OWN_TEMPLATE
    assert load_adapter(base, out).chat_template == OWN_TEMPLATE
    assert adapter_template(out) == adapter_template(adapter) == OWN_TEMPLATE
    base.hf_tokenizer.chat_template = OWN_TEMPLATE
    assert template_beside(out, base.hf_tokenizer) is None
    card = (out / "README.md").read_text()
    assert 'AutoTokenizer.from_pretrained("adapter")' in card
    assert "mlx-lora fuse" in card
    (out / TEMPLATE_FILE).write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InputError):
        load_adapter(loaded(tiny_folder), out)


@pytest.mark.parametrize("to", ["mlx-lm", "gguf-adapter"])
def test_forms_without_a_place_for_the_chat_template_say_so(to, tiny_folder, adapter, tmp_path):
    plain = make_adapter(tiny_folder, tmp_path / "plain")
    for given, noted in ((adapter, True), (plain, False)):
        said = export(tiny_folder, given, to, tmp_path / f"{noted}.gguf")
        assert ("Note:" in said) is noted


@pytest.mark.parametrize("to", ["peft", "mlx-lm"])
def test_nothing_of_an_earlier_adapter_stays_in_the_folder(to, tiny_folder, adapter, tmp_path):
    out = tmp_path / "out"
    plain = make_adapter(tiny_folder, tmp_path / "plain")
    for earlier in ("peft", "mlx-lm"):
        export(tiny_folder, adapter, earlier, out, "--force")
    (out / TEMPLATE_FILE).write_text(OWN_TEMPLATE)
    (out / LABELS_FILE).write_text(json.dumps({"mlx_lora": {"objective": "classify"}}))
    (out / "run.yaml").write_text("objective: embed\npooling: mean\n")
    (out / "notes.txt").write_text("mine")
    (out / "README.md").write_text("mine")
    export(tiny_folder, plain, to, out, "--force")
    weights = "adapter_model.safetensors" if to == "peft" else "adapters.safetensors"
    assert {file.name for file in out.iterdir()} == {"adapter_config.json", weights, "notes.txt", "README.md"}
    info = load_adapter(loaded(tiny_folder), out)
    assert (info.chat_template, info.head, run_of(out)) == (None, None, {})


def test_a_merged_adapter_is_not_what_the_earlier_one_was(tiny_folder, tmp_path):
    one, other = (make_adapter(tiny_folder, tmp_path / name, seed=seed) for seed, name in enumerate("ab", start=1))
    out = tmp_path / "merged"
    given = ("--model", tiny_folder, "--adapter", f"{one}=0.5", "--adapter", f"{other}=0.5", "--out", out)
    assert run("merge", *given, "--no-evaluate").code == 0
    (out / "run.yaml").write_text("objective: embed\npooling: mean\n")
    (out / LABELS_FILE).write_text("{}")
    ran = run("merge", *given, "--no-evaluate", "--force")
    assert ran.code == 0, ran.err
    assert run_of(out) == {}
    assert {"adapters.safetensors", "merge.json"} <= {file.name for file in out.iterdir()}
    assert not (out / LABELS_FILE).exists()


def test_a_qa_lora_starts_from_its_peft_form_and_not_from_an_ordinary_lora(tiny_4bit_folder, tmp_path):
    settings = AdapterSettings(method="qa-lora", rank=4, target_modules="q_proj,embed_tokens")
    base = loaded(tiny_4bit_folder)
    adapt_model(base.model, settings, 0)
    mx.random.seed(1)
    moved = [(name, mx.random.normal(v.shape)) for name, v in adapter_parameters(base.model).items()]
    base.model.load_weights(moved, strict=False)
    trained = {path: layer.delta() for path, layer in adapter_layers(base.model).items()}
    stored = saved(base, tmp_path / "own")
    plain = loaded(tiny_4bit_folder)
    load_adapter(plain, stored)
    write_peft(tmp_path / "p", plain.model, "some/base", 0.0)
    again = loaded(tiny_4bit_folder)
    start = read_start(again, str(tmp_path / "p"), scores=False)
    adapt_model(again.model, settings, 5)
    put_start(again.model, start, ())
    for path, layer in adapter_layers(again.model).items():
        assert mx.allclose(layer.delta(), trained[path], atol=1e-5)
    ordinary = make_adapter(tiny_4bit_folder, tmp_path / "lora", targets="q_proj,embed_tokens", peft=True)
    again = loaded(tiny_4bit_folder)
    start = read_start(again, str(ordinary), scores=False)
    adapt_model(again.model, settings, 5)
    with pytest.raises(InputError, match="qa-lora"):
        put_start(again.model, start, ())


def saved(base, folder):
    """Save the adapter on a model in our form, and return its folder."""
    layers = adapter_layers(base.model)
    scale = next(iter(layers.values())).scale
    info = AdapterInfo(
        "qa-lora", 4, 4 * scale, scale, 0.0, len(base.model.layers), tuple(layers), base.model_id, None,
        base.fingerprint,
    )  # fmt: skip
    save_adapter(folder, base.model, info)
    return folder


OTHERS = {
    "a model": ("config.json", "model.safetensors"),
    "a model with other names": ("config.json", "tokenizer.json", "weights.safetensors"),
    "a GGUF file": ("model-q4.gguf", "tokenizer.json"),
    "a run": ("adapter_config.json", "adapters.safetensors", "run.yaml", "checkpoints/step-1/state.json"),
}


@pytest.mark.parametrize(("to", "what"), [("peft", what) for what in OTHERS] + [("mlx-lm", "a model")])
def test_what_is_no_exported_adapter_is_not_replaced(to, what, tiny_folder, adapter, tmp_path):
    for name in OTHERS[what]:
        (tmp_path / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / name).write_text(name)
    out = tmp_path / "out"
    ran = run("export", "--model", tiny_folder, "--adapter-path", adapter, "--to", to, "--out", out, "--force")
    assert (ran.code, len(ran.lines)) == (2, 1)
    assert {str(path.relative_to(out)): path.read_text() for path in out.rglob("*.*") if path.is_file()} == {
        name: name for name in OTHERS[what]
    }
