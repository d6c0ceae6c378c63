"""Rows that nearly repeat each other: found, kept on one side of the split, and counted where a file decides."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from byte_tokenizer import CHATML, byte_tokenizer

from mlx_lora.config.settings import DataSettings
from mlx_lora.data import notes as near_duplicates
from mlx_lora.data.examples import Completion, Conversation, Text
from mlx_lora.data.load import load_data
from mlx_lora.data.notes import near_pairs
from mlx_lora.data.report import DataReport

TOKENIZER = byte_tokenizer(CHATML)
WORDS = [a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in "lmnrst"]


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def rows_of(count, seed=0):
    """Questions and answers that have nothing in common."""
    rng = random.Random(seed)
    return [(f"How do I {sentence(rng, 9)}?", f"You {sentence(rng, 14)}.") for _ in range(count)]


def pairs(rows):
    found = near_pairs([Completion(*row) for row in rows])
    return list(zip(found.first.tolist(), found.second.tolist(), strict=True))


def test_copies_with_small_changes_are_found():
    rows = rows_of(60)
    prompt, answer = rows[10]
    rows += [
        (prompt.upper() + "!!", answer),
        (prompt, f"Sure. {answer}"),
        (f"Please: {prompt}", answer),
        (prompt, rows[11][1]),
    ]
    assert pairs(rows) == [(10, 60), (10, 61), (10, 62), (60, 61), (60, 62), (61, 62)]


def test_the_rows_of_a_template_are_not_alike():
    rng, names = random.Random(1), ["positive", "negative"]
    long = "Classify the sentiment of the review below as positive or negative, and answer with one word and nothing else. Review: "
    for make in (
        lambda: (f"Translate {rng.choice(WORDS)} {rng.choice(WORDS)} to German, please", f"{rng.choice(WORDS)} {rng.choice(WORDS)}"),
        lambda: (f"{long}{sentence(rng, 6)}", rng.choice(names)),
        lambda: (f"What is {rng.randrange(999)} + {rng.randrange(999)}?", str(rng.randrange(1999))),
        lambda: (f"Extract the fields. {sentence(rng, 5)}", json.dumps({"name": sentence(rng, 2), "city": sentence(rng, 1), "currency": "EUR"})),
    ):  # fmt: skip
        assert not pairs([make() for _ in range(150)])


def test_phrasings_of_an_faq_are_not_alike():
    rng = random.Random(2)
    rows = []
    for _ in range(20):
        thing, answer = sentence(rng, 2), f"Yes: {sentence(rng, 12)}."
        rows += [(f"Do you sell {thing} in the shop?", answer), (f"I am looking for {thing}, is it there?", answer),
                 (f"Could one buy {thing} from you?", answer)]  # fmt: skip
    assert not pairs(rows)


def test_texts_chats_and_languages_without_spaces():
    rng = random.Random(3)
    text = sentence(rng, 60)
    texts = [Text(text), Text(sentence(rng, 60)), Text(f"{text} and more")]
    assert near_pairs(texts).second.tolist() == [2]
    turns = [{"role": "user", "content": sentence(rng, 8)}, {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "stock", "arguments": {"item": sentence(rng, 9)}}}]}]  # fmt: skip
    other = [
        turns[0],
        {
            **turns[1],
            "tool_calls": [
                {"type": "function", "function": {"name": "stock", "arguments": {"item": sentence(rng, 9)}}}
            ],
        },
    ]
    system = [{"role": "system", "content": sentence(rng, 40)}]
    assert near_pairs([Conversation(turns), Conversation(other), Conversation(system + turns)]).second.tolist() == [2]
    said = "私は明日の朝早くに駅前の大きな本屋へ行って新しい辞書を買います"
    assert pairs([(said, said), (said.replace("明日", "今日"), f"{said}。")]) == [(0, 1)]
    assert pairs([(said, said), ("猫は庭で寝ている", "犬は家で食べている")]) == []


def test_nothing_and_very_short_rows():
    assert pairs([]) == []
    assert pairs([("a", "b")]) == []
    assert pairs([("", ""), ("?", "!"), ("Hi", "Ho"), ("hi!", "ho"), ("Hi", "Hm")]) == [(0, 1), (2, 3)]


def test_a_large_set_is_sampled_and_still_found(monkeypatch):
    rows = rows_of(300)
    copies = [(f"{prompt} {prompt}", f"{answer} {answer} {answer}") for prompt, answer in rows[:40]]
    rows += copies + [(f"{prompt} Please.", answer) for prompt, answer in copies]
    whole = pairs(rows)
    assert len(whole) >= 40
    monkeypatch.setattr(near_duplicates, "MOST_RUNS", 4000)
    found = near_pairs([Completion(*row) for row in rows])
    assert found.sampled > 1
    assert len(found.first) > 20


def write(tmp_path, name, rows):
    path = tmp_path / name
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    return path


def load(path, **settings):
    return load_data(DataSettings(data=str(path), **settings), TOKENIZER, seed=0)


def sides(splits):
    return [
        {TOKENIZER.decode(part.row(i)[0].tolist()) for i in range(len(part))} for part in (splits.train, splits.valid)
    ]


def test_near_copies_are_on_one_side(tmp_path):
    rows = rows_of(60)
    both = [row for p, c in rows for row in ((p, c), (f"{p} Please.", c))]
    splits = load(write(tmp_path, "d.jsonl", both), valid_fraction=0.2)
    train, valid = ({text.split("?")[0] for text in side} for side in sides(splits))
    assert train.isdisjoint(valid)
    assert len(train) + len(valid) == 60
    assert len(splits.valid) == 24
    found = splits.report.near_duplicates
    assert (found.held_out_rows, found.of_rows, found.kept_together) == (0, 24, 120)
    assert any("120 rows" in note for note in splits.report.notes)
    assert DataReport.from_dict(json.loads(json.dumps(splits.report.to_dict()))) == splits.report


def test_a_valid_file_is_left_as_it_is_and_counted(tmp_path):
    rows = rows_of(40)
    write(tmp_path, "train.jsonl", rows)
    held = [*rows_of(5, seed=9), (f"{rows[3][0]} Please.", rows[3][1]), rows[4], ("Well: " + rows[7][0], rows[7][1])]
    write(tmp_path, "valid.jsonl", held)
    splits = load(tmp_path)
    found = splits.report.near_duplicates
    assert (len(splits.train), len(splits.valid)) == (40, 8)
    assert (found.held_out_rows, found.exact, found.of_rows) == (3, 1, 8)
    assert [(one.line, other.line) for one, other in found.examples] == [(6, 4), (8, 8), (7, 5)]
    (note,) = [note for note in splits.report.notes if "nearly" in note]
    assert "2 held-out rows" in note
    assert "valid.jsonl line 6 and train.jsonl line 4" in note
    clean = load(write(tmp_path, "alone.jsonl", rows)).report
    assert clean.near_duplicates.held_out_rows == 0
    assert not [note for note in clean.notes if "nearly" in note]


def test_if_most_rows_are_alike_they_are_split_row_by_row(tmp_path):
    rng = random.Random(5)
    words = [rng.choice(WORDS) for _ in range(500)]
    # Each row nearly repeats the next one, so that all hang together.
    chain = [(" ".join(words[6 * i : 6 * i + 40]), " ".join(words[6 * i + 1 : 6 * i + 41])) for i in range(70)]
    splits = load(write(tmp_path, "d.jsonl", [*chain, *rows_of(20)]), valid_fraction=0.1)
    assert len(splits.valid) == 9
    assert splits.report.near_duplicates.kept_together == 0
    assert splits.report.near_duplicates.held_out_rows > 0
    assert any("row by row" in note for note in splits.report.notes)


@pytest.mark.parametrize("seed", range(3))
def test_pairs_agree_with_a_plain_count(seed):
    rng = random.Random(seed)
    texts = [sentence(rng, 30).split() for _ in range(12)]
    rows = []
    for text in texts:
        for _ in range(3):
            copy = list(text)
            for _ in range(rng.randrange(4)):
                copy[rng.randrange(len(copy))] = rng.choice(WORDS)
            rows.append(Text(" ".join(copy)))

    def runs(row):
        words = row.text.split()
        return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

    wanted = [
        (i, j) for i in range(len(rows)) for j in range(i + 1, len(rows))
        if len(runs(rows[i]) & runs(rows[j])) >= 0.7 * len(runs(rows[i]) | runs(rows[j]))
    ]  # fmt: skip
    found = near_pairs(rows)
    assert list(zip(found.first.tolist(), found.second.tolist(), strict=True)) == wanted
    assert 0 < len(wanted) < 36
    assert np.all(found.first < found.second)
