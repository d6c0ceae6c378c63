"""The terminal chat: every answer is what `generate` says, and whatever is typed, it goes on."""

from __future__ import annotations

import io
import json
import os
import select
import signal
import subprocess
import sys
import time

import pytest
from byte_tokenizer import byte_tokenizer
from conftest import tiny_model, write_folder
from make_adapters import OWN_TEMPLATE, make_three
from run_cli import Ran, run
from serving_process import ROOT

from mlx_lora.cli.chat import ChatSession, figures_together, shown
from mlx_lora.config.settings import ModelSettings
from mlx_lora.engine.adapter_store import AdapterSource
from mlx_lora.engine.engine import Engine, Limits
from mlx_lora.models.generator import Sampling
from mlx_lora.models.load import load_base
from mlx_lora.utils.errors import RunError

FIRST, SECOND = "Wherefore art thou?", "And who am I?"
COUNT = 20
BYTES = 256  # tokens of the tiny models that are bytes; the control tokens follow


def byte_model():
    """A tiny model that never writes a control token: in a history that would be its text, and so another prompt."""
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight[BYTES:] = 0.0  # a score of 0, below the highest of 256 others
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = {"tie_word_embeddings": False, "max_position_embeddings": 10**6}
    return write_folder(tmp_path_factory.mktemp("long") / "tiny", byte_model(), config)


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    return make_three(folder, tmp_path_factory.mktemp("adapters"))


# A random model's words hang on the last bits, in which a batch and a single row differ in bfloat16.
EXACT = ("--dtype", "float32")


@pytest.fixture
def talk(folder, adapters, monkeypatch):
    """Run the command with lines on standard input."""

    def talk(*lines: str | bytes, flags: tuple = (), names: tuple[str, ...] = ("bard", "tutor"), model=folder) -> Ran:
        typed = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed)))
        named = [flag for name in names for flag in ("--adapter", f"{name}={adapters[name]}")]
        return run("chat", "--model", model, *named, "--max-tokens", COUNT, *EXACT, *flags)

    return talk


@pytest.fixture(scope="module")
def said(folder, adapters):
    """What `generate` says to a whole conversation."""

    def said(adapter: str | None, *turns: str, system: str | None = None, count: int = COUNT) -> str:
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        template = {"chat_template": OWN_TEMPLATE} if adapter == "tutor" else {}
        text = byte_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template)
        extra = ("--adapter-path", adapters[adapter]) if adapter else ()
        ran = run(
            "generate", "--model", folder, *extra, "-p", text, "-m", count, "--ignore-chat-template", "--json", *EXACT
        )
        return json.loads(ran.out)["text"].removeprefix(" ")  # an answer begins anew, a continuation does not

    return said


def test_everyone_says_what_generate_says(talk, said, folder, adapters):
    ran = talk(FIRST, "/reset", "/adapter base", FIRST, "/reset", "/adapter tutor", FIRST)
    meant = [said(name, FIRST) for name in ("bard", None, "tutor")]
    assert len(set(meant)) == 3, "they must differ for this to show anything"
    assert ran.code == 0
    assert ran.out == "".join(f"{text}\n" for text in meant), "and nothing else on standard output"
    by_prompt = run("generate", "--model", folder, "--adapter-path", adapters["bard"], "-p", FIRST, "-m", COUNT, *EXACT)
    assert by_prompt.out == f"{meant[0]}\n"
    assert talk(FIRST, names=()).out == f"{meant[1]}\n", "without adapters the base answers"
    assert talk(f"//{FIRST}").out == f"{said('bard', '/' + FIRST)}\n"


def test_a_conversation_goes_on_under_another_adapter(talk, said):
    one = said("bard", FIRST)
    two = said("tutor", FIRST, one, SECOND)
    assert not any(token in one + two for token in byte_tokenizer().get_added_vocab())
    three = said(None, FIRST, one, SECOND, two, FIRST)
    assert talk(FIRST, "/adapter tutor", SECOND, "/adapter tiny", FIRST).out == f"{one}\n{two}\n{three}\n"
    assert two != said("tutor", SECOND), "the history counts"


def test_a_comparison_is_the_separate_answers_and_leaves_no_trace(talk, said):
    one, after = said("bard", FIRST), said("bard", FIRST, said("bard", FIRST), SECOND)
    answers = {name or "base": said(name, FIRST, one, SECOND) for name in (None, "bard", "tutor")}
    assert len(set(answers.values())) == 3
    compared = "".join(f"[{name}]\n{text}\n\n" for name, text in answers.items())
    assert talk(FIRST, f"/compare {SECOND}", SECOND).out == f"{one}\n{compared}{after}\n"
    some = "".join(f"[{name}]\n{answers[name]}\n\n" for name in ("tutor", "base"))
    assert talk(FIRST, f"/compare @tutor @base {SECOND}").out == f"{one}\n{some}"


def test_the_system_prompt(talk, said):
    plain, told, other = (said("bard", FIRST, system=system) for system in (None, "Rhyme.", "Shout."))
    assert len({plain, told, other}) == 3
    lines = (FIRST, "/reset", "/system Shout.", FIRST, "/reset", "/system", FIRST)
    assert talk(*lines, flags=("--system-prompt", "Rhyme.")).out == f"{told}\n{other}\n{plain}\n"


def test_adapters_are_loaded_and_listed(talk, said, adapters):
    ran = talk(f"/load clerk={adapters['clerk']}", "/adapters", "/adapter clerk", FIRST, "/adapters", "/help")
    assert ran.out == f"{said('clerk', FIRST)}\n"
    assert any(line.startswith("* bard: lora, rank 4") for line in ran.lines)
    assert any(line.startswith("* clerk: lora, rank 3") for line in ran.lines)
    assert any(line.startswith("  base: tiny") for line in ran.lines)
    for name in ("adapter NAME", "adapters", "compare TEXT", "load NAME=DIR", "reset", "system TEXT", "help", "quit"):
        assert any(line.startswith(f"/{name}  ") for line in ran.lines), name
    blended = talk(FIRST, "/adapter mix", "/reset", FIRST, flags=("--blend", "mix=bard:1.0,tutor:0.0"))
    assert blended.out == f"{said('bard', FIRST)}\n" * 2


@pytest.mark.parametrize(("line", "words"), [
    ("/sing", "/sing: no such command; /help lists them"),
    ("/", "/: no such command"),
    ("/adapter", "/adapter: write it as /adapter NAME"),
    ("/adapter nobody", "base, bard, tutor"),
    ("/adapters all", "/adapters all: write it as /adapters"),
    ("/reset now", "/reset now: write it as /reset"),
    ("/compare", "/compare: write it as /compare TEXT"),
    ("/compare @bard", "nothing to answer"),
    ("/compare @nobody Who?", "no adapter 'nobody'"),
    ("/load clerk", "/load clerk: write it as NAME=DIR"),
    ("/load clerk=nowhere", "nowhere"),
    ("/load base=nowhere", "/load base: that is the base's own name"),
    ("/load a/b=nowhere", "letters, digits"),
    (b"\xff\xfe", "not UTF-8"),
    ("/\x1b[2J", r"/\x1b[2J: no such command"),
])  # fmt: skip
def test_a_bad_line_gets_one_line_and_the_chat_goes_on(talk, said, line, words):
    one = said("bard", FIRST)
    ran = talk(FIRST, line, SECOND)
    assert ran.code == 0
    assert ran.out == f"{one}\n{said('bard', FIRST, one, SECOND)}\n", "as if the line had not been there"
    errors = [printed for printed in ran.lines if "Error" in printed]
    assert len(errors) == 1, ran.err
    assert words in errors[0]


def test_empty_lines_and_the_end(talk, said):
    assert talk("", "  ", FIRST, "/quit", SECOND).out == f"{said('bard', FIRST)}\n"
    assert talk() == (0, "", talk().err)


@pytest.mark.long
def test_a_conversation_longer_than_the_context_is_kept(talk, said, tmp_path, adapters):
    model = byte_model()
    short = write_folder(tmp_path / "tiny", model, {"tie_word_embeddings": False, "max_position_embeddings": 200})
    first = said("bard", FIRST)
    ran = talk(FIRST, "x" * 200, SECOND, model=short)
    assert ran.out == f"{first}\n{said('bard', FIRST, first, SECOND)}\n"
    (error,) = [line for line in ran.lines if "Error" in line]
    assert "the model's context is 200" in error
    assert "/reset" in error
    room = 200 - len(byte_tokenizer().apply_chat_template(
        [{"role": "user", "content": FIRST}], add_generation_prompt=True, return_dict=False))  # fmt: skip
    cut = talk(FIRST, model=short, flags=("--max-tokens", 1000))
    assert cut.out == f"{said('bard', FIRST, count=room)}\n"
    assert "because the model's context is full" in cut.err
    assert "ends where" not in ran.err


def test_sampling(talk):
    def drawn(*flags):
        return talk(FIRST, "/reset", FIRST, flags=("--temp", 2, *flags)).out

    one = drawn("--seed", 5)
    assert one == drawn("--seed", 5)
    assert one != drawn("--seed", 6)
    assert one != drawn("--seed", 5, "--top-p", 0.2)
    assert one != talk(FIRST, "/reset", FIRST).out
    assert one[: len(one) // 2] == one[len(one) // 2 :], "a seed is every answer's"
    assert one != drawn()


@pytest.mark.parametrize(("arguments", "words"), [
    (("--adapter", "base={bard}"), "--adapter base: that is the base's own name"),
    (("--adapter", "tiny={bard}"), "--adapter tiny: that is the base's own name"),
    (("--adapter", "bard"), "write it as NAME=DIR"),
    (("--adapter", "x=nowhere"), "nowhere"),
    (("--blend", "m=bard:1"), "not loaded"),
    (("--temp", "nan"), "--temp nan"),
    (("--max-tokens", 0), "--max-tokens"),
    (("--seed", -1), "--seed"),
    (("--template", "none"), "--model: has no chat template"),
    (("--template", "{{ messages[-1].content }}", "--system-prompt", "x"),
     "--system-prompt: base: "),
    (("--template", "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}?", "--system-prompt", "x"),
     "refuses the conversation (no)"),
])  # fmt: skip
def test_bad_starts_are_one_line(folder, adapters, tmp_path, arguments, words):
    words_of = [
        str(word).format(**adapters) if "{%" not in str(word) and "{{" not in str(word) else word for word in arguments
    ]
    model = folder
    if words_of[0] == "--template":
        _, template, *words_of = words_of
        model = write_folder(tmp_path / "m", tiny_model(), chat_template=None if template == "none" else "chatml")
        if template != "none":
            (model / "chat_template.jinja").write_text(template)
    ran = run("chat", "--model", model, *words_of)
    assert (ran.code, len(ran.lines), ran.out) == (2, 1, ""), ran.err
    assert words in ran.err


def test_a_base_without_a_template_leaves_the_chat_to_its_adapters(talk, said, tmp_path, folder, adapters, monkeypatch):
    model = byte_model()
    bare = write_folder(tmp_path / "tiny", model, {"tie_word_embeddings": False}, chat_template=None)
    answer = said("tutor", FIRST)
    ran = talk("/compare " + FIRST, "/adapter base", FIRST, model=bare, names=("tutor",))
    assert ran.out == f"[tutor]\n{answer}\n\n"
    assert "base: has no chat template" in ran.err


# --- the conversation without a terminal


@pytest.fixture
def chat(folder, adapters):
    engine = Engine(lambda: load_base(ModelSettings(model=str(folder))), Limits())
    engine.call(lambda store: store.add({"bard": AdapterSource(adapters["bard"])})).result(60)
    yield ChatSession(engine, COUNT, 10_000, Sampling(temperature=0))
    engine.close()


def finished(answer):
    return "".join(answer), answer


def test_earlier_turns_are_not_computed_again(chat):
    _, first = finished(chat.ask(FIRST, "bard"))
    chat.keep(FIRST, first)
    _, second = finished(chat.ask(SECOND, "bard"))
    assert first.usage.cached == 0
    assert second.usage.cached >= first.usage.prompt
    assert f"{COUNT} tokens, " in second.figures()
    assert f"{second.usage.cached} of them cached" in second.figures()
    assert finished(chat.ask(SECOND, None))[1].usage.cached == 0, "another adapter's keys are of no use"


def test_rates_of_answers_that_are_made_at_once_are_those_of_all_together(chat):
    answers = [chat.ask(FIRST, adapter) for adapter in ("bard", None)]
    time.sleep(0.5)  # read later than they came, as a second answer is
    for answer in answers:
        finished(answer)
        assert answer.figures(alone=False).startswith(f"{answer.name}: {COUNT} tokens; ")
        assert " tokens/s; " in answer.figures()
    (first_a, last_a), (first_b, last_b) = (answer.span_s for answer in answers)
    rate = (2 * COUNT - 2) / (max(last_a, last_b) - min(first_a, first_b))
    assert figures_together(answers) == f"2 answers at once: {2 * COUNT} tokens, {rate:.1f} tokens/s together"


def test_an_answer_stopped_before_its_first_word_is_not_kept(chat):
    answer = chat.ask(FIRST, "bard")
    answer.stop()
    assert (finished(answer)[0], answer.finish, answer.figures()) == ("", "stopped", "bard: stopped")
    chat.keep(FIRST, answer)
    assert chat.turns == []
    deadline = time.monotonic() + 30
    while chat.engine.unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert chat.engine.unfinished == 0, "its row is free"


def test_a_stopped_answer_is_kept_as_far_as_it_came(chat, said):
    chat.max_tokens, chat.context = 10**5, 10**6
    answer, pieces = chat.ask(FIRST, "bard"), []
    for piece in answer:
        pieces.append(piece)
        if len(pieces) == 5:
            answer.stop()
    assert len(pieces) == 5, "nothing comes after it"
    chat.keep(FIRST, answer)
    part = "".join(pieces)
    assert chat.turns == [{"role": "user", "content": FIRST}, {"role": "assistant", "content": part}]
    chat.max_tokens = COUNT
    assert finished(chat.ask(SECOND, "bard"))[0] == said("bard", FIRST, part, SECOND)


def test_an_engine_that_failed_is_a_failure(chat, monkeypatch):
    import threading

    monkeypatch.setattr(threading, "excepthook", lambda defect: None)
    with pytest.raises(ZeroDivisionError):
        chat.engine.call(lambda store: 1 // 0).result(60)
    chat.engine._thread.join(60)  # before the hook above is taken away again
    with pytest.raises(RunError, match="the engine failed"):
        chat.ask(FIRST, "bard")


def test_a_terminal_obeys_no_model():
    assert shown("a\x1b[2Jb\x07\x9b1m\r\n\tè…🙂") == "a\\x1b[2Jb\\x07\\x9b1m\\x0d\n\tè…🙂"


# --- in a process of its own


@pytest.mark.slow
def test_no_web_server_is_needed(folder):
    blocked = "import sys; sys.modules.update(dict.fromkeys(('starlette', 'uvicorn', 'anyio')))"
    code = f"{blocked}; from mlx_lora.__main__ import main; main(['chat', '--model', sys.argv[1], '-m', '3'])"
    done = subprocess.run(
        [sys.executable, "-c", code, folder], input=FIRST + "\n", capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip("\n")


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it(folder):
    command = [sys.executable, "-m", "mlx_lora", "chat", "--model", str(folder), "-m", "400"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        process.stdin.write(f"{FIRST}\n".encode() * 50)
        process.stdin.close()
        told = process.stderr.read().decode()
        assert "Error" not in told
        assert "Traceback" not in told
        assert process.wait(60) == 1


class Terminal:
    """The command on a terminal of its own."""

    def __init__(self, *arguments: object):
        self.screen, theirs = os.openpty()
        self.seen = ""
        command = [sys.executable, "-m", "mlx_lora", "chat", *map(str, arguments)]
        environment = {**os.environ, "TERM": "dumb"}
        # Tests that a shell runs in the background ignore SIGINT, and what they start would too.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True
            )
        finally:
            signal.signal(signal.SIGINT, before)
        os.close(theirs)

    def until(self, words: str, more: int = 0) -> str:
        """Wait for words, and so many characters after them; return and forget what was seen up to there."""
        deadline = time.monotonic() + 60
        while words not in self.seen or len(self.seen) < self.seen.index(words) + len(words) + more:
            ready, _, _ = select.select([self.screen], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {words!r} in {self.seen!r}"
            try:
                self.seen += os.read(self.screen, 65536).decode(errors="replace")
            except OSError:  # the other end is closed
                raise AssertionError(f"ended before {words!r}: {self.seen!r}") from None
        end = self.seen.index(words) + len(words)
        found, self.seen = self.seen[:end], self.seen[end:]
        return found

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.mark.long
def test_ctrl_c_stops_the_answer_and_ends_at_the_prompt(folder, adapters):
    named = ("--adapter", f"bard={adapters['bard']}")
    with Terminal("--model", folder, *named, "--max-tokens", 10**5) as terminal:
        terminal.until("bard> ")
        terminal.type(FIRST + "\n")
        terminal.until(FIRST + "\r\n", more=200)
        terminal.process.send_signal(signal.SIGINT)
        answer = terminal.until("bard: stopped")
        assert len(answer) > 200
        assert "\x1b" not in answer
        assert "\\x" in answer, "what a terminal would obey is written out"
        terminal.until("bard> ")
        terminal.type("/compare " + SECOND + "\n")
        terminal.until("[base]", more=50)
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("base: stopped\r\n\r\nbard> ")
        terminal.type("/adapters\n")
        terminal.until("* bard")
        terminal.until("bard> ")
        time.sleep(0.3)  # readline misses a signal that comes between its prompt and its waiting for keys
        terminal.process.send_signal(signal.SIGINT)
        assert terminal.process.wait(60) == 0


@pytest.mark.long
def test_a_terminal_shows_speed_and_ctrl_d_ends_it(folder):
    with Terminal("--model", folder, "--max-tokens", 8) as terminal:
        terminal.until("base> ")
        terminal.type(FIRST + "\n")
        terminal.until("base: 8 tokens, ")
        assert "tokens/s; " in terminal.until("of them cached")
        terminal.until("base> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
