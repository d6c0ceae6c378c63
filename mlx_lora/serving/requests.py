"""What the engine is asked for, and what it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from mlx_lora.serving.sampling import Sampling
from mlx_lora.serving.text import Piece


class QueueFull(Exception):
    """As many requests wait as may."""


class Stopped(Exception):
    """The engine takes no more requests."""


@dataclass(frozen=True)
class Request:
    """One generation.

    Attributes:
        tokens: the prompt, at least one.
        adapter: name of a known adapter, or None for the base.
        max_tokens: at most this many new ones.
        sampling: how they are drawn.
        stops: texts before which the answer ends.
        continues: the text goes on from the prompt, as a completion does; a chat's answer begins anew.
        ignore_eos: go on after an end token (for measuring).
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
    """Tokens of the prompt, those of them that were not computed anew, and new ones without the end token."""

    prompt: int
    cached: int
    completion: int


@dataclass(frozen=True)
class Event:
    """A step of an answer; the last has a finish reason or an error.

    Attributes:
        piece: new text.
        finish: `stop`, `length`, or None while it goes on.
        usage: with the last.
        error: why there is no answer: UnknownAdapter, InputError, Stopped, or a defect.
    """

    piece: Piece
    finish: str | None = None
    usage: Usage | None = None
    error: Exception | None = None

    @property
    def last(self) -> bool:
        """Whether nothing follows."""
        return self.finish is not None or self.error is not None


@dataclass(eq=False)
class Ticket:
    """A request on its way.

    Attributes:
        request: what was asked.
        emit: is called with every event, in the engine's thread; must not block.
        canceled: nobody waits for it any more.
    """

    request: Request
    emit: Callable[[Event], None]
    canceled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Give the row up at the next step; no more events follow that matter."""
        self.canceled.set()
