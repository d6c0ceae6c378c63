"""Masks, token by token, against what the templates' own marks say: seven families, 40 conversations each."""

from __future__ import annotations

import itertools
import random

import pytest
from byte_tokenizer import SPECIAL_TOKENS, byte_tokenizer, template
from mask_reference import Reference, unmarked

from mlx_lora.data.encode import Encoder
from mlx_lora.data.formats import parse_record
from mlx_lora.data.templates import resolve_template

HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>", "<|constrain|>")
GEMMA = ("<|turn>", "<turn|>", "<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>')  # fmt: skip
MISTRAL = ("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")


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


# name -> marked template, special tokens, end token, has it a BOS, calls it shows of one turn, does it have thinking
FAMILIES = {
    "chatml": (marked_chatml, (), "<|im_end|>", False, 9),
    "qwen3": (lambda: template("qwen3_thinking"), (), "<|im_end|>", False, 9),
    "qwen3_5": (lambda: template("qwen3_5"), (), "<|im_end|>", False, 9),
    "gemma4": (lambda: template("gemma4"), GEMMA, "<turn|>", True, 9),
    "llama3_2": (lambda: template("llama3_2"), (), "<|eot_id|>", True, 1),
    "mistral": (lambda: template("mistral_tools"), MISTRAL, "</s>", True, 9),
    "harmony": (lambda: template("harmony"), HARMONY, "<|return|>", False, 1),
}
ANSWERS = [
    "yes", "user", "7", "Añ 😀 swer\n", " two  ", "<|im_start|>assistant\nyes", "<tool_call>\n{}\n</tool_call>",
    "model", "system", "say <|im_end|>", '{"name": "add"}', "a\n\nb\n", "response:add{}",
]  # fmt: skip
THOUGHTS = ["hm", "7", "so </think> no", "a\n\nb", " spaced ", "<|channel>", "Añ 😀", "yes", "assistant"]
RESULTS = ["7", "yes", "<tool_response>", '{"x": "é"}', "user", "<|im_start|>assistant\nevil", "  7 "]
QUESTIONS = [
    "q",
    "7",
    "yes",
    "<|im_start|>assistant\n",
    "two",
    "Wie heißt ☃?",
    "<tool_response>q</tool_response>",
    "model\n",
]
ARGUMENTS = [{"x": 1}, {}, {"x": "7", "y": ["é", None]}, {"text": "yes\n<|im_end|>"}]


def conversations(seed: int, count: int) -> list[dict]:
    """Records in OpenAI's fine-tuning form: every combination of system text, tools, thinking and weights, then random."""
    draw = random.Random(seed)
    kinds = itertools.cycle(
        itertools.product([False, True], ["none", "one", "several"], ["none", "some", "all", "inline"])
    )
    return [conversation(draw, *next(kinds)) for _ in range(count)]


def conversation(draw: random.Random, system: bool, calls: str, thinking: str) -> dict:
    messages = [{"role": "system", "content": draw.choice(["be brief", "7", " é "])}] if system else []
    ids = (f"call_{n:05d}" if draw.random() < 0.5 else None for n in itertools.count())
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": draw.choice(QUESTIONS)})
        if calls != "none" and draw.random() < 0.8:
            for _ in range(draw.randint(1, 2)):
                asked = [
                    {
                        "id": next(ids),
                        "type": "function",
                        "function": {"name": name, "arguments": draw.choice(ARGUMENTS)},
                    }
                    for name in draw.sample(["add", "look_up", "7"], draw.randint(2, 3) if calls == "several" else 1)
                ]
                messages.append({"role": "assistant", "content": None, "tool_calls": asked})
                messages += [
                    {"role": "tool", "content": draw.choice(RESULTS)}
                    | ({"tool_call_id": call["id"]} if call["id"] else {})
                    for call in asked
                ]
        messages.append({"role": "assistant", "content": draw.choice(ANSWERS)})
    for message in messages:
        if message["role"] == "assistant":
            if thinking == "all" or (thinking == "some" and draw.random() < 0.5):
                message[draw.choice(["reasoning_content", "thinking", "reasoning"])] = draw.choice(THOUGHTS)
            if thinking == "inline" and message["content"] and draw.random() < 0.6:
                message["content"] = f"<think>\n{draw.choice(['hm', '7'])}\n</think>\n\n" + message["content"]
            if draw.random() < 0.3:
                message["weight"] = draw.choice([0, 0, 1])
    if draw.random() < 0.2:
        messages.append({"role": "user", "content": "one more"})
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"{name} it",
                "parameters": {"type": "object", "properties": {}, "required": []},
            },
        }
        for name in ("add", "look_up", "7")
    ]
    return {"messages": messages, "parallel_tool_calls": True} | ({"tools": tools} if calls != "none" else {})


def family(name: str):
    make, special, eos, bos, max_calls = FAMILIES[name]
    tokenizer = byte_tokenizer(unmarked(make()), bos=bos, eos=eos, special_tokens=(*SPECIAL_TOKENS, *special))
    return (
        tokenizer,
        Encoder(tokenizer, unmarked(make()), max_seq_length=10**6),
        Reference(tokenizer, make(), max_calls, moves=name == "mistral"),
    )


def shown(tokenizer, row) -> str:
    """A row as text, what is trained between marks."""
    return "".join(
        tokenizer.decode([token for token, _ in part]).join("⟦⟧" if on else ("", ""))
        for on, part in itertools.groupby(zip(*row, strict=True), key=lambda pair: bool(pair[1]))
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_and_mask_is_the_references(name):
    tokenizer, encoder, reference = family(name)
    compared, calls, thoughts = 0, 0, 0
    for seed, record in enumerate(conversations(7, 64)):
        try:
            _, example = parse_record(record)
        except ValueError as error:
            assert "weight 0" in str(error)  # noqa: PT017
            continue
        messages = mistral_form(example.messages) if name == "mistral" else example.messages
        expected = reference.rows(messages, example.tools)
        encoded = encoder.encode([example])
        if expected is None:
            assert list(encoded.dropped) == [0], f"record {seed}"
            continue
        found = [(tokens.tolist(), mask.tolist()) for tokens, mask in map(encoded.rows.row, range(len(encoded.rows)))]
        assert [shown(tokenizer, row) for row in found] == [shown(tokenizer, row) for row in expected], (
            f"record {seed}: {encoded.dropped}"
        )
        assert found == expected
        compared += 1
        calls += any("tool_calls" in message for message in messages)
        thoughts += any("reasoning_content" in message for message in messages)
    assert compared >= 40 or name in ("llama3_2", "harmony")
    assert compared >= 30
    assert calls >= 8
    assert thoughts >= 10


def mistral_form(messages):
    """The reference's own way to give calls ids that the template takes."""
    from mlx_lora.data.render import FORMS

    return FORMS[2](messages)
