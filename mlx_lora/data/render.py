"""Render a conversation as one text or several, and find the spans of characters in them that are trained.

The trained spans are what the model itself writes at inference: in every assistant turn, the text after the generation
prompt, up to and including the end-of-turn token.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                      `-- generation prompt --'`---- span ---'

Fast path: the generation prompt occurs once per assistant turn, with each turn's content right after it, or after what
the template puts there in every chat. This holds for nearly every row without tools and thinking, and takes one
rendering. Otherwise the exact path (data/assistant_spans.py) renders each turn as at inference, with the messages before
it as the prompt, and searches the full rendering for the result.

Most turns are found there, so a conversation is one row. A turn is not found if the template shows it differently once
other turns follow. There are two cases:

- The full rendering lacks text that the model sees or writes at inference: thinking, of the turn or of one before it,
  that the template removes from the history (Qwen3, GPT-OSS, Gemma 4), or a system text or tools that it only shows at
  the last question (Mistral). Trained on the history, the model would learn not to think, and to call tools that it was
  not told about. So such a turn gets a row of its own: the prompt as at inference, and what the model writes.
- Anything else, such as an empty thinking block that only the last turn has: the turn is trained as it is in the full
  rendering, without tokens that the model would not write. GPT-OSS, for example, ends an answer with <|return|>, but
  the history shows <|end|>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cached_property

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.assistant_spans import AssistantTurns, Span, common_prefix
from mlx_lora.data.chat_template import PROBE, Specials, controls_of
from mlx_lora.data.examples import Conversation, EmptyRecord, FormatError, Message, call_of
from mlx_lora.data.sandbox import render_ahead, render_chat
from mlx_lora.utils.files import sha256_of

A_CALL = {"id": "aaaaaaaaa", "type": "function", "function": {"name": "qzx", "arguments": {}}}
NOTHING = {"type": "object", "properties": {}, "required": []}
A_TOOL = {"type": "function", "function": {"name": "qzx", "description": "x", "parameters": NOTHING}}
ADVICE = "; use --chat-template chatml, which supports tools"


@dataclass(frozen=True)
class Rendered:
    """A text to tokenize.

    Attributes:
        text: Of a row.
        spans: Its trained characters.
        append_eos: Whether the end token must follow (and is trained).
        ordinary: Where control tokens are content, and are encoded as ordinary text (data/chat_template.py).
    """

    text: str
    spans: list[Span]
    append_eos: bool = False
    ordinary: list[Span] = field(default_factory=list)


@dataclass(frozen=True)
class Rendering:
    """The rows of one conversation.

    Attributes:
        rows: One, or several if the template hides text of earlier turns.
        unshown: Names of fields with content that no row shows.
        controls: Control tokens that the messages' content has.
    """

    rows: list[Rendered]
    unshown: frozenset[str] = frozenset()
    controls: tuple[str, ...] = ()


@dataclass(frozen=True)
class Frame:
    """The text that a template puts around the answers of a plain chat.

    Attributes:
        prompt: The part of the generation prompt that precedes earlier answers, without a thinking block that it opens.
        leads: Texts that the model may write between the prompt and an answer (`<|channel|>final<|message|>`).
        closing: The text that ends the last answer, which the model writes; None: not known.
    """

    prompt: str
    leads: frozenset[str]
    closing: str | None


class Renderer:
    """Renders conversations with one chat template."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        day: date | None = None,
        allow_special_tokens: bool = False,
    ):
        """Learn the template's generation prompt and the tokenizer's special tokens.

        Args:
            tokenizer: For its special tokens.
            template: Jinja text.
            day: The day that the template shows as today; None: today.
            allow_special_tokens: Content that spells a control token brings that token in.
        """
        self._controls, self._allow = controls_of(tokenizer), allow_special_tokens
        self._tokenizer, self._template, self._day = tokenizer, template, day
        self._specials = Specials(tokenizer)
        self._call_format = 0  # the number of the format that the last conversation with calls needed
        self._is_exact = False  # whether the last conversation needed the exact path
        self._ahead: dict[tuple[int, ...], tuple[list[Message], str | Exception]] = {}  # by the ids of the messages
        self.generation_prompt = self._find_generation_prompt()

    def render_ahead(self, conversations: Sequence[Conversation]) -> None:
        """Render conversations that `render` will be asked for, together, which takes less time."""
        plain = [one.messages for one in conversations if one.tools is None and not _has_calls(one.messages)]
        chats = [(messages, False) for messages in plain]
        if self._is_exact:
            chats += [(messages[:-1], True) for messages in plain if len(messages) > 1]
        outcomes = render_ahead(self._tokenizer, chats, self._template, self._day)
        # The messages are kept, so that no others get their ids.
        self._ahead = {
            (asks, *map(id, messages)): (messages, outcome)
            for (messages, asks), outcome in zip(chats, outcomes, strict=False)
        }

    def render(self, conversation: Conversation) -> Rendering:
        """Render one conversation and find the trained spans.

        Raises:
            FormatError: the template refuses the conversation, or does not show what should be trained.
        """
        if self._allow:
            return replace(self._rendering(conversation), controls=self._controls.found(conversation.messages))
        hidden = self._controls.hide(conversation.messages)
        if not hidden.names:
            return self._rendering(conversation)
        found = self._rendering(replace(conversation, messages=hidden.messages))
        rows = []
        for row in found.rows:
            text, ordinary = hidden.shown(row.text)
            rows.append(replace(row, text=text, ordinary=ordinary))
        return replace(found, rows=rows, controls=hidden.names)

    def _rendering(self, conversation: Conversation) -> Rendering:
        """Render messages without control tokens of their own."""
        messages, text = self._shown(conversation)
        spans = self._fast_spans(text, messages, conversation.tools)
        self._is_exact = spans is None
        if spans is not None:
            trained = [
                span for span, answer in zip(spans, _answers(messages), strict=True) if answer.get("weight") != 0
            ]
            return Rendering([Rendered(text, trained)], self._unshown(text, messages))
        turns = AssistantTurns(
            messages,
            text,
            lambda part, prompt=False: self._text(part, conversation.tools, prompt),
            self._specials,
            self.generation_prompt,
            self._frame.prompt,
            self._moves(messages, conversation.tools),
        )
        rows = [Rendered(*row) for row in turns.rows()]
        if not rows:
            raise EmptyRecord("the chat template shows none of its assistant turns")
        hidden = {conversation.reasoning_field if name == "reasoning_content" else name for name in turns.unshown}
        return Rendering(rows, self._unshown(text, messages) | hidden)

    def shows_tools(self, conversation: Conversation) -> bool:
        """Return whether the conversation's tools change the rendering."""
        messages, text = self._shown(conversation)
        return text != self._text(messages, None)

    def _shown(self, conversation: Conversation) -> tuple[list[Message], str]:
        """Return the turns in the format that the template accepts, and the full rendering."""
        messages = conversation.messages
        if not self._knows_developer:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        if not _has_calls(messages):
            return messages, self._text(messages, conversation.tools)
        refusals = []
        for number in sorted(range(len(CALL_FORMATS)), key=lambda number: (number != self._call_format, number)):
            try:
                converted = CALL_FORMATS[number](messages)
                text = self._text(converted, conversation.tools)
            except FormatError as error:
                refusals.append((number, error))
                continue
            self._call_format = number
            if not self._has_calls:
                raise FormatError(f"the chat template does not show tool calls{ADVICE}")
            return converted, text
        refusal = min(refusals, key=lambda one: one[0])[1]
        raise FormatError(str(refusal) + ("" if self._has_calls else ADVICE)) from refusal

    def _text(self, messages: list[Message], tools: list[dict] | None, prompt: bool = False) -> str:
        """Return a rendering; with `prompt`, it ends with the generation prompt, as at inference."""
        try:
            if tools is None and (known := self._ahead.pop((prompt, *map(id, messages)), None)):
                outcome = known[1]
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome
            return render_chat(self._tokenizer, messages, self._template, tools, prompt, self._day)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FormatError(f"the chat template refuses it: {reason}") from error

    def _find_generation_prompt(self) -> str:
        """Return the text that the template adds before the model's answer; empty if it adds none."""
        try:
            without, with_prompt = self._text(PROBE, None), self._text(PROBE, None, prompt=True)
        except FormatError:
            return ""
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    @cached_property
    def _frame(self) -> Frame:
        """The text that the template puts around answers, found in a chat with two answers."""
        chat = [*PROBE, {"role": "assistant", "content": "qzx"}, *PROBE, {"role": "assistant", "content": "wvw"}]
        prompt = self.generation_prompt
        try:
            before, text = self._text(chat[:1], None), self._text(chat, None)
        except FormatError:
            return Frame(prompt, frozenset([""]), None)
        answers = text.find("qzx"), text.rfind("wvw")
        shown = prompt[: common_prefix(prompt, text[len(before) : len(before) + len(prompt)])]
        if not shown or answers[0] < len(before) + len(shown) or answers[1] < answers[0]:
            return Frame(prompt, frozenset([""]), None)
        leads = {""}
        for begin in answers:
            start = text.rfind(shown, 0, begin) + len(shown)
            start += len(prompt) - len(shown) if text.startswith(prompt, start - len(shown)) else 0
            leads.add(text[start:begin])
        closed = self._specials.end_after(text, answers[1] + 3)
        return Frame(shown, frozenset(leads), text[answers[1] + 3 : closed].strip() if closed else None)

    def _moves(self, messages: list[Message], tools: list[dict] | None) -> bool:
        """Return whether a turn's context in the full rendering lacks the system text or the tools."""
        return (messages[0]["role"] == "system" and self._moves_system) or (bool(tools) and self._moves_tools)

    @cached_property
    def _moves_system(self) -> bool:
        return self._comes_late([{"role": "system", "content": "qzx"}], None)

    @cached_property
    def _moves_tools(self) -> bool:
        return self._comes_late([], [A_TOOL])

    def _comes_late(self, system: list[Message], tools: list[dict] | None) -> bool:
        """Return whether `qzx` precedes a first answer at inference, but not in a chat that continues."""
        question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "wvw"}
        another = {"role": "user", "content": "y"}
        try:
            at_inference = self._text([*system, question], tools, prompt=True)
            later = self._text([*system, question, answer, another, answer], tools)
        except FormatError:
            return False
        return "qzx" in at_inference and "qzx" not in later[: later.find("wvw")]

    def _shows(self, messages: list[Message]) -> bool:
        """Return whether the template takes messages, and shows their `qzx`."""
        try:
            return "qzx" in self._text(messages, None)
        except FormatError:
            return False

    @cached_property
    def _has_calls(self) -> bool:
        """Whether the template shows tool calls in any of CALL_FORMATS."""
        call = {"role": "assistant", "content": "", "tool_calls": [A_CALL]}
        return any(self._shows(convert([*PROBE, call])) for convert in CALL_FORMATS)

    @cached_property
    def _knows_developer(self) -> bool:
        """Whether the template shows a developer message; if not, it is rendered as a system message."""
        return self._shows([{"role": "developer", "content": "qzx"}, *PROBE])

    @cached_property
    def shows_system(self) -> bool:
        """Whether the template shows a system message."""
        return self._shows([{"role": "system", "content": "qzx"}, *PROBE])

    def _fast_spans(self, text: str, messages: list[Message], tools: list[dict] | None) -> list[Span] | None:
        """Return each assistant turn's span, or None if the fast path does not apply."""
        prompt, frame, answers = self.generation_prompt, self._frame, _answers(messages)
        if not frame.prompt.strip() or tools or text.count(frame.prompt) != len(answers):
            return None
        for message in messages:
            if frame.prompt in message["content"] or "tool_calls" in message or "reasoning_content" in message:
                return None
        if self._moves(messages, tools):
            return None
        spans: list[Span] = []
        closings = set()
        end = 0
        for answer in answers:
            position = text.find(frame.prompt, end)
            if position < 0:
                return None
            start = position + len(prompt if text.startswith(prompt, position) else frame.prompt)
            found = self._content_end(text, start, answer["content"].strip())
            if found is None:
                return None
            end, closed = found
            closing = text[end:closed].strip()
            closings.add(closing)
            is_own = frame.closing is None or closing == frame.closing
            spans.append((start, closed if is_own else closed - len(closing)))
        return spans if len(closings) == 1 or frame.closing else None

    def _content_end(self, text: str, start: int, content: str) -> Span | None:
        """Return where a turn's content and its end token end; None if it is not a known lead and the content."""
        for lead in sorted(self._frame.leads, key=len, reverse=True):
            if not content or not text.startswith(lead, start):
                continue
            begin = start + len(lead)
            while text[begin : begin + 1].isspace():
                begin += 1
            end = begin + len(content)
            closed = self._specials.end_after(text, end) if text.startswith(content, begin) else None
            if closed is not None:  # otherwise it may have matched the template's own text, such as <think>
                return end, closed
        return None

    def _unshown(self, text: str, messages: list[Message]) -> frozenset[str]:
        """Return which names and instructions are not in the rendering."""
        found = set()
        for message in messages:
            if message["role"] in ("system", "user") and not _holds(text, message["content"].strip()):
                found.add(f"a {message['role']} message")
            if "name" in message and message["role"] != "tool" and not _holds(text, message["name"]):
                found.add("name")
        return frozenset(found)


def _answers(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "assistant"]


def _has_calls(messages: list[Message]) -> bool:
    return any("tool_calls" in message or message["role"] == "tool" for message in messages)


def _holds(text: str, content: str) -> bool:
    """Return whether a rendering shows a text, as it is or as JSON."""
    return content in text or json.dumps(content, ensure_ascii=False)[1:-1] in text


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    """Return messages with arguments as JSON text, which some templates require (DeepSeek's); most take an object."""

    def with_text(call: dict) -> dict:
        return {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}

    return [
        {**m, "tool_calls": [with_text(call) for call in m["tool_calls"]]} if "tool_calls" in m else m for m in messages
    ]


def _with_short_ids(messages: list[Message]) -> list[Message]:
    """Return messages whose calls and results have ids of nine letters and digits, as Mistral's templates require."""
    found = []
    waiting: list[dict] = []
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            ids = [call.get("id") or f"{number} {position}" for position, call in enumerate(message["tool_calls"])]
            ids = [one if re.fullmatch(r"[a-zA-Z0-9]{9}", one) else sha256_of(one)[:9] for one in ids]
            calls = [{**call, "id": own} for call, own in zip(message["tool_calls"], ids, strict=True)]
            waiting = [{**call, "short": new["id"]} for call, new in zip(message["tool_calls"], calls, strict=True)]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and (call := call_of(message, waiting)):
            waiting.remove(call)
            message = {**message, "tool_call_id": call["short"]}
        found.append(message)
    return found


# The formats of calls that templates accept, the usual one first.
CALL_FORMATS: tuple[Callable[[list[Message]], list[Message]], ...] = (
    list,
    _with_text_arguments,
    _with_short_ids,
    lambda messages: _with_text_arguments(_with_short_ids(messages)),
)
