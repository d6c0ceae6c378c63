"""A chat with one base and its adapters: the turns so far, who answers next, and answers as they come.

    turns + question -> chat template of who is asked -> tokens -> engine -> Answer -> turns

Knows neither terminal nor HTTP; `chat_lines` reads what a user types.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Iterator
from dataclasses import dataclass

from mlx_lora.data.templates import own_template
from mlx_lora.serving.adapter_names import base_name
from mlx_lora.serving.engine import Engine
from mlx_lora.serving.request_prompts import chat_tokens
from mlx_lora.serving.requests import Event, Request, Stopped, Usage
from mlx_lora.serving.sampling import Sampling
from mlx_lora.system.errors import InputError, RunError

BASE = "base"  # what the base is called beside its own name


@dataclass(frozen=True)
class AnswerSettings:
    """How answers are made.

    Attributes:
        max_tokens: new tokens of one answer.
        context: tokens of conversation and answer together.
        sampling: how they are drawn.
    """

    max_tokens: int
    context: int
    sampling: Sampling


class Answer:
    """One answer on its way.

    Attributes:
        name: who answers, `base` or an adapter.
        text: what has come.
        finish: `stop`, `length`, `stopped` by the user; None while it goes on.
        usage: token counts at its end; None of a stopped one.
        cut_by_context: the most tokens it may have are those that the context leaves.
    """

    def __init__(self, engine: Engine, request: Request, cut_by_context: bool):
        """Submit the request.

        Raises:
            QueueFull: too many wait already.
            Stopped: the engine ends, or has failed.
        """
        self.name = request.adapter or BASE
        self.text, self.finish, self.usage = "", None, None
        self.cut_by_context = cut_by_context
        self._stopping = False
        self._first_s = self._last_s = 0.0
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._ticket = engine.submit(request, self._take)

    def _take(self, event: Event) -> None:
        """Take an event in the engine's thread: when it came counts, not when somebody had time to read it."""
        self._last_s = time.monotonic()
        self._first_s = self._first_s or self._last_s
        self._events.put(event)

    def __iter__(self) -> Iterator[str]:
        """Yield its text piece by piece, until it ends or is stopped.

        Raises:
            UnknownAdapter, InputError: the adapter cannot be had any more.
            RunError: the engine has failed.
        """
        while self.finish is None:
            event = None if self._stopping else self._events.get()
            if event is None:
                self._ticket.cancel()
                self.finish = "stopped"
                return
            if isinstance(event.error, Stopped):
                raise RunError(f"the engine failed: {event.error}")
            if isinstance(event.error, OSError):
                raise InputError(f"{self.name}: {event.error}")
            if event.error is not None:
                raise event.error
            self.text += event.piece.text
            self.finish, self.usage = event.finish, event.usage
            if event.piece.text:
                yield event.piece.text

    def stop(self) -> None:
        """End it as it is; from a signal handler too, which is why nothing here takes a lock."""
        self._stopping = True
        self._events.put(None)

    def cancel(self) -> None:
        """Give its row up, if it still has one."""
        if self.finish is None:
            self._ticket.cancel()

    def figures(self, alone: bool = True) -> str:
        """Return one line: how long it was, how fast, how much of the prompt was known from earlier turns.

        Args:
            alone: nothing else was answered at the same time; else its rate would say little, and is left out.
        """
        usage: Usage | None = self.usage
        if usage is None:
            return f"{self.name}: stopped"
        speed = ""
        if alone and usage.completion > 1 and self._last_s > self._first_s:
            speed = f", {(usage.completion - 1) / (self._last_s - self._first_s):.1f} tokens/s"
        prompt = f"{usage.prompt} tokens of prompt, {usage.cached} of them known"
        return f"{self.name}: {usage.completion} tokens{speed}; {prompt}"

    @property
    def span_s(self) -> tuple[float, float]:
        """When its first and its last event came, on the monotonic clock."""
        return self._first_s, self._last_s


def figures_together(answers: list[Answer]) -> str:
    """Return one line on answers that were made at the same time: how many tokens in all, and how fast."""
    done = [answer for answer in answers if answer.usage is not None]
    tokens = sum(answer.usage.completion for answer in done)
    line = f"{len(done)} answers at once: {tokens} tokens"
    spans = [answer.span_s for answer in done]
    seconds = max((last for _, last in spans), default=0.0) - min((first for first, _ in spans), default=0.0)
    return line + (f", {(tokens - len(done)) / seconds:.1f} tokens/s together" if seconds > 0 else "")


class Conversation:
    """The turns of one chat, over an engine with any number of adapters.

    Attributes:
        adapter: who answers next, None for the base.
        system: the system prompt, None for none.
        turns: questions and answers, as chat templates take them.
    """

    def __init__(self, engine: Engine, settings: AnswerSettings, system: str | None = None):
        self.engine, self.settings, self.system = engine, settings, system
        self.adapter: str | None = None
        self.turns: list[dict[str, str]] = []

    @property
    def name(self) -> str:
        """Who answers next."""
        return self.adapter or BASE

    @property
    def names(self) -> list[str]:
        """Everyone who can answer."""
        return [BASE, *self.engine.store.cards]

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names that mean the base."""
        return BASE, base_name(self.engine.base)

    def adapter_named(self, name: str) -> str | None:
        """Return the adapter that a name means, None for the base.

        Raises:
            InputError: nobody is called that.
        """
        if name in self.base_names:
            return None
        if name not in self.engine.store.cards:
            raise InputError(f"no adapter {name!r}; there are {', '.join(self.names)}, and /load NAME=DIR loads one")
        return name

    def ask(self, question: str, adapter: str | None) -> Answer:
        """Begin one's answer to the conversation with one question more, which `keep` can add to it.

        Raises:
            InputError: no chat template, one that refuses this, or more tokens than the model was made for.
            RunError: the engine has failed.
        """
        tokens = self._tokens(question, adapter)
        room = self.settings.context - len(tokens)
        if room < 1:
            raise InputError(
                f"with this the conversation is {len(tokens)} tokens long, and the model was made for "
                f"{self.settings.context}; it is kept as it was, and /reset empties it"
            )
        most = min(self.settings.max_tokens, room)
        request = Request(tokens, adapter, most, self.settings.sampling)
        try:
            return Answer(self.engine, request, cut_by_context=room < self.settings.max_tokens)
        except Stopped:
            raise RunError(f"the engine failed: {self.engine.failure!r}") from None

    def keep(self, question: str, answer: Answer) -> None:
        """Add a question and its answer to the turns; of one that was stopped before its first word, neither."""
        if answer.text or answer.finish != "stopped":
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]

    def has_template(self, name: str) -> bool:
        """Tell whether one can chat at all."""
        try:
            return bool(self._template(self.adapter_named(name)))
        except InputError:
            return False

    def check_system(self) -> None:
        """Try whether who answers next takes the system prompt.

        Raises:
            InputError: the chat template refuses it, or does not show it.
        """
        self._tokens("x", self.adapter, "leave it out")

    def _tokens(self, question: str, adapter: str | None, advice: str = "/system alone drops it") -> list[int]:
        messages = [*self.turns, {"role": "user", "content": question}]
        if not self.system:
            return self._rendered(messages, adapter)
        try:
            tokens = self._rendered([{"role": "system", "content": self.system}, *messages], adapter)
        except InputError as error:
            self._rendered(messages, adapter)  # has a complaint of its own when it is not about the system prompt
            raise InputError(f"{error} with the system prompt and takes it without: {advice}") from None
        try:
            shown = self._rendered(messages, adapter) != tokens
        except InputError:
            shown = True  # a template that wants one
        if not shown:
            raise InputError(f"{adapter or BASE}: its chat template does not show a system prompt; {advice}")
        return tokens

    def _rendered(self, messages: list[dict[str, str]], adapter: str | None) -> list[int]:
        return chat_tokens(self.engine.base.hf_tokenizer, messages, self._template(adapter), self.engine.vocabulary)

    def _template(self, adapter: str | None) -> str:
        own = self.engine.store.cards[adapter].chat_template if adapter else None
        template = own or own_template(self.engine.base.hf_tokenizer)
        if not template:
            raise InputError(f"{adapter or BASE}: has no chat template; ask an adapter that was trained with one")
        return template
