"""Chat with a base and its adapters in a terminal, without a server.

python -m mlx_lora chat --model DIR --adapter bard=runs/bard --adapter tutor=runs/tutor

A line that the user types is a question, or a command that begins with a slash.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import click

from mlx_lora.api.base import TextSettings
from mlx_lora.cli import options as flags
from mlx_lora.config.load import train_settings
from mlx_lora.config.settings import ModelSettings
from mlx_lora.models.load import load_base
from mlx_lora.serving.adapter_store import (
    DEFAULT_CONTEXT,
    UnknownAdapter,
    adapter_sources,
    base_name,
    check_names,
    context_of,
    named_source,
)
from mlx_lora.serving.conversation import BASE, AnswerSettings, ChatAnswer, ChatSession, figures_together
from mlx_lora.serving.engine import Engine, Limits, Sampling, Stopped, failed_words
from mlx_lora.utils import console
from mlx_lora.utils.errors import InputError, RunError

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
    with begun_engine(model, Limits(max_waiting=WAITING), named, (BASE,)) as (engine, lines):
        context = context_of(engine.base.config) or DEFAULT_CONTEXT
        chat = ChatSession(engine, AnswerSettings(how.max_tokens, context, sampling), system_prompt)
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


@contextmanager
def begun_engine(
    model: ModelSettings, limits: Limits, named: flags.NamedAdapters, own: tuple[str, ...] = ()
) -> Iterator[tuple[Engine, list[str]]]:
    """Yield an engine with the base and the adapters of a command line, and a line about each; it is closed afterwards.

    Args:
        model, limits: of the engine.
        named: the adapters.
        own: names of the base, in addition to its model's.
    """
    sources = adapter_sources(named.adapters, named.blends)
    engine = Engine(lambda: load_base(model), limits, named.ignore_fingerprint)
    try:
        check_names("--adapter", sources, (*own, base_name(engine.base)))
        cards = engine.call(lambda store: store.add(sources)).result()
        lines = [f"base   {base_name(engine.base)}: {engine.base.describe()}"]
        lines += [f"weights {engine.weights.describe()}"] if engine.weights else []
        yield engine, [*lines, *(f"model  {card.name}: {card.describe()}" for card in cards)]
    finally:
        engine.close()


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


class ChatLines:
    """Runs the commands and asks the questions of each line."""

    def __init__(self, conversation: ChatSession):
        self._chat = conversation
        self._answering = self._stopped = False
        self._answers: list[ChatAnswer] = []
        # Name -> how to write it, what it does, what runs it, given the text after its name, and whether that text is
        # required (True), optional (None) or not allowed (False).
        self._commands: dict[str, tuple[str, str, Callable[[str], None] | None, bool | None]] = {
            "adapter": (
                "/adapter NAME", "lets NAME answer from now on; the name base stands for the base", self._adapter, True,
            ),
            "adapters": ("/adapters", "lists the base and the adapters", self._list, False),
            "compare": (
                "/compare TEXT",
                "lets the base and all adapters answer TEXT; their answers are not added to the chat; "
                "to choose some, write @NAME ... before TEXT",
                self._compare, True,
            ),
            "image": ("/image FILE|URL", "shows a picture with the next question", self._image, True),
            "load": ("/load NAME=DIR", "loads an adapter, or replaces one", self._load, True),
            "system": ("/system TEXT", "sets the system prompt; without TEXT, removes it", self._system, None),
            "reset": ("/reset", "empties the conversation", self._reset, False),
            "help": ("/help", "shows this list", self._help, False),
            "quit": ("/quit", "ends the chat, as Ctrl-D does; Ctrl-C stops an answer", None, False),
        }  # fmt: skip

    def take(self, line: str) -> bool:
        """Handle a line; return False if it ends the chat.

        Raises:
            RunError: the engine has failed.
        """
        try:
            line.encode()
            if line.startswith("/") and not line.startswith("//"):
                name, _, rest = line[1:].strip().partition(" ")
                if name not in self._commands:
                    raise InputError(f"/{name}: no such command; /help lists them, and //{name} sends it to the model")
                usage, _, run, wants = self._commands[name]
                if wants is not None and wants != bool(rest.strip()):
                    raise InputError(f"/{name} {rest}".strip() + f": write it as {usage}")
                if run is None:
                    return False
                run(rest.strip())
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

    def _adapter(self, name: str) -> None:
        self._chat.adapter = self._chat.adapter_named(name)

    def _list(self, rest: str) -> None:
        for name in self._chat.names:
            card = self._chat.engine.store.cards.get(name)
            about = card.describe() if card else self._chat.base_names[-1]
            console.echo(f"{'*' if name == self._chat.name else ' '} {name}: {about}")

    def _image(self, rest: str) -> None:
        self._chat.attach(rest)
        console.echo(f"{rest}: shown with the next question")

    def _load(self, rest: str) -> None:
        try:
            name, source = named_source("/load", rest)
            check_names("/load", [name], self._chat.base_names)
            card = self._chat.engine.call(lambda store: store.add({name: source})).result()[0]
        except (OSError, RunError) as error:  # an error of the disk or the hub, so the chat can continue
            raise InputError(f"/load {rest}: {error}") from None
        except Stopped:
            raise RunError(failed_words(self._chat.engine.failure)) from None
        console.echo(f"{name}: {card.describe()}; type /adapter {name} to use it")

    def _system(self, text: str) -> None:
        self._chat.system = text or None
        console.echo("the system prompt is set" if text else "there is no system prompt now")

    def _reset(self, rest: str) -> None:
        self._chat.reset()
        console.echo("the conversation is empty")

    def _help(self, rest: str) -> None:
        width = max(len(usage) for usage, *_ in self._commands.values())
        for usage, words, *_ in self._commands.values():
            console.echo(f"{usage:{width}}  {words}")
