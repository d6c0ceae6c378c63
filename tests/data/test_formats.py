"""Records of each format become one form, or say why not."""

from __future__ import annotations

import json

import pytest
from refusing import refuses

from mlx_lora.data.examples import Completion, Conversation, EmptyRecord, FormatError, Text
from mlx_lora.data.formats import parse_record

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


def test_thinking_that_contradicts_itself_is_refused():
    refuses(
        "message 2 has reasoning_content and thinking",
        assistant,
        reasoning_content="hm",
        thinking="ah",
        kind=FormatError,
    )


def test_thinking_as_a_content_part():
    for thought in ("hm", [{"type": "text", "text": "hm"}]):
        parts = [{"type": "thinking", "thinking": thought}, {"type": "text", "text": "a"}]
        assert assistant(content=parts).messages == assistant(thinking="hm").messages


def test_harmonys_channels_become_one_turn():
    def say(channel, content, **more):
        return {"role": "assistant", "channel": channel, "content": content, **more}

    asked = {"role": "tool", "name": "functions.sum", "content": "2"}
    turns = [
        USER,
        say("analysis", "hm"),
        say("commentary", "I will add."),
        say("commentary", '{"x": 1}', recipient="functions.sum"),
        asked,
        say("analysis", "so"),
        say("analysis", "yes"),
        say("final", "a", weight=0),
        USER,
        say("final", "b"),
    ]
    example = parse_record({"messages": turns})[1]
    assert example.messages == [
        USER,
        {"role": "assistant", "content": "I will add.", "reasoning_content": "hm", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "sum"},
        {"role": "assistant", "content": "a", "reasoning_content": "so\nyes", "weight": 0},
        USER,
        {"role": "assistant", "content": "b"},
    ]
    for left_over in ([USER, say("analysis", "hm")], [USER, say("commentary", "hm"), USER, say("final", "a")]):
        refuses("channel analysis or commentary", parse_record, {"messages": left_over}, kind=FormatError)
    refuses(
        "message 2 has channel 'secret'; expected one of analysis",
        parse_record,
        {"messages": [USER, say("secret", "hm")]},
        kind=FormatError,
    )


def test_openais_older_functions():
    call = {"role": "assistant", "content": None, "function_call": {"name": "sum", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "sum", "content": "2"}
    old = parse_record({"messages": [USER, call, result, ASSISTANT], "functions": [TOOL["function"]]})[1]
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    new = parse_record({"messages": [USER, call, {**result, "role": "tool"}, ASSISTANT], "tools": [TOOL]})[1]
    assert old == new


def test_results_are_named_by_id_or_place():
    calls = [{"id": f"c{n}", "type": "function", "function": {"name": n, "arguments": {}}} for n in "ab"]
    asked = {"role": "assistant", "content": "", "tool_calls": calls}
    by_id = [{"role": "tool", "content": name, "tool_call_id": f"c{name}"} for name in "ba"]
    example = parse_record({"messages": [USER, asked, *by_id, ASSISTANT]})[1]
    assert [m["name"] for m in example.messages[2:4]] == ["b", "a"]
    by_place = [{"role": "tool", "content": name} for name in "xy"]
    example = parse_record({"messages": [USER, asked, *by_place, ASSISTANT]})[1]
    assert [m["name"] for m in example.messages[2:4]] == ["a", "b"]


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
