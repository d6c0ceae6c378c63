"""Chat templates: the process in which those of strangers are rendered, and one day for the whole of a run where a template shows today's date."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import jinja2
import numpy as np
import pytest
import yaml
from byte_tokenizer import CHATML, TEMPLATES, byte_tokenizer
from child_environment import child_environment
from refusing import refuses
from row_files import write_rows
from run_cli import run, succeeds

from mlx_lora.config.settings import DataSettings, LoopSettings
from mlx_lora.data import sandbox, template_worker
from mlx_lora.data import tokenize as encode
from mlx_lora.data.examples import Conversation
from mlx_lora.data.load import load_data, load_eval_set
from mlx_lora.data.render import Renderer
from mlx_lora.data.sandbox import is_known, render_chat
from mlx_lora.data.tokenize import Encoder
from mlx_lora.trainer import run_folder
from mlx_lora.utils.text import start_mark

ROOT = Path(__file__).parents[2]
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHOWS = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


def shown(content: str = "a") -> str:
    return render_chat(byte_tokenizer(), [{"role": "user", "content": content}], SHOWS)


def process() -> subprocess.Popen[bytes]:
    """Return the worker, which runs."""
    assert shown() == "a"
    assert sandbox.WORKER._process is not None
    return sandbox.WORKER._process


def wait_until(happened) -> None:
    start = time.monotonic()
    while not happened():
        assert time.monotonic() - start < 60
        time.sleep(0.01)


@pytest.fixture
def known_templates(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("known_templates")


def test_the_list_of_known_templates_has_those_of_the_tests(known_templates):
    """If this fails: python scripts/known_templates.py, after reading the new template."""
    lines = known_templates.KNOWN.read_text().splitlines()
    names = dict(line.split(maxsplit=1) for line in lines)
    for folder in known_templates.FOLDERS:
        wanted = known_templates.hashes_of(folder)
        assert wanted
        assert {digest: names.get(digest) for digest in wanted} == wanted
        listed = {name for name in names.values() if name.startswith(f"{folder.parent.name}/")}
        assert listed == set(wanted.values()), "no older version"
    assert is_known((TEMPLATES / "gemma.jinja").read_text())
    assert not is_known((TEMPLATES / "gemma.jinja").read_text() + " ")


def test_the_worker_only_starts_for_templates_that_are_not_known():
    sandbox.WORKER.end()
    for file in (*TEMPLATES.iterdir(), *(ROOT / "mlx_lora" / "data" / "templates").glob("*.jinja")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sandbox.WORKER, "outcomes", lambda *_: pytest.fail("asked"))
            render_chat(byte_tokenizer(bos=True), TURNS, file.read_text())
    assert sandbox.WORKER._process is None
    text = (TEMPLATES / "plain.jinja").read_text()
    assert render_chat(byte_tokenizer(bos=True), TURNS * 500, text).count("b") >= 500
    assert sandbox.WORKER._process is not None, "a long conversation may take long with any template"


ODD = [
    {"role": "user", "content": "é \ud800 \n", 3: (1, 2.5, float("inf"), 10**30), "x": {"a": [None, True, b"", {1}]}},
    {"role": "assistant", "content": "😀", "reasoning": "hm"},
]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages }}{{ tools }}{{ documents }}{{ add_generation_prompt }}{{ eos_token }}{{ strftime_now('%d %b %Y %H') }}",
        "{{ messages[0][3] }}{{ messages[1] | tojson }}{{ messages[1].thinking }}",
        "{{ messages[0].content }}",
        "{{ raise_exception('not\n you') }}",
        "{{ raise_exception('') }}",
        "{{ raise_exception(messages[1]) }}",
        "\n\n{% if %}",
        "{{ 1 | nothing }}",
        "{{ 1 / 0 }}{# #}",
        "{{ {}['a']['b'] }}",
        "{{ 'a' + 1 }}",
        "{{ [1].remove(2) }}",
        "{{ 'a'.encode().decode('utf-16') }}",
        "{% include 'x' %}",
    ],
)
def test_the_worker_returns_and_raises_what_this_process_would(template, monkeypatch):
    found = []
    for known in (False, True):
        monkeypatch.setattr(sandbox, "is_known", lambda _, known=known: known)
        try:
            found.append(render_chat(byte_tokenizer(bos=True), ODD, template, [{"name": "f"}], True))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            kinds = (jinja2.TemplateSyntaxError, jinja2.TemplateError, TypeError, ValueError)
            kind = next(kind for kind in kinds if isinstance(error, kind))
            found.append((kind, str(error), getattr(error, "lineno", None)))
    assert found[0] == found[1]


def test_a_worker_that_was_killed_is_started_again():
    before = process()
    before.kill()
    assert shown() == "a", "killed between two conversations"
    assert process().pid != before.pid
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(render_chat, byte_tokenizer(), TURNS, ENDLESS)
        for _ in range(2):  # the first time, it is tried again
            wait_until(lambda: sandbox.WORKER._process and sandbox.WORKER._process.poll() is None)
            time.sleep(0.3)
            sandbox.WORKER._process.kill()
            time.sleep(0.3)
        refuses("takes more than", waiting.result, 60)
    assert shown() == "a"


def test_a_worker_that_cannot_work_is_an_error(monkeypatch):
    for command, words in (
        (["/nowhere"], "does not start"),
        ([sys.executable, "-c", "exit(3)"], "exit code 3"),
        (["true"], "exit code 0"),
    ):
        sandbox.WORKER.end()
        monkeypatch.setattr(sandbox, "COMMAND", command)
        refuses(words, shown)
    monkeypatch.undo()
    assert shown() == "a"


def test_an_interrupted_conversation_leaves_no_answer_for_the_next():
    process()
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            render_chat(byte_tokenizer(), TURNS, "{{ 'x' * 9 }}" + ENDLESS)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [shown(str(n)) for n in range(5)] == ["0", "1", "2", "3", "4"]


def test_a_worker_that_was_stopped_is_given_up(monkeypatch):
    process().send_signal(signal.SIGSTOP)
    monkeypatch.setattr(sandbox, "PATIENCE_S", 0.5)
    refuses("takes more than", shown)
    monkeypatch.undo()
    assert shown() == "a"


@pytest.mark.skipif(shutil.which("ps") is None, reason="asks ps")
def test_memory_is_looked_at_where_the_system_does_not_limit_it(monkeypatch):
    sandbox.WORKER.end()
    monkeypatch.setattr(sandbox, "RENDER_BYTES", 8 << 30)
    assert shown() == "a"  # starts a worker that has room
    monkeypatch.setattr(sandbox, "RENDER_BYTES", 128 << 20)
    monkeypatch.setattr(sandbox, "LIMITS_MEMORY", False)
    start = time.monotonic()
    refuses("128 MB", render_chat, byte_tokenizer(), TURNS, "{% set x = 'a' * 300000000 %}" + ENDLESS)
    assert time.monotonic() - start < sandbox.RENDER_S
    sandbox.WORKER.end()


def test_threads_share_the_worker_and_get_their_own_answers():
    worker = process()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(shown, map(str, range(200)))) == [str(n) for n in range(200)]
    assert process() is worker
    assert not [thread for thread in threading.enumerate() if "template" in thread.name]


def test_a_forked_process_has_a_worker_of_its_own():
    worker = process()
    child = os.fork()
    if child == 0:
        code = 0 if shown("child") == "child" and sandbox.WORKER._process.pid != worker.pid else 1
        sandbox.WORKER.end()
        os._exit(code)
    assert [shown(str(n)) for n in range(20)] == [str(n) for n in range(20)]
    assert os.waitpid(child, 0)[1] == 0
    assert process() is worker


PARENT = """
import sys, os
from byte_tokenizer import byte_tokenizer
from mlx_lora.data import sandbox
{before}tokenizer, turns = byte_tokenizer(), [{{"role": "user", "content": "a"}}]
print(sandbox.render_chat(tokenizer, turns, "{{{{ messages[0].content }}}}b"), sandbox.WORKER._process.pid, flush=True)
if len(sys.argv) > 1:
    sandbox.render_chat(tokenizer, turns, sys.argv[1])
"""


def started(*arguments: str, before: str = "") -> subprocess.Popen[str]:
    """Start a process that renders; `before` is what it does first."""
    code = PARENT.format(before=before)
    environment = child_environment(ROOT / "tests")
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.long
def test_the_worker_ends_with_its_parent():
    """Also with one that was killed while the worker rendered."""
    with started(ENDLESS) as parent:
        number = int(parent.stdout.readline().split()[1])
        assert start_mark(number)
        parent.kill()
    wait_until(lambda: start_mark(number) is None)  # it runs until its own time is over


@pytest.mark.long
def test_the_worker_needs_neither_the_folder_nor_the_environment_of_its_parent(tmp_path):
    for name in ("json", "marshal", "jinja2", "signal", "resource"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(9)")
    place = tmp_path / "place"
    place.mkdir()
    leaves = f"os.chdir({str(place)!r}); os.rmdir({str(place)!r}); os.environ['PYTHONPATH'] = {str(tmp_path)!r}\n"
    with started(before=leaves) as parent:  # that ends by itself
        text, number = parent.stdout.readline().split()
    assert (text, parent.returncode) == ("ab", 0)
    assert start_mark(int(number)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_worker_has_only_its_pipes():
    sandbox.WORKER.end()
    inherited = os.dup(1)
    os.set_inheritable(inherited, True)
    try:
        number = process().pid
    finally:
        os.close(inherited)
    assert len(os.listdir(f"/proc/{number}/fd")) == 3
    limits = Path(f"/proc/{number}/limits").read_text()
    assert f"Max address space         {sandbox.RENDER_BYTES} " in limits


def chats(count: int) -> list[Conversation]:
    return [
        Conversation([{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"a{n}"}])
        for n in range(count)
    ]


@pytest.mark.parametrize("name", ["llama3", "plain", "qwen3_thinking"])
def test_rows_are_rendered_together_and_as_one_after_the_other(name, monkeypatch):
    text, tokenizer = (TEMPLATES / f"{name}.jinja").read_text(), byte_tokenizer(bos=True)
    asked: list[int] = []
    outcomes = sandbox._Worker.outcomes

    def counted(self, rows, *rest):
        asked.append(len(rows))
        return outcomes(self, rows, *rest)

    monkeypatch.setattr(sandbox._Worker, "outcomes", counted)
    found = Encoder(tokenizer, text + "{# not known #}", max_seq_length=256).encode(chats(1000))
    assert len([rows for rows in asked if rows == 1]) < 200
    assert max(asked) >= 100
    wanted = Encoder(tokenizer, text, max_seq_length=256).encode(chats(1000))
    assert found.rows.fingerprint == wanted.rows.fingerprint


def test_rows_that_a_template_refuses_are_dropped_with_the_reason():
    template = "{% if messages[0].content == 'q3' %}{{ raise_exception('not q3') }}{% endif %}" + SHOWS
    found = Encoder(byte_tokenizer(), template, max_seq_length=256).encode(chats(10))
    assert list(found.dropped) == [3]
    assert "not q3" in found.dropped[3]


def test_slow_rows_are_not_rendered_ahead(monkeypatch):
    rows = [json.loads("{}")] * 5
    encoded = [template_worker.marshal.dumps(row) for row in rows]
    monkeypatch.setattr(template_worker, "AHEAD_CHARACTERS", 2)
    assert template_worker.answer(encoded, "xy", {}, "2026-01-05", 10.0) == ["xy", "xy"]
    monkeypatch.setattr(template_worker, "AHEAD_S", -1.0)
    assert template_worker.answer(encoded, "xy", {}, "2026-01-05", 10.0) == ["xy"]
    renderer = Renderer(byte_tokenizer(), SHOWS + "{# #}")
    renderer.render_ahead(chats(3))
    assert (len(renderer._ahead), renderer.render(chats(1)[0]).rows[0].text) == (3, "q0a0")


def test_long_texts_of_a_template_do_not_add_up(monkeypatch):
    """A template makes each short row long; what is beyond --max-seq-length is not kept."""
    monkeypatch.setattr("mlx_lora.data.tokenize.BATCH_CHARACTERS", 100_000)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ 'x' * 20000 }}"
    peaks = []
    encoder = Encoder(byte_tokenizer(), template, max_seq_length=8, mask_prompt=False)
    batch = encoder._render_batch

    def watched(*given):
        made = batch(*given)
        peaks.append(sum(len(one.text) for _, one in made[1]))
        return made

    encoder._render_batch = watched
    assert len(encoder.encode(chats(60)).truncated) == 60
    assert max(peaks) < 500_000
    assert sum(peaks) > 60 * 20_000


DATED = "{{ 'On ' + strftime_now('%d %b %Y') + ': ' }}" + CHATML
FIRST, NEXT = date(2026, 1, 5), date(2026, 1, 6)


def clock(monkeypatch, day):
    """Let it be that day for a run that starts now."""
    monkeypatch.setattr(run_folder, "date", type("Day", (date,), {"today": staticmethod(lambda: day)}))


def write_chats(path, count=12):
    return write_rows(path, [{"instruction": f"say {n}", "output": "abc" * (1 + n % 5)} for n in range(count)])


def test_a_day_can_be_given_and_is_todays_otherwise():
    turns = [{"role": "user", "content": "q"}]
    text = "{{ strftime_now('%Y-%m-%d %H:%M') }}"
    assert render_chat(byte_tokenizer(), turns, text, day=FIRST) == "2026-01-05 00:00"
    before = date.today()
    assert render_chat(byte_tokenizer(), turns, text)[:10] in (before.isoformat(), date.today().isoformat())
    assert render_chat(byte_tokenizer(), turns, text, day=NEXT) == "2026-01-06 00:00"


def test_the_day_is_part_of_the_rows_and_of_the_cache_only_where_it_shows(tmp_path, monkeypatch, own_cache):
    settings = DataSettings(data=str(write_chats(tmp_path / "d.jsonl")))
    encodes = []
    inner = encode.Encoder.encode
    monkeypatch.setattr(encode.Encoder, "encode", lambda self, *given: encodes.append(1) or inner(self, *given))

    def load(template, day, **changed):
        return load_data(DataSettings(**{**settings.__dict__, **changed}), byte_tokenizer(template), 0, today=day)

    first, second = load(DATED, FIRST), load(DATED, NEXT)
    assert first.train.fingerprint != second.train.fingerprint
    assert first.train.fingerprint == load(DATED, NEXT, chat_date="2026-01-05").train.fingerprint
    assert (first.chat_day, second.chat_day) == (FIRST, NEXT)
    assert "On 05 Jan 2026: " in byte_tokenizer().decode(first.train.row(0)[0].tolist())
    assert any("2026-01-05" in note for note in first.report.notes)
    assert len(encodes) == 2  # the first day again is a hit
    plain, again = load(CHATML, FIRST), load(CHATML, NEXT)
    assert plain.train.fingerprint == again.train.fingerprint
    assert plain.chat_day is again.chat_day is None
    assert len(encodes) == 3  # one, of both days
    assert not any("date" in note for note in plain.report.notes)


def test_a_day_that_nothing_shows_or_that_is_none_is_refused(tmp_path):
    data = str(write_chats(tmp_path / "d.jsonl"))
    refuses("--chat-date 2026-01-05: ", load_data, DataSettings(data=data, chat_date="2026-01-05"), byte_tokenizer(), 0)
    ran = run("train", "--model", "m", "--data", data, "--adapter-path", tmp_path / "a", "--chat-date", "5 Jan")
    assert ran.code == 2
    assert "--chat-date '5 Jan': not a date" in ran.err


def test_an_evaluation_is_of_the_day_it_is_told(tmp_path):
    data = str(write_chats(tmp_path / "d.jsonl"))
    sets = [
        load_eval_set(data, DataSettings(chat_date=day), byte_tokenizer(DATED))
        for day in ("2026-01-05", "2026-01-06", "2026-01-05")
    ]
    assert sets[0].fingerprint == sets[2].fingerprint != sets[1].fingerprint


@pytest.mark.long
def test_a_run_goes_on_tomorrow_with_todays_date(tiny_folder, tmp_path, monkeypatch):
    (tmp_path / "dated.jinja").write_text(DATED)
    data = write_chats(tmp_path / "d.jsonl", 30)
    common = ("train", "--model", tiny_folder, "--data", data, "--chat-template", tmp_path / "dated.jinja",
              "--batch-size", 2, "--steps-per-eval", 0, "--save-every", 2, "--lr-schedule", "constant", "--sample-tokens", 0)  # fmt: skip
    for day, name, iters, *resume in ((FIRST, "a", 2), (NEXT, "a", 4, "--resume"), (FIRST, "b", 4)):
        clock(monkeypatch, day)
        succeeds(*common, "--adapter-path", tmp_path / name, "--iters", iters, *resume)
        assert yaml.safe_load((tmp_path / name / "run.yaml").read_text())["chat_date"] == "2026-01-05"
    factors = [(tmp_path / name / "adapters.safetensors").read_bytes() for name in "ab"]
    assert factors[0] == factors[1]
    # The paired inequality: another day is another run.
    clock(monkeypatch, NEXT)
    another = run(*common, "--adapter-path", tmp_path / "a", "--iters", 6, "--resume", "--chat-date", "2026-01-06")
    assert another.code == 2
    assert "from another run: the rows" in another.err


class OtherRank:
    """A rank whose clock is a day ahead, and whose first rank says what it says."""

    leads = False

    def from_first(self, value):
        assert value == NEXT.isoformat()
        return FIRST.isoformat()


def test_every_rank_has_the_first_ones_day(tmp_path, monkeypatch):
    clock(monkeypatch, NEXT)
    loop = LoopSettings(adapter_path=str(tmp_path))
    assert (run_folder.first_day(loop), run_folder.first_day(loop, OtherRank())) == (NEXT, FIRST)
    (tmp_path / "run.yaml").write_text("chat_date: 2026-01-05\n")  # YAML reads a day without quotes as a date
    assert run_folder.first_day(loop) == NEXT  # a new run
    resumed = LoopSettings(adapter_path=str(tmp_path), resume="auto")
    assert run_folder.first_day(resumed) == FIRST
    named = LoopSettings(adapter_path="elsewhere", resume=str(tmp_path / "checkpoints/step-000002"))
    assert run_folder.first_day(named) == FIRST
    for broken in ("chat_date: soon\n", "[1]", "{", ""):
        (tmp_path / "run.yaml").write_text(broken)
        assert run_folder.first_day(resumed) == NEXT


def test_arrays_differ_in_the_date_only(tmp_path):
    settings = DataSettings(data=str(write_chats(tmp_path / "d.jsonl")), valid_fraction=0.0)
    one, other = (load_data(settings, byte_tokenizer(DATED), 0, today=day).train for day in (FIRST, NEXT))
    assert np.array_equal(one.mask, other.mask)
    assert set((np.flatnonzero(one.tokens != other.tokens) - one.offsets[:-1]).tolist()) == {4}  # 5 or 6 in "On 05"
