"""Calls of tools in what a model wrote: each form that is known, whole and in pieces of one character."""

from __future__ import annotations

import json
import random

import pytest
from byte_tokenizer import GEMMA, HARMONY, MISTRAL, SPECIAL_TOKENS, byte_tokenizer

from mlx_lora.models.grammar import THOUGHTS
from mlx_lora.rollouts.tool_calls import NO_CALLS, CallReader, Said, SaidStream, ToolTurns, call_forms

LONDON = [{"name": "get_weather", "arguments": {"city": "London"}}]
PRODUCT = [{"name": "multiply", "arguments": {"a": 12234585, "b": 48838483920}}]
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "multiply", "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}}}},
]  # fmt: skip
JSON_PRODUCT = '{"name": "multiply", "arguments": {"a": 12234585, "b": 48838483920}}'
# Of mlx-lm's own tests or documentation of each parser, with the texts around a call; and of our forms.
WRITTEN = {
    "json_tools": f"<tool_call>\n{JSON_PRODUCT}\n</tool_call>",
    "function_gemma": "<start_function_call>call:multiply{a:12234585,b:48838483920}<end_function_call>",
    "gemma4": "<|tool_call>call:multiply{a:12234585,b:48838483920}<tool_call|>",
    "glm47": "<tool_call>multiply<arg_key>a</arg_key><arg_value>12234585</arg_value><arg_key>b</arg_key><arg_value>48838483920</arg_value></tool_call>",
    "laguna": "<tool_call>multiply<arg_key>a</arg_key><arg_value>12234585</arg_value><arg_key>b</arg_key><arg_value>48838483920</arg_value></tool_call>",
    "kimi_k2": '<|tool_calls_section_begin|><|tool_call_begin|>functions.multiply:0<|tool_call_argument_begin|>{"a": 12234585, "b": 48838483920}<|tool_call_end|><|tool_calls_section_end|>',
    "kimi_k3": '<|open|>tools<|sep|>\n<|open|>call tool="multiply" index="1"<|sep|>\n<|open|>argument key="a" type="number"<|sep|>12234585<|close|>argument<|sep|>\n<|open|>argument key="b" type="number"<|sep|>48838483920<|close|>argument<|sep|>\n<|close|>call<|sep|>\n<|close|>tools<|sep|>',
    "longcat": f"<longcat_tool_call>{JSON_PRODUCT}</longcat_tool_call>",
    "minicpm5": '<function name="multiply"><param name="a">12234585</param><param name="b">48838483920</param></function>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="multiply">\n<parameter name="a">12234585</parameter>\n<parameter name="b">48838483920</parameter>\n</invoke>\n</minimax:tool_call>',
    "mistral": '[TOOL_CALLS]multiply[ARGS]{"a": 12234585, "b": 48838483920}',
    "muse_spark": '<atem:function_calls>\n<atem:invoke name="multiply">\n<atem:parameter name="a">12234585</atem:parameter>\n<atem:parameter name="b">48838483920</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
    "pythonic": "<|tool_call_start|>[multiply(a=12234585, b=48838483920)]<|tool_call_end|>",
    "qwen3_coder": "<tool_call>\n<function=multiply>\n<parameter=a>\n12234585\n</parameter>\n<parameter=b>\n48838483920\n</parameter>\n</function>\n</tool_call>",
    "llama3": '{"name": "multiply", "parameters": {"a": 12234585, "b": 48838483920}}',
    "harmony": '<|channel|>analysis<|message|>Numbers.<|end|><|start|>assistant<|channel|>commentary to=functions.multiply <|constrain|>json<|message|>{"a": 12234585, "b": 48838483920}',
    "fenced": "```tool_code\nmultiply(a=12234585, b=48838483920)\n```",
}  # fmt: skip
FORMS = {form.name: form for form in call_forms()}
# A last call of these goes up to the text's end.
ENDLESS = ("mistral", "llama3", "harmony")


@pytest.fixture(scope="module")
def turns():
    tokens = (*SPECIAL_TOKENS, *HARMONY, *GEMMA, *MISTRAL)
    return ToolTurns(byte_tokenizer(special_tokens=tokens), "", frozenset())


def reader(turns, name: str, opened: bool = False) -> CallReader:
    return CallReader(turns, FORMS.get(name, NO_CALLS), opened, TOOLS)


def streamed(reader: CallReader, text: str, cuts: list[int] | None = None) -> tuple[Said, list[str]]:
    """What a stream tells of a text in pieces, of one character if nothing else is said, put together."""
    stream, ends = SaidStream(reader), [*(range(1, len(text)) if cuts is None else cuts), len(text)]
    found = [stream.add(text[start:end], end == len(text)) for start, end in zip([0, *ends], ends, strict=False)]
    calls = [call for said in found for call in said.calls]
    unread = sum(said.unread for said in found)
    content, thinking = ("".join(getattr(said, part) for said in found) for part in ("content", "thinking"))
    return Said(content, calls, thinking, unread), [said.content for said in found]


def test_every_parser_of_mlx_lm_has_an_example():
    assert FORMS.keys() == WRITTEN.keys()


@pytest.mark.parametrize("name", sorted(WRITTEN))
def test_a_call_is_read_and_streamed(turns, name):
    text = WRITTEN[name]
    before = "" if name == "harmony" else "I look. "
    whole = reader(turns, name).said(before + text)
    calls = [{key: call[key] for key in ("name", "arguments")} for call in whole.calls]
    assert (calls, whole.content, whole.unread) == (PRODUCT, before.strip(), 0)
    told, pieces = streamed(reader(turns, name), before + text)
    assert told == whole
    assert not [piece for piece in pieces if "multiply" in piece]  # nothing of a call is told as text
    assert reader(turns, "none").said(before + text).calls == []


@pytest.mark.parametrize("name", sorted(WRITTEN.keys() - {*ENDLESS}))
def test_a_call_that_cannot_be_read_is_text_and_the_next_is_a_call(turns, name):
    good = WRITTEN[name]
    start, end = FORMS[name].parts.args[:2]
    bad = f"{start}%%%{end}"
    said = reader(turns, name).said(f"{bad} and {good}")
    if name in ("minicpm5", "laguna", "glm47", "longcat"):  # read a name in anything
        assert said.calls[-1]["name"] == "multiply"
    else:
        assert (len(said.calls), said.unread) == (1, 1)
        assert "%%%" in said.content
    assert streamed(reader(turns, name), f"{bad} and {good}")[0] == said
    cut = reader(turns, name).said(good[:-2])
    assert (cut.calls, cut.unread) == ([], 1)


def test_several_calls_of_llama_with_text_after_them(turns):
    one, other = WRITTEN["llama3"], json.dumps({"name": "get_weather", "parameters": {"city": "London"}})
    said = reader(turns, "llama3").said(f"<|python_tag|>{one}; {other}")
    assert said.calls == PRODUCT + LONDON
    text = f'A set {{1, 2}} and {one} {{"name": "broken'
    said = reader(turns, "llama3").said(text)
    assert (said.calls, said.unread) == (PRODUCT, 1)
    assert streamed(reader(turns, "llama3"), text)[0] == said
    assert reader(turns, "llama3").said("A set {1, 2}.").content == "A set {1, 2}."


def test_harmony_has_channels(turns):
    final = "<|end|><|start|>assistant<|channel|>final<|message|>It is 7."
    text = "<|channel|>analysis<|message|>I think: <|channel|>" + final
    said = reader(turns, "harmony").said(text)
    assert (said.thinking, said.content, said.calls) == ("I think:", "It is 7.", [])
    assert streamed(reader(turns, "harmony"), text)[0] == said


@pytest.mark.parametrize("pair", THOUGHTS)
def test_a_call_inside_of_thinking_is_none(turns, pair):
    start, end = pair
    call = WRITTEN["json_tools"]
    for opened in (False, True):
        if opened and start != "<think>":
            continue
        text = f"{'' if opened else start}Should I {call}?{end}\n\nYes. {call}"
        said = reader(turns, "json_tools", opened).said(text)
        assert (said.calls, said.content) == (PRODUCT, "Yes.")
        assert said.thinking.startswith("Should I")
        assert "multiply" in said.thinking
        assert streamed(reader(turns, "json_tools", opened), text)[0] == said
        cut = reader(turns, "json_tools", opened).said(text[: text.index(end)])
        assert (cut.calls, cut.content) == ([], "")
        assert cut.thinking


@pytest.mark.parametrize("name", ["none", *sorted(WRITTEN)])
def test_a_stream_tells_what_the_whole_text_says_wherever_it_is_cut(turns, name):
    """Texts of marks, parts of marks, calls and words, in which nothing that was told is taken back."""
    draw = random.Random(name)
    own = reader(turns, name)
    marks = [
        *own.form.marks,
        "<think>",
        "</think>",
        "<|im_end|>",
        "<|im_start|>",
        "```",
        "{",
        "é",
        "\U0001f600",
        " ",
        "\n",
    ]
    parts = [*marks, "word", '{"name": "x"', WRITTEN.get(name, ""), WRITTEN.get(name, "")[:-3]]
    parts += [mark[: draw.randint(1, len(mark))] for mark in marks]
    for number in range(60):
        text = "".join(draw.choice(parts) for _ in range(draw.randint(1, 9)))
        if name == "harmony" and "think>" in text:
            continue  # it has a channel for that
        if "</think>" in text and text.find("<think>") not in range(text.find("</think>")):
            continue  # thinking that nothing opened: a stream cannot know
        cuts = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, 6)))
        whole = own.said(text)
        told = streamed(own, text, cuts if number % 2 else None)[0]
        assert told == whole, text
