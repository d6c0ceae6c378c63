"""Chat with a base and its adapters in a terminal, without a server.

python -m mlx_lora chat --model DIR --adapter bard=runs/bard --adapter tutor=runs/tutor

A line that the user types is a question, or a command that begins with a slash.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mlx_lora.api import options as flags
from mlx_lora.api.base import TextSettings
from mlx_lora.config.load import train_settings
from mlx_lora.data.chat_template import own_template
from mlx_lora.data.downloads import ImageDownloads, is_on_web
from mlx_lora.data.examples import FormatError
from mlx_lora.data.images import MARK, mark
from mlx_lora.engine.adapter_store import (
    DEFAULT_CONTEXT,
    UnknownAdapter,
    adapter_sources,
    base_name,
    check_names,
    context_of,
    named_source,
)
from mlx_lora.engine.engine import (
    Engine,
    Event,
    Limits,
    PicturePrompt,
    PictureReader,
    Request,
    Stopped,
    Usage,
    chat_tokens,
    opened_engine,
)
from mlx_lora.models.generator import Sampling
from mlx_lora.models.load import load_base
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError, RunError, first_line

BASE = "base"  # another name of the base, in addition to its own
# A comparison may ask more adapters than generate at once; the others wait.
WAITING = 4096


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model")
@flags.named_adapters_options(" The first one answers at the start.")
@click.option("--system-prompt", type=str, default=None, help="System message before the conversation.")
@flags.text_options(512, TextSettings)
def main(named: flags.NamedAdapters, system_prompt: str | None, how: TextSettings, **given: Any) -> None:
    """Chat with --model and its --adapter; type /help in the chat to list the commands."""
    model = train_settings(given).model
    sampling = Sampling(temperature=how.temperature, top_p=how.top_p, seed=how.seed)
    sources = adapter_sources(named.adapters, named.blends)
    limits = Limits(max_waiting=WAITING, drafts=how.speculate == "auto")
    with opened_engine(lambda: load_base(model), limits, sources, named.ignore_fingerprint, (BASE,)) as (engine, lines):
        context = context_of(engine.base.config) or DEFAULT_CONTEXT
        chat = ChatSession(engine, how.max_tokens, context, sampling, system_prompt)
        chat.adapter = next(iter(engine.store.cards), None)
        if not any(chat.has_template(name) for name in chat.names):
            raise InputError("--model: has no chat template, and no --adapter has one; use mlx-lora generate")
        if chat.system and chat.has_template(chat.name):
            try:
                chat.check_system()
            except InputError as error:
                raise InputError(f"--system-prompt: {error}") from None
        console.echo("\n".join([*lines, f"{chat.name} answers; /help lists the commands"]))
        talk(ChatLines(chat), chat)


def talk(lines: ChatLines, chat: ChatSession) -> None:
    """Read lines until Ctrl-D or Ctrl-C at the prompt, or the end of standard input."""
    typed = sys.stdin.isatty()
    edited = typed and sys.stdout.isatty()  # by input()
    if edited:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its editing and history
    with contextlib.suppress(EOFError, KeyboardInterrupt), interrupts(lines.interrupt):
        while True:
            if not edited and typed:
                click.echo(f"{chat.name}> ", nl=False, err=True)
            line = (
                f"{input(f'{chat.name}> ')}\n"
                if edited
                else sys.stdin.buffer.readline().decode(errors="surrogateescape")
            )
            if not line:
                break
            if not lines.take(line.rstrip("\r\n")):
                return
    if typed:
        console.echo()  # so that the shell's prompt begins a new line


@contextmanager
def interrupts(stop: Callable[[], bool]) -> Iterator[None]:
    """Let Ctrl-C call `stop` while it has something to stop; otherwise it raises KeyboardInterrupt."""

    def handle(number: int, frame: Any) -> None:
        if not stop():
            raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGINT)
    if before != signal.SIG_IGN:  # a parent that starts us in the background may ignore it
        signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def write(text: str) -> None:
    """Write a piece of an answer to standard output, unchanged in a pipe; all else goes to standard error."""
    click.echo(shown(text) if sys.stdout.isatty() else text, nl=False)


def show_figures(line: str) -> None:
    """Show a line with counts and speed on a terminal."""
    if sys.stderr.isatty():
        console.echo(click.style(line, dim=True) if console.wants_color() else line)


def shown(text: str) -> str:
    """Return a model's text without control characters of terminals."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}" for c in text)


# What a user types


# Name -> how to write it, what it does, and whether a text after its name is required (True), optional (None) or not allowed (False).
COMMANDS: dict[str, tuple[str, str, bool | None]] = {
    "adapter": ("/adapter NAME", "lets NAME answer from now on; the name base stands for the base", True),
    "adapters": ("/adapters", "lists the base and the adapters", False),
    "compare": (
        "/compare TEXT",
        "lets the base and all adapters answer TEXT; their answers are not added to the chat; "
        "to choose some, write @NAME ... before TEXT",
        True,
    ),
    "image": ("/image FILE|URL", "shows a picture with the next question", True),
    "load": ("/load NAME=DIR", "loads an adapter, or replaces one", True),
    "system": ("/system TEXT", "sets the system prompt; without TEXT, removes it", None),
    "reset": ("/reset", "empties the conversation", False),
    "help": ("/help", "shows this list", False),
    "quit": ("/quit", "ends the chat, as Ctrl-D does; Ctrl-C stops an answer", False),
}


class ChatLines:
    """Runs the commands and asks the questions of each line."""

    def __init__(self, conversation: ChatSession):
        self._chat = conversation
        self._answering = self._stopped = False
        self._answers: list[ChatAnswer] = []

    def take(self, line: str) -> bool:
        """Handle a line; return False if it ends the chat.

        Raises:
            RunError: the engine has failed.
        """
        try:
            line.encode()
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line[1:].strip().partition(" ")
                if name not in COMMANDS:
                    raise InputError(f"/{name}: no such command; /help lists them, and //{name} sends it to the model")
                usage, _, wants = COMMANDS[name]
                if wants is not None and wants != bool(rest.strip()):
                    raise InputError(f"/{name} {rest}".strip() + f": write it as {usage}")
                if name == "quit":
                    return False
                self._run(name, rest.strip())
            elif line.strip():
                text = line.removeprefix("/") if line.startswith("//") else line
                with self._answers_of(text, [self._chat.adapter]) as (answer,):
                    self._show(answer)
                    self._chat.keep(text, answer)
        except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as lone surrogates
            console.echo("Error: the line is not UTF-8; set the terminal, or save the file, as UTF-8")
        except UnknownAdapter as error:
            console.echo(f"Error: adapter {error}: it is no longer loaded; /adapters lists those that are")
        except InputError as error:
            console.echo(f"Error: {console.printable(str(error))}")
        return True

    def interrupt(self) -> bool:
        """Stop the current answers; return False if there are none. A signal handler may call this."""
        if not self._answering:
            return False
        self._stopped = True
        for answer in self._answers:
            answer.stop()
        return True

    def _run(self, command: str, rest: str) -> None:
        """Run a command, given the text after its name."""
        match command:
            case "adapter":
                self._chat.adapter = self._chat.adapter_named(rest)
            case "adapters":
                for name in self._chat.names:
                    card = self._chat.engine.store.cards.get(name)
                    about = card.describe() if card else self._chat.base_names[-1]
                    console.echo(f"{'*' if name == self._chat.name else ' '} {name}: {about}")
            case "compare":
                self._compare(rest)
            case "image":
                self._chat.attach(rest)
                console.echo(f"{rest}: shown with the next question")
            case "load":
                self._load(rest)
            case "system":
                self._chat.system = rest or None
                console.echo("the system prompt is set" if rest else "there is no system prompt now")
            case "reset":
                self._chat.reset()
                console.echo("the conversation is empty")
            case "help":
                width = max(len(usage) for usage, *_ in COMMANDS.values())
                for usage, words, _ in COMMANDS.values():
                    console.echo(f"{usage:{width}}  {words}")

    def _compare(self, rest: str) -> None:
        names = []
        while rest.startswith("@"):
            word, _, rest = rest.partition(" ")
            names.append(word[1:])
            rest = rest.lstrip()
        if not rest:
            raise InputError("/compare: nothing to answer; write it as /compare TEXT, or /compare @NAME @NAME TEXT")
        names = names or [name for name in self._chat.names if self._chat.has_template(name)]
        adapters = [self._chat.adapter_named(name) for name in names]
        with self._answers_of(rest, list(dict.fromkeys(adapters))) as answers:
            for answer in answers:
                if self._stopped:
                    break
                write(f"[{answer.name}]\n")
                self._show(answer, alone=len(answers) == 1)
                write("\n")
            if len(answers) > 1 and not self._stopped:
                show_figures(figures_together(answers))

    @contextmanager
    def _answers_of(self, text: str, adapters: list[str | None]) -> Iterator[list[ChatAnswer]]:
        """Start the answers of all `adapters`, which are generated in one batch; leaving the block ends them."""
        self._answering, self._stopped = True, False
        try:
            for adapter in adapters:
                self._answers.append(self._chat.ask(text, adapter))
            if self._stopped:  # interrupted before all answers were started
                self.interrupt()
            yield self._answers
        finally:
            for answer in self._answers:
                answer.cancel()
            self._answering, self._answers = False, []

    def _show(self, answer: ChatAnswer, alone: bool = True) -> None:
        try:
            for piece in answer:
                write(piece)
        finally:
            write("\n")
        show_figures(answer.figures(alone))
        if answer.finish == "length" and answer.cut_by_context:
            console.echo("(the answer ends here because the model's context is full; /reset empties the conversation)")

    def _load(self, rest: str) -> None:
        try:
            name, source = named_source("/load", rest)
            check_names("/load", [name], self._chat.base_names)
            card = self._chat.engine.call(lambda store: store.add({name: source})).result()[0]
        except (OSError, RunError) as error:  # an error of the disk or the hub, so the chat can continue
            raise InputError(f"/load {rest}: {error}") from None
        except Stopped:
            raise self._chat.engine.failed() from None
        console.echo(f"{name}: {card.describe()}; type /adapter {name} to use it")


# The conversation: turns + question -> the adapter's chat template -> tokens -> engine -> ChatAnswer -> turns


class ChatAnswer:
    """One answer, which may not be complete yet.

    Attributes:
        name: what answers, `base` or an adapter.
        text: the text so far.
        finish: `stop`, `length`, `stopped` by the user; None before that.
        usage: token counts at its end; None if it was stopped.
        cut_by_context: the context limits its length more than `max_tokens` does.
    """

    def __init__(self, engine: Engine, request: Request, cut_by_context: bool):
        """Submit the request.

        Raises:
            QueueFull: too many requests are waiting.
            Stopped: the engine is ending, or has failed.
        """
        self.name = request.adapter or BASE
        self.text, self.finish, self.usage = "", None, None
        self.cut_by_context = cut_by_context
        self._stopping = False
        self._first_s = self._last_s = 0.0
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._engine, self._ticket = engine, engine.submit(request, self._take)

    def _take(self, event: Event) -> None:
        """Queue an event in the engine's thread, so that its time is when it came, not when it is read."""
        self._last_s = time.monotonic()
        self._first_s = self._first_s or self._last_s
        self._events.put(event)

    def __iter__(self) -> Iterator[str]:
        """Yield its text piece by piece, until it ends or is stopped.

        Raises:
            UnknownAdapter, InputError: the adapter is no longer available.
            RunError: the engine has failed.
        """
        while self.finish is None:
            event = None if self._stopping else self._events.get()
            if event is None:
                self._ticket.canceled.set()
                self.finish = "stopped"
                return
            if isinstance(event.error, Stopped):
                raise self._engine.failed()
            if isinstance(event.error, OSError):
                where = f" {event.error.filename}" if event.error.filename else ""
                why = event.error.strerror or first_line(event.error)
                raise InputError(f"{self.name}: its files{where} cannot be read ({why}); /load NAME=DIR loads it again")
            if event.error is not None:
                raise event.error
            self.text += event.piece.text
            self.finish, self.usage = event.finish, event.usage
            if event.piece.text:
                yield event.piece.text

    def stop(self) -> None:
        """End the answer as it is; a signal handler may call this, so it takes no lock."""
        self._stopping = True
        self._events.put(None)

    def cancel(self) -> None:
        """Free its row, if it still has one."""
        if self.finish is None:
            self._ticket.canceled.set()

    def figures(self, alone: bool = True) -> str:
        """Return one line with its length, its speed, and how much of the prompt was cached from earlier turns.

        Args:
            alone: nothing else was answered at the same time; otherwise the speed would be misleading, and is left out.
        """
        usage: Usage | None = self.usage
        if usage is None:
            return f"{self.name}: stopped"
        speed = ""
        if alone and usage.completion > 1 and self._last_s > self._first_s:
            speed = f", {(usage.completion - 1) / (self._last_s - self._first_s):.1f} tokens/s"
        prompt = f"{usage.prompt} tokens in the prompt, {usage.cached} of them cached"
        return f"{self.name}: {usage.completion} tokens{speed}; {prompt}"

    @property
    def span_s(self) -> tuple[float, float]:
        """The times of its first and its last event, on the monotonic clock."""
        return self._first_s, self._last_s


def figures_together(answers: list[ChatAnswer]) -> str:
    """Return one line with the total length and speed of answers that were generated at the same time."""
    done = [answer for answer in answers if answer.usage is not None]
    tokens = sum(answer.usage.completion for answer in done if answer.usage)
    line = f"{len(done)} answers at once: {tokens} tokens"
    spans = [answer.span_s for answer in done]
    seconds = max((last for _, last in spans), default=0.0) - min((first for first, _ in spans), default=0.0)
    return line + (f", {(tokens - len(done)) / seconds:.1f} tokens/s together" if seconds > 0 else "")


class ChatSession:
    """The turns of one chat, with an engine that has any number of adapters.

    Attributes:
        max_tokens: the most new tokens of one answer.
        context: the most tokens of conversation and answer together.
        sampling: how tokens are drawn.
        adapter: the adapter that answers next, None for the base.
        system: the system prompt, or None.
        turns: questions and answers, in the format of chat templates; pictures are marks in them.
        attached: marks of pictures that the next question will begin with.
    """

    def __init__(self, engine: Engine, max_tokens: int, context: int, sampling: Sampling, system: str | None = None):
        self.engine, self.max_tokens, self.context, self.sampling, self.system = (
            engine, max_tokens, context, sampling, system,
        )  # fmt: skip
        self.adapter: str | None = None
        self.turns: list[dict[str, str]] = []
        self.attached = ""
        self._sources: dict[str, str | bytes] = {}
        self._reader = PictureReader(engine.base)

    @property
    def name(self) -> str:
        """The name of what answers next."""
        return self.adapter or BASE

    @property
    def names(self) -> list[str]:
        """The names of the base and of all adapters."""
        return [BASE, *self.engine.store.cards]

    @property
    def base_names(self) -> tuple[str, ...]:
        """Names that mean the base."""
        return BASE, base_name(self.engine.base)

    def adapter_named(self, name: str) -> str | None:
        """Return the adapter that a name means, None for the base.

        Raises:
            InputError: there is no such adapter.
        """
        if name in self.base_names:
            return None
        if name not in self.engine.store.cards:
            raise InputError(f"no adapter {name!r}; there are {', '.join(self.names)}, and /load NAME=DIR loads one")
        return name

    def ask(self, question: str, adapter: str | None) -> ChatAnswer:
        """Return an adapter's answer to a further question; `keep` can add both to the conversation.

        Raises:
            InputError: there is no chat template, it refuses the conversation, or the context is too short.
            RunError: the engine has failed.
        """
        tokens, pictures = self._tokens(self.attached + question, adapter)
        room = self.context - len(tokens)
        if room < 1:
            raise InputError(
                f"with this question, the conversation has {len(tokens)} tokens, and the model's context is "
                f"{self.context}; the question was not added, and /reset empties the conversation"
            )
        most = min(self.max_tokens, room)
        request = Request(tokens, adapter, most, self.sampling, pictures=pictures)
        try:
            return ChatAnswer(self.engine, request, cut_by_context=room < self.max_tokens)
        except Stopped:
            raise self.engine.failed() from None

    def keep(self, question: str, answer: ChatAnswer) -> None:
        """Add a question and its answer to the turns, unless the answer was stopped before its first word."""
        if answer.text or answer.finish != "stopped":
            question, self.attached = self.attached + question, ""
            self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]

    def attach(self, picture: str | Path) -> None:
        """Show a picture with the next question.

        Args:
            picture: a file, or a web address, from which it is downloaded.

        Raises:
            InputError: it cannot be used, or the model sees no pictures.
        """
        self._reader.check()
        try:
            file = ImageDownloads().file(str(picture)) if is_on_web(str(picture)) else Path(picture)
        except FormatError as error:
            raise InputError(f"/image {picture}: {error}") from None
        path = file.expanduser().resolve()
        if not path.is_file():
            raise InputError(f"/image {picture}: there is no such file; give the path of a picture")
        found = mark(str(path), self._sources)
        self._rendered([{"role": "user", "content": found + "x"}], self.adapter)
        self.attached += found

    def reset(self) -> None:
        """Empty the conversation."""
        self.turns.clear()
        self._sources.clear()
        self.attached = ""

    def has_template(self, name: str) -> bool:
        """Tell whether the base or adapter of that name has a chat template."""
        try:
            return bool(self._template(self.adapter_named(name)))
        except InputError:
            return False

    def check_system(self) -> None:
        """Check that the current chat template supports the system prompt.

        Raises:
            InputError: the chat template refuses it, or does not show it.
        """
        self._tokens("x", self.adapter, "leave it out")

    def _tokens(
        self, question: str, adapter: str | None, advice: str = "remove it with /system"
    ) -> tuple[list[int], PicturePrompt | None]:
        messages = [*self.turns, {"role": "user", "content": question}]
        if not self.system:
            return self._rendered(messages, adapter)
        try:
            prompt = self._rendered([{"role": "system", "content": self.system}, *messages], adapter)
        except InputError as error:
            self._rendered(messages, adapter)  # raises its own error if the system prompt is not the cause
            raise InputError(f"{error} with the system prompt, but not without it; {advice}") from None
        try:
            shown = self._rendered(messages, adapter)[0] != prompt[0]
        except InputError:
            shown = True  # the template requires a system prompt
        if not shown:
            raise InputError(f"{adapter or BASE}: its chat template does not show a system prompt; {advice}")
        return prompt

    def _rendered(self, messages: list[dict[str, str]], adapter: str | None) -> tuple[list[int], PicturePrompt | None]:
        if any(MARK.search(str(message.get("content") or "")) for message in messages):
            card = self.engine.store.cards[adapter] if adapter else None
            folders = list({Path(str(source)).parent for source in self._sources.values()})
            own, pixels = (card.chat_template, card.max_pixels) if card else (None, None)
            pictures = self._reader.prompt(messages, self._sources, own, folders, pixels)
            return pictures.tokens, pictures
        template = self._template(adapter)
        return chat_tokens(self.engine.base.hf_tokenizer, messages, template, self.engine.vocabulary), None

    def _template(self, adapter: str | None) -> str:
        own = self.engine.store.cards[adapter].chat_template if adapter else None
        template = own or own_template(self.engine.base.hf_tokenizer)
        if not template:
            raise InputError(f"{adapter or BASE}: has no chat template; ask an adapter that was trained with one")
        return template
