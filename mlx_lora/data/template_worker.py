"""Render chat templates: in this process, or as the program of a process of its own that has limits.

A chat template is a program from a model or adapter folder. jinja2's sandbox keeps it from Python's objects, but it does not
limit cost: one comparison can take hours, and a loop can fill the memory. Inside the process nothing can stop a single
operation. So data/sandbox.py starts this file as a program of its own, which imports jinja2 and nothing else, and the
system ends it when a conversation takes too much.

Templates can use here what transformers gives them (https://huggingface.co/docs/transformers/chat_templating_writing), and
the result is the same as transformers'.
"""

from __future__ import annotations

import functools
import json
import marshal
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

if __name__ == "__main__":
    sys.path += sys.argv[2:]  # where the parent has jinja2; this process starts without any packages

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

DATE_FUNCTION = "strftime_now"  # the function that returns today's date in a template
OUT_OF_MEMORY = 77  # exit code
# What a template may write for one conversation: characters, and characters for each byte of the conversation.
MOST_CHARACTERS, MOST_PER_BYTE = 100_000, 10
# When no further conversation of a message is rendered.
AHEAD_S, AHEAD_CHARACTERS = 1.0, 4_000_000


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, with which templates mark what the model writes: the content is rendered in its own scope."""

    tags = {"generation"}  # noqa: RUF012 (a set, as jinja2 declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        """Parse the block up to its end."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_shown"), [], [], body).set_lineno(line)

    def _shown(self, caller: Callable[[], str]) -> str:
        return caller()


class _Namespace(jinja2.utils.Namespace):
    """`namespace` in templates, without the names that Python itself looks up."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that a template may call one of its names `self`
        jinja2.utils.Namespace.__init__(args[0])
        for name, value in dict(*args[1:], **kwargs).items():
            args[0][name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed in a chat template's namespace")
        super().__setitem__(name, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


SANDBOX = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
)
SANDBOX.filters["tojson"] = _tojson
SANDBOX.globals.update(raise_exception=_raise_exception, namespace=_Namespace)
_compiled = functools.lru_cache(maxsize=128)(SANDBOX.from_string)


def render(template: str, values: dict[str, Any], now: str) -> str:
    """Return a conversation as text.

    Args:
        template: Jinja text.
        values: the template's variables, plain data.
        now: the time that the template shows, in ISO format.

    Raises:
        jinja2.TemplateError, TypeError, ValueError: the template is invalid, refuses the conversation, or fails on it.
    """
    try:
        text = _compiled(template).render(
            values | {DATE_FUNCTION: lambda format: datetime.fromisoformat(now).strftime(format)}
        )
    except (jinja2.TemplateError, TypeError, ValueError, MemoryError):
        raise
    except RecursionError:
        raise jinja2.TemplateRuntimeError("it calls itself endlessly") from None
    except Exception as error:  # what a template's own operations raise: a division by zero, a missing key
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
    text.encode()  # raises ValueError for half a surrogate pair, which Jinja can write and no tokenizer accepts
    return text


# The process


def answer(rows: Sequence[bytes], template: str, common: dict[str, Any], now: str, limit_s: float) -> list[Any]:
    """Return the outcome of each conversation, at least of the first; the system ends this process if one takes longer than `limit_s`.

    Args:
        rows: variables of each conversation, marshaled.
        template, now: as for `render`.
        common: variables of all conversations.
        limit_s: for each conversation.

    Returns:
        A text, or an error: its type, its message, the line of a syntax error. The last ones are left out if those before
        them took long.
    """
    found: list[Any] = []
    began, written = time.monotonic(), 0
    for row in rows:
        if found and (time.monotonic() - began > AHEAD_S or written > AHEAD_CHARACTERS):
            break
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        line = None
        try:
            kind, text = "", render(template, common | marshal.loads(row), now)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            kind = next(one.__name__ for one in (TypeError, ValueError, jinja2.TemplateError) if isinstance(error, one))
            text, line = str(error), getattr(error, "lineno", None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if len(text) > (most := MOST_CHARACTERS + MOST_PER_BYTE * len(row)):
            text = f"the chat template writes {len(text):,} characters for one conversation, and {most:,} are allowed"
            kind, line = "InputError", None
        written += len(text)
        found.append([kind, text, line] if kind else text)
    return found


def main() -> None:
    """Answer messages on standard input, each with a line of JSON, until it is closed."""
    most_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # macOS does not enforce it; there the parent looks
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes if hard < 0 else min(most_bytes, hard), hard))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # ends this process, whatever it does
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    while head := sys.stdin.buffer.read(8):
        try:
            found = answer(*marshal.loads(sys.stdin.buffer.read(int.from_bytes(head))))
            sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
