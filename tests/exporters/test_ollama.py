"""Ollama folders: the Modelfile's lines, and chat templates known by what they render.

The Go templates were run in Go for every family, with and without a system turn, and gave what `Chat.render` gives;
here there is no Go, so two of them stand spelled out.
"""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from byte_tokenizer import CHATML, byte_tokenizer, template
from gguf_families import MERGES, write_folder_with_merges
from make_adapters import adapt_and_save
from run_cli import one_line, passed, run, succeeds

import mlx_lora.data
from mlx_lora.exporters.ollama import FAMILIES, Chat, recognize
from mlx_lora.gguf.reader import read_gguf

BUILT_IN = Path(mlx_lora.data.__file__).parent / "templates"
CHATML_GO = (
    '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
    '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
    "{{ end }}{{ end }}<|im_start|>assistant\n"
)
GEMMA_GO = (
    '{{ $system := "" }}{{ range .Messages }}{{ if eq .Role "system" }}{{ $system = .Content }}'
    '{{ else if eq .Role "user" }}<start_of_turn>user\n{{ if $system }}{{ $system }}\n\n{{ $system = "" }}{{ end }}'
    '{{ .Content }}<end_of_turn>\n{{ else if eq .Role "assistant" }}<start_of_turn>model\n{{ .Content }}<end_of_turn>\n'
    "{{ end }}{{ end }}<start_of_turn>model\n"
)
WITH_DEFAULT = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_folder_with_merges(tmp_path_factory.mktemp("float"))


def export(model, out, *more):
    return run("export", "--model", model, "--to", "ollama", "--out", out, *more)


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize(
    ("text", "family", "system"),
    [
        (CHATML, "chatml", None),
        (WITH_DEFAULT, "chatml", "Be kind."),
        ((BUILT_IN / "chatml.jinja").read_text(), "chatml", None),
        ((BUILT_IN / "alpaca.jinja").read_text(), "alpaca", "Below is an instruction that describes a task. Write a"),
        (template("llama3"), "llama3", None),
        (template("gemma"), "gemma", None),
        (template("mistral"), "mistral", None),
    ],
)
def test_known_forms_are_told_by_what_they_render(text, family, system, bos):
    chat = recognize(byte_tokenizer(text, bos=bos), text)
    assert chat.family.name == family
    assert (chat.system or "").startswith(system or "")
    assert (chat.system is None) == (system is None)
    assert chat.before == ""


def test_other_forms_are_not_guessed():
    altered = CHATML.replace("'<|im_end|>' + '\\n'", "'<|im_end|>'")
    changes = [template("plain"), altered, "x" + CHATML, template("gemma").replace("\\n\\n", "\\n")]
    for text in changes:
        assert text != CHATML
        assert recognize(byte_tokenizer(text), text) is None


def test_a_bos_that_the_tokenizer_does_not_add_is_the_templates():
    tokenizer = byte_tokenizer(template("llama3"))
    tokenizer.bos_token = "<s>"
    chat = recognize(tokenizer, template("llama3"))
    assert chat.before == "<s>"
    assert chat.go_template().startswith("<s>{{ range")


def test_templates_in_go():
    families = {family.name: family for family in FAMILIES}
    assert Chat(families["chatml"], "</s>", None, "").go_template() == CHATML_GO
    assert Chat(families["gemma"], "</s>", None, "").go_template() == GEMMA_GO
    for family in FAMILIES:
        text = Chat(family, "</s>", None, "").go_template()
        assert text.count("{{ if") + text.count("{{ range") == text.count("{{ end }}")
        assert "{eos}" not in text


@pytest.mark.slow
def test_the_merged_model_with_its_template(folder, tmp_path):
    adapt_and_save(folder, tmp_path / "a")
    ran = passed(export(folder, tmp_path / "out", "--adapter-path", tmp_path / "a", "--gguf-type", "q8_0"))
    assert "chatml" in ran.err
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "model.gguf"]
    wanted = f'FROM ./model.gguf\nTEMPLATE """{CHATML_GO}"""\nPARAMETER stop "<|im_end|>"\n'
    assert (tmp_path / "out" / "Modelfile").read_text() == wanted
    file = read_gguf(tmp_path / "out" / "model.gguf")
    assert file.metadata["general.name"] == "out"
    succeeds("export", "--model", folder, "--to", "gguf", "--gguf-type", "q8_0", "--out", tmp_path / "bare.gguf")
    name = "blk.0.attn_v.weight"
    there, without = file.tensors[name].dequantize(), read_gguf(tmp_path / "bare.gguf").tensors[name].dequantize()
    assert abs(there - without).max() > 0.1


def test_a_default_system_text_is_the_modelfiles(folder, tmp_path):
    model = tmp_path / "m"
    model.mkdir()
    for file in folder.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    byte_tokenizer(WITH_DEFAULT, merges=MERGES).save_pretrained(model)
    assert export(model, tmp_path / "out").code == 0
    assert 'SYSTEM """Be kind."""\n' in (tmp_path / "out" / "Modelfile").read_text()
    byte_tokenizer(template("plain"), merges=MERGES).save_pretrained(model)
    ran = export(model, tmp_path / "out", "--force")
    assert "so the Modelfile has no TEMPLATE" in ran.err
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM ./model.gguf\n"


def test_the_adapter_over_a_base_that_ollama_has(folder, tmp_path):
    adapt_and_save(folder, tmp_path / "a")
    adapter = ("--adapter-path", tmp_path / "a")
    passed(export(folder, tmp_path / "out", *adapter, "--ollama-base", "smollm2:135m"))
    assert (tmp_path / "out" / "Modelfile").read_text() == "FROM smollm2:135m\nADAPTER ./adapter.gguf\n"
    assert read_gguf(tmp_path / "out" / "adapter.gguf").metadata["general.type"] == "adapter"
    assert run("export", "--model", folder, "--to", "gguf", "--out", tmp_path / "base.gguf").code == 0
    assert export(folder, tmp_path / "two", *adapter, "--ollama-base", tmp_path / "base.gguf").code == 0
    lines = (tmp_path / "two" / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {tmp_path / 'base.gguf'}", "ADAPTER ./adapter.gguf"]
    assert lines[2].startswith('TEMPLATE """')
    assert mx.load(str(tmp_path / "two" / "adapter.gguf"))


def test_bad_input_is_one_line_and_leaves_nothing(folder, tmp_path):
    adapt_and_save(folder, tmp_path / "a")
    out, adapter = tmp_path / "out", ("--adapter-path", tmp_path / "a")
    one_line(export(folder, out, "--ollama-base", "x"), "--ollama-base", "--adapter-path")
    one_line(export(folder, out, *adapter, "--ollama-base", "x", "--gguf-type", "f16"), "excludes --gguf-type")
    one_line(export(folder, out, *adapter, "--ollama-base", "gone.gguf"), "gone.gguf", "no such file")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]
    out.mkdir()
    (out / "mine").write_text("mine")
    one_line(export(folder, out), "not empty", "--force")
    one_line(export(folder, out, "--force"), "Modelfile")
    assert (out / "mine").read_text() == "mine"
