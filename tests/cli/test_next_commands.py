"""What a run's end tells its user to do next works as it is written, for every kind of adapter."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import tiny_model, write_folder
from run_cli import run, succeeds
from tiny_moe import tiny_moe

from mlx_lora.config.load import train_settings
from mlx_lora.trainer.callbacks import Uses, next_commands

SHORT = ("--iters", 2, "--batch-tokens", 240, "--rank", 4, "--val-batches", 1, "--sample-tokens", 2)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labeled") / "rows.jsonl"
    rows = [{"text": f"number {n}", "label": "odd" if n % 2 else "even"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def plain_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} foxes jump over {n * n} dogs."}) + "\n" for n in range(20)))
    return path


@pytest.fixture(scope="module")
def without_template(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("plain") / "base", tiny_model(), chat_template=None)


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("moe") / "base", *tiny_moe("qwen3_moe"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    path.write_text("".join(json.dumps({"anchor": f"what is {n}", "positive": f"it is {n}"}) + "\n" for n in range(40)))
    return path


@pytest.fixture(scope="module")
def folder_of_labels(tmp_path_factory, labeled):
    folder = tmp_path_factory.mktemp("folder")
    (folder / "train.jsonl").write_bytes(labeled.read_bytes())
    return folder


CLASSIFY, EMBED, BITS = ("--objective", "classify"), ("--objective", "embed"), ("--bits", 4)


@pytest.mark.long
@pytest.mark.parametrize(
    ("base", "data", "flags"),
    [
        ("tiny_folder", "chats", ()),
        ("tiny_folder", "chats", (*BITS, "--qat")),
        ("without_template", "plain_text", ()),
        ("experts", "chats", ()),
        *(
            pytest.param(*one, marks=pytest.mark.slow)
            for one in (
                ("tiny_folder", "chats", ("--modules-to-save", "model.norm")),
                ("tiny_folder", "folder_of_labels", CLASSIFY),
                ("tiny_folder", "pairs", (*EMBED, *BITS, "--qat")),
                ("tiny_folder", "chats", BITS),
                ("tiny_folder", "chats", (*BITS, "--method", "qa-lora", "--target-modules", "q_proj,v_proj")),
                ("tiny_folder", "chats", ("--method", "full")),
                ("tiny_folder", "chats", ("--method", "dora")),
                ("tiny_folder", "chats", ("--valid-fraction", 0)),
                ("tiny_folder", "plain_text", ()),
                ("tiny_4bit_folder", "chats", ("--qat",)),
                ("without_template", "plain_text", ("--method", "full")),
                ("experts", "chats", ("--method", "dora")),
                ("tiny_folder", "labeled", CLASSIFY),
                ("tiny_folder", "labeled", (*CLASSIFY, "--method", "full")),
                ("tiny_4bit_folder", "labeled", (*CLASSIFY, "--qat")),
                ("experts", "labeled", (*CLASSIFY, "--method", "full")),
                ("tiny_folder", "pairs", EMBED),
                ("experts", "pairs", EMBED),
            )
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)) or "lora",
)
def test_each_next_command_works(base, data, flags, request, tmp_path, monkeypatch):
    data = request.getfixturevalue(data)
    words = ("--model", request.getfixturevalue(base), "--data", data, "--adapter-path", tmp_path / "a")
    ran = succeeds("train", *words, *flags, *SHORT)
    told = ran.lines[ran.lines.index("What to do next:") + 1 :]
    commands = [
        shlex.split(one[2])
        for line in told
        if (one := line.partition("mlx-lora ") if "mlx-lora " in line else line.partition("mlx_lora "))[2]
    ]
    assert commands
    named = {command[0]: command[1:] for command in commands}
    assert named.get("chat") in (None, named.get("serve"))  # the same engine reads both
    questions = tmp_path / "FILE.txt"
    questions.write_text("a text of mine\n")
    monkeypatch.chdir(tmp_path)
    for name, *given in commands:
        if name == "serve":
            continue
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"Hi\n"), isatty=lambda: False))
        succeeds(name, *given)


def test_a_folder_that_is_named_like_the_base_is_not_taken_for_it(tiny_folder, chats, tmp_path):
    adapter = tmp_path / tiny_folder.name
    ran = run("train", "--model", tiny_folder, "--data", chats, "--adapter-path", adapter, *SHORT)
    [chat] = [line for line in ran.lines if "mlx-lora chat" in line]
    assert f"--adapter {tiny_folder.name}-adapter={adapter}" in chat


def test_the_commands_load_the_model_as_the_run_did(tmp_path):
    model = {"model": "owner/name", "revision": "v2", "bits": 4, "trust_remote_code": True}
    settings, info = (
        train_settings({**model, "data": "d"}),
        SimpleNamespace(scores=False, method="lora", full=(), qat=False),
    )
    for line in next_commands(Path("runs/a"), settings, info, [], Uses("llama")):
        assert "--model owner/name --revision v2" in line
        assert "--trust-remote-code" in line
        assert ("--bits 4" in line) is ("export" not in line)
