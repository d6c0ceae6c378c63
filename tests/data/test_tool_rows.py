"""Rows with tool calls: a template that does not show them is named with one that does, and the call is shown."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest
from byte_tokenizer import CHATML, byte_tokenizer
from conftest import tiny_model, write_folder
from refusing import refuses
from run_cli import run

import mlx_lora
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import encode_prompt, resolve_template
from mlx_lora.data.files import read_tools
from mlx_lora.data.load import load_data
from mlx_lora.data.notes import ToolsNotShown
from mlx_lora.trainer.callbacks import held_out_prompts
from mlx_lora.utils import console

TOKENIZER = byte_tokenizer(CHATML)
TOOLS = [
    {"type": "function", "function": {"name": name, "description": "x" * 150, "parameters": {"type": "object", "properties": {}}}}
    for name in ("stock", "opening_hours", "price", "delivery")
]  # fmt: skip


def asked(item):
    call = {"type": "function", "function": {"name": "stock", "arguments": json.dumps({"item": item})}}
    turns = [
        {"role": "user", "content": f"Do you have {item}?"}, {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": '{"count": 12,\n "more": 3,\n "shelf": "A",\n "row": 4,\n "in": "shop"}'},
        {"role": "assistant", "content": f"Yes, 12 {item}."},
    ]  # fmt: skip
    return {"messages": turns, "tools": TOOLS}


def said(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"You said {text}"}]}


CALLS = [asked(f"item {n}") for n in range(6)]
TALK = [said(f"word {n}") for n in range(6)]


def write(tmp_path, rows, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(path, **settings):
    return load_data(DataSettings(data=str(path), valid_fraction=0.0, **settings), TOKENIZER, seed=0)


def test_the_refusal_names_the_template_and_counts_the_rows(tmp_path):
    for rows in (CALLS, [*CALLS, *TALK[:5]]):
        with pytest.raises(ToolsNotShown, match="--chat-template chatml") as refused:
            load(write(tmp_path, rows))
        assert refused.value.rows == 6
    notes = load(write(tmp_path, [*CALLS, *TALK])).report.notes
    assert any("6 train rows" in note and "--chat-template chatml" in note for note in notes)
    chosen = load(write(tmp_path, [*CALLS, *TALK[:1]]), chat_template="alpaca")  # who names a template has decided
    assert chosen.report.splits["train"].rows == 1
    assert load(write(tmp_path, CALLS), chat_template="chatml").report.dropped == 0


def test_the_example_shows_the_call(tmp_path):
    lines = load(write(tmp_path, [*TALK, *CALLS]), chat_template="chatml").report.render().splitlines()
    example = lines[next(n for n, line in enumerate(lines) if line.startswith("example")) + 1 :]
    text = "\n".join(example)
    assert '"name": "stock", "arguments": {"item": "item' in text
    assert "⟦Yes, 12 item" in text
    assert "Do you have item" in text
    assert len(example) < 20
    colored = load(write(tmp_path, CALLS), chat_template="chatml").report.render(color=True)
    assert '"arguments": {"item": "item' in colored


def test_texts_of_the_report_are_made_with_the_tools_of_the_row(tmp_path):
    rows = load(write(tmp_path, CALLS), chat_template="chatml").train
    for _, prompt in held_out_prompts(rows, 3):
        text = TOKENIZER.decode(prompt)
        assert len(prompt) > 600
        assert text.startswith("<|im_start|>system")
        assert all(tool["function"]["name"] in text for tool in TOOLS)
        assert "Yes" not in text


@pytest.mark.parametrize(
    ("key", "usual", "answer"),
    [
        ("y", True, "True"),
        ("\r", True, "True"),
        ("n", True, "False"),
        ("\x1b", True, "False"),
        ("\r", False, "False"),
        ("y", False, "True"),
    ],
)
def test_one_key_answers_on_a_terminal(key, usual, answer):
    ours, theirs = pty.openpty()
    program = f"from mlx_lora.utils import console; print(console.agreed('Train with chatml?', {usual}))"
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=theirs, stderr=theirs, stdout=subprocess.PIPE, text=True
    )
    try:
        shown = b""
        while (b"[Y/n]" if usual else b"[y/N]") not in shown:
            shown += os.read(ours, 1000)
        for _ in range(100):  # a key that comes before the terminal is read key by key is thrown away
            os.write(ours, key.encode())
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.3)
                break
        assert child.communicate(timeout=10)[0].strip() == answer
    finally:
        child.kill()
        child.wait()
    assert b"Train with chatml?" in shown
    os.close(ours)
    os.close(theirs)


def test_train_goes_on_with_chatml_if_the_user_agrees(tmp_path, monkeypatch):
    model = write_folder(tmp_path / "model", tiny_model())
    data = write(tmp_path, CALLS)
    arguments = (
        "--model",
        model,
        "--data",
        data,
        "--adapter-path",
        tmp_path / "a",
        "--dry-run",
        "--max-seq-length",
        4096,
    )
    refused = run("train", *arguments)  # nobody can be asked here
    assert refused.code == 2
    assert "--chat-template chatml" in refused.lines[-1]
    questions = []
    monkeypatch.setattr(console, "agreed", lambda question: not questions.append(question))
    ran = run("train", *arguments)
    assert ran.code == 0, ran.err
    assert "chatml" in ran.err
    assert "6 rows" in questions[0]
    assert "stock" in ran.err


def test_tools_are_read_and_shown_to_the_model_that_generates(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    assert read_tools(str(tmp_path / "tools.json")) == TOOLS
    assert read_tools(str(write(tmp_path, [*TALK, *CALLS]))) == TOOLS
    for name, content in (("a.json", "{"), ("b.json", "[]"), ("c.json", "[1]"), ("d.jsonl", json.dumps(TALK[0]))):
        (tmp_path / name).write_text(content)
        refuses(rf"--tools .*{name}", read_tools, str(tmp_path / name))
    refuses("--tools", read_tools, str(tmp_path / "nowhere.json"))
    chatml, _ = resolve_template("chatml", TOKENIZER)
    row = load(write(tmp_path, CALLS[:1]), chat_template="chatml").train
    assert encode_prompt(TOKENIZER, "Do you have item 0?", chatml, tools=TOOLS) == held_out_prompts(row, 1)[0][1]
    refuses(r"--tools.*chatml", encode_prompt, TOKENIZER, "x", CHATML, tools=TOOLS)
    refuses("--tools", encode_prompt, TOKENIZER, "x", None, tools=TOOLS)


def test_generate_hands_the_tools_to_the_template(tmp_path, tiny_folder):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    asked = ("generate", "--model", tiny_folder, "--prompt", "Do you have glue?", "--max-tokens", 1, "--tools", tools)
    refused = run(*asked)  # the tiny model's own template shows none
    assert refused.code == 2
    assert "--tools" in refused.lines[-1]
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    chatml, _ = resolve_template("chatml", TOKENIZER)
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chatml}))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    shown = run("generate", "--model", model, *asked[3:], "--json")
    assert shown.code == 0, shown.err
    assert json.loads(shown.out)["prompt_tokens"] > 600
    with pytest.raises(ValueError, match="tools"):
        mlx_lora.load(tiny_folder).generate("Hi", max_tokens=1, tools=TOOLS)


TEXTS = [{"text": f"Bread number {n} needs {n} hours."} for n in range(6)]


def test_plain_text_teaches_no_answering_and_that_is_said(tmp_path):
    def told(path, tokenizer=TOKENIZER, **settings):
        notes = load_data(DataSettings(data=str(path), valid_fraction=0.0, **settings), tokenizer, seed=0).report.notes
        return any("plain text" in note and "--speaker" in note for note in notes)

    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "bread.md").write_text("# Bread\n\nMix flour and water.\n")
    (notes / "pizza.md").write_text("# Pizza\n\nThe same dough.\n")
    assert told(notes)
    assert told(write(tmp_path, TEXTS))
    assert not told(write(tmp_path, TEXTS), byte_tokenizer(None))  # a base model continues text
    assert not told(write(tmp_path, [*TEXTS, *TALK]))
    assert not told(write(tmp_path, TALK))
    assert not told(write(tmp_path, TEXTS), data_format="text")  # was asked for
    assert not told(
        write(tmp_path, [{"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"}] * 2)
    )
    assert not told("bard")
