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
from refusing import refuses
from row_files import loaded, write_rows
from run_cli import holds, lacks, one_line, run, succeeds

import mlx_lora
from mlx_lora.data.chat_template import encode_prompt, resolve_template
from mlx_lora.data.data_sets import read_tools
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
    return loaded(write_rows(tmp_path / "d.jsonl", rows), **settings).report


def test_counts(tmp_path):
    rows = [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "output": ""},
        {"prompt": "p", "completion": "c" * 300},
        "{broken",
        CHAT,
    ]
    found = report(tmp_path, rows, max_seq_length=150)
    assert (found.rows_read, found.formats) == (6, {"alpaca": 2, "completions": 1, "messages": 1})
    assert (found.truncated, found.empty, found.duplicates, found.dropped) == (1, 1, 1, 2)
    assert [row.line for row in found.dropped_rows] == [3, 5]
    assert (found.truncated_rows, found.duplicate_rows) == ([Location("d.jsonl", 4)], [Location("d.jsonl", 2)])
    train = found.splits["train"]
    assert (train.rows, train.max_length) == (4, 150)
    assert train.min_length <= train.median_length <= train.p95_length <= train.max_length
    assert 0 < train.supervised_tokens < train.tokens
    holds(
        found.render(), "6 (2 alpaca, 1 completions, 1 messages)", "truncated 1, duplicate 1, empty 1, dropped 2",
        "d.jsonl line 5: not JSON", "the model's own",
        "  truncated: d.jsonl line 4\n  duplicate, trained as often as it occurs: d.jsonl line 2\n",
    )  # fmt: skip
    assert json.loads(json.dumps(found.to_dict()))["dropped_rows"][0]["line"] == 3


def test_the_example_marks_exactly_what_is_trained(tmp_path):
    found = report(tmp_path, [CHAT])
    plain = found.render()
    # A control character from the data never reaches the terminal.
    holds(plain, "⟦1<|im_end|>⟧↵", "Two?→<|im_end|>↵", "⟦2 ·[31m<|im_end|>⟧↵")
    assert "\x1b" not in plain
    assert plain.count("⟦") == plain.count("⟧") == 3  # two turns, and the heading names both marks
    colored = found.render(color=True)
    holds(colored, "\x1b[32m1<|im_end|>\x1b[0m")
    lacks(colored, "⟦", "\x1b[31m")
    everything = report(tmp_path, [CHAT], mask_prompt=False).render()
    assert "<|im_start|>⟦user↵" in everything


def test_lines_of_cut_and_doubled_rows_are_named_up_to_ten(tmp_path):
    rows = [{"prompt": "p", "completion": "c" * 300}] * 13 + [{"prompt": "q", "completion": "c"}]
    found = report(tmp_path, rows, max_seq_length=150)
    assert (found.truncated, found.duplicates) == (13, 12)
    numbers = ", ".join(map(str, range(2, 11)))
    holds(found.render(), f"d.jsonl lines 1, {numbers} and 3 more", f"d.jsonl lines {numbers}, 11 and 2 more")
    assert DataReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert "truncated:" not in report(tmp_path, rows[-1:]).render()


@pytest.mark.parametrize(
    ("indent", "dropped", "doubled"),
    [(None, "d.json record 2", "d.json record 3"), (1, "d.json line 6", "d.json line 10")],
)
def test_rows_of_a_file_without_lines_are_counted(tmp_path, indent, dropped, doubled):
    rows = [{"prompt": "p", "completion": answer} for answer in ("c", "", "c")]
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=indent))
    holds(
        loaded(tmp_path / "d.json").report.render(), f"  duplicate, trained as often as it occurs: {doubled}",
        f"  {dropped}: the cell completion is empty; fill it in, or remove the row",
    )  # fmt: skip


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
    found = report(tmp_path, ["{"] * 25 + [long], max_seq_length=400_000)
    lines = found.render().splitlines()
    assert len(lines) <= 35
    assert max(map(len, lines)) < 1000
    assert len(found.dropped_rows) == 10
    assert "  and 15 more" in lines


CALL = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
ASKED = [
    {"role": "user", "content": "f?"},
    CALL,
    {"role": "tool", "content": "2"},
    {"role": "assistant", "content": "two"},
]
FIRST, *REST = CHAT["messages"]
BRIEF = {"content": "be brief"}
DEAF = CHATML.replace("{{ '<|im_start|>' + m", "{% if message.role != 'system' %}{{ '<|im_start|>' + m").replace("{% endfor %}", "{% endif %}{% endfor %}", 1)  # fmt: skip
WITH_IDS = [{**message, "id": n} | ({"thinking": "hm"} if n == 1 else {}) for n, message in enumerate(CHAT["messages"])]


def thinking(name: str) -> dict:
    return {"messages": [FIRST, {"role": "assistant", "content": "1", name: "hm"}]}


# What a row has beside its texts -> rows, the template, and what the notes say.
NOTED = {
    "tools": ([{**CHAT, "tools": [{"name": "f"}]}, CHAT], CHATML, ["--chat-template chatml"]),
    "no tools": ([CHAT], CHATML, []),
    "tools that are shown": ([{**CHAT, "tools": [{"name": "f"}]}], "chatml", []),
    **{
        name: ([thinking(name), CHAT, thinking(name)], CHATML, [f"2 rows have {name}, which the chat template does not show; it is not"])
        for name in ("reasoning_content", "thinking", "reasoning")
    },
    **{
        f"{name} that is shown": ([thinking(name), CHAT], template("think_prompt"), [])
        for name in ("reasoning_content", "thinking", "reasoning")
    },
    "unread fields and a divided chat": (
        [{"messages": WITH_IDS}], template("qwen3_thinking"),
        ["fields of messages that are not read: id (1 row)", "1 chat gives several rows"],
    ),
    "instructions": (
        [{"messages": [{"role": "system", **BRIEF}, {**FIRST, "name": "Ann"}, *REST]}], DEAF,
        ["1 row has a system message, which the chat template does not show; it is not trained",
         "1 row has name, which the chat template does not show; it is not trained"],
    ),
    "instructions that are shown": ([{"messages": [{"role": "developer", **BRIEF}, FIRST, *REST]}], template("qwen3_5"), []),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTED)
def test_what_a_template_does_not_show_is_counted_under_its_name(name, tmp_path):
    rows, text, wanted = NOTED[name]
    (tmp_path / "t.jinja").write_text(text)
    found = report(tmp_path, rows, chat_template=text if text == "chatml" else str(tmp_path / "t.jinja"))
    assert len(found.notes) == len(wanted)
    assert all(words in note for note, words in zip(found.notes, wanted, strict=True))
    assert (found.dropped, found.splits["train"].rows) == (0, len(rows) + name.endswith("divided chat"))
    holds(found.render(), *wanted, *(["tools of 1 row"] if name == "tools" else []))
    assert ("be brief" in found.render()) == (name == "instructions that are shown")


def test_rows_with_tool_calls_name_a_template_that_has_tools_and_train_with_it(tmp_path):
    """As in a Glaive set: some rows call tools, the others talk."""
    rows = [{"messages": [{"role": "system", "content": "help"}, *ASKED], "tools": [{"name": "f"}]}, CHAT] * 6
    found = report(tmp_path, rows)
    assert found.dropped == 6
    assert {row.why for row in found.dropped_rows} == {
        "the chat template does not show tool calls; use --chat-template chatml, which supports tools"
    }
    alpaca = report(tmp_path, rows, chat_template="alpaca")
    assert all(row.why.endswith("; use --chat-template chatml, which supports tools") for row in alpaca.dropped_rows)
    chatml = report(tmp_path, rows, chat_template="chatml")
    assert (chatml.dropped, chatml.splits["train"].rows, chatml.notes) == (0, 12, [])
    one = report(tmp_path, rows[:1], chat_template="chatml")
    assert [text.split("\n")[0] for text, is_trained in one.example if is_trained] == ["<tool_call>", "two<|im_end|>"]


@pytest.mark.parametrize("color", [False, True])
def test_no_validation_is_said(tmp_path, color):
    lines = report(tmp_path, [CHAT]).render(color).splitlines()
    assert [line for line in lines if line.startswith("valid ")] == ["valid      none"]


@pytest.mark.parametrize("name", ["alpaca", "sharegpt", "messages", "completions", "text", "csv"])
def test_our_example_data_is_ready_to_train(name):
    splits = loaded(EXAMPLES / name, valid_fraction=0.05, strict=True, chat_template="chatml")
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


def test_the_refusal_names_the_template_and_counts_the_rows(tmp_path):
    for rows in (CALLS, [*CALLS, *TALK[:5]]):
        with pytest.raises(ToolsNotShown, match="--chat-template chatml") as refused:
            report(tmp_path, rows)
        assert refused.value.rows == 6
    notes = report(tmp_path, [*CALLS, *TALK]).notes
    assert any("6 train rows" in note and "--chat-template chatml" in note for note in notes)
    chosen = report(tmp_path, [*CALLS, *TALK[:1]], chat_template="alpaca")  # who names a template has decided
    assert chosen.splits["train"].rows == 1
    assert report(tmp_path, CALLS, chat_template="chatml").dropped == 0


def test_the_example_shows_the_call(tmp_path):
    lines = report(tmp_path, [*TALK, *CALLS], chat_template="chatml").render().splitlines()
    example = lines[next(n for n, line in enumerate(lines) if line.startswith("example")) + 1 :]
    holds("\n".join(example), '"name": "stock", "arguments": {"item": "item', "⟦Yes, 12 item", "Do you have item")
    assert len(example) < 20
    holds(report(tmp_path, CALLS, chat_template="chatml").render(color=True), '"arguments": {"item": "item')


def test_texts_of_the_report_are_made_with_the_tools_of_the_row(tmp_path):
    rows = loaded(write_rows(tmp_path / "rows.jsonl", CALLS), chat_template="chatml").train
    for _, prompt in held_out_prompts(rows, 3):
        text = TOKENIZER.decode(prompt)
        assert len(prompt) > 600
        assert text.startswith("<|im_start|>system")
        holds(text, *(tool["function"]["name"] for tool in TOOLS))
        lacks(text, "Yes")


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


@pytest.mark.long
def test_train_goes_on_with_chatml_if_the_user_agrees(tiny_folder, tmp_path, monkeypatch):
    data = write_rows(tmp_path / "rows.jsonl", CALLS)
    arguments = (
        "--model",
        tiny_folder,
        "--data",
        data,
        "--adapter-path",
        tmp_path / "a",
        "--dry-run",
        "--max-seq-length",
        4096,
    )
    one_line(run("train", *arguments), "--chat-template chatml")  # nobody can be asked here
    questions = []
    monkeypatch.setattr(console, "agreed", lambda question: not questions.append(question))
    holds(succeeds("train", *arguments).err, "chatml", "stock")
    assert "6 rows" in questions[0]


def test_tools_are_read_and_shown_to_the_model_that_generates(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    assert read_tools(str(tmp_path / "tools.json")) == TOOLS
    assert read_tools(str(write_rows(tmp_path / "rows.jsonl", [*TALK, *CALLS]))) == TOOLS
    for name, content in (("a.json", "{"), ("b.json", "[]"), ("c.json", "[1]"), ("d.jsonl", json.dumps(TALK[0]))):
        (tmp_path / name).write_text(content)
        refuses(rf"--tools .*{name}", read_tools, str(tmp_path / name))
    refuses("--tools", read_tools, str(tmp_path / "nowhere.json"))
    chatml, _ = resolve_template("chatml", TOKENIZER)
    row = loaded(write_rows(tmp_path / "rows.jsonl", CALLS[:1]), chat_template="chatml").train
    assert encode_prompt(TOKENIZER, "Do you have item 0?", chatml, tools=TOOLS) == held_out_prompts(row, 1)[0][1]
    refuses(r"--tools.*chatml", encode_prompt, TOKENIZER, "x", CHATML, tools=TOOLS)
    refuses("--tools", encode_prompt, TOKENIZER, "x", None, tools=TOOLS)


def test_generate_hands_the_tools_to_the_template(tmp_path, tiny_folder):
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    asked = ("generate", "--model", tiny_folder, "--prompt", "Do you have glue?", "--max-tokens", 1, "--tools", tools)
    one_line(run(*asked), "--tools")  # the tiny model's own template shows none
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    chatml, _ = resolve_template("chatml", TOKENIZER)
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": chatml}))
    (model / "chat_template.jinja").unlink(missing_ok=True)
    shown = succeeds("generate", "--model", model, *asked[3:], "--json")
    assert json.loads(shown.out)["prompt_tokens"] > 600
    with pytest.raises(ValueError, match="tools"):
        mlx_lora.load(tiny_folder).generate("Hi", max_tokens=1, tools=TOOLS)


TEXTS = [{"text": f"Bread number {n} needs {n} hours."} for n in range(6)]
# Rows, or the texts of a folder of notes -> settings, and whether a note says that they teach no answering.
PLAIN = {
    "a folder of notes": (["# Bread\n\nMix flour and water.\n", "# Pizza\n\nThe same dough.\n"], {}, True),
    "texts": (TEXTS, {}, True),
    "texts for a base model, which continues them": (TEXTS, {"tokenizer": byte_tokenizer(None)}, False),
    "texts and talk": ([*TEXTS, *TALK], {}, False),
    "talk": (TALK, {}, False),
    "texts that were asked for": (TEXTS, {"data_format": "text"}, False),
    "texts with turns": (
        [{"text": "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>"}] * 2,
        {},
        False,
    ),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_text_teaches_no_answering_and_that_is_said(name, tmp_path):
    rows, settings, told = PLAIN[name]
    if name == "a folder of notes":
        for number, text in enumerate(rows):
            (tmp_path / f"{number}.md").write_text(text)
    else:
        write_rows(tmp_path / "train.jsonl", rows)
    notes = loaded(tmp_path, **settings).report.notes
    assert any("plain text" in note and "--speaker" in note for note in notes) == told
