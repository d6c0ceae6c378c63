"""Conversation -> rendered texts and the character spans of them that are trained.

Trained is what the model writes itself at inference: what stands after the generation prompt, up to and
with the end-of-turn token, in every assistant turn.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\nHello<|im_end|>\\n
                                      `-- generation prompt --'`---- span ---'

Fast path: the generation prompt occurs once per assistant turn, each turn's content right after it, or after what
the template puts there in every chat. It holds for nearly every row without tools and thinking, and costs one rendering. Else the exact path (turns.py) renders
each turn as at inference, with what came before it as the prompt, and looks for that in the full rendering.

Most turns are found there, so a conversation is one row. A turn is not, where the template shows it otherwise once
others have followed. Two cases:

- The full rendering lacks text that the model sees or writes at inference: thinking, of the turn or of one before it, that the
  template takes out of the history (Qwen3, GPT-OSS, Gemma 4), or a system text or tools that it shows at the last
  question only (Mistral). Trained on the history's form, the model would unlearn to think, and call tools it was not
  told of. So such a turn gets a row of its own: the prompt as at inference, and what the model writes.
- Anything else, as an empty thinking block that only the last turn has: the turn is trained as it stands in the full
  rendering, but no token there that the model would not write: GPT-OSS ends an answer with <|return|>, and the
  history shows <|end|>.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import cached_property

import jinja2
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.examples import Conversation, EmptyRecord, FormatError, Message
from mlx_lora.data.messages import call_of
from mlx_lora.data.sandbox import render_chat
from mlx_lora.data.specials import Specials
from mlx_lora.data.templates import PROBE
from mlx_lora.data.turns import Span, Turns
from mlx_lora.system.files import sha256_of

A_CALL = {"id": "aaaaaaaaa", "type": "function", "function": {"name": "qzx", "arguments": {}}}
NOTHING = {"type": "object", "properties": {}, "required": []}
A_TOOL = {"type": "function", "function": {"name": "qzx", "description": "x", "parameters": NOTHING}}
ADVICE = "; use --chat-template chatml, which has tools"


@dataclass(frozen=True)
class Rendered:
    """A text to tokenize, what of it is trained, and whether the end token is to follow (and be trained)."""

    text: str
    spans: list[Span]
    append_eos: bool = False


@dataclass(frozen=True)
class Rendering:
    """The rows of one conversation, one unless the template hides earlier thinking, and what the template does not show.

    Attributes:
        rows: At least one.
        unshown: Names of fields with content that no row shows.
    """

    rows: list[Rendered]
    unshown: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Frame:
    """What a template puts around the answers of a plain chat.

    Attributes:
        prompt: What of the generation prompt stands before an earlier answer: a thinking block it opens does not.
        leads: What may stand between the prompt and an answer, and the model writes (`<|channel|>final<|message|>`).
        closing: What ends the last answer, and so what the model writes there; None: not known.
    """

    prompt: str
    leads: frozenset[str]
    closing: str | None


class Renderer:
    """One chat template applied to many conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str, day: date | None = None):
        """Learn the template's generation prompt and the tokenizer's special tokens.

        Args:
            tokenizer: For its special tokens.
            template: Jinja text.
            day: What the template takes for today; None: today.
        """
        self._tokenizer, self._template, self._day = tokenizer, template, day
        self._specials = Specials(tokenizer)
        self._form = 0  # the one that the last conversation with calls needed
        self.generation_prompt = self._find_generation_prompt()

    def render(self, conversation: Conversation) -> Rendering:
        """Render one conversation and find the trained spans.

        Raises:
            FormatError: the template refuses the conversation, or does not show what is to be trained.
        """
        messages, text = self._shown(conversation)
        spans = self._fast_spans(text, messages, conversation.tools)
        if spans is not None:
            trained = [
                span for span, answer in zip(spans, _answers(messages), strict=True) if answer.get("weight") != 0
            ]
            return Rendering([Rendered(text, trained)], self._unshown(text, messages))
        turns = Turns(
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
            raise EmptyRecord("the chat template shows no assistant turn of it")
        hidden = {conversation.reasoning_field if name == "reasoning_content" else name for name in turns.unshown}
        return Rendering(rows, self._unshown(text, messages) | hidden)

    def shows_tools(self, conversation: Conversation) -> bool:
        """Return whether the conversation's tool list changes the rendering at all."""
        messages, text = self._shown(conversation)
        return text != self._text(messages, None)

    def _shown(self, conversation: Conversation) -> tuple[list[Message], str]:
        """Return the turns in the form that the template takes, and the full rendering."""
        messages = conversation.messages
        if not self._knows_developer:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        if not _has_calls(messages):
            return messages, self._text(messages, conversation.tools)
        refusals = []
        for number in sorted(range(len(FORMS)), key=lambda number: (number != self._form, number)):
            try:
                formed = FORMS[number](messages)
                text = self._text(formed, conversation.tools)
            except FormatError as error:
                refusals.append((number, error))
                continue
            self._form = number
            if not self._has_calls:
                raise FormatError(f"the chat template does not show tool calls{ADVICE}")
            return formed, text
        refusal = min(refusals, key=lambda one: one[0])[1]
        raise FormatError(str(refusal) + ("" if self._has_calls else ADVICE)) from refusal

    def _text(self, messages: list[Message], tools: list[dict] | None, prompt: bool = False) -> str:
        """Render; with `prompt`, as at inference, with the generation prompt at the end."""
        try:
            return render_chat(self._tokenizer, messages, self._template, tools, prompt, self._day)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise FormatError(f"the chat template refuses it: {reason}") from error

    def _find_generation_prompt(self) -> str:
        """Return the text the template adds for the model to go on from; empty when it adds none."""
        try:
            without, with_prompt = self._text(PROBE, None), self._text(PROBE, None, prompt=True)
        except FormatError:
            return ""
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    @cached_property
    def _frame(self) -> Frame:
        """What the template puts around answers, learned from a chat of two."""
        chat = [*PROBE, {"role": "assistant", "content": "qzx"}, *PROBE, {"role": "assistant", "content": "wvw"}]
        prompt = self.generation_prompt
        try:
            before, text = self._text(chat[:1], None), self._text(chat, None)
        except FormatError:
            return Frame(prompt, frozenset([""]), None)
        answers = text.find("qzx"), text.rfind("wvw")
        shown = prompt
        while shown and not text.startswith(shown, len(before)):
            shown = shown[:-1]
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
        """Return whether `qzx` stands before a first answer at inference, and not so in a chat that went on."""
        question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": "wvw"}
        another = {"role": "user", "content": "y"}
        try:
            at_inference = self._text([*system, question], tools, prompt=True)
            later = self._text([*system, question, answer, another, answer], tools)
        except FormatError:
            return False
        return "qzx" in at_inference and "qzx" not in later[: later.find("wvw")]

    @cached_property
    def _has_calls(self) -> bool:
        """Whether the template shows tool calls, in any of the forms."""
        call = {"role": "assistant", "content": "", "tool_calls": [A_CALL]}
        for form in FORMS:
            try:
                if "qzx" in self._text(form([*PROBE, call]), None):
                    return True
            except FormatError:
                continue
        return False

    @cached_property
    def _knows_developer(self) -> bool:
        """Whether the template shows a developer message; else it is shown as the system message it replaced."""
        try:
            return "qzx" in self._text([{"role": "developer", "content": "qzx"}, *PROBE], None)
        except FormatError:
            return False

    def _fast_spans(self, text: str, messages: list[Message], tools: list[dict] | None) -> list[Span] | None:
        """Return each assistant turn's span, or None where the simple picture does not hold."""
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
            place = text.find(frame.prompt, end)
            if place < 0:
                return None
            start = place + len(prompt if text.startswith(prompt, place) else frame.prompt)
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
        """Return where a turn's content and its end token end; None: the turn is no content with a known lead."""
        for lead in sorted(self._frame.leads, key=len, reverse=True):
            if not content or not text.startswith(lead, start):
                continue
            begin = start + len(lead)
            while text[begin : begin + 1].isspace():
                begin += 1
            end = begin + len(content)
            closed = self._specials.end_after(text, end) if text.startswith(content, begin) else None
            if closed is not None:  # else it may have matched the template's own text, as <think>
                return end, closed
        return None

    def _unshown(self, text: str, messages: list[Message]) -> frozenset[str]:
        """Return which names and instructions the rendering does not hold."""
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


def _as_it_is(messages: list[Message]) -> list[Message]:
    return messages


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    """Write arguments as JSON text: some templates join them as text (DeepSeek's), most take the object."""

    def mend(call: dict) -> dict:
        return {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}}

    return [{**m, "tool_calls": [mend(call) for call in m["tool_calls"]]} if "tool_calls" in m else m for m in messages]


def _with_short_ids(messages: list[Message]) -> list[Message]:
    """Give every call and its result an id of nine letters and digits, the only kind that Mistral's templates take."""
    found = []
    waiting: list[dict] = []
    for number, message in enumerate(messages):
        if "tool_calls" in message:
            calls = [
                {**call, "id": _short_id(call.get("id") or f"{number} {place}")}
                for place, call in enumerate(message["tool_calls"])
            ]
            waiting = [{**call, "short": new["id"]} for call, new in zip(message["tool_calls"], calls, strict=True)]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool" and (call := call_of(message, waiting)):
            waiting.remove(call)
            message = {**message, "tool_call_id": call["short"]}
        found.append(message)
    return found


def _short_id(known: str) -> str:
    return known if re.fullmatch(r"[a-zA-Z0-9]{9}", known) else sha256_of(known)[:9]


# How calls are written, the usual way first.
FORMS: tuple[Callable[[list[Message]], list[Message]], ...] = (
    _as_it_is,
    _with_text_arguments,
    _with_short_ids,
    lambda messages: _with_text_arguments(_with_short_ids(messages)),
)
