"""Training, validation and test sets: repeatable, disjoint, never empty in silence, and near copies on one side."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from byte_tokenizer import CHATML, byte_tokenizer
from refusing import refuses
from row_files import loaded, row_texts, write_rows

from mlx_lora.config.settings import DataSettings
from mlx_lora.data import notes as near_duplicates
from mlx_lora.data.examples import Completion, Conversation, Text
from mlx_lora.data.load import load_data, load_eval_set
from mlx_lora.data.mix import content_key, cut_text, joined_groups, prompt_key, split_by_group
from mlx_lora.data.notes import near_pairs
from mlx_lora.data.report import DataReport

TOKENIZER = byte_tokenizer(CHATML)


def alpaca(count, start=0):
    return [{"instruction": f"q{n}", "output": f"answer {n}"} for n in range(start, start + count)]


def hold_out(keys, fraction, seed):
    return split_by_group(keys, keys, fraction, seed).held


def test_hold_out_is_a_function_of_content_and_seed():
    keys = [f"k{n}" for n in range(200)]
    held = hold_out(keys, 0.05, seed=0)
    assert held.sum() == 10
    assert np.array_equal(held, hold_out(keys, 0.05, seed=0))
    assert not np.array_equal(held, hold_out(keys, 0.05, seed=1))
    # In another order the same rows are held out.
    assert np.array_equal(held[::-1], hold_out(keys[::-1], 0.05, seed=0))


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.99])
def test_duplicates_stay_on_one_side(fraction):
    keys = [f"k{n % 7}" for n in range(50)]
    held = hold_out(keys, fraction, seed=3)
    sides = {key: {bool(h) for k, h in zip(keys, held, strict=True) if k == key} for key in keys}
    assert all(len(side) == 1 for side in sides.values())
    assert 0 < held.sum() < len(keys)


def test_small_and_equal_data():
    assert hold_out(["a", "b"], 0.05, 0).sum() == 1
    for keys, fraction in ((["a"], 0.5), (["a"] * 9, 0.5), (["a", "b"], 0.0), ([], 0.5)):
        assert not hold_out(keys, fraction, 0).any()


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_groups_stay_on_one_side_and_the_share_is_kept(fraction):
    rng = np.random.default_rng(0)
    groups = np.sort(rng.integers(0, 120, 400)).tolist()
    keys = [f"k{n}" for n in range(400)]
    split = split_by_group(groups, keys, fraction, seed=3)
    sides = {(group, bool(h)) for group, h in zip(groups, split.held, strict=True)}
    assert len(sides) == len(set(groups))
    assert not split.divided.any()
    assert fraction <= split.held.mean() < fraction + 0.05
    again = split_by_group(groups[::-1], keys[::-1], fraction, seed=3)
    assert np.array_equal(split.held, again.held[::-1])
    assert not np.array_equal(split.held, split_by_group(groups, keys, fraction, seed=4).held)


def test_a_group_of_most_rows_is_split_row_by_row():
    keys = [f"k{n % 90}" for n in range(100)]  # the last ten are duplicates
    everything = split_by_group(["same"] * 100, keys, 0.1, 0)
    assert everything.divided.all()
    assert 9 <= everything.held.sum() <= 12
    assert np.array_equal(everything.held[:10], everything.held[90:])
    half = split_by_group(["same"] * 50 + list(range(50)), [f"k{n}" for n in range(100)], 0.1, 0)
    assert (half.divided.tolist(), half.held.sum()) == ([True] * 50 + [False] * 50, 10)
    assert 0 < half.held[:50].sum() < 10
    # Duplicates are never divided, and two rows of one question are.
    assert not split_by_group(["same"] * 9, ["k"] * 9, 0.5, 0).held.any()
    assert split_by_group(["same"] * 2, ["a", "b"], 0.05, 0).held.sum() == 1


def test_rows_that_may_not_be_held_out_keep_their_group():
    groups, keys = [n // 2 for n in range(40)], [f"k{n}" for n in range(40)]
    may = np.arange(40) != 6
    for seed in range(12):
        held = split_by_group(groups, keys, 0.9, seed, may).held
        assert held.any()
        assert not held[6:8].any()
    assert any(split_by_group(groups, keys, 0.9, seed).held[6] for seed in range(12))


def test_groups_are_joined_through_other_rows():
    assert joined_groups("aabcd", [1, 2, 2, 3, 4]).tolist() == [0, 0, 0, 1, 2]
    assert joined_groups("abcde").tolist() == [0, 1, 2, 3, 4]
    assert joined_groups("abcde", [0, 1, 2, 3, 0], [0, 1, 2, 1, 1]).tolist() == [0, 0, 1, 0, 0]


def test_the_prompt_is_what_comes_before_the_trained_answer():
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    first = Conversation([user, answer])
    assert prompt_key(first) == prompt_key(Conversation([user, {**answer, "content": "b"}]))
    assert prompt_key(first) == prompt_key(Conversation([user, answer, user, answer]))
    assert prompt_key(first) == prompt_key(Completion("q", "a"))
    assert prompt_key(first) != prompt_key(Conversation([user, {**answer, "weight": 0}, user, answer]))
    assert prompt_key(first) != prompt_key(Conversation([{**user, "role": "system"}, user, answer]))
    assert prompt_key(Completion("", "a")) != prompt_key(Completion("", "b"))
    assert prompt_key(Text("a")) == prompt_key(Text("a")) != prompt_key(Text("b"))


def test_the_key_is_of_the_content_not_the_format():
    one = Conversation([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    same = Conversation([dict(reversed(message.items())) for message in one.messages])
    assert content_key(one) == content_key(same)
    assert content_key(one) != content_key(Conversation(one.messages, [{"name": "f"}]))
    assert content_key(Text("a")) != content_key(Text("b"))


def test_load_splits_disjoint_and_repeatable(tmp_path):
    data = write_rows(tmp_path / "d.jsonl", alpaca(40) + alpaca(3))
    splits, again = (loaded(data, valid_fraction=0.2) for _ in range(2))
    train, valid = row_texts(splits.train), row_texts(splits.valid)
    assert len(train) + len(valid) == 43
    assert 8 <= len(valid) <= 11
    assert set(train).isdisjoint(valid)
    assert again.train.fingerprint == splits.train.fingerprint
    assert again.valid.fingerprint == splits.valid.fingerprint
    other = loaded(data, valid_fraction=0.2, seed=1)
    assert other.valid.fingerprint != splits.valid.fingerprint
    assert splits.test is None
    assert splits.chat_template == CHATML
    none = loaded(data)
    assert none.valid is None
    assert len(none.train) == 43


def test_a_row_that_is_refused_late_does_not_shift_the_split(tmp_path):
    rows = alpaca(20)
    clean = loaded(write_rows(tmp_path / "a.jsonl", rows), valid_fraction=0.05)
    rows.insert(3, {"instruction": "x" * 400, "output": "cut off"})
    cut = loaded(write_rows(tmp_path / "b.jsonl", rows), valid_fraction=0.05, max_seq_length=300)
    assert (cut.report.dropped, cut.report.dropped_rows[0].line) == (1, 4)
    assert cut.valid.fingerprint == clean.valid.fingerprint
    assert cut.train.fingerprint == clean.train.fingerprint


def test_files_of_a_folder_are_used_as_they_are(tmp_path):
    for name, rows in (("train", alpaca(5)), ("valid", alpaca(2, start=4)), ("test", alpaca(3, start=50))):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    splits = loaded(tmp_path)
    assert (len(splits.train), len(splits.valid), len(splits.test)) == (5, 2, 3)
    assert splits.report.valid_source == "file"
    assert splits.report.notes == ["1 valid row is also a training row; the valid loss will be too low"]
    assert len(load_eval_set(str(tmp_path), DataSettings(), TOKENIZER)) == 3
    (tmp_path / "test.jsonl").unlink()
    assert len(load_eval_set(str(tmp_path), DataSettings(), TOKENIZER)) == 2
    (tmp_path / "valid.jsonl").unlink()
    refuses("neither a test nor a validation file", load_eval_set, str(tmp_path), DataSettings(), TOKENIZER)
    assert len(load_eval_set(str(tmp_path / "train.jsonl"), DataSettings(), TOKENIZER)) == 5


def test_the_end_of_one_long_text_is_held_out(tmp_path):
    text = "".join(f"Line number {n}.\n" for n in range(200))
    (tmp_path / "book.txt").write_text(text)
    splits = loaded(tmp_path / "book.txt", max_seq_length=64, valid_fraction=0.1)
    assert splits.chat_template is None
    joined = [
        "".join(TOKENIZER.decode(rows.row(i)[0][1:].tolist()) for i in range(len(rows)))
        for rows in (splits.train, splits.valid)
    ]
    # Every window's first token is context; the very first of each part is the only one never a target.
    assert text == f"{text[0]}{joined[0]}L{joined[1].removesuffix('<|im_end|>')}"
    assert 0.08 < len(joined[1]) / len(text) < 0.13
    assert splits.report.rows_read == 1


def test_cut_text_at_a_line_and_not_into_nothing():
    first, last = cut_text(Text("a b\n" * 50), 0.5)
    assert first.text.endswith("\n")
    assert not first.ends
    assert last.ends
    assert first.text + last.text == "a b\n" * 50
    assert cut_text(Text("a"), 0.5) is None
    assert cut_text(Text("words " * 9), 0.0) is None


def test_nothing_usable_is_an_error_with_reasons(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"messages": []}\nnot json\n{"question": "q"}\n{"text": ""}\n')
    refuses(r"no usable row in the train data, 4 refused: d.jsonl line 1: .*and 1 more", loaded, data)
    data.write_text("\n \n")
    refuses("has no record", loaded, data)
    refuses("no data given", load_data, DataSettings(), TOKENIZER, 0)


def test_strict_stops_at_bad_rows_of_every_stage(tmp_path):
    for bad in ("{", {"text": 3}, {"instruction": "q" * 500, "output": "a"}):
        data = write_rows(tmp_path / "d.jsonl", [*alpaca(3), bad])
        assert len(loaded(data, max_seq_length=200).report.dropped_rows) == 1
        refuses(r"d.jsonl line 4: ", loaded, data, max_seq_length=200, strict=True)


def test_base_models_get_alpaca_for_chats_only(tmp_path):
    base = byte_tokenizer(None, eos="</s>")
    splits = loaded(write_rows(tmp_path / "chats.jsonl", alpaca(4)), tokenizer=base)
    assert "### Response:" in splits.chat_template
    assert splits.report.template == "built-in alpaca (the model has no chat template)"
    pairs = write_rows(tmp_path / "pairs.jsonl", [{"prompt": "2+2=", "completion": "4"}] * 2)
    splits = loaded(pairs, tokenizer=base)
    assert splits.chat_template is None
    assert base.decode(splits.train.row(0)[0].tolist()) == "2+2=4</s>"
    asked = loaded(pairs, tokenizer=base, chat_template="alpaca")
    assert "### Response:\n4</s>" in base.decode(asked.train.row(0)[0].tolist())


ANSWERS = {  # several rows of one question, for every kind of records
    "rated": lambda q: [{"prompt": f"q{q}", "chosen": f"good {q}", "rejected": f"bad {q}"}],
    "pairs": lambda q: [{"prompt": f"q{q}", "chosen": f"good {n}", "rejected": "bad"} for n in range(2)],
    "prompts": lambda q: [{"prompt": f"q{q}", "target": n} for n in range(2)],
    "examples": lambda q: [{"prompt": f"q{q}", "completion": f"good {n}"} for n in range(2)],
}


@pytest.mark.parametrize("records", ANSWERS)
def test_the_rows_of_one_prompt_are_on_one_side(tmp_path, records):
    rows = [row for q in range(30) for row in ANSWERS[records](f"{q:02}")]
    splits = loaded(write_rows(tmp_path / "d.jsonl", rows), records=records, valid_fraction=0.2)
    train, valid = ({text[text.index("q") :][:3] for text in row_texts(part)} for part in (splits.train, splits.valid))
    assert len(train) + len(valid) == 30
    assert train.isdisjoint(valid)
    assert splits.valid.examples == 12
    assert not splits.report.notes


def test_a_prompt_that_all_rows_share_is_said(tmp_path):
    rows = [{"prompt": "Write a line.", "completion": f"line {n}"} for n in range(40)]
    splits = loaded(write_rows(tmp_path / "d.jsonl", rows), valid_fraction=0.1)
    assert splits.valid.examples == 4
    assert any("40 rows" in note and "d.jsonl" in note for note in splits.report.notes)


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


def asked(rows):
    """Return questions and answers as records."""
    return [{"prompt": prompt, "completion": answer} for prompt, answer in rows]


def test_near_copies_are_on_one_side(tmp_path):
    rows = rows_of(60)
    both = [row for p, c in rows for row in ((p, c), (f"{p} Please.", c))]
    splits = loaded(write_rows(tmp_path / "d.jsonl", asked(both)), valid_fraction=0.2)
    train, valid = ({text.split("?")[0] for text in row_texts(part)} for part in (splits.train, splits.valid))
    assert train.isdisjoint(valid)
    assert len(train) + len(valid) == 60
    assert len(splits.valid) == 24
    found = splits.report.near_duplicates
    assert (found.held_out_rows, found.of_rows, found.kept_together) == (0, 24, 120)
    assert any("120 rows" in note for note in splits.report.notes)
    assert DataReport.from_dict(json.loads(json.dumps(splits.report.to_dict()))) == splits.report


def test_a_valid_file_is_left_as_it_is_and_counted(tmp_path):
    rows = rows_of(40)
    held = [*rows_of(5, seed=9), (f"{rows[3][0]} Please.", rows[3][1]), rows[4], ("Well: " + rows[7][0], rows[7][1])]
    write_rows(tmp_path / "train.jsonl", asked(rows))
    write_rows(tmp_path / "valid.jsonl", asked(held))
    splits = loaded(tmp_path)
    found = splits.report.near_duplicates
    assert (len(splits.train), len(splits.valid)) == (40, 8)
    assert (found.held_out_rows, found.exact, found.of_rows) == (3, 1, 8)
    assert [(one.line, other.line) for one, other in found.examples] == [(6, 4), (8, 8), (7, 5)]
    (note,) = [note for note in splits.report.notes if "nearly" in note]
    assert "2 held-out rows" in note
    assert "valid.jsonl line 6 and train.jsonl line 4" in note
    clean = loaded(write_rows(tmp_path / "alone.jsonl", asked(rows)), valid_fraction=0.05).report
    assert clean.near_duplicates.held_out_rows == 0
    assert not [note for note in clean.notes if "nearly" in note]


def test_if_most_rows_are_alike_they_are_split_row_by_row(tmp_path):
    rng = random.Random(5)
    words = [rng.choice(WORDS) for _ in range(500)]
    # Each row nearly repeats the next one, so that all hang together.
    chain = [(" ".join(words[6 * i : 6 * i + 40]), " ".join(words[6 * i + 1 : 6 * i + 41])) for i in range(70)]
    splits = loaded(write_rows(tmp_path / "d.jsonl", asked([*chain, *rows_of(20)])), valid_fraction=0.1)
    assert (len(splits.valid), splits.report.near_duplicates.kept_together) == (9, 0)
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
