"""What a run's end tells its user to do next works as it is written, for every kind of adapter."""

from __future__ import annotations

import io
import json
import shlex
import sys
from types import SimpleNamespace

import pytest
from run_cli import run

SHORT = ("--iters", 2, "--batch-tokens", 240, "--rank", 4, "--val-batches", 1, "--sample-tokens", 2)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory):
    path = tmp_path_factory.mktemp("labeled") / "rows.jsonl"
    rows = [{"text": f"number {n}", "label": "odd" if n % 2 else "even"} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("base", "flags"),
    [
        ("tiny_folder", ()),
        ("tiny_folder", ("--bits", 4)),
        ("tiny_folder", ("--bits", 4, "--qat")),
        ("tiny_folder", ("--bits", 4, "--method", "qa-lora", "--target-modules", "q_proj,v_proj")),
        ("tiny_folder", ("--method", "full")),
        ("tiny_folder", ("--method", "dora")),
        ("tiny_folder", ("--modules-to-save", "model.norm")),
        ("tiny_4bit_folder", ("--qat",)),
        ("tiny_folder", ("--objective", "classify")),
        ("tiny_folder", ("--objective", "classify", "--method", "full")),
        ("tiny_4bit_folder", ("--objective", "classify", "--qat")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value)) or "lora",
)
def test_each_next_command_works(base, flags, request, chats, labeled, tmp_path, monkeypatch):
    data = labeled if "classify" in flags else chats
    words = ("--model", request.getfixturevalue(base), "--data", data, "--adapter-path", tmp_path / "a")
    ran = run("train", *words, *flags, *SHORT)
    assert ran.code == 0, ran.err
    told = ran.lines[ran.lines.index("What to do next:") + 1 :]
    commands = [shlex.split(line)[1:] for line in told if line.strip().startswith("mlx-lora ")]
    assert len(commands) >= 3
    named = {command[0]: command[1:] for command in commands}
    assert named.get("serve") == named.get("chat")  # the same engine reads both
    for name, *given in commands:
        if name == "serve":
            continue
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"Hi\n"), isatty=lambda: False))
        followed = run(name, *given)
        assert followed.code == 0, followed.err
