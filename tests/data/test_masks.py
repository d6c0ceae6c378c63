"""Masks, token by token, against what the templates' own marks say: seven families, 40 conversations each."""

from __future__ import annotations

import itertools
import re

import pytest
from byte_tokenizer import GEMMA, HARMONY, MISTRAL, SPECIAL_TOKENS, byte_tokenizer, template
from made_conversations import ASKED, CALL, HANDMADE, TOOLS, conversations, rows_of
from mask_reference import Reference, unmarked
from tiers import by_default

from mlx_lora.data.chat_template import resolve_template
from mlx_lora.data.examples import EmptyRecord
from mlx_lora.data.formats import parse_record
from mlx_lora.data.tokenize import Encoder


def marked_chatml() -> str:
    """The built-in chatml with its assistant turns marked."""
    text, _ = resolve_template("chatml", byte_tokenizer())
    before = "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    after = "{{- '<|im_end|>\\n' }}\n    {%- endif %}"
    assert text.count(before) == text.count(after) == 1
    start = "{% if message['role'] == 'assistant' %}"
    # A mark cannot stand in a condition of its own: the turn is written twice, once marked.
    head, tail = text.split(before)
    middle, tail = tail.split(after)
    plain = "{{- message['content'] }}" + middle + "{{- '<|im_end|>' }}"
    both = f"{start}{{% generation %}}{plain}{{% endgeneration %}}{{% else %}}{plain}{{% endif %}}"
    return head + "{{- '<|im_start|>' + message['role'] + '\\n' }}" + both + "{{- '\\n' }}\n    {%- endif %}" + tail


# name -> marked template, its special tokens, end token, has it a BOS, calls it shows of one turn
FAMILIES = {
    "chatml": (marked_chatml, (), "<|im_end|>", False, 9),
    "qwen3": (lambda: template("qwen3_thinking"), (), "<|im_end|>", False, 9),
    "qwen3_5": (lambda: template("qwen3_5"), (), "<|im_end|>", False, 9),
    "gemma4": (lambda: template("gemma4"), GEMMA, "<turn|>", True, 9),
    "llama3_2": (lambda: template("llama3_2"), (), "<|eot_id|>", True, 1),
    "mistral": (lambda: template("mistral_tools"), MISTRAL, "</s>", True, 9),
    "harmony": (lambda: template("harmony"), HARMONY, "<|return|>", False, 1),
}


def family(name: str):
    make, special, eos, bos, max_calls = FAMILIES[name]
    tokenizer = byte_tokenizer(unmarked(make()), bos=bos, eos=eos, special_tokens=(*SPECIAL_TOKENS, *special))
    return (
        tokenizer,
        Encoder(tokenizer, unmarked(make()), max_seq_length=10**6, allow_special_tokens=True),
        Reference(tokenizer, make(), max_calls, moves=name == "mistral"),
    )


def shown(tokenizer, row) -> str:
    """A row as text, what is trained between marks."""
    return "".join(
        tokenizer.decode([token for token, _ in part]).join("⟦⟧" if on else ("", ""))
        for on, part in itertools.groupby(zip(*row, strict=True), key=lambda pair: bool(pair[1]))
    )


@pytest.mark.parametrize("name", by_default(FAMILIES, "chatml", "qwen3_5"))
def test_every_token_and_mask_is_the_references(name):
    tokenizer, encoder, reference = family(name)
    compared, divided, calls, thoughts, context = 0, 0, 0, 0, 0
    count = 64 if FAMILIES[name][-1] == 1 else 44  # a third has several calls in one turn, which not all show
    for number, record in enumerate(conversations(7, count, always_ids=name == "mistral")):
        try:
            _, example = parse_record(record)
        except EmptyRecord:  # every turn of it has weight 0
            continue
        expected = reference.rows(example.messages, example.tools)
        encoded = encoder.encode([example])
        if expected is None:
            assert list(encoded.dropped) == [0], f"record {number}"
            continue
        found = rows_of(encoded)
        words = [[shown(tokenizer, row) for row in rows] for rows in (found, expected)]
        assert words[0] == words[1], f"record {number}: {encoded.dropped}"
        assert found == expected
        compared += 1
        divided += len(found) > 1
        calls += any("tool_calls" in message for message in example.messages)
        thoughts += any("reasoning_content" in message for message in example.messages)
        context += any(message.get("weight") == 0 for message in example.messages)
    assert compared >= 40
    assert min(calls, thoughts, context) >= 10
    shows_all = ("chatml", "llama3_2")  # these rewrite nothing
    assert (divided == 0) == (name in shows_all)


@pytest.mark.parametrize("name", FAMILIES)
def test_no_trained_token_is_of_another_message(name):
    """Without a reference: what others say is marked, and the mark is in every row and in no trained text."""
    tokenizer, encoder, _ = family(name)
    rows = 0
    for record in conversations(23, 18, always_ids=True):
        messages = [
            message if message["role"] == "assistant" else {**message, "content": f"SECRET {message['content']}"}
            for message in record["messages"]
        ]
        encoded = encoder.encode([parse_record({**record, "messages": messages})[1]])
        for row in rows_of(encoded):
            text = shown(tokenizer, row)
            assert "SECRET" in text
            assert not any("SECRET" in part.split("⟧")[0] for part in text.split("⟦")[1:])
            rows += 1
    assert rows >= 12


def test_the_comparison_sees_one_wrong_token():
    tokenizer, encoder, reference = family("gemma4")
    _, example = parse_record({"messages": HANDMADE[0], "tools": TOOLS})
    ((tokens, mask),) = rows_of(encoder.encode([example]))
    assert [(tokens, mask)] == reference.rows(example.messages, example.tools)
    text = tokenizer.decode(tokens)
    start = len(tokenizer.encode(text[: text.index("response:add")], add_special_tokens=False))
    assert not mask[start]
    assert mask[start - 1]  # the token that asks for the tool's answer
    # As it once was: from the call to the end of the turn, the tool's answer with it.
    once = [*mask[:start], *[True] * mask[start:].index(True), *mask[start + mask[start:].index(True) :]]
    assert (tokens, once) != (tokens, mask)
    assert "it is 7" in shown(tokenizer, (tokens, once)).split("⟧")[0]
    assert "it is 7" not in shown(tokenizer, (tokens, mask)).split("⟧")[0]


def test_a_call_is_cut_where_the_tools_answer_begins():
    """Gemma 4 shows the text beside a call behind the tool's answer: what stands there is not what the model wrote."""
    tokenizer, encoder, _ = family("gemma4")
    call = {"role": "assistant", "content": "I will add.", "tool_calls": [CALL]}
    messages = [ASKED, call, {"role": "tool", "content": "SECRET"}, {"role": "assistant", "content": "it is 7"}]
    encoded = encoder.encode([parse_record({"messages": messages, "tools": TOOLS})[1]])
    (row,) = rows_of(encoded)
    trained = [part.split("⟧")[0] for part in shown(tokenizer, row).split("⟦")[1:]]
    assert trained == ["<|tool_call>call:add{x:7}<tool_call|><|tool_response>", "it is 7<turn|>"]
    assert "SECRET" in shown(tokenizer, row)
    assert encoded.unshown == {"text beside a tool call": [0]}


@pytest.mark.parametrize("weight", [0, 1])
def test_a_turn_that_changes_what_stands_before_it_begins_behind_the_tools_answer(weight):
    """Gemma 4's template of July 2026 closes the model's turn behind text beside a call, and only at inference."""
    once = "{{ message.content | trim + '<turn|>\\n' }}"
    at_the_end = "{{ message.content | trim + ('<turn|>\\n' if loop.index + results.count == turns | length else '') }}"
    text = unmarked(template("gemma4"))
    assert text.count(once) == 1
    tokenizer = byte_tokenizer(
        text.replace(once, at_the_end), bos=True, eos="<turn|>", special_tokens=(*SPECIAL_TOKENS, *GEMMA)
    )
    encoder = Encoder(tokenizer, text.replace(once, at_the_end), max_seq_length=10**6)
    call = {"role": "assistant", "content": "I will add.", "tool_calls": [CALL], "weight": weight}
    messages = [ASKED, call, {"role": "tool", "content": "SECRET"}, {"role": "assistant", "content": "it is 7"}]
    (row,) = rows_of(encoder.encode([parse_record({"messages": messages, "tools": TOOLS})[1]]))
    trained = [part.split("⟧")[0] for part in shown(tokenizer, row).split("⟦")[1:]]
    assert trained == ["<|tool_call>call:add{x:7}<tool_call|><|tool_response>"] * weight + ["it is 7<turn|>"]


def test_text_of_another_message_within_a_turn_refuses_the_row():
    inside = (
        "{% for m in messages %}{% if m.role == 'user' %}<s>{{ m.content }}</s>{% elif m.role == 'assistant' %}"
        "{{ m.content[:2] }}{% if not loop.last %}{{ messages[loop.index].content }}{% endif %}{{ m.content[2:] }}</s>"
        "{% endif %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(inside, eos="</s>")
    encoder = Encoder(tokenizer, inside, max_seq_length=999)
    talk = [
        ASKED,
        {"role": "assistant", "content": "once"},
        {"role": "user", "content": "SECRET"},
        {"role": "assistant", "content": "more"},
    ]
    encoded = encoder.encode([parse_record({"messages": talk})[1], parse_record({"messages": talk[:2]})[1]])
    assert encoded.dropped == {0: "the chat template puts message 3 into message 2"}
    assert encoded.source.tolist() == [1]


def test_calls_get_ids_of_the_kind_that_mistral_takes():
    tokenizer, encoder, _ = family("mistral")
    long = [{"id": f"call_{n}_of_openai", **CALL} for n in range(2)]
    messages = [ASKED, {"role": "assistant", "content": None, "tool_calls": long},
                {"role": "tool", "content": "2nd", "tool_call_id": "call_1_of_openai"},
                {"role": "tool", "content": "1st", "tool_call_id": "call_0_of_openai"}, {"role": "assistant", "content": "7"}]  # fmt: skip
    without = [{key: value for key, value in message.items() if key != "tool_call_id"} for message in messages]
    without[1] = {**without[1], "tool_calls": [CALL]}
    without = [*without[:3], without[4]]
    for turns in (messages, without):
        (row,) = rows_of(encoder.encode([parse_record({"messages": turns, "tools": TOOLS})[1]]))
        text = shown(tokenizer, row)
        asked = re.findall(r'"id": "(\w{9})"', text)
        answered = re.findall(r'"call_id": "(\w{9})"', text)
        assert sorted(asked) == sorted(answered)
        assert len(set(asked)) == len(turns[1]["tool_calls"])
        if turns is messages:
            assert answered == asked[::-1]


def test_a_template_that_shows_the_first_of_several_calls_refuses_them():
    _, encoder, _ = family("harmony")
    two = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    result = {"role": "tool", "content": "7"}
    messages = [ASKED, two, result, result, {"role": "assistant", "content": "7"}]
    encoded = encoder.encode([parse_record({"messages": messages, "tools": TOOLS})[1]])
    assert encoded.dropped == {0: "the chat template shows 1 of the 2 tool calls of message 2; write one call per turn"}


def test_harmony_by_its_own_words():
    """The three channels, written out: earlier thinking is gone, and no turn is trained to end with <|end|>."""
    tokenizer, encoder, _ = family("harmony")
    _, example = parse_record({"messages": HANDMADE[4], "tools": TOOLS})
    trained = [
        part.split("⟧")[0]
        for row in rows_of(encoder.encode([example]))
        for part in shown(tokenizer, row).split("⟦")[1:]
    ]
    to_add = " to=functions.add<|channel|>commentary json<|message|>"
    assert trained == [
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>7<|return|>",
        f'<|channel|>analysis<|message|>call it<|end|><|start|>assistant{to_add}{{"x": 7}}<|call|>',
        f'<|channel|>analysis<|message|>again<|end|><|start|>assistant{to_add}{{"x": 7}}<|call|>',
        "<|channel|>analysis<|message|>so<|end|><|start|>assistant<|channel|>final<|message|>hm<|return|>",
    ]
    plain = [ASKED, {"role": "assistant", "content": "one"}, ASKED, {"role": "assistant", "content": "two"}]
    (row,) = rows_of(encoder.encode([parse_record({"messages": plain})[1]]))
    trained = [part.split("⟧")[0] for part in shown(tokenizer, row).split("⟦")[1:]]
    assert trained == ["<|channel|>final<|message|>one", "<|channel|>final<|message|>two<|return|>"]
