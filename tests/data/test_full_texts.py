"""Answers that begin with their prompt: cut where a whole data set has full texts, and left alone elsewhere."""

from __future__ import annotations

import json

import pytest
from byte_tokenizer import byte_tokenizer

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.load import load_data, load_eval_set

GREETING = {"prompt": "Hi", "chosen": "Hi! How can I help you?", "rejected": "Hi."}


def full(n):
    return {"prompt": f"Q{n} is", "chosen": f"Q{n} is good.", "rejected": f"Q{n} is bad."}


def apart(n):
    return {"prompt": f"Q{n} is", "chosen": " good.", "rejected": " bad."}


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return DataSettings(data=str(path), valid_fraction=0)


def trained(rows):
    decode = byte_tokenizer().decode
    return [decode(tokens[mask].tolist()) for tokens, mask in map(rows.row, range(0, len(rows), 1))]


def noted(splits, *words):
    return [note for note in splits.report.notes if "begin with the prompt" in note and all(w in note for w in words)]


@pytest.mark.parametrize("records", ["pairs", "rated"])
def test_an_answer_that_greets_back_is_trained_whole(tmp_path, records):
    settings = write(tmp_path / "d.jsonl", [*map(apart, range(9)), GREETING])
    splits = load_data(settings, byte_tokenizer(), 0, records=records)
    assert any(text.startswith("Hi! How can") for text in trained(splits.train))
    assert noted(splits, "1 of 10 rows", "d.jsonl line 10")


@pytest.mark.parametrize("records", ["pairs", "rated"])
def test_a_set_of_full_texts_has_the_prompt_cut(tmp_path, records):
    rows = [full(n) for n in range(40)]
    splits = load_data(write(tmp_path / "d.jsonl", [*rows, apart(40)]), byte_tokenizer(), 0, records=records)
    same = load_data(write(tmp_path / "e.jsonl", map(apart, range(41))), byte_tokenizer(), 0, records=records)
    assert splits.train.fingerprint == same.train.fingerprint
    assert noted(splits, "40 of 41 rows", "cut")
    assert not noted(same)
    mixed = load_data(
        write(tmp_path / "f.jsonl", [*rows, *map(apart, range(40, 50))]), byte_tokenizer(), 0, records=records
    )
    assert any(text.startswith("Q7 is good.") for text in trained(mixed.train))
    assert noted(mixed, "40 of 50 rows")


def test_each_set_decides_for_all_its_files(tmp_path):
    folder = tmp_path / "one"
    folder.mkdir()
    write(folder / "train.jsonl", map(apart, range(20)))
    write(folder / "valid.jsonl", [GREETING])
    write(tmp_path / "two.jsonl", map(full, range(20)))
    data = DataSettings(data=f"{folder},{tmp_path / 'two.jsonl'}", valid_fraction=0)
    splits = load_data(data, byte_tokenizer(), 0, records="pairs")
    assert trained(splits.valid)[0].startswith("Hi! How can")
    assert not any(text.startswith("Q") for text in trained(splits.train))
    assert noted(splits, "1 of 21 rows")
    assert noted(splits, "20 of 20 rows", "cut")


def test_an_evaluation_says_so_too(tmp_path, logged):
    settings = write(tmp_path / "d.jsonl", map(full, range(8)))
    for _ in range(2):  # the second time from the cache
        rows = load_eval_set(settings.data, settings, byte_tokenizer(), records="pairs")
    assert trained(rows)[0].startswith(" good.")
    assert ["8 of 8 rows" in line for line in logged] == [True, True]
