"""Render chat templates with bounds on time and memory, and report a tokenizer that crashes as an error.

A chat template is a program from a model or adapter folder. jinja2's sandbox keeps it from Python's objects. It does not
limit cost: two nested loops can run for hours, and `'a' * 10**10` takes ten gigabytes in one operation. So the sandbox
here refuses single operations that make something huge, and a clock checks time and memory every few milliseconds, which
bounds everything else. Templates can use in it what transformers gives them
(https://huggingface.co/docs/transformers/chat_templating_writing), and the result is the same as transformers'.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import date, datetime
from datetime import time as time_of_day
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser
from transformers import PreTrainedTokenizerBase

from mlx_lora.data.examples import REASONING
from mlx_lora.utils.errors import InputError
from mlx_lora.utils.text import peak_bytes

MAX_TEMPLATE_CHARACTERS = 500_000  # the longest published ones have 30,000
MAX_SIZE = 10_000_000  # characters or items that one operation may make
MAX_COUNT = 100_000  # a width, an indent, a precision
MAX_BITS = 10_000  # of a whole number
RENDER_S = 10.0  # for one conversation, which usually takes a millisecond
RENDER_BYTES = 512 << 20
TICK_S = 0.05
AGAIN_S = 1.0  # until an exception is raised again: Python drops one that arrives in a finalizer
DATE_FUNCTION = "strftime_now"  # the function that returns today's date in a template


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, Any]],
    template: str,
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    day: date | None = None,
) -> str:
    """Return a conversation as text, rendered by transformers.

    Args:
        tokenizer: for its special tokens.
        messages, tools: plain data.
        template: Jinja text.
        add_generation_prompt: end with the generation prompt.
        day: the day that a template shows as today; None: today.

    Raises:
        jinja2.TemplateError: the template is invalid, refuses the conversation, or does what the sandbox does not allow.
        TypeError, ValueError: it fails on the conversation.
        InputError: it takes too much time or memory.
    """
    if len(template) > MAX_TEMPLATE_CHARACTERS:
        raise InputError(
            f"the chat template has {len(template)} characters, which is too long; use another with --chat-template"
        )
    if not messages:
        raise ValueError("the conversation is empty")
    given = {
        **tokenizer.special_tokens_map,
        "messages": [_as_templates_take_it(message) for message in messages],
        "tools": tools,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        with CLOCK:
            text = _compiled(template).render(_plain(given) | {DATE_FUNCTION: lambda format: _strftime(format, day)})
    except RecursionError:
        raise jinja2.TemplateRuntimeError("it calls itself endlessly") from None
    except (ArithmeticError, LookupError, AttributeError, MemoryError, SyntaxError) as error:
        # A template's own operations raise these: a division by zero, a missing key.
        raise jinja2.TemplateRuntimeError(f"{type(error).__name__}: {error}") from error
    text.encode()  # raises ValueError for half a surrogate pair, which Jinja can write and no tokenizer accepts
    return text


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


# What a template may do


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


class BoundedSandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """jinja2's sandbox without operations that make huge results."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _tojson
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.globals.update(raise_exception=_raise_exception, namespace=_Namespace)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute one of the operators above if its result is not too large."""
        if operator == "%" and isinstance(left, (str, bytes)):
            _check_format(left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _check(right * max(1, left.bit_length()), MAX_BITS)
        elif operator == "*" and isinstance(left, int) and isinstance(right, int):
            _check(left.bit_length() + right.bit_length(), MAX_BITS)
        elif operator == "*":
            for sequence, count in ((left, right), (right, left)):
                if isinstance(count, int) and isinstance(sequence, Sized):
                    _check(len(sequence) * count, MAX_SIZE)
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a sandboxed `format` with bounded widths; None for anything else."""
        inner = super().wrap_str_format(value)
        if inner is None:
            return None

        @functools.wraps(inner)
        def checked(*args: Any, **kwargs: Any) -> str:
            _check_format(value.__self__)
            _check_counts((*args, *kwargs.values()))
            return inner(*args, **kwargs)

        return checked

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function or method if its result is not too large."""
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, (str, bytes)):
            _check_text_method(owner, name, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _strftime(date_format: str, day: date | None) -> str:
    """Return a day in a format such as `%d %b %Y`; the time of a given day is midnight, and None is now."""
    _check_format(date_format)
    return (datetime.combine(day, time_of_day()) if day else datetime.now()).strftime(date_format)


def _bounded(name: str, function: Callable) -> Callable:
    """Return a filter with its counts checked; `functools.wraps` keeps jinja2's marks, such as that for a context."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        values = list(args)
        _check_counts((*values[first + 1 :], *kwargs.values()))
        if name == "format" and isinstance(values[first], str):
            _check_format(values[first])
        if name == "replace" and len(values) > first + 2:
            _check_replace(str(values[first]), str(values[first + 1]), str(values[first + 2]))
        if name == "join" and (len(values) > first + 1 or "d" in kwargs):
            values[first] = list(values[first])
            between = kwargs.get("d", values[first + 1] if len(values) > first + 1 else "")
            _check(len(values[first]) * len(str(between)), MAX_SIZE)
        return function(*values, **kwargs)

    return checked


def _check_text_method(text: str | bytes, name: str, args: tuple, kwargs: dict[str, Any]) -> None:
    if name in ("ljust", "rjust", "center", "zfill", "expandtabs"):
        _check_counts((*args, *kwargs.values()))
    if name == "replace" and len(args) > 1:
        _check_replace(text, args[0], args[1])
    if name == "join" and args and hasattr(args[0], "__len__"):
        _check(len(args[0]) * len(text), MAX_SIZE)
    if name == "translate":
        raise jinja2.exceptions.SecurityError("translate is not allowed in a chat template")


def _check_counts(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int):
            _check(abs(value), MAX_COUNT)
        elif isinstance(value, dict):  # of format_map
            _check_counts(value.values())


def _check_format(text: str | bytes) -> None:
    """Refuse a format with a large width (`%99999d`), or with `*`, which takes the width from the values."""
    words = text if isinstance(text, str) else text.decode("latin-1")
    if re.search(r"\d{5}|%[-+ #0]*\*", words):
        raise jinja2.exceptions.SecurityError("a format of that width is not allowed in a chat template")


def _check_replace(text: Any, old: Any, new: Any) -> None:
    if isinstance(text, (str, bytes)) and type(text) is type(old) is type(new):
        _check(len(text) + text.count(old) * len(new), MAX_SIZE)


def _check(size: int, limit: int) -> None:
    if size > limit:
        raise jinja2.exceptions.SecurityError(f"a result of size {size:.3g} is not allowed in a chat template")


# Time and memory


class TooMuch(InputError):
    """A template takes too much time or memory."""

    def __init__(self) -> None:  # without arguments, because another thread can only raise the class
        super().__init__(
            f"the chat template takes more than {RENDER_S:g} s or {RENDER_BYTES >> 20} MB for one conversation; "
            "use another with --chat-template"
        )


class _Clock:
    """Stops a rendering that takes too much time or memory; there is one clock per process, as there is one timer.

    Entering it again while it runs restarts the count, which takes a microsecond instead of the 40 for setting the timer.
    Signals only reach the main thread, where training and generation render. In another thread, such as a server's,
    each rendering gets a watching thread.
    """

    def __init__(self) -> None:
        self._depth, self._is_held = 0, False
        self._elsewhere = threading.local()

    def __enter__(self) -> None:
        if not self._is_ours():
            self._elsewhere.watch = _Watch()
            return
        self._began, self._held = time.monotonic(), peak_bytes()
        self._depth += 1
        if self._depth == 1:
            self._before = signal.signal(signal.SIGALRM, self._look)
            signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)

    def __exit__(self, *error: object) -> None:
        if not self._is_ours():
            self._elsewhere.watch.end()
            return
        self._depth -= 1
        if self._depth == 0:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)

    def _is_ours(self) -> bool:
        return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()

    def _look(self, number: int, frame: Any) -> None:
        # Only bound renderings, not the code between those that `held` covers.
        if self._depth < 1 + self._is_held:
            return
        if _over(self._began, self._held):
            raise TooMuch

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the timer running over several renderings; in other threads, each rendering has its own watch."""
        if not self._is_ours():
            yield
            return
        with self:
            self._is_held = True
            try:
                yield
            finally:
                self._is_held = False


class _Watch:
    """Watches one rendering in a thread that gets no signals, and raises TooMuch there."""

    def __init__(self) -> None:
        self._began, self._held, self._thread = time.monotonic(), peak_bytes(), threading.get_ident()
        self._lock, self._ended = threading.Lock(), threading.Event()
        threading.Thread(target=self._look, name="mlx-lora-template", daemon=True).start()

    def end(self) -> None:
        """Stop watching, and cancel an exception that was raised but has not arrived yet."""
        with self._lock:
            self._ended.set()
            _raise_in(self._thread, None)

    def _look(self) -> None:
        pause_s = TICK_S
        while not self._ended.wait(pause_s):
            if _over(self._began, self._held):
                with self._lock:
                    if not self._ended.is_set():
                        _raise_in(self._thread, TooMuch)
                pause_s = AGAIN_S


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Raise an exception in a thread at its next Python instruction; None cancels one that has not arrived."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error and ctypes.py_object(error))


def _over(began_s: float, held_bytes: int) -> bool:
    return time.monotonic() - began_s > RENDER_S or peak_bytes() - held_bytes > RENDER_BYTES


CLOCK = _Clock()
_compiled = functools.lru_cache(maxsize=128)(BoundedSandbox().from_string)
