"""What is right to train, found another way than mlx_lora finds it: by the marks that a template's author put into it.

The test templates say themselves what the model writes (`{% generation %}`), and transformers returns that per token.
From it follow the rows of a conversation, token by token, by the rules that docs/data.md states:

1. A turn is what the template's marks say, in the rendering that ends with it; its prompt is the rendering of what came
   before, with the generation prompt.
2. A turn that the full rendering shows with that prompt is trained there. If it ends with another token there, that token is not.
3. Else, if it or a turn before it has thinking, or the template moves the system text or the tools to the last question,
   it gets a row: prompt and turn. Rows that begin another are one with it.
4. Else it is trained as the full rendering shows it, without an end that is not its own.
"""

from __future__ import annotations

import re
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerFast

Row = tuple[list[int], list[bool]]
THINKING_IN_TEXT = "</think>"


def unmarked(template: str) -> str:
    """Return the template as its author publishes it, without the marks."""
    return re.sub(r"\bgeneration\b(?= [-%])", "if true", re.sub(r"\bendgeneration\b", "endif", template))


class Reference:
    """The rows that a marked template makes of conversations."""

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
