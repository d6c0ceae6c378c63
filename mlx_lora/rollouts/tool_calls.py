"""Read the calls of tools in what a model wrote, in the form in which its chat template writes calls.

Training and serving read by the same `CallReader`, so a call that was rewarded is the call that a client gets.

mlx-lm's parser of a chat template is taken where it reads what the template writes. Otherwise the form is found by having the
template write a call and reading it back (`ToolTurns`), so a template needs no entry in a list. The forms are those of
mlx-lm's parsers (mlx_lm/tool_parsers), which have a text before a call and one after it, and these:

    Llama 3    {"name": "f", "parameters": {"x": 1}}
    harmony    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>
    fenced     ```tool_code, a call in Python, ```

A call inside the model's thinking is no call. What cannot be read as a call is text, as in TRL; the calls beside it are calls.
"""

from __future__ import annotations

import ast
import copy
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import cache, cached_property, partial
from importlib import import_module
from typing import Any, NamedTuple

import jinja2
from mlx_lm import tool_parsers
from transformers import PreTrainedTokenizerBase

from mlx_lora.compat.foreign import INFER_TOOL_PARSER
from mlx_lora.data.chat_template import rendered_chat, template_shows, tokens_of_rendered
from mlx_lora.data.examples import FormatError, Message
from mlx_lora.data.render import CALL_FORMATS
from mlx_lora.models.grammar import THOUGHTS, with_white_space
from mlx_lora.utils.errors import InputError

Call = dict[str, Any]
"""`name` and `arguments`, and `id` if the model wrote one."""
Schemas = Sequence[dict[str, Any]]


class Part(NamedTuple):
    """A part of what a model wrote after its thinking.

    Attributes:
        text: as it wrote it.
        parse: returns the call or calls that it is, or raises; None: it is no call.
        ended: nothing that the model writes later belongs to it.
    """

    text: str
    parse: Callable[[], Any] | None = None
    ended: bool = True


@dataclass(frozen=True)
class CallForm:
    """A way of writing calls.

    Attributes:
        name: of the parser in mlx-lm, or of the family.
        parts: (what the model wrote after its thinking, schemas of the tools) -> all of its parts, in order.
        marks: texts, the beginning of which may be that of a call.
    """

    name: str
    parts: Callable[[str, Schemas], Iterator[Part]]
    marks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Said:
    """What a model said in a turn.

    Attributes:
        content: the text, without special tokens, thinking and calls.
        calls: of tools, in order.
        thinking: the text of its thinking.
        unread: parts that look like calls and could not be read, so that they are in `content`.
    """

    content: str
    calls: list[Call] = field(default_factory=list)
    thinking: str = ""
    unread: int = 0

    @property
    def message(self) -> dict[str, Any]:
        """The turn as rewards see it, which is as in TRL."""
        found: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thinking:
            found["reasoning_content"] = self.thinking
        if self.calls:
            found["tool_calls"] = [
                {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
                for call in self.calls
            ]
        return found


# Forms


def _between(start: str, end: str, parse: Callable[..., Any], text: str, tools: Schemas) -> Iterator[Part]:
    """Find calls that stand between two texts; one without an end goes up to the next call, or to the text's end."""
    before, found, after = text.partition(start)
    yield Part(before)
    while found:
        inside, closed, rest = after.partition(end or start)
        read = partial(parse, inside, list(tools)) if closed or not end else _unended
        before, found, after = rest.partition(start) if end else ("", closed, rest)
        yield Part(start + inside + (closed if end else ""), read, bool(closed))
        yield Part(before)


def _unended() -> Any:
    raise ValueError("a call without an end")


LLAMA_CALL = re.compile(r'\{\s*"name"\s*:')
LLAMA_BEGUN = re.compile(r'\{[\s"name]*$')  # the end of a text that may become such a call


def _llama(text: str, tools: Schemas) -> Iterator[Part]:
    """Find JSON objects with a name and parameters, which white space or a semicolon may divide."""
    text = text.replace("<|python_tag|>", "")
    if (found := LLAMA_CALL.search(text)) is None:
        begun = LLAMA_BEGUN.search(text)
        at = begun.start() if begun else len(text)
        yield Part(text[:at])
        yield Part(text[at:], ended=not begun)
        return
    yield Part(text[: found.start()])
    at, decoder = found.start(), json.JSONDecoder()
    while at < len(text):
        try:
            read, end = decoder.raw_decode(text, at)
        except ValueError:  # it goes on, or is none
            begun = text[at] == "{"
            yield Part(text[at:], _unended if begun else None, ended=not begun)
            return
        yield Part(
            text[at:end],
            lambda read=read: {"name": read["name"], "arguments": read.get("parameters", read.get("arguments"))},
        )
        at = end + len(text[end:]) - len(text[end:].lstrip(" \n;"))


HARMONY_TO = re.compile(r"to=functions\.([\w.-]+)")


def _harmony(text: str, tools: Schemas) -> Iterator[Part]:
    """Find messages of the commentary channel to a function; the text is that of the final channel."""
    parts = text.split("<|start|>")
    for place, part in enumerate(parts):
        header, message, body = part.partition("<|message|>")
        body, *closed = re.split(r"<\|(?:end|call|return)\|>", body, maxsplit=1)
        ended = bool(closed) or place < len(parts) - 1
        if to := HARMONY_TO.search(header):
            yield Part(body, lambda name=to[1], body=body: {"name": name, "arguments": json.loads(body)}, ended)
        elif not message:
            yield Part(header, ended=ended)
        elif "analysis" not in header:
            yield Part(body)


def _python_calls(text: str, tools: Schemas) -> list[Call]:
    """Read calls in Python, one a line."""
    calls = []
    for line in ast.parse(text.strip()).body:
        call = line.value if isinstance(line, ast.Expr) else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("not a call with named arguments")
        arguments = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
        calls.append({"name": call.func.id, "arguments": arguments})
    return calls


PLAINEST = "json_tools"  # is tried first: some others read its form too
FENCE = "```tool_code\n", "```"
# An object with a name and arguments, whatever the template is: what a model writes whose own form has no grammar here.
JSON_CALLS = CallForm("llama3", _llama)
NO_CALLS = CallForm("none", lambda text, tools: iter([Part(text)]))


@cache
def call_forms() -> tuple[CallForm, ...]:
    """Return all forms that are known."""
    found, names = [], [module.name for module in pkgutil.iter_modules(tool_parsers.__path__)]
    for name in sorted(names, key=lambda name: (name != PLAINEST, name)):
        parser: Any = import_module(f"{tool_parsers.__name__}.{name}")
        start, end = parser.tool_call_start, parser.tool_call_end or ""
        found.append(CallForm(name, partial(_between, start, end, parser.parse_tool_call), (start,)))
    fenced = CallForm("fenced", partial(_between, *FENCE, _python_calls), FENCE[:1])
    return *found, CallForm("harmony", _harmony), fenced, JSON_CALLS


def call_form(turns: ToolTurns) -> CallForm:
    """Return the form in which a chat template writes calls: that of mlx-lm's choice, unless another one reads them.

    Raises:
        InputError: mlx-lm has no parser for the template, and it does not show tools, or its form is not known.
    """
    asked = copy.copy(turns.tokenizer)
    asked.chat_template = turns.template
    chosen = INFER_TOOL_PARSER.of()(asked)
    known = {form.name: form for form in call_forms()}
    try:
        said = _without_end(turns)
    except InputError:
        if chosen in known:
            return known[chosen]
        raise
    for form in sorted(call_forms(), key=lambda form: form.name != chosen):
        found = _read(form, said, [PROBE_SCHEMA])[1]
        if [{name: call[name] for name in PROBE} for call in found] == [PROBE]:
            return form
    if chosen in known:  # it writes ids of its own in calls, say
        return known[chosen]
    raise InputError(
        f"the chat template writes calls of tools in a form that is not known ({said.strip()[:80]!r}); give another with "
        "--chat-template, such as chatml"
    )


def _without_end(turns: ToolTurns) -> str:
    """Return the call that a chat template writes, without the token that ends the turn, unless only a call ends by it."""
    for end in turns.ends:
        token = str(turns.tokenizer.convert_ids_to_tokens(end))
        if turns.probed.endswith(token) and token != "<|call|>":
            return turns.probed.removesuffix(token)
    return turns.probed


def call_rules(
    reader: CallReader, tools: Schemas, literal: Callable[[str], str], parallel: bool, free: bool
) -> tuple[CallForm, str]:
    """Return rules of llguidance's Lark for calls of tools as the chat template writes them, `calls` first, and what reads them.

    Where the template writes arguments in another way than as JSON, a call is an object with `name` and `parameters`.

    Args:
        reader: of the template.
        tools: that may be called.
        literal: returns a text in Lark (models/grammar.py).
        parallel: several calls are allowed.
        free: any text may be around the calls; only the arguments of tools with `strict` then have to fit their schemas.
    """
    form, before, after = JSON_CALLS, f'{{"name": "{PROBE["name"]}", "parameters": ', "}"
    with suppress(InputError):  # the template shows no results, and mlx-lm knows its form
        written = _without_end(reader.turns).removesuffix("<|call|>")
        found = ARGUMENTS.search(written)
        if found and PROBE["name"] in written[: found.start()]:
            form, before, after = reader.form, written[: found.start()], written[found.end() :]
    head, _, rest = before.partition(PROBE["name"])
    marked = literal(head).startswith("<[")  # by a token of its own
    rules = []
    for place, tool in enumerate(tools):
        function = tool["function"]
        schema = function.get("parameters") or {"type": "object", "additionalProperties": False}
        if free and not function.get("strict"):
            schema = {"type": "object"}
        ids = "/[a-zA-Z0-9]{9}/".join(map(literal, after.split(call_id({}, 0))))
        begun = literal(head + function["name"] + rest)
        if free and not marked:
            rules.append(f"begun_{place}[lazy]: TEXT {literal(head)}")
            begun = f"begun_{place} {literal(function['name'] + rest)}"
        elif free:
            begun = f"TEXT {begun}"
        rules.append(f"call_{place}: {begun} %json {json.dumps(with_white_space(schema))} {ids}")
    # Up to 8 calls in a turn that must have one: a small model might else repeat them up to its last token.
    most = 7 if parallel and form.name != "harmony" else 0
    calls = (
        "calls: (call | other)* TEXT" if free else f'calls: call ("\\n"? call){{0,{most}}}' if most else "calls: call"
    )
    return form, "\n".join([calls, f"call: {' | '.join(f'call_{place}' for place in range(len(tools)))}", *rules])


def _read(form: CallForm, text: str, tools: Schemas, whole: bool = True) -> tuple[str, list[Call], int]:
    """Return the text around the calls, these, and how many could not be read; `whole`: nothing follows the text."""
    around, calls, unread = "", [], 0
    for part in form.parts(text, tools):
        if not (part.ended or whole):
            break
        try:
            if part.parse is None:
                around += part.text
                continue
            found, own = part.parse(), []
            for call in found if isinstance(found, list) else [found]:
                name, arguments = call["name"], call.get("arguments")
                if not isinstance(name, str) or not name:
                    raise ValueError("a call without a name")
                known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
                own.append({"name": name, "arguments": {} if arguments is None else arguments, **known})
            calls += own
        except Exception:  # mlx-lm's parsers may raise anything on what a model wrote
            around += part.text
            unread += 1
    return around, calls, unread


# What a model said

HARMONY_THOUGHT = re.compile(r"<\|channel\|>analysis<\|message\|>(.*?)(?:<\|end\|>|$)", re.DOTALL)


@dataclass(frozen=True)
class CallReader:
    """Reads what a model said in a turn.

    Attributes:
        turns: of its chat template.
        form: of calls there.
        opened: whether its turn begins inside its thinking.
        tools: schemas of the tools that may be called, whose types some forms need.
    """

    turns: ToolTurns
    form: CallForm
    opened: bool
    tools: Schemas = ()

    @classmethod
    def of(cls, turns: ToolTurns) -> CallReader:
        """Return it for a chat template; errors as of `call_form`, and of `ToolTurns.probed`."""
        turns.probed  # noqa: B018 # results have to be written, too
        return cls(turns, call_form(turns), turns.opens_thinking(), turns.tools)

    def __call__(self, tokens: Sequence[int]) -> Said:
        """Return what the tokens of a turn say, with or without its end token."""
        tokenizer, own = self.turns.tokenizer, list(tokens)
        if own and own[-1] in self.turns.ends and tokenizer.convert_ids_to_tokens(own[-1]) != "<|call|>":
            own.pop()
        return self.said(str(tokenizer.decode(own, skip_special_tokens=False)))

    def said(self, text: str, whole: bool = True) -> Said:
        """Return what a text says.

        Args:
            text: of a turn, with special tokens as the tokenizer spells them, without the end token.
            whole: nothing follows it. Otherwise what may still become part of a call, a mark or a token is left out, so that
                what is returned only grows as the text does.
        """
        if not whole:
            longest = max(map(len, self._beginnings), default=0)
            cut = (
                len(text) - size for size in range(min(longest, len(text)), 0, -1) if text[-size:] in self._beginnings
            )
            text = text[: next(cut, len(text))]
        thinking, answer = _thought(text, self.opened)
        around, calls, unread = _read(self.form, answer, self.tools, whole)
        around, thinking = (self.turns.special.sub("", one).strip() for one in (around, thinking))
        return Said(around, calls, thinking, unread)

    @cached_property
    def _beginnings(self) -> frozenset[str]:
        """All beginnings of the marks of calls and thinking, and of special tokens."""
        marks = {*self.form.marks, *(mark for pair in THOUGHTS for mark in pair), *self.turns.special_tokens}
        return frozenset(mark[:size] for mark in marks for size in range(1, len(mark)))


def _thought(text: str, opened: bool) -> tuple[str, str]:
    """Return the thinking and the rest; all is thinking if that does not end."""
    if harmony := HARMONY_THOUGHT.findall(text):
        return "\n".join(harmony), text
    for start, end in THOUGHTS:
        first, last = text.find(start), text.find(end)
        inside = (opened and start == THOUGHTS[0][0] and first != 0) or 0 <= last < (first if first >= 0 else len(text))
        if not inside and first < 0:
            continue
        thinking = answer = ""
        while text:
            before, found, text = text.partition(end if inside else start)
            thinking, answer = (thinking + before, answer) if inside else (thinking, answer + before)
            inside ^= bool(found)
        return thinking, answer
    return "", text


class SaidStream:
    """Tells what is new in what a model says, while it writes."""

    def __init__(self, reader: CallReader) -> None:
        self._reader, self._text, self._told = reader, "", Said("")

    def add(self, text: str, last: bool = False) -> Said:
        """Return what is new with some more text; all that was held back if it is the last."""
        self._text += text
        told, said = self._told, self._reader.said(self._text, whole=last)
        self._told = said
        return Said(
            said.content.removeprefix(told.content),
            said.calls[len(told.calls) :],
            said.thinking.removeprefix(told.thinking),
            said.unread - told.unread,
        )


# How a chat template writes a call of a tool and its result: what the model says, and what follows until it speaks again.
#
# Both are found in a rendered conversation. The call has an argument that no other text has; after it, the first token that
# ends an answer of this model divides the two:
#
#     <|im_start|>assistant\n<tool_call>\n{"name": "f", "arguments": {"text": MARK}}\n</tool_call><|im_end|>
#     \n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n
#
# Only what follows is ever put into an episode. What the model said stays as it was sampled, even where the template would
# write it otherwise, for example without its thinking.

ARGUMENTS = re.compile(r'\{\s*"text"\s*:\s*"the-call-between"\s*,\s*"count"\s*:\s*7\s*\}')  # of the probe, as JSON
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

    @cached_property
    def special_tokens(self) -> list[str]:
        """The texts of the tokens that no text is made of."""
        return [token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Finds special tokens."""
        return re.compile("|".join(sorted(map(re.escape, self.special_tokens), key=len, reverse=True)) or "(?!)")

    @cached_property
    def probed(self) -> str:
        """How the model would write the call `PROBE`, from its turn's beginning to its end token.

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
        return begun.rfind(THOUGHTS[0][0]) > begun.rfind(THOUGHTS[0][1])

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
