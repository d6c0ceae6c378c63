"""Find the turns of a conversation in its rendering, by rendering each turn as at inference.

For turn i, the prompt is the rendering of the messages before it, with the generation prompt; what the model writes is
what follows the prompt when the turn is the last one. Both only depend on the messages up to i, so what the model writes
contains no other message's text: not a tool's answer either, even if the template puts both into one turn of the model,
as Gemma 4's does.

    prompt    ... <|turn>model\\n
    last      ... <|turn>model\\n<|tool_call>call:add{x:1}<tool_call|><|tool_response>
    whole     ... <|turn>model\\n<|tool_call>call:add{x:1}<tool_call|><|tool_response>response:add{value:7}<tool_response|>it is 7<turn|>
                               `------------ what it writes ---------------------'                                   `- next turn --'
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlx_lora.data.chat_template import Specials
from mlx_lora.data.examples import FormatError, Message

Span = tuple[int, int]  # characters [start, end)
THINKING = (
    "</think>",
    "<channel|>",
    "[/THINK]",
    "</thinking>",
    "</seed:think>",
)  # texts that end the thinking inside a content
BESIDE_A_CALL, THINKING_INSIDE = "text beside a tool call", "thinking in its content"
PRIVATE = range(0xE000, 0xF900)  # private-use characters, which should not occur in data


@dataclass(frozen=True)
class Turn:
    """One assistant turn as at inference.

    Attributes:
        number: The number of its message.
        prompt: The text that the model has seen.
        written: The text that it writes, with the token that ends the turn.
        closing: The special token that ends the turn; may be empty.
        tail: Ordinary text that the template adds after the turn.
    """

    number: int
    prompt: str
    written: str
    closing: str
    tail: str

    @property
    def body(self) -> str:
        """The text that the model writes, without the token that ends the turn."""
        return self.written.removesuffix(self.closing) if self.closing else self.written


class AssistantTurns:
    """The assistant turns of one conversation."""

    def __init__(
        self,
        messages: list[Message],
        text: str,
        render: Callable[..., str],
        specials: Specials,
        prompt: str,
        history_prompt: str,
        moves_text: bool,
    ):
        """Prepare to find them.

        Args:
            messages: The messages in the format that the template accepts.
            text: The full rendering.
            render: Renders some of the messages; with True, followed by the generation prompt.
            specials: The tokenizer's special tokens.
            prompt: The generation prompt; may be empty.
            history_prompt: The part of it that precedes an earlier turn.
            moves_text: Whether the full rendering shows the system text or the tools at another position than at
                inference.
        """
        self._messages, self._text, self._render, self._specials = messages, text, render, specials
        self._prompt, self._history_prompt, self._moves_text = prompt, history_prompt, moves_text
        self._mark = next(chr(code) for code in PRIVATE if chr(code) not in text)
        self.unshown: set[str] = set()

    def rows(self) -> list[tuple[str, list[Span], bool]]:
        """Return (text, trained spans, whether the end token must follow) of each row, the full rendering last.

        Raises:
            FormatError: the template does not show what should be trained, or mixes it with other text.
        """
        whole: list[Span] = []
        apart: list[tuple[Turn, list[Span]]] = []  # turns with rows of their own, the last one first
        closed = True
        trained = [n for n, one in enumerate(self._messages) if one["role"] == "assistant" and one.get("weight") != 0]
        for number in reversed(trained):
            turn = self._turn(number)
            if turn is None:
                span = self._standing(number, None)
            elif (span := self._in(self._text, turn)) is None:
                if self._moves_text or any(map(has_thinking, self._messages[: number + 1])):
                    # A row of its own, or the row of a later turn that shows it as at inference.
                    places = ((spans, found) for later, spans in apart if (found := self._in(later.prompt, turn)))
                    if place := next(places, None):
                        place[0].append(place[1])
                    else:
                        apart.append((turn, [(len(turn.prompt), len(turn.prompt) + len(turn.written))]))
                    continue
                span = self._shared(turn) or self._standing(number, turn)
            if span is None or span[0] >= span[1]:
                continue
            if whole and span[1] > whole[-1][0]:
                raise FormatError(f"the chat template renders message {number + 1} out of order")
            if number == len(self._messages) - 1 and not (turn and turn.closing):
                span, closed = (span[0], len(self._text)), False
            whole.append(span)
        rows = [(turn.prompt + turn.written, spans[::-1], not turn.closing) for turn, spans in reversed(apart)]
        return rows + ([(self._text, whole[::-1], not closed)] if whole else [])

    def _in(self, text: str, turn: Turn) -> Span | None:
        """Return the span of the turn in a rendering that shows it as at inference; None if it does not.

        The span excludes the end token if the rendering has another one.
        """
        start, end = len(turn.prompt), len(turn.prompt) + len(turn.body)
        if not text.startswith(turn.prompt + turn.body):
            return None
        if turn.closing and text.startswith(turn.closing, end):
            return start, end + len(turn.closing)
        closed = self._specials.closing_at(text, end)
        if not turn.closing:  # the token that begins the next turn also ends this one (GLM)
            return start, end + len(closed)
        return (start, end) if closed else None

    def _turn(self, number: int) -> Turn | None:
        """Return a turn as at inference; None if the template refuses to show it as the last one."""
        message, before = self._messages[number], self._messages[:number]
        try:
            is_last = number == len(self._messages) - 1
            last = self._text if is_last else self._render(self._messages[: number + 1])
        except FormatError:
            return None
        try:
            prompt = asked = self._render(before, True)
        except FormatError:
            prompt = asked = ""
        if not (prompt and last.startswith(prompt)):
            found = self._after_marks(last, number, prompt)
            if found is None:
                return None
            prompt, start = found
        else:
            start = len(prompt)
        end, closing = self._end(last, start, message["content"])
        turn = Turn(number, prompt, last[start:end], closing, last[end:].rstrip())
        self._check_calls(turn)
        if message.get("reasoning_content", "").strip() not in turn.written:
            self.unshown.add("reasoning_content")
        if message["content"].strip() in turn.written:
            return turn
        if "tool_calls" in message:
            self.unshown.add(BESIDE_A_CALL)
            return turn
        if not has_thinking(message):
            raise FormatError(f"the chat template does not show the text of message {number + 1}")
        content = message["content"]  # with thoughts, of which the turn may not have the last words
        thoughts = [
            content.rpartition(end)[0].rpartition(_opening(end))[2].strip() for end in THINKING if end in content
        ]
        removed = any(thought and thought[-64:] not in turn.written for thought in thoughts)
        return self._with_thinking(turn, asked) if removed else turn

    def _with_thinking(self, turn: Turn, asked: str) -> Turn:
        """Return a turn with the thinking in its content, which the template removes (DeepSeek-R1's distilled models).

        Args:
            turn: As the template shows it.
            asked: The messages before it with the generation prompt, which may open the thinking; empty: not known.
        """
        if not asked:
            self.unshown.add(THINKING_INSIDE)
            return turn
        content = self._messages[turn.number]["content"].strip()
        for opening in map(_opening, THINKING):
            if asked.rstrip().endswith(opening) and content.startswith(opening):
                content = content.removeprefix(opening).lstrip()
        return Turn(turn.number, asked, content + turn.closing, turn.closing, turn.tail)

    def _after_marks(self, last: str, number: int, prompt: str) -> tuple[str, int] | None:
        """Return the prompt and the start of a last turn that does not begin with its own prompt.

        Either the prompt has more text than the turn shows (it opens or closes a thinking block), and what they share is
        the prompt; or the turn changes how those before it are shown, and the prompt stays as it is.
        """
        messages = self._messages[: number + 1]
        region = self._region(last, messages, number)
        if region is None:
            return None
        try:
            history = self._render(messages[:-1])
        except FormatError:
            history = ""
        if history and prompt.startswith(history) and last.startswith(history):
            start = min(common_prefix(prompt, last), region[0])
            return last[:start], start
        opening = self._prompt or self._specials.tail(prompt)  # the text right before a turn
        opened = last.rfind(opening, 0, region[0]) if opening else -1
        start = opened + len(opening) if opened >= 0 else region[0]
        kept = self._without_foreign_text(last, messages, number, (start, region[1]), region)[0]
        return prompt if opened >= 0 and kept == start and prompt.endswith(opening) else last[:kept], kept

    def _end(self, last: str, start: int, content: str) -> tuple[int, str]:
        """Return where a last turn ends, and the special token that ends it, without text that the template adds."""
        position = last.rfind(content.strip(), start) if content.strip() else -1
        if position >= 0:
            closed = self._specials.end_after(last, position + len(content.strip()))
            if closed is not None and self._specials.are_all(last[closed:]):
                return closed, self._specials.closing(last[:closed])
        trimmed = last.rstrip()
        if (closing := self._specials.closing(trimmed)) and len(trimmed) - len(closing) >= start:
            return len(trimmed), closing
        position = last.rfind(content, start)
        return max(len(trimmed), position + len(content) if position >= 0 else start), ""

    def _check_calls(self, turn: Turn) -> None:
        """Raise unless the turn shows each of its calls."""
        calls = self._messages[turn.number].get("tool_calls", [])
        names = [call["function"]["name"] for call in calls]
        shown = sum(name in turn.written for name in names)
        if len(names) > 1:  # several may have one name: rename each, to find every one
            marks = [chr(code) for code in PRIVATE if chr(code) not in self._text][: len(names)]
            renamed = [{**c, "function": {**c["function"], "name": m}} for c, m in zip(calls, marks, strict=True)]
            message = {**self._messages[turn.number], "tool_calls": renamed}
            text = self._render([*self._messages[: turn.number], message])
            shown = sum(mark in text for mark in marks)
        if shown < len(names):
            raise FormatError(
                f"the chat template shows {shown} of the {len(names)} tool calls of message {turn.number + 1}; write one call per turn"
            )

    def _shared(self, turn: Turn) -> Span | None:
        """Return the span of the turn's calls if the full rendering puts the tools' answers into the turn (Gemma 4)."""
        calls = self._messages[turn.number].get("tool_calls")
        if not calls or not self._text.startswith(turn.prompt):
            return None
        start = len(turn.prompt)
        shared = turn.body[: common_prefix(self._text[start:], turn.body)]
        end = self._specials.last_end(shared)
        if not all(call["function"]["name"] in shared[:end] for call in calls):
            return None
        if self._messages[turn.number]["content"].strip() not in shared[:end]:
            self.unshown.add(BESIDE_A_CALL)
        return start, start + end

    def _standing(self, number: int, turn: Turn | None) -> Span | None:
        """Return the span of turn `number` in a full rendering that shows it differently than at inference."""
        text = self._text
        if turn and (span := self._end_of(turn)):
            return span
        region = self._region(text, self._messages, number)
        if region is None:
            return None
        if turn:
            for written in (turn.written, turn.body):
                position = text.find(written, max(0, region[1] - len(written))) if written else -1
                if 0 <= position <= region[0]:
                    return position, position + len(written)
        end = self._specials.end_after(text, region[1])
        if end is None and turn and turn.tail and text.startswith(turn.tail, region[1]):
            end = region[1] + len(turn.tail)
        end = region[1] if end is None else end
        opened = text.rfind(self._history_prompt, 0, region[0]) if self._history_prompt else -1
        start = opened + len(self._history_prompt) if opened >= 0 else region[0]
        if opened < 0 and turn:
            start = min(start, end - common_prefix(text[:end][::-1], turn.written[::-1]))
        span = (start, end)
        if turn is None or text[start:end] not in turn.written:
            span = self._without_foreign_text(text, self._messages, number, span, region)
        closing = self._specials.closing(text[span[0] : span[1]])
        if turn and turn.closing and closing and closing != turn.closing:
            span = (span[0], span[1] - len(closing))
        return span

    def _end_of(self, turn: Turn) -> Span | None:
        """Return the span of a turn that the full rendering shows without its beginning, such as an empty thinking block."""
        history = turn.prompt
        if self._prompt and history.endswith(self._prompt):
            history = history.removesuffix(self._prompt) + self._history_prompt
        if not self._text.startswith(history):
            return None
        start = len(history)
        for skipped in _starts(turn.written, self._text[start : start + 16]):
            if skipped >= len(turn.body):
                break
            if self._text.startswith(turn.written[skipped:], start):
                return start, start + len(turn.written) - skipped
        return None

    def _region(self, text: str, messages: list[Message], number: int) -> Span | None:
        """Return the span of a turn's content (or of the name of its call) in `text`; None if it is not shown.

        It is found by rendering again with a character that occurs nowhere else instead.
        """
        for variant, by_name in self._variants(messages, number):
            if self._mark not in variant:
                return None
            if variant.count(self._mark) != 1:
                raise FormatError(f"the chat template repeats message {number + 1}")
            start, end = difference(text, variant)
            if by_name:
                end = self._specials.next_in(text, end)
            prompts = text.count(self._prompt, start, end) if self._prompt else 0
            if prompts > messages[number]["content"].count(self._prompt) and not has_thinking(messages[number]):
                raise FormatError(f"the chat template renders other turns differently because of message {number + 1}")
            return start, end
        return None

    def _variants(self, messages: list[Message], number: int) -> Iterator[tuple[str, bool]]:
        """Yield (rendering, False) with the mark as a turn's content, or (rendering, True) with it as a call's name.

        The second is for templates that refuse the first because tools' answers must follow calls.
        """
        message = messages[number]
        try:
            yield self._render(_with(messages, number, {"role": "assistant", "content": self._mark})), False
        except FormatError:
            if "tool_calls" not in message:
                raise
        else:
            return
        call = message["tool_calls"][0]
        named = {**call, "function": {"name": self._mark, "arguments": {}}}
        yield self._render(_with(messages, number, {**message, "content": "", "tool_calls": [named]})), True

    def _without_foreign_text(self, text: str, messages: list[Message], number: int, span: Span, region: Span) -> Span:
        """Return a span, cut down to the turn's own region on a side that has another message's text.

        That text is what changes in the rendering if that message changes.

        Raises:
            FormatError: the other text is within the turn's own.
        """
        start, end = span
        for other, message in enumerate(messages):
            content = message["content"].strip()
            if other == number or not content or not (text[start : region[0]] + text[region[1] : end]).strip():
                continue
            try:
                first, last = difference(text, self._render(_with(messages, other, {**message, "content": self._mark})))
            except FormatError:  # the template refuses a changed message: search for its text instead
                first = text.find(content, start, end)
                last = text.rfind(content, start, end) + len(content)
            if first < region[1] and last > region[0]:
                raise FormatError(f"the chat template puts message {other + 1} into message {number + 1}")
            start = region[0] if first < region[0] and last > start else start
            end = region[1] if last > region[1] and first < end else end
        return start, end


def has_thinking(message: Message) -> bool:
    """Return whether an assistant's turn has thinking, in a field or in its content."""
    if message["role"] != "assistant":
        return False
    return "reasoning_content" in message or any(end in message["content"] for end in THINKING)


def _opening(end: str) -> str:
    """Return the text that begins the thinking that `end` ends."""
    return end.replace("/", "")


def common_prefix(a: str, b: str) -> int:
    """Return how many characters two texts share at their start, by bisection (comparing slices is fast)."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def difference(text: str, variant: str) -> Span:
    """Return the span of a text that differs in another one."""
    start = common_prefix(text, variant)
    return start, len(text) - min(common_prefix(text[::-1], variant[::-1]), len(text) - start)


def _with(messages: list[Message], number: int, message: Message) -> list[Message]:
    return [*messages[:number], message, *messages[number + 1 :]]


def _starts(text: str, beginning: str) -> Iterator[int]:
    """Yield the positions from which `text` may continue with `beginning`, cut off at the end of `text`."""
    position = text.find(beginning)
    while position >= 0:
        yield position
        position = text.find(beginning, position + 1)
    yield from range(max(0, len(text) - len(beginning) + 1), len(text))
