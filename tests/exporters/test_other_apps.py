"""Exports into other programs' folders, which stand in as directories laid out like theirs, and programs that answer like them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import tiny_model, write_folder
from gguf_families import write_folder_with_merges
from make_adapters import make_adapter
from run_cli import one_line, run, succeeds

from mlx_lora.config.settings import ModelSettings
from mlx_lora.exporters.adapter_folder import load_adapter
from mlx_lora.exporters.fuse import _left_out
from mlx_lora.models.draft_folder import drafting_tensors
from mlx_lora.models.load import load_base

OLLAMA = """#!/bin/sh
echo "$@" >> "$LOG"
case "$1" in
show) test "$KNOWN" ;;
create) grep -q '^FROM' "$4" && test -f "$(dirname "$4")/model.gguf" || { echo 'Error: no Modelfile' >&2; exit 1; } ;;
run) [ "$MUTE" ] && printf '\033[?25lbroken\033[K' >&2 || echo 'I am a pirate.' ;;
esac
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    model = tiny_model(tie_word_embeddings=False)
    folder = write_folder(tmp_path_factory.mktemp("apps") / "tiny", model, {"tie_word_embeddings": False})
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    return make_adapter(base, tmp_path_factory.mktemp("adapter") / "a")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def export(base, adapter, to, out, *more):
    return run("export", "--model", base, "--adapter-path", adapter, "--to", to, "--out", out, *more)


@pytest.mark.parametrize("place", [".lmstudio/models", ".cache/lm-studio/models", "elsewhere", "pointed/models"])
def test_lm_studio_finds_the_fused_model_where_it_looks(base, adapter, home, place):
    (home / place).mkdir(parents=True)
    if place != ".lmstudio/models":
        (home / ".lmstudio/models").mkdir(parents=True)  # of a newer version, which goes on with the old place
    if place == "elsewhere":
        (home / ".lmstudio/settings.json").write_text(json.dumps({"downloadsFolder": str(home / place)}))
    if place == "pointed/models":
        (home / ".cache/lm-studio").mkdir(parents=True)
        (home / ".lmstudio-home-pointer").write_text(f"{home / 'pointed'}\n")
    ran = export(base, adapter, "lmstudio", "me/pirate")
    assert ran.code == 0, ran.err
    written = home / place / "me/pirate"
    assert (written / "generation_config.json").read_text() == (base / "generation_config.json").read_text()
    fused, adapted = load_base(ModelSettings(model=str(written))), load_base(ModelSettings(model=str(base)))
    tokens = mx.array([[3, 1, 4, 1, 5]])
    plain = adapted.model(tokens)
    load_adapter(adapted, adapter)
    assert mx.allclose(fused.model(tokens), adapted.model(tokens), atol=1e-4)
    assert not mx.allclose(fused.model(tokens), plain, atol=1e-2)
    one_line(export(base, adapter, "lmstudio", "me/pirate"), str(written))
    assert export(base, adapter, "lmstudio", "me/pirate", "--force").code == 0
    assert export(base, adapter, "lmstudio", "alone-v1.5").code == 0
    assert (home / place / "mlx-lora/alone-v1.5/config.json").exists()


@pytest.mark.parametrize("name", ["../x", "a/b/c", "/tmp/x", "..", "a b"])
def test_a_name_in_lm_studio_is_no_path(base, adapter, home, name):
    (home / ".lmstudio/models").mkdir(parents=True)
    one_line(export(base, adapter, "lmstudio", name), "--out", "PUBLISHER")
    assert list((home / ".lmstudio/models").iterdir()) == []


def test_settings_of_lm_studio_that_say_nothing_or_name_a_folder_that_is_gone(base, adapter, home):
    (home / ".lmstudio").mkdir()
    (home / ".lmstudio/settings.json").write_text(json.dumps({"downloadsFolder": str(home / "gone")}))
    one_line(export(base, adapter, "lmstudio", "x"), str(home / "gone"))
    assert not (home / "gone").exists()
    (home / ".lmstudio/settings.json").write_text("[]")
    assert export(base, adapter, "lmstudio", "x").code == 0
    assert (home / ".lmstudio/models/mlx-lora/x/config.json").exists()


def test_without_lm_studio_nothing_is_written(base, adapter, home):
    one_line(export(base, adapter, "lmstudio", "x"), "LM Studio")
    assert list(home.iterdir()) == []


def test_ollama_creates_the_model_and_is_asked(tmp_path, monkeypatch):
    folder = write_folder_with_merges(tmp_path / "float")
    own = make_adapter(folder, tmp_path / "adapter")
    one_line(export(folder, own, "ollama", tmp_path / "none", "--create"), "--create", "ollama")
    one_line(export(folder, own, "gguf", tmp_path / "none.gguf", "--create"), "--create")
    program, log = tmp_path / "bin/ollama", tmp_path / "log"
    program.parent.mkdir()
    program.write_text(OLLAMA)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("LOG", str(log))
    ran = export(folder, own, "ollama", tmp_path / "My Pirate 1.5", "--create")
    assert ran.code == 0, ran.err
    assert "I am a pirate." in ran.err
    _, create, asked = log.read_text().splitlines()
    assert create == f"create my-pirate-1.5 -f {tmp_path / 'My Pirate 1.5' / 'Modelfile'}"
    assert asked.startswith("run my-pirate-1.5 ")
    monkeypatch.setenv("KNOWN", "1")
    log.unlink()
    refused = export(folder, own, "ollama", tmp_path / "known", "--create")
    assert refused.code == 2
    assert "create" not in log.read_text()  # a model of the user's is not replaced
    assert export(folder, own, "ollama", tmp_path / "known", "--create", "--force").code == 0
    monkeypatch.setenv("MUTE", "1")
    monkeypatch.delenv("KNOWN")
    silent = export(folder, own, "ollama", tmp_path / "silent", "--create")
    assert silent.code == 1
    assert "(broken)" in silent.err
    assert (tmp_path / "silent/Modelfile").exists()


@pytest.mark.parametrize("form", ["lora", "dora"])
def test_mlx_swift_gets_the_keys_that_it_reads(base, tmp_path, form):
    """Its LoRAContainer puts rank, scale and type on the keys of the last blocks, and takes no name that it does not have."""
    adapter = make_adapter(base, tmp_path / "a", form=form, targets="q_proj,down_proj", num_layers=1)
    succeeds("export", "--model", base, "--adapter-path", adapter, "--to", "mlx-swift", "--out", tmp_path / "swift")
    config = json.loads((tmp_path / "swift/adapter_config.json").read_text())
    shape, weights = config["lora_parameters"], mx.load(str(tmp_path / "swift/adapters.safetensors"))
    assert config["fine_tune_type"] == form
    assert 0 <= shape["dropout"] < 1
    blocks = len(load_base(ModelSettings(model=str(base))).model.layers)
    adapted = {
        f"model.layers.{block}.{key}" for block in range(blocks)[-config["num_layers"] :] for key in shape["keys"]
    }
    assert {name.rpartition(".")[0] for name in weights} == adapted
    parts = {"lora_a", "lora_b"} | ({"m"} if form == "dora" else set())
    assert {name.rpartition(".")[2] for name in weights} == parts
    assert all(shape["rank"] in array.shape for name, array in weights.items() if not name.endswith(".m"))


def test_mlx_swift_gets_a_count_of_blocks_for_mlx_lms_minus_one(base, adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    own = tmp_path / "all"
    own.mkdir()
    (own / "adapters.safetensors").write_bytes((adapter / "adapters.safetensors").read_bytes())
    config = {key: value for key, value in config.items() if key != "mlx_lora"} | {"num_layers": -1}
    (own / "adapter_config.json").write_text(json.dumps(config))
    assert export(base, own, "mlx-swift", tmp_path / "swift").code == 0
    written = json.loads((tmp_path / "swift/adapter_config.json").read_text())
    assert written["num_layers"] == len(load_base(ModelSettings(model=str(base))).model.layers)


def test_mlx_swift_is_refused_what_it_does_not_load(base, tmp_path):
    head = make_adapter(base, tmp_path / "head", targets="q_proj,lm_head")
    one_line(export(base, head, "mlx-swift", tmp_path / "out"), "lm_head", "fuse")
    assert not (tmp_path / "out").exists()
    assert export(base, head, "mlx-lm", tmp_path / "out").code == 0


def test_what_a_fused_folder_is_without_is_named(tmp_path):
    base, fused = tmp_path / "base", tmp_path / "fused"
    for folder in (base, fused):
        folder.mkdir()
        mx.save_safetensors(str(folder / "model.safetensors"), {"model.layers.0.w": mx.zeros(2), "w": mx.zeros(1)})
        (folder / "config.json").write_text("{}")
    assert _left_out(base, fused) == []
    (base / "extra.json").write_text("{}")
    (base / "README.md").write_text("a card")
    (base / "draft").mkdir()
    mx.save_safetensors(str(base / "draft/model.safetensors"), {"w": mx.zeros(2)})
    (base / ".cache").mkdir()
    (base / ".cache/x.lock").write_text("")
    assert _left_out(base, fused) == ["draft/model.safetensors", "extra.json"]
    (base / "config.json").write_text('{"num_hidden_layers": 1}')
    draft = {"mtp.fc.weight": mx.zeros(2), "model.layers.1.w": mx.zeros(2), "model.mtp_norm": mx.zeros(2)}
    mx.save_safetensors(str(base / "mtp.safetensors"), draft)
    assert drafting_tensors(base) == ["model.layers.1.w", "mtp.fc.weight"]
