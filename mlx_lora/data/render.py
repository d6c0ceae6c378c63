"""Conversation -> rendered text and the character spans of it that are trained.

Trained is what the model writes itself at inference: what stands after the generation prompt, up to and
with the end-of-turn token, in every assistant turn. Templates trim, fold, rewrite and drop, so a span is
never taken from a prefix that is assumed: it is found in the full rendering.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                      `-- generation prompt --'`---- span ---'

Fast path: the generation prompt occurs once per assistant turn, each turn's content right after it. It
holds for nearly every row of a plain template and costs one rendering. Else the exact path renders again
for each turn with its content replaced by a character that occurs nowhere; what differs is the turn.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.formats import Conversation, EmptyRecord, FormatError, Message
from mlx_lora.data.sandbox import render_chat
from mlx_lora.data.templates import PROBE

Span = tuple[int, int]  # characters [start, end)


@dataclass(frozen=True)
class Rendered:
    """A text to tokenise, what of it is trained, and whether the end token is to follow (and be trained)."""

    text: str
    spans: list[Span]
    append_eos: bool = False


class Renderer:
    """One chat template applied to many conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str):
        """Learn the template's generation prompt and the tokenizer's special tokens.

        Args:
            tokenizer: Renders templates in transformers' sandbox.
            template: Jinja text.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._special, self._end_of_turn = _special_patterns(tokenizer)
        self.generation_prompt = self._find_generation_prompt()

    def render(self, conversation: Conversation) -> Rendered:
        """Render one conversation and find the trained spans.

        Raises:
            FormatError: the template refuses the conversation, or does not show what is to be trained.
        """
        text = self._text(conversation.messages, conversation.tools)
        bodies = self._fast_bodies(text, conversation) or self._exact_bodies(text, conversation)
        last_is_answer = conversation.messages[-1]["role"] == "assistant"
        spans, append_eos = self._with_ends(text, bodies, last_is_answer)
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        spans = [
            span
            for span, answer in zip(spans, answers, strict=True)
            if span and span[0] < span[1] and answer.get("weight") != 0
        ]
        if not spans:
            raise EmptyRecord("the chat template shows no assistant turn of it")
        return Rendered(text, spans, append_eos and spans[-1][1] == len(text))

    def shows_tools(self, conversation: Conversation) -> bool:
        """Return whether the conversation's tool list changes the rendering at all."""
        return self._text(conversation.messages, conversation.tools) != self._text(conversation.messages, None)

    def _text(self, messages: list[Message], tools: list[dict] | None, prompt: bool = False) -> str:
        """Render; with `prompt`, as at inference, with the generation prompt at the end."""
        try:
            try:
                return self._apply(messages, tools, prompt)
            except TypeError:
                # Some templates join the arguments as text (DeepSeek's), most take the object.
                if not any("tool_calls" in message for message in messages):
                    raise
                return self._apply([_with_text_arguments(message) for message in messages], tools, prompt)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FormatError(f"the chat template refuses it: {reason}") from error

    def _apply(self, messages: list[Message], tools: list[dict] | None, prompt: bool) -> str:
        return render_chat(self._tokenizer, messages, self._template, tools, prompt)

    def _find_generation_prompt(self) -> str:
        """Return the text the template adds for the model to go on from; empty when it adds none."""
        try:
            without, with_prompt = self._text(PROBE, None), self._text(PROBE, None, prompt=True)
        except FormatError:
            return ""
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    def _fast_bodies(self, text: str, conversation: Conversation) -> list[Span | None] | None:
        """Return each assistant turn's content span, or None where the simple picture does not hold."""
        prompt = self.generation_prompt
        answers = [message for message in conversation.messages if message["role"] == "assistant"]
        if not prompt.strip() or conversation.tools or text.count(prompt) != len(answers):
            return None
        for message in conversation.messages:
            if prompt in message["content"] or "tool_calls" in message or "reasoning_content" in message:
                return None
        bodies: list[Span | None] = []
        end = 0
        for answer in answers:
            start = text.find(prompt, end) + len(prompt)
            content = answer["content"].strip()
            begin = start
            while text[begin : begin + 1].isspace():
                begin += 1
            end = begin + len(content)
            if start < len(prompt) or not content or not text.startswith(content, begin):
                return None
            if self._end_after(text, end) is None:  # it may have matched the template's own text, as <think>
                return None
            bodies.append((start, end))
        return bodies

    def _exact_bodies(self, text: str, conversation: Conversation) -> list[Span | None]:
        """Return each assistant turn's span from generation prompt to content end; None: not rendered."""
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
        bodies: list[Span | None] = []
        reached = 0
        for index, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            body = self._marked_body(text, conversation, index, mark)
            if body is not None:
                body = (self._turn_start(text, conversation, index, body), body[1])
                if body[0] < reached:
                    raise FormatError(f"the chat template renders message {index + 1} out of order")
                reached = body[1]
            if "tool_calls" in message:
                name = message["tool_calls"][0]["function"]["name"]
                if body is None or name not in text[body[0] : body[1]]:
                    raise FormatError("the chat template does not show tool calls")
            bodies.append(body)
        return bodies

    def _marked_body(self, text: str, conversation: Conversation, index: int, mark: str) -> Span | None:
        """Return where turn `index` stands in `text`, by a rendering with `mark` in its place."""
        message = conversation.messages[index]
        by_name = False
        try:
            variant = self._variant(conversation, index, {"role": "assistant", "content": mark})
        except FormatError:
            if "tool_calls" not in message:
                raise
            # A tool message may follow calls only: keep one call and mark its name.
            call = message["tool_calls"][0]
            marked = {**call, "function": {"name": mark, "arguments": {}}}
            variant = self._variant(conversation, index, {**message, "content": "", "tool_calls": [marked]})
            by_name = True
        if mark not in variant:
            return None
        if variant.count(mark) != 1:
            raise FormatError(f"the chat template repeats message {index + 1}")
        start = _common_prefix(text, variant)
        end = len(text) - min(_common_prefix(text[::-1], variant[::-1]), len(text) - start)
        if by_name and self._special is not None:
            following = self._special.search(text, end)
            end = following.start() if following else len(text)
        prompt = self.generation_prompt
        if prompt and text.count(prompt, start, end) > message["content"].count(prompt):
            raise FormatError(f"the chat template renders other turns differently because of message {index + 1}")
        return start, end

    def _variant(self, conversation: Conversation, index: int, message: Message) -> str:
        messages = conversation.messages
        return self._text([*messages[:index], message, *messages[index + 1 :]], conversation.tools)

    def _turn_start(self, text: str, conversation: Conversation, index: int, body: Span) -> int:
        """Move a content's start back to where the model begins to write: right after the prompt."""
        prompt = self.generation_prompt
        if prompt and text.endswith(prompt, 0, body[0]):
            return body[0]
        try:
            seen = self._text(conversation.messages[:index], conversation.tools, prompt=True) if index else ""
        except (FormatError, IndexError):
            seen = ""
        if seen and len(seen) <= body[1] and text.startswith(seen):
            return len(seen)
        # The template rewrote an earlier turn since: take the nearest prompt, if only its own text follows.
        nearest = text.rfind(prompt, 0, body[0]) if prompt else -1
        between = text[nearest + len(prompt) : body[0]]
        if nearest < 0 or (self._special and self._special.search(between)):
            return body[0]
        return body[0] if self._has_foreign_text(conversation, index, between) else nearest + len(prompt)

    def _has_foreign_text(self, conversation: Conversation, index: int, text: str) -> bool:
        """Return whether `text` holds the content of a message other than number `index`."""
        others = [message["content"].strip() for i, message in enumerate(conversation.messages) if i != index]
        return any(content and content in text for content in others)

    def _with_ends(self, text: str, bodies: list[Span | None], last_is_answer: bool) -> tuple[list[Span | None], bool]:
        """Extend each span over its end-of-turn token; without one, the end token has to be appended."""
        ended: list[Span | None] = []
        open_ends: list[int] = []
        for body in bodies:
            end = self._end_after(text, body[1]) if body else None
            if body and end is None:
                open_ends.append(len(ended))
            ended.append((body[0], end) if body and end else body)
        if not last_is_answer or not open_ends or open_ends[-1] != len(bodies) - 1:
            return ended, False
        # What the template itself writes after an answer, be it ordinary text, ends the turn.
        tail = text[bodies[-1][1] :].rstrip()
        for number in open_ends[:-1]:
            start, end = bodies[number]
            if tail and text.startswith(tail, end):
                ended[number] = (start, end + len(tail))
        ended[-1] = (bodies[-1][0], len(text))
        return ended, True

    def _end_after(self, text: str, end: int) -> int | None:
        """Return the end of the special token that closes a turn whose content ends at `end`."""
        if self._special is None:
            return None
        for special in self._special.finditer(text, max(0, end - 64), end + 64):
            if special.start() < end < special.end():  # two end tokens that share their last letters
                return special.end()
        match = self._end_of_turn.match(text, end)
        return match.end() if match else None


def _special_patterns(tokenizer: PreTrainedTokenizerBase) -> tuple[re.Pattern | None, re.Pattern | None]:
    """Return patterns of any special token, and of one that can close a turn after white space."""
    texts = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts |= set(tokenizer.all_special_tokens)
    if not texts:
        return None, None
    ordered = sorted(texts, key=len, reverse=True)
    closing = [text for text in ordered if text != tokenizer.bos_token or text == tokenizer.eos_token]
    any_special = "|".join(map(re.escape, ordered))
    return re.compile(any_special), re.compile(rf"\s*(?:{'|'.join(map(re.escape, closing))})" if closing else r"(?!)")


def _common_prefix(a: str, b: str) -> int:
    """Return how many characters two texts share at their start, by halving (slices compare fast)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _with_text_arguments(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}
