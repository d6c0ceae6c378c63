"""How a chat template writes a call of a tool and its result: what the model says, and what follows until it speaks again.

Both are found in a rendered conversation. The call has an argument that no other text has; after it, the first token that
ends an answer of this model divides the two:

    <|im_start|>assistant\\n<tool_call>\\n{"name": "f", "arguments": {"text": MARK}}\\n</tool_call><|im_end|>
    \\n<|im_start|>user\\n<tool_response>\\n7\\n</tool_response><|im_end|>\\n<|im_start|>assistant\\n

Only what follows is ever put into an episode. What the model said stays as it was sampled, even where the template would
write it otherwise, for example without its thinking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.chat_template import rendered_chat, template_shows, tokens_of_rendered
from mlx_lora.data.examples import FormatError, Message
from mlx_lora.data.render import CALL_FORMATS
from mlx_lora.utils.errors import InputError

QUESTION, RESULT, MARK = "the-question-before", "the-result-after", "the-call-between"
PROBE: dict[str, Any] = {"name": "look_up", "arguments": {"text": MARK, "count": 7}}
PROBE_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks up a text.",
        "parameters": {
            "type": "object",
            "properties": {
                "text": {"type": "string", "description": "The text."},
                "count": {"type": "integer", "description": "A number."},
            },
            "required": ["text", "count"],
        },
    },
}
ANOTHER = "give another with --chat-template, such as chatml"
THINKING = ("<think>", "</think>")


@dataclass(frozen=True)
class ToolTurns:
    """Writes results of tools as a chat template does.

    Attributes:
        tokenizer: not mlx-lm's wrapper.
        template: Jinja text.
        ends: the tokens that end what the model says.
        tools: schemas of all tools that prompts show.
        day: that the template shows as today; None: today.
        allow_special_tokens: a result that spells a control token brings that token in.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    ends: frozenset[int]
    tools: Sequence[dict[str, Any]] = field(default_factory=list)
    day: date | None = None
    allow_special_tokens: bool = False

    def probed(self) -> str:
        """Return how the model would write the call `PROBE`, from its turn's beginning to its end token.

        Raises:
            InputError: the template does not show tools, calls or results, or no end token stands between the two.
        """
        asked = [{"role": "user", "content": QUESTION}]
        if not template_shows(self.tokenizer, asked, self.template, [PROBE_SCHEMA]):
            raise InputError(f"the chat template does not show tools to the model; {ANOTHER}")
        text, _, cut = self._divided([PROBE], [RESULT], MARK, [PROBE_SCHEMA])
        if RESULT not in text[cut:]:
            raise InputError(f"the chat template does not show what a tool returned; {ANOTHER}")
        if RESULT in text[:cut]:
            raise InputError(
                "the chat template writes no end token of the model between a call and its result, so the model would not "
                f"wait for it; {ANOTHER}"
            )
        begun = self._rendered(asked, [PROBE_SCHEMA])[0].partition(QUESTION)[2]
        said = text[:cut].partition(QUESTION)[2]
        return said.removeprefix(begun)

    def opens_thinking(self) -> bool:
        """Return whether the template itself opens the model's thinking, so that an answer begins inside of it."""
        begun = self._rendered([{"role": "user", "content": QUESTION}], self.tools)[0].partition(QUESTION)[2]
        return begun.rfind(THINKING[0]) > begun.rfind(THINKING[1])

    def tokens(self, calls: Sequence[Mapping[str, Any]], results: Sequence[str]) -> list[int]:
        """Return the tokens between the end token of a turn with calls and the model's next turn.

        Args:
            calls: each with `name`, and an `id` if the model wrote one.
            results: the text that each returned.

        Raises:
            InputError: the template refuses them.
        """
        mark = MARK
        while any(mark in result for result in results):
            mark += "-"
        marked = [{**call, "arguments": {"text": mark}} for call in calls]
        text, spans, cut = self._divided(marked, results, mark, self.tools)
        return tokens_of_rendered(self.tokenizer, text[cut:], [(a - cut, b - cut) for a, b in spans if a >= cut])

    def _divided(
        self, calls: Sequence[Mapping[str, Any]], results: Sequence[str], mark: str, tools: Sequence[dict[str, Any]]
    ) -> tuple[str, list[tuple[int, int]], int]:
        """Return a conversation with calls and results, the spans of its control tokens, and where the turn of the calls ends."""
        ids = [call_id(call, place) for place, call in enumerate(calls)]
        written = [
            {"id": own, "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for own, call in zip(ids, calls, strict=True)
        ]
        after: list[Message] = [
            {"role": "tool", "name": call["name"], "content": result, "tool_call_id": own}
            for own, call, result in zip(ids, calls, results, strict=True)
        ]
        refused: Exception | None = None
        for shown in (written, written[-1:]):  # some templates take a single call in a turn
            turn: Message = {"role": "assistant", "content": "", "tool_calls": shown}
            for formatted in CALL_FORMATS:
                messages = formatted([{"role": "user", "content": QUESTION}, turn, *after])
                try:
                    text, spans = self._rendered(messages, tools)
                except (jinja2.TemplateError, TypeError, ValueError, FormatError) as error:
                    refused = refused or error
                    continue
                return text, spans, self._end(text, mark)
        raise InputError(f"the chat template refuses the result of a tool ({refused}); {ANOTHER}")

    def _end(self, text: str, mark: str) -> int:
        """Return where the turn ends whose call has the mark."""
        if mark not in text:
            raise InputError(f"the chat template does not show calls of tools; {ANOTHER}")
        after = text.rindex(mark) + len(mark)
        texts = [str(self.tokenizer.convert_ids_to_tokens(end)) for end in self.ends]
        found = [(text.find(one, after), -len(one)) for one in texts if text.find(one, after) >= 0]
        if not found:
            raise InputError(f"the chat template writes no end token of the model after a call; {ANOTHER}")
        start, minus_length = min(found)
        return start - minus_length

    def _rendered(self, messages: list[Message], tools: Sequence[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        return rendered_chat(self.tokenizer, messages, self.template, list(tools), self.day, self.allow_special_tokens)


def call_id(call: Mapping[str, Any], place: int) -> str:
    """Return the id of a call: the model's own if Mistral's templates would take it, else one of its place."""
    own = call.get("id")
    return own if isinstance(own, str) and len(own) == 9 and own.isalnum() and own.isascii() else f"call{place:05d}"
