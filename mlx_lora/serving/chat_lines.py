"""Handle the lines that a user types into a chat: questions, and commands that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from mlx_lora.serving.adapter_names import check_names, named_source
from mlx_lora.serving.adapter_store import UnknownAdapter
from mlx_lora.serving.conversation import Answer, Conversation, figures_together
from mlx_lora.serving.requests import Stopped, failed_words
from mlx_lora.system.errors import InputError, RunError


@dataclass(frozen=True)
class Screen:
    """The functions that show output.

    Attributes:
        write: shows pieces of answers, which include line ends.
        say: shows a line about the chat.
        complain: shows an error's line.
        figures: shows a line with counts and speed; some screens leave it out.
    """

    write: Callable[[str], None]
    say: Callable[[str], None]
    complain: Callable[[str], None]
    figures: Callable[[str], None]


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        usage: how to write it.
        words: what it does.
        run: takes the text after its name; returns True to end the chat.
        wants: whether text after the name is required (True), optional (None) or not allowed (False).
    """

    usage: str
    words: str
    run: Callable[[str], bool | None]
    wants: bool | None


class ChatLines:
    """Runs the commands and asks the questions of each line."""

    def __init__(self, conversation: Conversation, screen: Screen):
        self._chat, self._screen = conversation, screen
        self._answering = self._stopped = False
        self._answers: list[Answer] = []
        self._commands = {
            "adapter": Command(
                "/adapter NAME", "lets NAME answer from now on; the name base stands for the base", self._adapter, True
            ),
            "adapters": Command("/adapters", "lists the base and the adapters", self._list, False),
            "compare": Command(
                "/compare TEXT",
                "lets the base and all adapters answer TEXT; their answers are not added to the chat; "
                "to choose some, write @NAME ... before TEXT",
                self._compare,
                True,
            ),
            "load": Command("/load NAME=DIR", "loads an adapter, or replaces one", self._load, True),
            "system": Command("/system TEXT", "sets the system prompt; without TEXT, removes it", self._system, None),
            "reset": Command("/reset", "empties the conversation", self._reset, False),
            "help": Command("/help", "shows this list", self._help, False),
            "quit": Command("/quit", "ends the chat, as Ctrl-D does; Ctrl-C stops an answer", self._quit, False),
        }

    def take(self, line: str) -> bool:
        """Handle a line; return False if it ends the chat.

        Raises:
            RunError: the engine has failed.
        """
        try:
            line.encode()
        except UnicodeEncodeError:  # bytes that are not UTF-8 arrive as lone surrogates
            self._screen.complain("the line is not UTF-8; set the terminal, or save the file, as UTF-8")
            return True
        if not line.strip():
            return True
        try:
            if line.startswith("/") and not line.startswith("//"):
                return not self._command(*line[1:].strip().partition(" ")[::2])
            self._question(line[1:] if line.startswith("//") else line)
        except UnknownAdapter as error:
            self._screen.complain(f"adapter {error}: it is no longer loaded; /adapters lists those that are")
        except InputError as error:
            self._screen.complain(str(error))
        return True

    def interrupt(self) -> bool:
        """Stop the current answers; return False if there are none. A signal handler may call this."""
        if not self._answering:
            return False
        self._stopped = True
        for answer in self._answers:
            answer.stop()
        return True

    def _command(self, name: str, rest: str) -> bool | None:
        command, rest = self._commands.get(name), rest.strip()
        if command is None:
            raise InputError(f"/{name}: no such command; /help lists them, and //{name} sends it to the model")
        if command.wants is not None and command.wants != bool(rest):
            raise InputError(f"/{name} {rest}".strip() + f": write it as {command.usage}")
        return command.run(rest)

    def _question(self, text: str) -> None:
        with self._answers_of(text, [self._chat.adapter]) as (answer,):
            self._show(answer)
            self._chat.keep(text, answer)

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
                self._screen.write(f"[{answer.name}]\n")
                self._show(answer, alone=len(answers) == 1)
                self._screen.write("\n")
            if len(answers) > 1 and not self._stopped:
                self._screen.figures(figures_together(answers))

    @contextmanager
    def _answers_of(self, text: str, adapters: list[str | None]) -> Iterator[list[Answer]]:
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

    def _show(self, answer: Answer, alone: bool = True) -> None:
        try:
            for piece in answer:
                self._screen.write(piece)
        finally:
            self._screen.write("\n")
        self._screen.figures(answer.figures(alone))
        if answer.finish == "length" and answer.cut_by_context:
            self._screen.say(
                "(the answer ends here because the model's context is full; /reset empties the conversation)"
            )

    def _adapter(self, name: str) -> None:
        self._chat.adapter = self._chat.adapter_named(name)

    def _list(self, rest: str) -> None:
        for name in self._chat.names:
            card = self._chat.engine.store.cards.get(name)
            about = card.describe() if card else self._chat.base_names[-1]
            self._screen.say(f"{'*' if name == self._chat.name else ' '} {name}: {about}")

    def _load(self, rest: str) -> None:
        try:
            name, source = named_source("/load", rest)
            check_names("/load", [name], self._chat.base_names)
            card = self._chat.engine.call(lambda store: store.add({name: source})).result()[0]
        except (OSError, RunError) as error:  # an error of the disk or the hub, so the chat can continue
            raise InputError(f"/load {rest}: {error}") from None
        except Stopped:
            raise RunError(failed_words(self._chat.engine.failure)) from None
        self._screen.say(f"{name}: {card.describe()}; type /adapter {name} to use it")

    def _system(self, text: str) -> None:
        self._chat.system = text or None
        self._screen.say("the system prompt is set" if text else "there is no system prompt now")

    def _reset(self, rest: str) -> None:
        self._chat.turns.clear()
        self._screen.say("the conversation is empty")

    def _help(self, rest: str) -> None:
        width = max(len(command.usage) for command in self._commands.values())
        for command in self._commands.values():
            self._screen.say(f"{command.usage:{width}}  {command.words}")

    def _quit(self, rest: str) -> bool:
        return True
