"""export measures merged models as they are read back; what is not measured is said."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from make_adapters import make_adapter
from resumed_runs import command
from run_cli import one_line, passed, run, succeeds


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter, and rows."""
    root = tmp_path_factory.mktemp("made")
    base = write_folder(root / "base", tiny_model())
    byte_tokenizer(merges=(("a", "b"), ("Ġ", "t"), ("ab", "c"))).save_pretrained(base)  # GGUF knows none without
    make_adapter(base, root / "a", strength=0.1)
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{n} foxes jump over {n * n} dogs"}) + "\n" for n in range(8)))
    return base, root / "a", rows


def export(made, out, *extra):
    return run("export", "--model", made[0], "--adapter-path", made[1], "--out", out, *extra)


def kl(text: str) -> float:
    return float(re.search(r"KL (\d+\.\d+)", text)[1])


def test_merged_forms_are_read_back_and_measured(made, tmp_path):
    data, found = ("--data", made[2]), {}
    for name, extra in {
        "m.gguf": ("--to", "gguf", "--gguf-type", "f32"),
        "q.gguf": ("--to", "gguf", "--gguf-type", "q4_0"),
        "hf": ("--to", "hf"),
        "ollama": ("--to", "ollama", "--gguf-type", "q4_0"),
    }.items():
        ran = passed(export(made, tmp_path / name, *extra, *data))
        assert "8 rows of" in ran.err
        found[name] = kl(ran.err)
    assert found["m.gguf"] == found["hf"] == 0
    assert found["q.gguf"] == pytest.approx(found["ollama"], abs=2e-3)
    assert found["q.gguf"] > 0.002


def test_what_is_not_measured_is_said(made, tmp_path):
    ran = export(made, tmp_path / "m.gguf", "--to", "gguf")
    assert (ran.code, "KL" in ran.err, "f16" in ran.err, "--data" in ran.err) == (0, False, True, True)
    ran = export(made, tmp_path / "p", "--to", "peft")
    assert (ran.code, "--data" in ran.err) == (0, False)
    one_line(export(made, tmp_path / "q", "--to", "peft", "--data", made[2]), "--data", "--to peft")
    one_line(export(made, tmp_path / "g.gguf", "--to", "gguf", "--data", tmp_path / "none.jsonl"), "none.jsonl")


@pytest.mark.long
def test_what_keeps_the_bases_numbers_is_not_called_rounded(tiny_4bit_folder, chats, tmp_path):
    base = shutil.copytree(tiny_4bit_folder, tmp_path / "base")
    byte_tokenizer(merges=(("a", "b"), ("Ġ", "t"), ("ab", "c"))).save_pretrained(base)
    succeeds(*command(base, chats, tmp_path / "a", "--method", "qa-lora"))
    merged = ("export", "--model", base, "--adapter-path", tmp_path / "a", "--to", "gguf")
    stored = run(*merged, "--out", tmp_path / "m.gguf")
    assert (stored.code, "KL" in stored.err, "f16" in stored.err) == (0, False, False)
    measured = run(*merged, "--out", tmp_path / "n.gguf", "--data", chats)
    assert kl(measured.err) < 0.01
