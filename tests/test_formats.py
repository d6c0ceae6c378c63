"""Records of each format become one form, or say why not."""

from __future__ import annotations

import json

import pytest

from mlx_lora.data.formats import Completion, Conversation, EmptyRecord, FormatError, Text, parse_record

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"type": "function", "function": {"name": "sum", "arguments": {"x": 1}}}
TOOL = {"type": "function", "function": {"name": "sum", "parameters": {}}}
EXAMPLES = [
    ({"instruction": "q", "input": "", "output": "a", "text": "q a"}, "alpaca", Conversation([USER, ASSISTANT])),
    ({"prompt": "q", "completion": "a"}, "completions", Completion("q", "a")),
    ({"text": "t"}, "text", Text("t")),
    ({"messages": [USER, ASSISTANT], "tools": None}, "messages", Conversation([USER, ASSISTANT])),
    (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "sharegpt",
        Conversation([USER, ASSISTANT]),
    ),
    ({"conversation": [USER, ASSISTANT]}, "sharegpt", Conversation([USER, ASSISTANT])),
]


@pytest.mark.parametrize(("record", "name", "example"), EXAMPLES)
def test_formats_are_found_and_can_be_named(record, name, example):
    assert parse_record(record) == (name, example)
    assert parse_record(record, name) == (name, example)


def test_a_named_format_is_binding():
    with pytest.raises(FormatError, match="found keys text; the alpaca format needs instruction, output"):
        parse_record({"text": "t"}, "alpaca")
    both = {"text": "t", "prompt": "p", "completion": "c"}
    assert parse_record(both)[0] == "completions"
    assert parse_record(both, "text") == ("text", Text("t"))


def test_alpaca_input_system_and_history():
    record = {"instruction": "do", "input": "this", "output": "a", "system": "s", "history": [["q0", "a0"]]}
    _, example = parse_record(record)
    assert [(m["role"], m["content"]) for m in example.messages] == [
        ("system", "s"), ("user", "q0"), ("assistant", "a0"), ("user", "do\nthis"), ("assistant", "a")
    ]  # fmt: skip


def test_sharegpt_tools_calls_and_system():
    record = {
        "system": "s",
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "sum", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "a"},
        ],
        "tools": '[{"name": "sum", "parameters": {}}]',
    }
    _, example = parse_record(record)
    assert example.tools == [TOOL]
    assert example.messages == [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "sum"},
        ASSISTANT,
    ]
    as_list = {**record, "tools": [TOOL]}
    assert parse_record(as_list)[1] == example


def test_messages_with_calls_parts_and_nulls():
    text_call = {"id": "c1", "type": "function", "function": {"name": "sum", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]
    record = {
        "messages": [
            {"role": "user", "content": parts, "name": None},
            {"role": "assistant", "content": None, "tool_calls": [text_call]},
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
            {"role": "assistant", "content": "a", "reasoning_content": "r", "tool_calls": None},
        ]
    }
    _, example = parse_record(record)
    assert example.messages == [
        {"role": "user", "content": "q!"},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "c1", **CALL}]},
        {"role": "tool", "content": "2", "tool_call_id": "c1", "name": "sum"},
        {"role": "assistant", "content": "a", "reasoning_content": "r"},
    ]


def test_lists_held_as_json_text_in_a_table():
    _, example = parse_record({"conversations": json.dumps(EXAMPLES[4][0]["conversations"]), "tools": ""})
    assert example == Conversation([USER, ASSISTANT])


def test_only_the_completion_of_two_message_lists_is_trained():
    _, example = parse_record({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    weights = [message.get("weight", 1) for message in example.messages]
    assert weights == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "q", "answer": "a"}, "found keys question, answer; expected one of: instruction"),
        ({}, "found no keys"),
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
            "no JSON object",
        ),
        ({"messages": [USER, ASSISTANT], "tools": 3}, "tools must be a list"),
        ({"conversations": [{"from": "alien", "value": "q"}]}, "from 'alien'; expected one of human"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "tool call is not valid JSON"),
        ({"prompt": "q", "completion": [ASSISTANT]}, "both be strings, or both lists"),
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
