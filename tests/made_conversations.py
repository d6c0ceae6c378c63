"""Conversations drawn by chance and written by hand, what is right to train of them, and how transformers itself renders them."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mlx_lora.data.examples import Conversation, EmptyRecord
from mlx_lora.data.formats import parse_record
from mlx_lora.data.sandbox import render_chat

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


def examples(seed: int, count: int, always_ids: bool = False) -> Iterator[Conversation]:
    """Yield these records as they are read, without those of which every turn has weight 0."""
    for record in conversations(seed, count, always_ids):
        with suppress(EmptyRecord):
            yield parse_record(record)[1]


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


Row = tuple[list[int], list[bool]]
THINKING_IN_TEXT = "</think>"


def unmarked(template: str) -> str:
    """Return the template as its author publishes it, without the marks."""
    return re.sub(r"\bgeneration\b(?= [-%])", "if true", re.sub(r"\bendgeneration\b", "endif", template))


class Reference:
    """The rows that a marked template makes of conversations: what is right to train, found another way than mlx_lora finds it.

    The test templates say themselves what the model writes (`{% generation %}`), and transformers returns that per token.
    From it follow the rows of a conversation, token by token, by the rules that docs/data-forms.md states:

    1. A turn is what the template's marks say, in the rendering that ends with it; its prompt is the rendering of what came
       before, with the generation prompt.
    2. A turn that the full rendering shows with that prompt is trained there. If it ends with another token there, that token is not.
    3. Else, if it or a turn before it has thinking, or the template moves the system text or the tools to the last question,
       it gets a row: prompt and turn. Rows that begin another are one with it.
    4. Else it is trained as the full rendering shows it, without an end that is not its own.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, marked_template: str, max_calls: int = 9, moves: bool = False
    ):
        """Take a template whose turns are marked.

        Args:
            tokenizer: Any.
            marked_template: Jinja text.
            max_calls: Calls of one turn that the template shows.
            moves: It shows system text and tools before the last question only.
        """
        self._tokenizer, self._template, self._max_calls, self._moves = tokenizer, marked_template, max_calls, moves

    def rows(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[Row] | None:
        """Return the rows in the order of their turns, the full rendering last; None: the template refuses it."""
        trained = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
        try:
            whole, runs = self._marked(messages, tools)
            turns = {i: self._turn(messages[: i + 1], tools) for i in trained}
        except jinja2.TemplateError:
            return None
        if any(len(messages[i].get("tool_calls", [])) > self._max_calls for i in trained):
            return None
        places = dict(zip([i for i, m in enumerate(messages) if m["role"] == "assistant"], runs, strict=True))
        mask = [False] * len(whole)
        apart: list[Row] = []
        for i in reversed(trained):
            prompt, written = turns[i]
            start, stop = places[i]
            same_prompt = whole[:start] == prompt
            if same_prompt and whole[start:stop] == written:
                pass
            elif same_prompt and whole[start : stop - 1] == written[:-1]:
                stop -= 1
            elif any(map(has_thinking, messages[: i + 1])) or (
                self._moves and (tools or messages[0]["role"] == "system")
            ):
                self._put(apart, prompt, written)
                continue
            elif whole[stop - 1] != written[-1]:
                stop -= 1
            mask[start:stop] = [True] * (stop - start)
        return apart[::-1] + ([(whole, mask)] if any(mask) else [])

    def _put(self, apart: list[Row], prompt: list[int], written: list[int]) -> None:
        for tokens, mask in apart:
            if tokens[: len(prompt) + len(written)] == prompt + written:
                mask[len(prompt) : len(prompt) + len(written)] = [True] * len(written)
                return
        apart.append((prompt + written, [False] * len(prompt) + [True] * len(written)))

    def _turn(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> tuple[list[int], list[int]]:
        """Return the prompt of the last turn and what is written behind it."""
        last, runs = self._marked(messages, tools)
        start, stop = runs[-1]
        prompt = self._tokens(messages[:-1], tools, add_generation_prompt=True)["input_ids"]
        # Where the turn shows less than its prompt (a thinking block that only the prompt opens), that is the prompt.
        return (last[:start] if prompt[:start] == last[:start] else prompt), last[start:stop]

    def _marked(self, messages: list[dict], tools: list[dict] | None) -> tuple[list[int], list[tuple[int, int]]]:
        found = self._tokens(messages, tools, return_assistant_tokens_mask=True)
        ids, mask = found["input_ids"], [0, *found["assistant_masks"], 0]
        edges = [i for i in range(len(ids) + 1) if mask[i] != mask[i + 1]]
        return ids, list(zip(edges[::2], edges[1::2], strict=True))

    def _tokens(self, messages: list[dict], tools: list[dict] | None, **options: Any) -> dict[str, list[int]]:
        return self._tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self._template, tokenize=True, return_dict=True, **options
        )


def has_thinking(message: dict[str, Any]) -> bool:
    """Return whether an assistant's turn has thinking."""
    own = message.get("reasoning_content") or THINKING_IN_TEXT in message["content"]
    return message["role"] == "assistant" and bool(own)


REFUSED = "refused: "


def rendered_by_both(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], template: str, **options: Any
) -> tuple[str, str]:
    """Return our rendering and transformers'; where one refuses, REFUSED and the reason."""

    def ours() -> str:
        return render_chat(tokenizer, messages, template, **options)

    def theirs() -> str:
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options)

    return _said(ours), _said(theirs)


def _said(render) -> str:
    try:
        return render()
    except (jinja2.TemplateError, TypeError, ValueError, AttributeError) as error:
        return REFUSED + str(error).removeprefix("AttributeError: ")  # which we report as a template's error
