"""Render chat templates, those of strangers in a process with limits; report a tokenizer that crashes as an error.

A template is rendered in this process if its hash is in data/templates/known.txt: the built-in ones, and published ones that
the tests render. Any other, and a very long conversation, is rendered by a worker (data/template_worker.py). A worker is a process of its own: the system
ends it if a conversation takes too much time or memory, even inside a single operation, and this process goes on. It is
started when it is first needed, and kept for the next conversation. All threads share it.

The two talk over pipes. A message to the worker is in Python's marshal format, an answer is a line of JSON: nothing that the
worker writes can become anything but plain data here.
"""

from __future__ import annotations

import atexit
import functools
import json
import marshal
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import date, datetime
from datetime import time as time_of_day
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
from transformers import PreTrainedTokenizerBase

from mlx_lora.data import template_worker
from mlx_lora.data.examples import REASONING
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.files import sha256_of

MAX_TEMPLATE_CHARACTERS = 500_000  # the longest published ones have 30,000
MOST_MESSAGES = 200  # with a known template; some compare each message with all others
RENDER_S = 10.0  # for one conversation, which usually takes a millisecond
RENDER_BYTES = 512 << 20  # of the worker
LIMITS_MEMORY = sys.platform != "darwin"  # whether the system does; elsewhere this process looks every LOOK_S seconds
LOOK_S = 0.2
PATIENCE_S = 60.0  # with a worker that neither answers nor ends, for example because it was stopped
# The worker reads no settings from the environment, and finds no packages but jinja2 as it is here.
COMMAND = [sys.executable or "", "-I", "-S", os.path.abspath(template_worker.__file__)]
PACKAGES = list(
    dict.fromkeys(str(Path(str(package.__file__)).resolve().parents[1]) for package in (jinja2, markupsafe))
)


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    day: date | None = None,
) -> str:
    """Return a conversation as text, as transformers renders it.

    Args:
        tokenizer: for its special tokens.
        messages, tools: plain data.
        template: Jinja text.
        add_generation_prompt: end with the generation prompt.
        day: the day that a template shows as today; None: today.

    Raises:
        jinja2.TemplateError: the template is invalid, refuses the conversation, or does what the sandbox does not allow.
        TypeError, ValueError: it fails on the conversation.
        InputError: it takes too much time or memory, or writes too much.
    """
    if not messages:
        raise ValueError("the conversation is empty")
    rows, common, now = _variables(tokenizer, [(messages, add_generation_prompt)], tools, day)
    if is_known(template) and len(messages) <= MOST_MESSAGES:
        return template_worker.render(template, common | rows[0], now)
    outcome = WORKER.outcomes(rows, template, common, now)[0]
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def render_ahead(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[tuple[list[dict[str, Any]], bool]],
    template: str,
    day: date | None,
) -> list[str | Exception]:
    """Return what `render_chat` will return or raise for conversations without tools; one message to the worker is faster.

    The last ones are left out if those before them took long, and all of them if the template is known.

    Args:
        chats: messages, and whether to end with the generation prompt.
        tokenizer, template, day: as for `render_chat`.

    Raises:
        InputError: one of them takes too much time or memory, or writes too much.
    """
    if is_known(template):
        return []
    rows, common, now = _variables(tokenizer, chats, None, day)
    return WORKER.outcomes(rows, template, common, now)


@functools.lru_cache(maxsize=128)
def is_known(template: str) -> bool:
    """Return whether a template is rendered in this process.

    Raises:
        InputError: it is too long.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise InputError(
            f"the chat template has {len(template)} characters, which is too long; use another with --chat-template"
        )
    known = (resources.files("mlx_lora.data") / "templates" / "known.txt").read_text(encoding="utf-8")
    return sha256_of(template) in known


def _variables(
    tokenizer: PreTrainedTokenizerBase,
    chats: Sequence[tuple[list[dict[str, Any]], bool]],
    tools: list[dict[str, Any]] | None,
    day: date | None,
) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """Return the variables of each conversation, those of all, and the time that the template shows."""
    moment = datetime.combine(day, time_of_day()) if day else datetime.now()
    try:
        common = _plain({**tokenizer.special_tokens_map, "documents": None})
        rows = [
            {
                "messages": [_plain(_as_templates_take_it(message)) for message in messages],
                "tools": _plain(tools),
                "add_generation_prompt": asks,
            }
            for messages, asks in chats
        ]
    except RecursionError:
        raise jinja2.TemplateRuntimeError("the conversation is nested too deeply") from None
    return rows, common, moment.isoformat()


def _as_templates_take_it(message: dict[str, Any]) -> dict[str, Any]:
    """Return a message without fields that are None, and with its thinking under the names that templates use."""
    message = {name: value for name, value in message.items() if value is not None}
    thinking = next((message[name] for name in REASONING if name in message), None)
    return message if thinking is None else {"thinking": thinking, **message, "reasoning_content": thinking}


def _plain(value: Any) -> Any:
    """Copy plain data; for anything else, a template only gets the type's name, and none of its methods."""
    if isinstance(value, dict):
        return {_plain(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return (list if isinstance(value, list) else tuple)(map(_plain, value))
    return value if value is None or type(value) in (str, int, float, bool) else f"<{type(value).__name__}>"


class TooMuch(InputError):
    """A template takes too much time or memory."""

    def __init__(self) -> None:
        super().__init__(
            f"the chat template takes more than {RENDER_S:g} s or {RENDER_BYTES >> 20} MB for one conversation; "
            "use another with --chat-template"
        )


class _Worker:
    """The process that renders templates of strangers, for all threads of this one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def outcomes(
        self, rows: list[dict[str, Any]], template: str, common: dict[str, Any], now: str
    ) -> list[str | Exception]:
        """Return the text or the error of each conversation; the last ones may be missing, the first is there.

        Raises:
            InputError: one of them takes too much time or memory, or the process does not start.
        """
        body = marshal.dumps(([marshal.dumps(row) for row in rows], template, common, now, RENDER_S))
        request = len(body).to_bytes(8) + body
        try:
            with self._lock:
                line, code = self._line(request)
                if code == -signal.SIGKILL:  # by something else, for example by the system when memory is short
                    line, code = self._line(request)
        except OSError as error:
            raise InputError(f"the process for chat templates does not start ({error}); start Python again") from error
        if code in (-signal.SIGALRM, -signal.SIGKILL, template_worker.OUT_OF_MEMORY):
            raise TooMuch
        if not line:
            raise InputError(
                f"the chat template ends the process that renders it (exit code {code}); use another with --chat-template"
            )
        return [outcome if isinstance(outcome, str) else _error(*outcome) for outcome in json.loads(line)]

    def _line(self, request: bytes) -> tuple[bytes, int]:
        """Return the answer to a message, and 0; if the process ends instead, its exit code."""
        try:
            if self._process is None or self._process.poll() is not None:
                self.end()
                self._process = subprocess.Popen(
                    [*COMMAND, str(RENDER_BYTES), *PACKAGES],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            process: Any = self._process  # both of its pipes are there
            with suppress(BrokenPipeError):
                while request:
                    request = request[os.write(process.stdin.fileno(), request) :]
            began, pipe = time.monotonic(), select.poll()
            pipe.register(process.stdout, select.POLLIN)
            while not pipe.poll(1000 * LOOK_S):
                size = ["ps", "-o", "rss=", "-p", str(process.pid)]  # where the system does not see to that itself
                found = (
                    "" if LIMITS_MEMORY else subprocess.run(size, capture_output=True, text=True, check=False).stdout
                )
                if time.monotonic() - began > PATIENCE_S or int(found or 0) << 10 > RENDER_BYTES:
                    raise TooMuch
            line = process.stdout.readline()
        except BaseException:
            self.end()  # the next message would get the answer to this one
            raise
        return (line, 0) if line.endswith(b"\n") else (b"", self.end())

    def end(self) -> int:
        """End the process, and return its exit code."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with process:  # closes the pipes, and waits
            process.kill()
        return process.returncode


def _error(kind: str, message: str, line: int | None) -> Exception:
    """Return an error that the worker reports."""
    if line is None:
        return {"TypeError": TypeError, "ValueError": ValueError, "InputError": InputError}.get(
            kind, jinja2.TemplateError
        )(message)
    error = jinja2.TemplateSyntaxError(message, line)
    error.translated = True  # its text is the message alone, as if it had been raised here
    return error


WORKER = _Worker()
atexit.register(WORKER.end)
os.register_at_fork(after_in_child=WORKER.__init__)  # the worker is the parent's


# The tokenizer


@contextmanager
def tokenizer_panics(what: str) -> Iterator[None]:
    """Report a tokenizer that crashes: the library panics if one of its patterns takes too long.

    Args:
        what: what is being encoded.

    Raises:
        InputError: instead of the panic.
    """
    try:
        yield
    except BaseException as error:
        # pyo3 makes this class at run time, so it cannot be imported; it does not derive from Exception.
        if type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the model's tokenizer crashes on {what} ({reason}); download the model again") from None
