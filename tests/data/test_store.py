"""Encoded data on disk: a hit equals a miss, whatever decides the arrays is in the key, damage is no hit."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from refusing import refuses
from row_files import write_rows
from tiers import by_default

from mlx_lora.config.settings import DataSettings
from mlx_lora.data import load as store
from mlx_lora.data import tokenize as encode
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.load import entry_folder, load_data, load_eval_set, read_entry, write_entry
from mlx_lora.data.tokenize import Encoder
from mlx_lora.utils import progress as long_task


@pytest.fixture
def cache(own_cache):
    return own_cache / "encoded"


@pytest.fixture
def encodes(monkeypatch):
    """Counts of the examples of each encoding that really took place."""
    calls = []
    encode = Encoder.encode

    def counted(self, examples, *rest):
        calls.append(len(examples))
        return encode(self, examples, *rest)

    monkeypatch.setattr(Encoder, "encode", counted)
    return calls


def write_chats(path, count=40, extra=""):
    rows = [{"instruction": f"say {i}", "output": f"here is {i}{extra} " * (1 + i % 7)} for i in range(count)]
    return DataSettings(data=str(write_rows(path, [*rows, rows[0], {"what": 1}])), valid_fraction=0.1)


def arrays(rows):
    return [rows.tokens.tolist(), rows.mask.tolist(), rows.offsets.tolist()]


def test_a_hit_equals_a_miss(tmp_path, cache, encodes):
    settings = write_chats(tmp_path / "a.jsonl")
    first, second = (load_data(settings, byte_tokenizer(), 0) for _ in range(2))
    assert encodes == [41]
    for name in ("train", "valid"):
        assert arrays(getattr(first, name)) == arrays(getattr(second, name))
    assert first.test is second.test is None
    assert (second.report, second.chat_template) == (first.report, first.chat_template)
    assert (second.report.duplicates, second.report.dropped_rows[0].line) == (1, 42)
    assert second.report.render() == first.report.render()
    assert not second.train.tokens.flags.owndata  # mapped, not read into memory
    assert len(list(cache.iterdir())) == 1


def test_the_same_bytes_under_another_path_are_a_hit_that_names_it(tmp_path, cache, encodes):
    settings = write_chats(tmp_path / "a.jsonl")
    load_data(settings, byte_tokenizer(), 0)
    (tmp_path / "b").mkdir()
    other = write_chats(tmp_path / "b" / "a.jsonl")
    assert load_data(other, byte_tokenizer(), 0).report.data == other.data
    assert len(encodes) == 1


def test_an_evaluation_set_is_kept_too(tmp_path, cache, encodes):
    settings = write_chats(tmp_path / "a.jsonl")
    first, second = (load_eval_set(settings.data, settings, byte_tokenizer()) for _ in range(2))
    assert arrays(first) == arrays(second)
    assert encodes == [41]
    load_data(settings, byte_tokenizer(), 0)  # splits are another thing
    assert encodes == [41, 41]


def test_what_decides_the_arrays_is_in_the_key(tmp_path, cache):
    path = tmp_path / "a.jsonl"
    settings = write_chats(path)
    files, tokenizer = {"train": [path]}, byte_tokenizer()
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    filed = replace(settings, chat_template=str(template))

    def key(settings=settings, tokenizer=tokenizer, seed=0, files=files, kind="splits"):
        return entry_folder(kind, files, settings, tokenizer, seed).name

    keys = [
        key(),
        key(seed=1),
        key(kind="evaluation"),
        key(files={"valid": [path]}),
        key(tokenizer=byte_tokenizer(chat_template="{{ messages }}")),
        key(tokenizer=byte_tokenizer(bos=True)),
        key(tokenizer=byte_tokenizer(eos="</s>")),
        key(tokenizer=byte_tokenizer(merges=[("a", "b")])),
        key(filed),
        *(
            key(replace(settings, **change))
            for change in (
                {"max_seq_length": 99},
                {"mask_prompt": False},
                {"valid_fraction": 0.2},
                {"strict": True},
                {"allow_special_tokens": True},
                {"data_format": "alpaca"},
                {"chat_template": "alpaca"},
            )
        ),
    ]
    template.write_text("{{ messages }} ", encoding="utf-8")
    keys.append(key(filed))
    write_chats(path, extra="!")
    keys.append(key())
    assert len(set(keys)) == len(keys)
    write_chats(path)
    assert key(tokenizer=byte_tokenizer()) == keys[0]


@pytest.mark.parametrize("file", ["train.tokens.npy", "train.mask.npy", "train.offsets.npy", "entry.json"])
@pytest.mark.parametrize("damage", by_default(["cut", "flip", "empty", "gone", "text"], "flip", "gone"))
def test_a_damaged_entry_is_made_again(tmp_path, cache, encodes, file, damage):
    settings = write_chats(tmp_path / "a.jsonl")
    first = load_data(settings, byte_tokenizer(), 0)
    path = next(cache.iterdir()) / file
    content = path.read_bytes()
    at = content.index(b'"fingerprints": {"train": "') + 30 if file == "entry.json" else len(content) - 5
    path.unlink()
    if damage != "gone":
        flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
        path.write_bytes({"cut": content[:-9], "flip": flipped, "empty": b"", "text": b"not an array"}[damage])
    again = load_data(settings, byte_tokenizer(), 0)
    assert len(encodes) == 2
    assert arrays(again.train) == arrays(first.train)
    load_data(settings, byte_tokenizer(), 0)
    assert len(encodes) == 2


def test_only_a_long_encoding_says_how_far_it_is(tmp_path, cache, monkeypatch, logged):
    monkeypatch.setattr(encode, "BATCH_ROWS", 10)
    load_data(write_chats(tmp_path / "a.jsonl"), byte_tokenizer(), 0)
    assert logged == []
    monkeypatch.setattr(long_task, "QUIET_S", 0.0)
    monkeypatch.setattr(long_task, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr(long_task.LongTask, "_after", lambda *_: None)  # no line before the first batch
    load_data(write_chats(tmp_path / "b.jsonl"), byte_tokenizer(), 0)
    assert logged[0].startswith("Encoding: 10 of 41 records, about ")
    assert len(logged) == 4


def test_refused_data_leaves_no_entry(tmp_path, cache):
    settings = replace(write_chats(tmp_path / "a.jsonl"), strict=True)
    for _ in range(2):
        refuses("line 42", load_data, settings, byte_tokenizer(), 0)
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_costs_a_note(tmp_path, cache, logged):
    cache.parent.mkdir()
    cache.write_text("a file in the way", encoding="utf-8")
    splits = load_data(write_chats(tmp_path / "a.jsonl"), byte_tokenizer(), 0)
    assert len(splits.train)
    assert ["cannot be kept" in line for line in logged] == [True]


def test_the_room_is_bounded_and_the_last_used_stay(tmp_path, monkeypatch):
    rows = {"train": EncodedSet(np.arange(4, dtype=np.int32), np.ones(4, bool), np.array([0, 4]))}
    room = tmp_path / "encoded"
    monkeypatch.setattr(store, "MAX_ENTRIES", 3)
    for number in range(3):
        write_entry(room / f"e{number}", rows, {})
        os.utime(room / f"e{number}", (1000 + number, 1000 + number))
    (room / ".e9.killed").mkdir()
    os.utime(room / ".e9.killed", (1000, 1000))
    (room / ".e8.at-work").mkdir()
    assert read_entry(room / "e0") is not None  # used just now
    write_entry(room / "e3", rows, {"a": 1})
    assert sorted(path.name for path in room.iterdir()) == [".e8.at-work", "e0", "e2", "e3"]
    assert read_entry(room / "e3")[1] == {"a": 1}
    monkeypatch.setattr(store, "MAX_BYTES", 1)
    write_entry(room / "e4", rows, {})
    assert [path.name for path in room.iterdir() if path.name[0] != "."] == ["e4"]
