"""What lies beside a PEFT adapter: its chat template, what an earlier adapter left there, and a run that starts from it.

Also ranks of PEFT's configs against the factors in their files; tied embeddings and parameters trained in full in PEFT's form, without torch: which tensors are written, and what is read.
"""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures.build import tiny_architecture, write_architecture
from conftest import tiny_model, write_folder
from make_adapters import OWN_TEMPLATE, TOKENS, loaded, make_adapter, our_logits, write_moved_peft
from run_cli import holds, run, succeeds
from tiny_moe import tiny_moe
from transformers import AutoTokenizer

from mlx_lora.adapters.inject import adapt_model, adapter_layers, adapter_parameters
from mlx_lora.config.settings import AdapterSettings
from mlx_lora.exporters.adapter_config import LABELS_FILE, TEMPLATE_FILE, template_beside
from mlx_lora.exporters.adapter_folder import AdapterInfo, load_adapter, put_start, read_start, run_of, save_adapter
from mlx_lora.exporters.peft import PEFT_CONFIG, PEFT_WEIGHTS, check_peft, check_reached, rank_problems, write_peft
from mlx_lora.models.head import tied_embedding
from mlx_lora.trainer.adapter import adapter_template
from mlx_lora.utils.errors import InputError


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    """An adapter with a chat template of its own."""
    return make_adapter(tiny_folder, tmp_path_factory.mktemp("own") / "a", chat_template=OWN_TEMPLATE)


def export(folder, adapter, to, out, *more):
    return succeeds("export", "--model", folder, "--adapter-path", adapter, "--to", to, "--out", out, *more).err


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
    holds(card, 'AutoTokenizer.from_pretrained("adapter")', "mlx-lora fuse")
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
    succeeds("merge", *given, "--no-evaluate", "--force")
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
    plain = loaded(tiny_4bit_folder, stored)
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


LAYER = "model.layers.0.self_attn.q_proj"


def write(folder, rank: int, **config):
    tensors = {
        f"base_model.model.{LAYER}.lora_A.weight": mx.ones((rank, 64)),
        f"base_model.model.{LAYER}.lora_B.weight": mx.ones((64, rank)),
    }
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    whole = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(whole))
    return folder


def test_a_rank_that_is_not_the_factors_is_refused(tiny_folder, tmp_path):
    base = loaded(tiny_folder)
    with pytest.raises(InputError) as refused:
        load_adapter(base, write(tmp_path, 2))
    assert "\n" not in str(refused.value)
    assert all(words in str(refused.value) for words in ("rank 2", "r 4", LAYER))
    assert load_adapter(base, write(tmp_path, 2, rank_pattern={"q_proj": 2})).rank == 2


def test_every_layer_is_compared():
    found = {f"layer{n}": {"A": f"a{n}"} for n in range(3)}
    header = {f"a{n}": {"shape": [4 + n, 8]} for n in range(3)}
    [problem] = rank_problems({"r": 4}, found, header)
    holds(problem, "layer1", "1 more")
    assert not rank_problems({"r": 4, "rank_pattern": {"layer1": 5, "layer2": 6}}, found, header)
    assert not rank_problems({"r": 4, "peft_type": "ADALORA"}, found, header)


PREFIX = "base_model.model."
# mlx-lm's path of a tied embedding, and transformers'.
TIED = {
    "gpt2": ("model.wte", "transformer.wte"),
    "gpt_bigcode": ("transformer.wte", "transformer.wte"),
    "mamba": ("backbone.embeddings", "backbone.embeddings"),
    "llama": ("model.embed_tokens", "model.embed_tokens"),
}


def changed(out: Path, tensors: dict[str, mx.array], **config) -> None:
    """Write other tensors, and other settings, over a PEFT folder's."""
    mx.save_safetensors(str(out / PEFT_WEIGHTS), tensors)
    before = json.loads((out / PEFT_CONFIG).read_text())
    (out / PEFT_CONFIG).write_text(json.dumps(before | config))


@pytest.mark.parametrize("name", [*TIED, "gemma3", "cohere", "openelm"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_tied_embedding_is_the_one_that_makes_logits(name, tied, monkeypatch):
    called, as_linear = [], nn.Embedding.as_linear
    monkeypatch.setattr(nn.Embedding, "as_linear", lambda self, x: (called.append(self), as_linear(self, x))[1])
    model = tiny_architecture(name, tied)
    model(TOKENS)
    found = [path for path, module in model.named_modules() if any(module is one for one in called)]
    assert ([tied_embedding(model)] if tied_embedding(model) else []) == found


@pytest.mark.parametrize("name", TIED)
@pytest.mark.parametrize("whole", [False, True])
def test_only_the_tied_embedding_is_a_head_for_peft(name, whole, tmp_path):
    folder, out = write_architecture(tmp_path / "base", name, tied=True), tmp_path / "p"
    (_, theirs), layer = TIED[name], "in_proj" if name == "mamba" else "c_attn" if "gpt" in name else "q_proj"
    leaf = TIED[name][0].rpartition(".")[2]
    targets = {"target_modules": layer, "modules_to_save": leaf} if whole else {"target_modules": f"{layer},{leaf}"}
    expected, stored = write_moved_peft(folder, out, **targets)
    if whole:
        assert mx.array_equal(stored[f"{PREFIX}lm_head.weight"], stored[f"{PREFIX}{theirs}.weight"])
    else:
        head, own = f"{PREFIX}lm_head.lora_A.weight", f"{PREFIX}{theirs}.lora_embedding_B"
        assert mx.array_equal(stored[head], stored[own].T)
    assert np.allclose(our_logits(folder, out), expected, atol=1e-5)
    kept = {key: value for key, value in stored.items() if "lm_head" not in key}
    changed(out, kept)
    if whole:  # PEFT would have left the head as it was
        with pytest.raises(InputError):
            our_logits(folder, out)
    else:
        assert not np.allclose(our_logits(folder, out), expected, atol=1e-3)


def test_an_embedding_of_positions_is_no_head(tmp_path):
    folder = write_architecture(tmp_path / "base", "gpt2", tied=True)
    expected, stored = write_moved_peft(folder, tmp_path / "p", target_modules="c_attn,wpe")
    assert f"{PREFIX}transformer.wpe.lora_embedding_A" in stored
    assert not [name for name in stored if "lm_head" in name]
    assert np.allclose(our_logits(folder, tmp_path / "p"), expected, atol=1e-5)


def test_gpt2s_layers_in_full_have_their_inputs_first(tmp_path):
    folder, out = write_architecture(tmp_path / "base", "gpt2", tied=True), tmp_path / "p"
    own = loaded(folder).model
    for targets, saved in (("c_fc", "attn.*"), ("c_attn", "mlp.*")):
        expected, stored = write_moved_peft(folder, out, target_modules=targets, modules_to_save=saved)
        weights = {n: v for n, v in stored.items() if n.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))}
        assert len(weights) == 2 * len(own.layers)
        for name, value in weights.items():
            block, part, leaf = name.removesuffix(".weight").split(".")[-3:]
            assert value.shape == own.layers[int(block)][part][leaf].weight.T.shape
        assert np.allclose(our_logits(folder, out), expected, atol=1e-5)
        assert not np.allclose(our_logits(folder), expected, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("qwen3_moe", {"modules_to_save": "switch_mlp.down_proj"}),
        ("gpt_oss", {"modules_to_save": "experts.down_proj"}),
        ("gpt_oss", {"bias": "all"}),
        ("gpt_oss", {"target_modules": "all-linear", "bias": "lora_only"}),
    ],
)
def test_whole_experts_and_their_biases_are_refused(kind, settings):
    model, _ = tiny_moe(kind)
    adapted = adapt_model(model, AdapterSettings(**{"rank": 4, "target_modules": "self_attn.*", **settings}), 0)
    with pytest.raises(InputError, match=r"(switch_mlp|experts)\.\w+\.(weight|bias) and \d+ more"):
        check_peft(model, adapted.full)


def test_mixtrals_whole_router_has_the_name_in_transformers(tmp_path):
    folder = write_folder(tmp_path / "base", *tiny_moe("mixtral"))
    saved = {"target_modules": "self_attn.*", "modules_to_save": "block_sparse_moe.gate"}
    expected, stored = write_moved_peft(folder, tmp_path / "p", **saved)
    assert {f"{PREFIX}model.layers.{block}.mlp.gate.weight" for block in (0, 1)} <= stored.keys()
    assert not [name for name in stored if "block_sparse_moe" in name]
    assert json.loads((tmp_path / "p" / PEFT_CONFIG).read_text())["modules_to_save"] == [
        "model.layers.0.mlp.gate", "model.layers.1.mlp.gate",
    ]  # fmt: skip
    assert np.allclose(our_logits(folder, tmp_path / "p"), expected, atol=1e-5)
    assert not np.allclose(our_logits(folder), expected, atol=1e-2)


def test_biases_of_layers_with_other_names_are_refused():
    path = "model.layers.0.self_attn.q_proj"
    with pytest.raises(InputError):
        check_reached("hunyuan", [], [f"{path}.bias"])
    with pytest.raises(InputError):
        check_reached("hunyuan", [], [f"{path}.linear.bias"])
    with pytest.raises(InputError):
        check_reached("phimoe", [], ["model.layers.0.block_sparse_moe.gate.weight"])
    check_reached("hunyuan", [], ["model.layers.0.self_attn.o_proj.bias"])
    check_reached("mamba", [], ["backbone.layers.0.mixer.dt_proj.bias"])  # PEFT finds it by its name


def test_a_doras_magnitudes_have_the_name_that_transformers_reads_and_old_files_load(tmp_path):
    folder, out = write_folder(tmp_path / "base", tiny_model()), tmp_path / "p"
    expected, stored = write_moved_peft(folder, out, method="dora", target_modules="q_proj")
    names = [name for name in stored if "magnitude" in name]
    assert names
    assert all(name.endswith(".lora_magnitude_vector.weight") for name in names)
    assert json.loads((out / PEFT_CONFIG).read_text())["use_dora"] is True
    assert np.allclose(our_logits(folder, out), expected, atol=1e-5)
    changed(out, {n.removesuffix(".weight") if "magnitude" in n else n: value for n, value in stored.items()})
    assert np.allclose(our_logits(folder, out), expected, atol=1e-5)


def test_an_embedding_that_peft_kept_tied_is_read(tmp_path):
    folder, out = write_folder(tmp_path / "base", tiny_model()), tmp_path / "p"
    expected, stored = write_moved_peft(folder, out, target_modules="q_proj", modules_to_save="embed_tokens")
    # As PEFT writes it with ensure_weight_tying: the head is in the file, and not in modules_to_save.
    peft = {"modules_to_save": ["embed_tokens", "model.embed_tokens"], "ensure_weight_tying": True}
    changed(out, stored, **peft)
    assert np.allclose(our_logits(folder, out), expected, atol=1e-5)
    head = f"{PREFIX}lm_head.weight"
    changed(out, {name: value for name, value in stored.items() if name != head})
    assert np.allclose(our_logits(folder, out), expected, atol=1e-5)
    changed(out, {**stored, head: stored[head] + 0.1})
    with pytest.raises(InputError):
        our_logits(folder, out)
    changed(out, {name: value for name, value in stored.items() if name != head}, ensure_weight_tying=False)
    with pytest.raises(InputError):
        our_logits(folder, out)
