"""The report before training: right counts, the trained part marked as it is, and tool calls that a template does not show."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from byte_tokenizer import CHATML, byte_tokenizer, template
from conftest import tiny_model, write_folder
from refusing import refuses
from run_cli import run

import mlx_lora
from mlx_lora.config.settings import DataSettings
from mlx_lora.data.chat_template import encode_prompt, resolve_template
from mlx_lora.data.files import read_tools
from mlx_lora.data.load import load_data
from mlx_lora.data.notes import ToolsNotShown
from mlx_lora.data.report import DataReport, DroppedRow, Location, cut, reasons
from mlx_lora.trainer.callbacks import held_out_prompts
from mlx_lora.utils import console

TOKENIZER = byte_tokenizer(CHATML)
EXAMPLES = Path(__file__).parents[2] / "data"
CHAT = {
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "Two?\t"},
        {"role": "assistant", "content": "2 \x1b[31m"},
    ]
}


def report(tmp_path, rows, **settings):
    path = tmp_path / "d.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return load_data(DataSettings(data=str(path), **settings), TOKENIZER, seed=0).report


def test_counts(tmp_path):
    rows = [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": ""},
        {"prompt": "p", "completion": "c" * 300},
        "{broken",
        CHAT,
    ]
    found = report(tmp_path, rows, max_seq_length=150, valid_fraction=0.0)
    assert found.rows_read == 6
    assert found.formats == {"alpaca": 2, "completions": 1, "messages": 1}
    assert (found.truncated, found.empty, found.duplicates, found.dropped) == (1, 1, 1, 2)
    assert [row.line for row in found.dropped_rows] == [3, 5]
    assert (found.truncated_rows, found.duplicate_rows) == ([Location("d.jsonl", 4)], [Location("d.jsonl", 2)])
    train = found.splits["train"]
    assert train.rows == 4
    assert train.max_length == 150
    assert train.min_length <= train.median_length <= train.p95_length <= train.max_length
    assert 0 < train.supervised_tokens < train.tokens
    text = found.render()
    assert "6 (2 alpaca, 1 completions, 1 messages)" in text
    assert "truncated 1, duplicate 1, empty 1, dropped 2" in text
    assert "d.jsonl line 5: not JSON" in text
    assert "  truncated: d.jsonl line 4\n  duplicate, trained as often as it occurs: d.jsonl line 2\n" in text
    assert "the model's own" in text


def test_the_example_marks_exactly_what_is_trained(tmp_path):
    found = report(tmp_path, [CHAT], valid_fraction=0.0)
    plain = found.render()
    assert "⟦1<|im_end|>⟧↵" in plain
    assert "Two?→<|im_end|>↵" in plain
    assert "⟦2 ·[31m<|im_end|>⟧↵" in plain  # a control character from the data never reaches the terminal
    assert "\x1b" not in plain
    assert plain.count("⟦") == plain.count("⟧") == 3  # two turns, and the heading names both marks
    colored = found.render(color=True)
    assert "\x1b[32m1<|im_end|>\x1b[0m" in colored
    assert "⟦" not in colored
    assert "\x1b[31m" not in colored
    everything = report(tmp_path, [CHAT], valid_fraction=0.0, mask_prompt=False).render()
    assert "<|im_start|>⟦user↵" in everything


def test_lines_of_cut_and_doubled_rows_are_named_up_to_ten(tmp_path):
    rows = [{"prompt": "p", "completion": "c" * 300}] * 13 + [{"prompt": "q", "completion": "c"}]
    found = report(tmp_path, rows, max_seq_length=150, valid_fraction=0.0)
    assert (found.truncated, found.duplicates) == (13, 12)
    text = found.render()
    assert "d.jsonl lines 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 3 more" in text
    assert "d.jsonl lines 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 2 more" in text
    assert DataReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    none = report(tmp_path, rows[-1:], valid_fraction=0.0)
    assert "truncated:" not in none.render()


def test_rows_of_a_file_without_lines_are_counted(tmp_path):
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}, {"prompt": "p", "completion": "c"}]
    for name, content, location in (
        ("one.json", json.dumps(rows), "one.json record {}"),
        ("spread.json", json.dumps(rows, indent=1), "spread.json line {}"),
    ):
        (tmp_path / name).write_text(content)
        settings = DataSettings(data=str(tmp_path / name), valid_fraction=0.0)
        text = load_data(settings, TOKENIZER, seed=0).report.render()
        dropped, doubled = (2, 3) if name == "one.json" else (6, 10)
        assert f"  {location.format(dropped)}: the cell completion is empty; fill it in, or remove the row" in text
        assert f"  duplicate, trained as often as it occurs: {location.format(doubled)}" in text


def test_a_reason_is_told_once_and_cut_between_words():
    dropped = [DroppedRow("d.jsonl", line, "not good") for line in (1, 2, 5)]
    assert reasons(dropped) == "d.jsonl line 1 and 2 more: not good"
    others = [DroppedRow("e.json", line, f"bad {line}", "row") for line in range(1, 5)]
    assert reasons([*dropped, *others]) == (
        "d.jsonl line 1 and 2 more: not good; e.json row 1: bad 1; e.json row 2: bad 2; and 2 more"
    )
    words = "word " * 60
    assert cut(words, 200) == "word " * 39 + "…"
    assert len(cut("x" * 300, 200)) == 200
    assert cut("short", 200) == "short"


def test_long_rows_and_many_bad_ones_stay_short(tmp_path):
    long = {
        "messages": [
            m
            for n in range(30)
            for m in ({"role": "user", "content": f"q{n}\n" * 50}, {"role": "assistant", "content": "a" * 5000})
        ]
    }
    found = report(tmp_path, ["{"] * 25 + [long], max_seq_length=400_000, valid_fraction=0.0)
    lines = found.render().splitlines()
    assert len(lines) <= 35
    assert max(map(len, lines)) < 1000
    assert len(found.dropped_rows) == 10
    assert "  and 15 more" in lines


def test_tools_a_template_does_not_show_are_noted(tmp_path):
    found = report(tmp_path, [{**CHAT, "tools": [{"name": "f"}]}, CHAT], valid_fraction=0.0)
    (note,) = found.notes
    assert "tools of 1 row" in note
    assert "--chat-template chatml" in note
    assert report(tmp_path, [CHAT], valid_fraction=0.0).notes == []
    shown = report(tmp_path, [{**CHAT, "tools": [{"name": "f"}]}], valid_fraction=0.0, chat_template="chatml")
    assert shown.notes == []


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
ASKED = [
    {"role": "user", "content": "f?"},
    CALL,
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_a_template_does_not_show_is_counted_under_its_name(name, tmp_path):
    thinking = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "1", name: "hm"}]}
    found = report(tmp_path, [thinking, CHAT, thinking], valid_fraction=0.0)
    assert found.notes == [f"2 rows have {name}, which the chat template does not show; it is not trained"]
    assert f"note       2 rows have {name}" in found.render()
    (tmp_path / "shows.jinja").write_text(template("think_prompt"))
    shown = report(tmp_path, [thinking, CHAT], valid_fraction=0.0, chat_template=str(tmp_path / "shows.jinja"))
    assert shown.notes == []


def test_fields_that_are_not_read_and_chats_that_are_divided_are_counted(tmp_path):
    turns = [{**message, "id": n} for n, message in enumerate(CHAT["messages"])]
    turns[1] = {**turns[1], "thinking": "hm"}
    (tmp_path / "qwen.jinja").write_text(template("qwen3_thinking"))
    found = report(tmp_path, [{"messages": turns}], valid_fraction=0.0, chat_template=str(tmp_path / "qwen.jinja"))
    assert found.notes[0] == "fields of messages that are not read: id (1 row)"
    assert found.notes[1].startswith("1 chat gives several rows")
    assert found.splits["train"].rows == 2


def test_rows_with_tool_calls_name_a_template_that_has_tools_and_train_with_it(tmp_path):
    """As in a Glaive set: some rows call tools, the others talk."""
    rows = [{"messages": [{"role": "system", "content": "help"}, *ASKED], "tools": [{"name": "f"}]}, CHAT] * 6
    found = report(tmp_path, rows, valid_fraction=0.0)
    assert found.dropped == 6
    assert {row.why for row in found.dropped_rows} == {
        "the chat template does not show tool calls; use --chat-template chatml, which supports tools"
    }
    alpaca = report(tmp_path, rows, valid_fraction=0.0, chat_template="alpaca")
    assert all(row.why.endswith("; use --chat-template chatml, which supports tools") for row in alpaca.dropped_rows)
    chatml = report(tmp_path, rows, valid_fraction=0.0, chat_template="chatml")
    assert chatml.dropped == 0
    assert chatml.splits["train"].rows == 12
    assert chatml.notes == []
    one = report(tmp_path, rows[:1], valid_fraction=0.0, chat_template="chatml")
    assert [text.split("\n")[0] for text, is_trained in one.example if is_trained] == ["<tool_call>", "two<|im_end|>"]


def test_instructions_a_template_does_not_show_are_counted(tmp_path):
    (tmp_path / "deaf.jinja").write_text(CHATML.replace("{{ '<|im_start|>' + m", "{% if message.role != 'system' %}{{ '<|im_start|>' + m").replace("{% endfor %}", "{% endif %}{% endfor %}", 1))  # fmt: skip
    told = {"messages": [{"role": "system", "content": "be brief"}, *CHAT["messages"]]}
    told["messages"][1] = {**told["messages"][1], "name": "Ann"}
    deaf = report(tmp_path, [told], valid_fraction=0.0, chat_template=str(tmp_path / "deaf.jinja"))
    assert deaf.notes == [
        "1 row has a system message, which the chat template does not show; it is not trained",
        "1 row has name, which the chat template does not show; it is not trained",
    ]
    developer = {"messages": [{"role": "developer", "content": "be brief"}, *CHAT["messages"]]}
    (tmp_path / "qwen.jinja").write_text(template("qwen3_5"))  # knows system only
    heard = report(tmp_path, [developer], valid_fraction=0.0, chat_template=str(tmp_path / "qwen.jinja"))
    assert (heard.dropped, heard.notes) == (0, [])
    assert "be brief" in heard.render()


def test_to_dict_is_plain(tmp_path):
    values = report(tmp_path, [CHAT, "{"]).to_dict()
    assert json.loads(json.dumps(values))["dropped_rows"][0]["line"] == 2
    assert values["splits"]["train"]["supervised_tokens"] > 0


@pytest.mark.parametrize("color", [False, True])
def test_no_validation_is_said(tmp_path, color):
    lines = report(tmp_path, [CHAT]).render(color).splitlines()
    assert [line for line in lines if line.startswith("valid ")] == ["valid      none"]


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "messages", "completions", "text", "csv"])
def test_our_example_data_is_ready_to_train(name):
    settings = DataSettings(data=str(EXAMPLES / name), strict=True, chat_template="chatml")
    splits = load_data(settings, TOKENIZER, seed=0)
    assert splits.report.dropped == splits.report.truncated == splits.report.duplicates == 0
    assert len(splits.train) >= (1 if name == "text" else 12)
    assert len(splits.valid) >= 1


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
