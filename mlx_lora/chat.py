"""Chat with a base and its adapters in a terminal, without a server.

python -m mlx_lora.chat --model DIR --adapter bard=runs/bard --adapter tutor=runs/tutor
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click

from mlx_lora.models.load import load_base
from mlx_lora.serving.adapter_names import DEFAULT_CONTEXT, adapter_sources, base_name, check_names, context_of
from mlx_lora.serving.chat_lines import ChatLines, Screen
from mlx_lora.serving.conversation import BASE, AnswerSettings, Conversation
from mlx_lora.serving.engine import Engine, Limits
from mlx_lora.serving.sampling import Sampling
from mlx_lora.settings import flags
from mlx_lora.settings.resolve import train_settings
from mlx_lora.system import console
from mlx_lora.system.errors import InputError

# A comparison may ask more adapters than generate at once; the others wait.
WAITING = 4096


@click.command(cls=flags.ShortCommand)
@flags.settings_options("model")
@click.option(
    "--adapter",
    "--adapter-path",
    "adapters",
    multiple=True,
    help="Adapter: DIR, NAME=DIR, or NAME=OWNER/NAME of the hub; may be repeated. The first one answers at the start.",
)
@click.option(
    "--blend",
    "blends",
    multiple=True,
    help="Blend of loaded adapters: NAME=ADAPTER:WEIGHT,ADAPTER:WEIGHT ...; may be repeated.",
)
@flags.ignore_fingerprint_option
@click.option("--system-prompt", type=str, default=None, help="System message before the conversation.")
@click.option(
    "-m",
    "--max-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Maximum number of tokens of an answer.",
)
@click.option(
    "--temp",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0 always takes the most likely token.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, max=1),
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens whose probabilities add up to this.",
)
@click.option("--seed", type=click.IntRange(min=0, max=2**63 - 1), default=None, help="Seed for sampling every answer.")
def main(
    adapters: tuple[str, ...], blends: tuple[str, ...], ignore_fingerprint: bool, system_prompt: str | None,
    max_tokens: int, temp: float, top_p: float, seed: int | None, **options: Any,
) -> None:  # fmt: skip
    """Chat with --model and its --adapter; type /help in the chat to list the commands."""
    if not math.isfinite(temp):
        raise InputError(f"--temp {temp}: not a finite number; give 0 for greedy, or about 0.7")
    model = train_settings(flags.given(options)).model
    sources = adapter_sources(adapters, blends)
    sampling = Sampling(temperature=temp, top_p=top_p or 1.0, seed=seed)  # 0 means off in mlx-lm
    engine = Engine(lambda: load_base(model), Limits(max_waiting=WAITING), ignore_fingerprint)
    try:
        check_names("--adapter", sources, (BASE, base_name(engine.base)))
        cards = engine.call(lambda store: store.add(sources)).result()
        context = context_of(engine.base.config) or DEFAULT_CONTEXT
        chat = Conversation(engine, AnswerSettings(max_tokens, context, sampling), system_prompt)
        chat.adapter = next(iter(sources), None)
        check(chat)
        console.echo(f"base   {base_name(engine.base)}: {engine.base.describe()}")
        if engine.weights:
            console.echo(f"weights {engine.weights.describe()}")
        for card in cards:
            console.echo(f"model  {card.name}: {card.describe()}")
        talk(ChatLines(chat, screen()), chat)
    finally:
        engine.close()


def check(chat: Conversation) -> None:
    """Check before the first question that a model can answer, and with the system prompt.

    Raises:
        InputError: there is no chat template, or it does not accept the system prompt.
    """
    if not any(chat.has_template(name) for name in chat.names):
        raise InputError("--model: has no chat template, and no --adapter has one; use mlx-lora generate")
    if chat.system and chat.has_template(chat.name):
        try:
            chat.check_system()
        except InputError as error:
            raise InputError(f"--system-prompt: {error}") from None


def talk(lines: ChatLines, chat: Conversation) -> None:
    """Read lines until Ctrl-D or Ctrl-C at the prompt, or the end of standard input."""
    read = reader()
    console.echo(f"{chat.name} answers; /help lists the commands")
    with contextlib.suppress(EOFError, KeyboardInterrupt), interrupts(lines.interrupt):
        while lines.take(read(f"{chat.name}> ")):
            pass
        return
    if sys.stdin.isatty():
        console.echo()  # so that the shell's prompt begins a new line


@contextlib.contextmanager
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


def reader() -> Callable[[str], str]:
    """Return a function that reads a line, on a terminal with a prompt and line editing."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  gives input() its editing and history
        return input

    def read(prompt: str) -> str:
        if sys.stdin.isatty():
            click.echo(prompt, nl=False, err=True)
        line = sys.stdin.buffer.readline()
        if not line:
            raise EOFError
        return line.decode(errors="surrogateescape").rstrip("\r\n")

    return read


def screen() -> Screen:
    """Return a screen with answers on standard output, unchanged in a pipe, and all else on standard error."""
    terminal = sys.stdout.isatty()

    def write(text: str) -> None:
        click.echo(shown(text) if terminal else text, nl=False)

    def figures(line: str) -> None:
        if sys.stderr.isatty():
            console.echo(click.style(line, dim=True) if console.wants_color() else line)

    return Screen(write, console.echo, lambda line: console.echo("Error: " + console.printable(line)), figures)


def shown(text: str) -> str:
    """Return a model's text without control characters of terminals."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}" for c in text)


if __name__ == "__main__":
    main()
