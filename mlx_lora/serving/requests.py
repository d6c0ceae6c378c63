"""The engine's requests and its answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_lora.serving.sampling import Sampling
from mlx_lora.serving.text import Piece
from mlx_lora.system.errors import first_line


class QueueFull(Exception):
    """The queue of waiting requests is full."""


class Stopped(Exception):
    """The engine takes no more requests."""


def failed_words(failure: BaseException | None) -> str:
    """Return what a user reads when the engine has ended because of an error."""
    why = f" ({first_line(failure)})" if failure is not None else ""
    return f"the engine failed{why}; start the command again, and report it if this happens again"


@dataclass(frozen=True)
class Request:
    """One generation.

    Attributes:
        tokens: the prompt, at least one token.
        adapter: name of a known adapter, or None for the base.
        max_tokens: the most new tokens.
        sampling: how tokens are drawn.
        stops: texts before which the answer ends.
        ignore_eos: continue after an end token (for measurements).
        continues: the text continues the prompt, as in a completion; a chat's answer is a new text.
    """

    tokens: list[int]
    adapter: str | None
    max_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    ignore_eos: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens: the prompt's, those of them that came from the cache, and new ones without the end token."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Event:
    """A part of an answer; the last has a finish reason or an error.

    Attributes:
        piece: new text.
        finish: `stop`, `length`, or None if more follows.
        usage: only in the last event.
        error: why there is no answer: UnknownAdapter, InputError, OSError or Stopped.
    """

    piece: Piece
    finish: str | None = None
    usage: Usage | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether no event follows."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Ticket:
    """A request that was submitted to the engine.

    Attributes:
        request: the request.
        emit: called with every event, in the engine's thread; must not block.
        canceled: set when the answer is no longer wanted.
    """

    request: Request
    emit: Callable[[Event], None]
    canceled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Ask the engine to free the row at its next step; ignore events that still come."""
        self.canceled.set()
