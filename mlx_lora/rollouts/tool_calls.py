"""Read the calls of tools in what a model wrote, in the form in which its chat template writes calls.

Which form that is, is found by having the template write a call and reading it back (data/tool_turns.py), so a template
needs no entry in a list. The forms are those of mlx-lm's parsers (mlx_lm/tool_parsers), which have a text before a call
and one after it, and these:

    Llama 3    {"name": "f", "parameters": {"x": 1}}
    harmony    <|channel|>commentary to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>
    fenced     ```tool_code, a call in Python, ```

A call inside the model's thinking is no call. What cannot be read as a call is text, as in TRL.
"""

from __future__ import annotations

import ast
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from importlib import import_module
from typing import Any

from mlx_lm import tool_parsers

from mlx_lora.data.tool_turns import PROBE, PROBE_SCHEMA, ToolTurns
from mlx_lora.utils.errors import InputError

Call = dict[str, Any]
"""`name` and `arguments`, and `id` if the model wrote one."""
Schemas = Sequence[dict[str, Any]]
Reader = Callable[[str, Schemas], tuple[str, list[Call]]]
"""(what the model wrote after its thinking, schemas of the tools) -> the text around its calls, and these.

Raises any exception if what looks like a call cannot be read.
"""


@dataclass(frozen=True)
class CallForm:
    """A way of writing calls.

    Attributes:
        name: of the parser in mlx-lm, or of the family.
        read: reads them.
    """

    name: str
    read: Reader


@dataclass(frozen=True)
class Said:
    """What a model said in a turn.

    Attributes:
        content: the text, without special tokens, thinking and calls.
        calls: of tools, in order.
        thinking: the text of its thinking.
    """

    content: str
    calls: list[Call] = field(default_factory=list)
    thinking: str = ""

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


def _between(start: str, end: str, parse: Callable[..., Any], text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Read calls that stand between two texts; without an end, the last one goes up to the text's end."""
    rest, calls = "", []
    before, found, after = text.partition(start)
    rest += before
    while found:
        inside, closed, after = after.partition(end) if end else (after, "", "")
        if end and not closed:
            raise ValueError("a call without an end")
        read = parse(inside, list(tools))
        calls += read if isinstance(read, list) else [read]
        before, found, after = after.partition(start)
        rest += before
    return rest, calls


LLAMA_CALL = re.compile(r'\{\s*"name"\s*:')


def _llama(text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Read JSON objects with a name and parameters, which nothing but white space or a semicolon may follow."""
    text = text.replace("<|python_tag|>", "")
    found = LLAMA_CALL.search(text)
    if found is None:
        return text, []
    calls, at, decoder = [], found.start(), json.JSONDecoder()
    while at < len(text):
        read, at = decoder.raw_decode(text, at)
        calls.append({"name": read["name"], "arguments": read.get("parameters", read.get("arguments"))})
        at += len(text[at:]) - len(text[at:].lstrip(" \n;"))
    return text[: found.start()], calls


HARMONY_TO = re.compile(r"to=functions\.([\w.-]+)")


def _harmony(text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Read messages of the commentary channel to a function; the text is that of the final channel."""
    said, calls = "", []
    for part in text.split("<|start|>"):
        header, message, body = part.partition("<|message|>")
        body = re.split(r"<\|(?:end|call|return)\|>", body)[0]
        if to := HARMONY_TO.search(header):
            calls.append({"name": to[1], "arguments": json.loads(body)})
        elif not message:
            said += header
        elif "analysis" not in header:
            said += body
    return said, calls


FENCE = re.compile(r"```tool_code\s*\n(.*?)```", re.DOTALL)


def _fenced(text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Read calls in Python, one a line, in a fence."""
    calls = []
    for fence in FENCE.findall(text):
        for line in ast.parse(fence.strip()).body:
            call = line.value if isinstance(line, ast.Expr) else None
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
                raise ValueError("not a call with named arguments")
            arguments = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
            calls.append({"name": call.func.id, "arguments": arguments})
    return FENCE.sub("", text), calls


PLAINEST = "json_tools"  # is tried first: some others read its form too


@cache
def call_forms() -> tuple[CallForm, ...]:
    """Return all forms that are known."""
    found, names = [], [module.name for module in pkgutil.iter_modules(tool_parsers.__path__)]
    for name in sorted(names, key=lambda name: (name != PLAINEST, name)):
        parser: Any = import_module(f"{tool_parsers.__name__}.{name}")
        read = partial(_between, parser.tool_call_start, parser.tool_call_end or "", parser.parse_tool_call)
        found.append(CallForm(name, read))
    return *found, CallForm("harmony", _harmony), CallForm("fenced", _fenced), CallForm("llama3", _llama)


def call_form(turns: ToolTurns) -> CallForm:
    """Return the form in which a chat template writes calls.

    Raises:
        InputError: the template does not show tools, or its form is not known.
    """
    written = turns.probed()
    said = _without_ends(written, turns)
    for form in call_forms():
        found = _read(form, said, [PROBE_SCHEMA])[1]
        if [{name: call[name] for name in PROBE} for call in found] == [PROBE]:
            return form
    raise InputError(
        f"the chat template writes calls of tools in a form that is not known ({said.strip()[:80]!r}); give another with "
        "--chat-template, such as chatml"
    )


def _read(form: CallForm, text: str, tools: Schemas) -> tuple[str, list[Call]]:
    """Return the text around the calls and these; all of it as text if a call cannot be read."""
    try:
        around, found = form.read(text, tools)
        return around, [_checked(call) for call in found]
    except Exception:  # mlx-lm's parsers may raise anything on what a model wrote
        return text, []


def _checked(call: Any) -> Call:
    """Return a call with the arguments as a dict, if they are one.

    Raises:
        ValueError: it has no name.
    """
    name, arguments = call["name"], call.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError("a call without a name")
    own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {"name": name, "arguments": {} if arguments is None else arguments, **own}


# What a model said

# Texts around thinking; harmony's is a channel of its own.
THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<|channel>thought", "<channel|>"))
HARMONY_THOUGHT = re.compile(r"<\|channel\|>analysis<\|message\|>(.*?)(?:<\|end\|>|$)", re.DOTALL)


@dataclass(frozen=True)
class CallReader:
    """Reads what a model said in a turn.

    Attributes:
        turns: of its chat template.
        form: of calls there.
        opened: whether its turn begins inside its thinking.
    """

    turns: ToolTurns
    form: CallForm
    opened: bool

    @classmethod
    def of(cls, turns: ToolTurns) -> CallReader:
        """Return it for a chat template; errors as of `call_form`."""
        return cls(turns, call_form(turns), turns.opens_thinking())

    def __call__(self, tokens: Sequence[int]) -> Said:
        """Return what the tokens of a turn say, with or without its end token."""
        ends = self.turns.ends
        own = list(tokens[:-1] if tokens and tokens[-1] in ends and not self._is_of_a_call(tokens[-1]) else tokens)
        text = str(self.turns.tokenizer.decode(own, skip_special_tokens=False))
        thinking, answer = _thought(text, self.opened)
        around, calls = _read(self.form, answer, self.turns.tools)
        return Said(self._plain(around).strip(), calls, self._plain(thinking).strip())

    def _is_of_a_call(self, token: int) -> bool:
        """Return whether an end token belongs to the text of a call, as harmony's does."""
        return str(self.turns.tokenizer.convert_ids_to_tokens(token)) in ("<|call|>",)

    def _plain(self, text: str) -> str:
        """Return a text without special tokens."""
        for special in _specials(self.turns.tokenizer):
            text = text.replace(special, "")
        return text


def _specials(tokenizer: Any) -> Iterator[str]:
    return (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)


def _without_ends(text: str, turns: ToolTurns) -> str:
    """Return a rendered turn without the token that ends it."""
    for end in turns.ends:
        token = str(turns.tokenizer.convert_ids_to_tokens(end))
        if text.endswith(token) and token != "<|call|>":
            return text.removesuffix(token)
    return text


def _thought(text: str, opened: bool) -> tuple[str, str]:
    """Return the thinking and what follows it; all is thinking if that does not end."""
    if harmony := HARMONY_THOUGHT.findall(text):
        return "\n".join(harmony), text
    for start, end in THOUGHTS:
        before, found, after = text.rpartition(end)
        if found:
            later = after.partition(start)  # it thinks once more, and was cut
            return before.replace(start, "", 1) + later[2], later[0]
        if start in text or (opened and start == THOUGHTS[0][0]):
            answer, _, thinking = ("", "", text) if opened and start not in text else text.partition(start)
            return thinking, answer
    return "", text
