"""A template that shows today's date shows one day for the whole of a run, on every rank and after every --resume."""

from __future__ import annotations

from datetime import date

import numpy as np
import yaml
from byte_tokenizer import CHATML, byte_tokenizer
from refusing import refuses
from row_files import write_rows
from run_cli import run, succeeds

from mlx_lora.config.settings import DataSettings, LoopSettings
from mlx_lora.data import tokenize as encode
from mlx_lora.data.load import load_data, load_eval_set
from mlx_lora.data.sandbox import render_chat
from mlx_lora.trainer import run_folder

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


def test_the_day_is_part_of_the_rows_and_of_the_cache_only_where_it_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
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
