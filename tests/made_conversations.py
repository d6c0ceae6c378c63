"""Conversations with every combination of system text, tool calls and thinking, drawn by chance and written by hand."""

from __future__ import annotations

import itertools
import random

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
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"{name} it", "parameters": {"type": "object", "properties": {}}}}
    for name in ("add", "look_up", "7")
]  # fmt: skip
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"x": 7}'}}
ASKED = {"role": "user", "content": "add"}
# By hand: what has misled mask finders before.
HANDMADE = [
    # A tool's result is what the model then answers; the call has no content; a question repeats an answer.
    [ASKED, {"role": "assistant", "tool_calls": [{"id": "c00000001", **CALL}]},
     {"role": "tool", "content": "it is 7", "tool_call_id": "c00000001"}, {"role": "assistant", "content": "it is 7"},
     {"role": "user", "content": "it is 7"}, {"role": "assistant", "content": "it is 7"}],
    # Thinking that holds the end of thinking, and an answer that is the thinking.
    [ASKED, {"role": "assistant", "content": "a </think> b", "thinking": "a </think> b"},
     ASKED, {"role": "assistant", "content": "a </think> b", "reasoning": "a </think> b", "weight": 0},
     ASKED, {"role": "assistant", "content": "7", "reasoning_content": "7"}],
    # An answer that is the template's own text, and white space at both ends of everything.
    [{"role": "user", "content": " \n q \n"}, {"role": "assistant", "content": "\n\n <|im_end|>\n<|im_start|>assistant\n \n"},
     {"role": "user", "content": "\t"}, {"role": "assistant", "content": " ☃\u00a0 \n"}],
    # All turns before the last are context; the last is a question.
    [ASKED, {"role": "assistant", "content": "one", "weight": 0}, ASKED, {"role": "assistant", "content": "one", "weight": 1}, ASKED],
    # A call after an answer with thinking, then thinking between calls.
    [ASKED, {"role": "assistant", "content": "7", "thinking": "hm"},
     ASKED, {"role": "assistant", "content": None, "thinking": "call it", "tool_calls": [{"id": "c00000001", **CALL}]},
     {"role": "tool", "content": "hm", "tool_call_id": "c00000001"},
     {"role": "assistant", "content": "", "reasoning": "again", "tool_calls": [{"id": "c00000002", **CALL}]},
     {"role": "tool", "content": "call it", "tool_call_id": "c00000002"},
     {"role": "assistant", "content": "hm", "thinking": "so"}],
]  # fmt: skip


def conversations(seed: int, count: int, always_ids: bool = False) -> list[dict]:
    """Records in OpenAI's fine-tuning form: every combination of system text, calls and thinking in turn, then by hand."""
    draw = random.Random(seed)
    kinds = itertools.cycle(
        itertools.product([False, True], ["none", "one", "several"], ["none", "some", "all", "inline"])
    )
    made = [conversation(draw, *next(kinds), always_ids) for _ in range(count)]
    return made + [{"messages": messages, "tools": TOOLS} for messages in HANDMADE]


def conversation(draw: random.Random, system: bool, calls: str, thinking: str, always_ids: bool) -> dict:
    messages = [{"role": "system", "content": draw.choice(["be brief", "7", " é "])}] if system else []
    has_ids = draw.random() < 0.5 or always_ids
    numbers = itertools.count()
    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": draw.choice(QUESTIONS)})
        if calls != "none" and draw.random() < 0.8:
            for _ in range(draw.randint(1, 2)):
                asked = [
                    {"type": "function", "function": {"name": name, "arguments": draw.choice(ARGUMENTS)}}
                    for name in draw.sample(["add", "look_up", "7"], draw.randint(2, 3) if calls == "several" else 1)
                ]
                results = [{"role": "tool", "content": draw.choice(RESULTS)} for _ in asked]
                if has_ids:
                    for call, result in zip(asked, results, strict=True):
                        call["id"] = result["tool_call_id"] = f"c{next(numbers):08d}"
                messages += [{"role": "assistant", "content": None, "tool_calls": asked}, *results]
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
    return {"messages": messages, "parallel_tool_calls": True} | ({"tools": TOOLS} if calls != "none" else {})


def rows_of(encoded):
    """Return the rows of encoded examples as (tokens, mask) lists."""
    return [(tokens.tolist(), mask.tolist()) for tokens, mask in map(encoded.rows.row, range(len(encoded.rows)))]
