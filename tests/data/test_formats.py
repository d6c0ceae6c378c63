"""Records of each format become one form, or say why not; no column that says something is lost without a word."""

from __future__ import annotations

import json
import zipfile
from datetime import datetime
from decimal import Decimal

import pytest
from refusing import refuses

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import find_splits
from mlx_lora.data.examples import Completion, Conversation, EmptyRecord, FormatError, Record, Text
from mlx_lora.data.file_formats import read_records
from mlx_lora.data.formats import parse_record
from mlx_lora.data.preferences import parse_pairs
from mlx_lora.data.prompts import parse_prompt
from mlx_lora.data.read import SplitRows, parse_rows

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {}}}
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
EXAMPLES = [
    ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, "alpaca", Conversation([USER, ASSISTANT])),
    ({"prompt": "q", "completion": "a"}, "completions", Completion("q", "a")),
    ({"text": "t"}, "text", Text("t")),
    ({"messages": [USER, ASSISTANT], "tools": None}, "messages", Conversation([USER, ASSISTANT])),
    ({"conversations": SHAREGPT}, "sharegpt", Conversation([USER, ASSISTANT])),
    ({"conversation": [USER, ASSISTANT]}, "sharegpt", Conversation([USER, ASSISTANT])),
]


@pytest.mark.parametrize(("record", "name", "example"), EXAMPLES)
def test_formats_are_found_and_can_be_named(record, name, example):
    assert parse_record(record) == (name, example)
    assert parse_record(record, name) == (name, example)


def test_a_named_format_is_binding():
    refuses(
        "found keys text; the alpaca format requires instruction, output",
        parse_record,
        {"text": "t"},
        "alpaca",
        kind=FormatError,
    )
    both = {"text": "t", "prompt": "p", "completion": "c"}
    assert parse_record(both)[0] == "completions"
    assert parse_record(both, "text") == ("text", Text("t"))


# What OpenAI's Python library, chat templates and other programs write -> the turns that it becomes.
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
OLD_CALL = {"role": "assistant", "content": None, "function_call": {"name": "sum", "arguments": '{"x": 1}'}}
RESULT = {"role": "tool", "content": "2", "name": "sum"}
CALLS = {"role": "assistant", "content": "", "tool_calls": [
    {"id": f"c{name}", "type": "function", "function": {"name": name, "arguments": {}}} for name in "ab"]}  # fmt: skip


def say(channel: str, content: str, **more: object) -> dict:
    """Return a message of a harmony channel."""
    return {"role": "assistant", "channel": channel, "content": content, **more}


TURNS_OF = {
    "alpaca": (
        {"instruction": "do", "input": "this", "output": "a", "system": "s", "history": [["q0", "a0"]]},
        [{"role": "system", "content": "s"}, {"role": "user", "content": "q0"}, {"role": "assistant", "content": "a0"},
         {"role": "user", "content": "do\nthis"}, ASSISTANT],
    ),
    "sharegpt": (
        {
            "system": "s",
            "conversations": [
                {"from": "human", "value": "q"}, {"from": "function_call", "value": '{"name": "sum", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"}, {"from": "gpt", "value": "a"},
            ],
            "tools": '[{"name": "sum", "parameters": {}}]',
        },
        [{"role": "system", "content": "s"}, USER, CALLED, RESULT, ASSISTANT],
    ),
    "sharegpt, with a list of tools": (
        {"conversations": SHAREGPT, "tools": [TOOL]}, [USER, ASSISTANT],
    ),
    "parts and nulls": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}], "name": None},
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"x": 1}'}}]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": None},
        ]},
        [{"role": "user", "content": "q!"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
         {**RESULT, "tool_call_id": "c1"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}],
    ),
    "lists as JSON text, of a table": ({"conversations": json.dumps(SHAREGPT), "tools": ""}, [USER, ASSISTANT]),
    "only the completion is trained": (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        [{**turn, "weight": 0} for turn in (USER, ASSISTANT, USER)] + [ASSISTANT],
    ),
    "harmony's channels": (
        {"messages": [
            USER, say("analysis", "hm"), say("commentary", "I will add."), say("commentary", '{"x": 1}', recipient="functions.sum"),
            {"role": "tool", "name": "functions.sum", "content": "2"}, say("analysis", "so"), say("analysis", "yes"),
            say("final", "a", weight=0), USER, say("final", "b"),
        ]},
        [USER, {**CALLED, "content": "I will add.", "reasoning_content": "hm"}, RESULT,
         {"role": "assistant", "content": "a", "reasoning_content": "so\nyes", "weight": 0}, USER, {"role": "assistant", "content": "b"}],
    ),
    "OpenAI's older functions": (
        {"messages": [USER, OLD_CALL, {**RESULT, "role": "function"}, ASSISTANT], "functions": [TOOL["function"]]},
        [USER, CALLED, RESULT, ASSISTANT],
    ),
    "results named by id": (
        {"messages": [USER, CALLS, *({"role": "tool", "content": name, "tool_call_id": f"c{name}"} for name in "ba"), ASSISTANT]},
        [USER, CALLS, *({"role": "tool", "content": name, "tool_call_id": f"c{name}", "name": name} for name in "ba"), ASSISTANT],
    ),
    "results named by place": (
        {"messages": [USER, CALLS, *({"role": "tool", "content": name} for name in "xy"), ASSISTANT]},
        [USER, CALLS, *({"role": "tool", "content": x, "name": name} for x, name in ("xa", "yb")), ASSISTANT],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNS_OF)
def test_every_way_of_writing_a_chat_becomes_the_same_turns(name):
    record, wanted = TURNS_OF[name]
    example = parse_record(record)[1]
    assert example.messages == wanted
    assert example.tools == ([TOOL] if record.get("tools") or record.get("functions") else None)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"frage": "q", "antwort": "a"},
            "found columns frage, antwort; name yours: --prompt-column frage --completion-column antwort",
        ),
        ({}, "found no columns"),
        ({"instruction": "q", "output": 3}, "output is a int, not a string"),
        ({"messages": {"role": "user"}}, "messages is a dict, not a list"),
        ({"messages": "no json"}, "messages is not valid JSON"),
        ({"messages": [{"from": "human", "value": "q"}]}, "message 1 has keys from, value; expected role, content"),
        ({"messages": [{"role": "bot", "content": "q"}]}, "role 'bot'; expected one of system"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "expected one of system"),
        ({"messages": [{"role": "user", "content": 1}]}, "content is a int"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "type 'image_url'; only text"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, "only 0 and 1"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [{"name": 1}]}]}, "expected function: name"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "not a JSON object",
        ),
        ({"messages": [USER, ASSISTANT], "tools": 3}, "tools must be a list"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "from 'alien'; expected one of human"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "tool call is not valid JSON"),
        ({"prompt": "q", "completion": [ASSISTANT]}, "both be strings, or both lists"),
        (
            {"messages": [USER, {**ASSISTANT, "reasoning_content": "hm", "thinking": "ah"}]},
            "message 2 has reasoning_content and thinking",
        ),
        *(
            ({"messages": [USER, {**ASSISTANT, name: ["hm"]}]}, f"message 2: {name} is a list, not a string")
            for name in ("reasoning_content", "thinking", "reasoning")
        ),
        ({"messages": [USER, say("analysis", "hm")]}, "channel analysis or commentary"),
        ({"messages": [USER, say("commentary", "hm"), USER, say("final", "a")]}, "channel analysis or commentary"),
        ({"messages": [USER, say("secret", "hm")]}, "message 2 has channel 'secret'; expected one of analysis"),
        ({"question": "q", "answer": "a", "rejected": "b"}, "preference row"),
        ({"Question": "q", "Chosen": "a", "Rejected": "b"}, "preference row"),
        ({"question": "q", "answer": "a", "label": False}, "rated answer"),
        (
            {"question": "q", "answer": "a", "response": "b"},
            "found columns question, answer, response; name yours: --prompt",
        ),
        ({"frage": "q"}, "--completion-column, or --chat-column, or --text-column"),
    ],
)
def test_reasons_on_one_line(record, message):
    with pytest.raises(FormatError, match=message) as error:
        parse_record(record)
    assert not isinstance(error.value, EmptyRecord)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "q", "output": " \n"},
        {"instruction": "", "output": "a"},
        {"prompt": "q", "completion": ""},
        {"text": ""},
        {"messages": []},
        {"messages": [USER]},
        {"messages": [USER, {"role": "assistant", "content": " "}]},
        {"messages": [USER, {**ASSISTANT, "weight": 0}]},
    ],
)
def test_nothing_to_learn_is_told_apart(record):
    with pytest.raises(EmptyRecord):
        parse_record(record)


def assistant(**fields):
    return parse_record({"messages": [USER, {"role": "assistant", "content": "a", **fields}]})[1]


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_has_several_names_and_one_here(name):
    example = assistant(**{name: "hm"})
    assert example.messages[1] == {"role": "assistant", "content": "a", "reasoning_content": "hm"}
    assert example.reasoning_field == name
    assert not example.unread
    assert "reasoning_content" not in assistant(**{name: " "}).messages[1]
    copies = assistant(**{name: "hm", "reasoning_content": "hm"})
    assert copies.messages == example.messages
    refuses(r"message 2: \w+ is a list, not a string", assistant, **{name: ["hm"]}, kind=FormatError)


def test_thinking_as_a_content_part():
    for thought in ("hm", [{"type": "text", "text": "hm"}]):
        parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "a"}]
        assert assistant(content=parts).messages == assistant(thinking="hm").messages


def test_what_is_not_read_is_named():
    turns = [{**USER, "time": 3, "thinking": "hm"}, {**ASSISTANT, "refusal": "no", "audio": None, "annotations": []}]
    assert parse_record({"messages": turns})[1].unread == {"time", "thinking", "refusal"}
    shared = [{"from": "human", "value": "q", "mood": 1}, {"from": "gpt", "value": "a", "weight": 1}]
    assert parse_record({"conversations": shared})[1].unread == {"mood"}


PREFERENCES = [
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}],
     "chosen": {"from": "gpt", "value": "good"}, "rejected": {"from": "gpt", "value": "bad"}},
    {"prompt": "q", "chosen": "good", "rejected": "bad"},
    {"messages": [USER, ASSISTANT], "chosen_response": "good", "rejected_response": "bad"},
    {"prompt": "q", "completion": "a", "label": False},
    {"prompt": [USER], "completion": [ASSISTANT], "label": True},
    {"prompt": "q", "completion": "a", "label": "False"},
    {"messages": [USER, ASSISTANT], "kto_tag": False},
    {"instruction": "q", "input": "", "output": "bad", "kto_tag": False},
    {"instruction": "q", "output": "bad", "label": "0"},
    {"conversation": [USER, ASSISTANT], "kto_tag": False},
]  # fmt: skip


@pytest.mark.parametrize("record", PREFERENCES)
def test_rows_that_compare_or_rate_answers_are_refused(record):
    refuses(r"(preference row|rated answer).*train with --objective", parse_record, record, kind=FormatError)


def test_rows_with_half_of_such_columns_are_not_preferences():
    both = {"prompt": "q", "completion": "a"}
    for other in ({"label": "sports"}, {"label": None}, {"chosen": "a"}, {"chosen": "a", "rejected": None}):
        assert parse_record({**both, **other}) == ("completions", Completion("q", "a"))
    assert parse_record({"text": "t", "label": 1}) == ("text", Text("t"))
    # Naming the format says which columns are meant.
    compared = {"messages": [USER, ASSISTANT], "chosen": [ASSISTANT], "rejected": [USER]}
    assert parse_record(compared, "messages") == ("messages", Conversation([USER, ASSISTANT]))


PAIR = {"chosen": "The answer is 2.", "rejected": "The answer is 3, or so."}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def texts(example) -> list[str]:
    return [turn["content"] for turn in example.messages]


@pytest.mark.parametrize("name", ["query", "problem", "Prompt", "Question", "context"])
def test_a_pairs_question_is_read_under_any_usual_name(name):
    [pair] = parse_pairs({name: "Question number 2?", **PAIR})
    if name == "Prompt":  # a text before two texts
        assert (pair.chosen.prompt, pair.chosen.completion) == ("Question number 2?", PAIR["chosen"])
    else:
        assert texts(pair.chosen) == ["Question number 2?", PAIR["chosen"]]
        assert texts(pair.rejected) == ["Question number 2?", PAIR["rejected"]]


def test_a_pairs_passage_and_system_text_come_before_its_question():
    [pair] = parse_pairs({"system_prompt": "Be brief.", "context": "A text.", "question": "What?", **PAIR})
    assert texts(pair.chosen) == ["Be brief.", "What?\nA text.", PAIR["chosen"]]
    turns = {"prompt": [TURNS[0]], "chosen": [TURNS[1]], "rejected": [{**TURNS[1], "content": "b"}]}
    [pair] = parse_pairs({"system": "Be brief.", **turns})
    assert texts(pair.rejected) == ["Be brief.", "q", "b"]


def test_a_common_beginning_is_no_prompt_where_a_column_may_be_it():
    refuses("--prompt-column", parse_pairs, {"trajectory": "Question number 2?", **PAIR}, kind=FormatError)
    [pair] = parse_pairs({"id": "7", **PAIR})
    assert pair.chosen.prompt == "The answer is"
    [pair] = parse_pairs({"source": "my forum", "chosen": "Q: x A: good", "rejected": "Q: x A: bad"})
    assert pair.chosen.prompt == "Q: x A:"
    dialogue = "\n\nHuman: Hi\n\nAssistant: {}"
    [pair] = parse_pairs({"source": "hh", "chosen": dialogue.format("Hello"), "rejected": dialogue.format("No")})
    assert pair.chosen.prompt == dialogue.format("")[:-1]


def test_dialogues_beside_their_source_are_what_they_are():
    chosen = [{"role": "user", "content": "Solve: 1 + 1"}, {"role": "assistant", "content": "2"}]
    rejected = [chosen[0], {"role": "assistant", "content": "3"}]
    [pair] = parse_pairs({"problem": "1 + 1", "chosen": chosen, "rejected": rejected})
    assert texts(pair.chosen) == ["Solve: 1 + 1", "2"]


@pytest.mark.parametrize(
    "beside", [{"tools": "calculator"}, {"tools": ["search"]}, {"history": "some text"}, {"system": 3}]
)
def test_a_column_that_is_something_else_is_left_out_and_counted(beside):
    for record in (
        {"prompt": "q", "completion": "a", **beside},
        {"prompt": TURNS[:1], "completion": TURNS[1:], **beside},
    ):
        rows = SplitRows()
        parse_rows([Record(1, record, "line")], "x", DataSettings(), "examples", rows)
        assert (len(rows.entries), rows.dropped, set(rows.ignored)) == (1, [], set(beside))
    assert isinstance(parse_prompt({"prompt": "q", **beside}).example, Completion)


def test_columns_of_pairs_and_rated_answers_that_are_not_read_are_counted():
    rows = SplitRows()
    record = {"prompt": "q", "context": "c", "id": 1, "chosen_score": 3, **PAIR}
    parse_rows([Record(1, record, "line")], "x", DataSettings(), "pairs", rows)
    assert set(rows.ignored) == {"context", "chosen_score"}
    rows = SplitRows()
    record = {"question": "q", "answer": "a", "label": True, "length": 3}
    parse_rows([Record(1, record, "line")], "x", DataSettings(), "rated", rows)
    assert set(rows.ignored) == {"length"}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"system": "S", "prompt": "q", "completion": "a"}, ["S", "q", "a"]),
        ({"system_prompt": "S", "instruction": "q", "output": "a"}, ["S", "q", "a"]),
        ({"system_prompt": "S", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ["S", "q", "a"]),
        ({"system": "S", "messages": TURNS}, ["S", "q", "a"]),
        ({"system": "S", "messages": [{"role": "system", "content": "T"}, *TURNS]}, ["T", "q", "a"]),
        ({"system": "S", "prompt": TURNS[:1], "completion": TURNS[1:]}, ["S", "q", "a"]),
        ({"prompt": "q", "completion": "a", "tools": TOOLS}, ["q", "a"]),
        ({"question": "q", "answer": "a", "text": "q a"}, ["q", "a"]),
        ({"Instruction": "q", "response": "a", "text": "q a"}, ["q", "a"]),
        ({"instruction": "q", "output": "a", "history": ""}, ["q", "a"]),
        ({"system": "S", "question": "q", "answer": "a"}, ["S", "q", "a"]),
        ({"question": "q", "answer": "a", "level": 3}, ["q", "a"]),
        ({"Prompt": "q", "RESPONSE ": "a"}, ["q", "a"]),
        ({"input": "q", "output": "a"}, ["q", "a"]),
        ({"instruction": "q", "response": "a"}, ["q", "a"]),
        ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, ["q\nc", "a"]),
        ({"instruction": "q", "context": "", "response": "a"}, ["q", "a"]),
        ({"query": "q", "response": 42}, ["q", "42"]),
        ({"Instruction": "q", "Output": "a"}, ["q", "a"]),
        ({"system_prompt": "s", "question": "q", "response": "a"}, ["s", "q", "a"]),
        ({"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]}, ["q", "a"]),
        ({"conversations": [{"from": "Human", "value": "q"}, {"from": "GPT", "value": "a"}]}, ["q", "a"]),
    ],
)  # fmt: skip
def test_an_examples_parts_are_found_wherever_they_stand_and_under_usual_names(record, expected):
    example = parse_record(record)[1]
    assert isinstance(example, Conversation)
    assert texts(example) == expected
    assert [turn["role"] for turn in example.messages] == ["system", "user", "assistant"][-len(expected) :]
    assert bool(example.tools) == ("tools" in record)
    rows = SplitRows()
    parse_rows([Record(1, record, "line")], "x", DataSettings(), "examples", rows)
    assert set(rows.ignored) <= {"text", "level", "category"} | ({"system"} if expected[0] == "T" else set())


def test_a_plain_completion_and_a_plain_text_stay_what_they_are():
    assert parse_record({"prompt": "q", "completion": "a", "system": "", "tools": []})[1] == Completion("q", "a")
    assert parse_record({"text": "t", "question": "q"})[0] == "text"
    assert parse_record({"text": "t", "question": "", "answer": ""})[0] == "text"


def test_a_prompt_for_rewards_has_its_system_text_its_passage_and_its_tools():
    assert texts(parse_prompt({"system_prompt": "S", "prompt": "q"}).example)[:2] == ["S", "q"]
    assert texts(parse_prompt({"context": "C", "question": "q?"}).example)[0] == "q?\nC"
    found = parse_prompt({"prompt": "q", "tools": TOOLS}).example
    assert isinstance(found, Conversation)
    assert found.tools == TOOLS
    assert texts(parse_prompt({"system": "S", "prompt": [TURNS[0]]}).example)[:2] == ["S", "q"]
    assert isinstance(parse_prompt({"prompt": "q"}).example, Completion)


def test_parquet_rows_have_only_their_own_fields_and_dates_do_no_harm(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def row(name, arguments):
        call = {"function": {"name": name, "arguments": arguments}}
        return {
            "messages": [TURNS[0], {"role": "assistant", "content": "", "tool_calls": [call]}],
            "timestamp": datetime(2026, 1, 2),
            "price": Decimal("1.50"),
            "embedding": b"\0\1",
        }

    rows = [row("weather", {"city": "Paris"}), row("stock", {"item": "pen"})]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = [record.value for record in read_records(tmp_path / "a.parquet")]
    calls = [value["messages"][1]["tool_calls"][0]["function"] for value in found]
    assert [call["arguments"] for call in calls] == [{"city": "Paris"}, {"item": "pen"}]
    assert [value["price"] for value in found] == ["1.50", "1.50"]
    assert all(isinstance(parse_record(value)[1], Conversation) for value in found)
    # A real null in JSON stays.
    (tmp_path / "a.jsonl").write_text(json.dumps({"arguments": {"unit": None}}) + "\n")
    assert [record.value for record in read_records(tmp_path / "a.jsonl")] == [{"arguments": {"unit": None}}]


@pytest.mark.parametrize("claimed", [b"A1", b"A1:B3", b"A1:A9"])
def test_a_sheet_is_read_whole_whatever_size_it_claims(claimed, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.active.append(["prompt", "completion", "note"])
    for i in range(8):
        book.active.append([f"q{i}", f"a{i}", "n" if i else None])
    book.save(tmp_path / "whole.xlsx")
    with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "small.xlsx", "w") as small:
        for name in whole.namelist():
            part = whole.read(name)
            small.writestr(name, part.replace(b'dimension ref="A1:C9"', b'dimension ref="' + claimed + b'"'))
    found = [record.value for record in read_records(tmp_path / "small.xlsx")]
    assert found == [record.value for record in read_records(tmp_path / "whole.xlsx")]
    assert len(found) == 8
    assert found[0] == {"prompt": "q0", "completion": "a0", "note": None}


# Files of a folder -> those that are its splits.
FOLDERS = [
    *(
        ((*names, "README.md", "LICENSE.txt"), {"train": names})
        for names in (
            ("bread.md", "Requirements for the kitchen.md", "Notice period.md", "License plates.md"),
            ("bread.md", "pizza.md", "training.md"), ("bread.md", "test.md"), ("bread.md", "pizza.md", "dev/new.md"),
        )
    ),
    (("a.md", "b.md", "att/table.csv"), {"train": ("a.md", "b.md")}),
    (("train.txt", "valid.txt", "notes.txt"), {"train": ("train.txt",), "valid": ("valid.txt",)}),
]  # fmt: skip


@pytest.mark.parametrize(("names", "wanted"), FOLDERS)
def test_a_note_is_read_whatever_its_name_and_splits_stay_splits(names, wanted, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\n")
    found = {
        split: sorted(str(p.relative_to(tmp_path)) for p in paths)
        for split, paths in find_splits(str(tmp_path)).items()
    }
    assert found == {split: sorted(own) for split, own in wanted.items()}
