"""Pairs and rated answers as encoded rows, and in batches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from byte_tokenizer import byte_tokenizer
from refusing import refuses

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import Completion
from mlx_lora.data.load import load_data
from mlx_lora.data.preferences import Pair, Rated
from mlx_lora.data.read import encode_entries
from mlx_lora.data.report import SplitReport
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.data.tokenize import Encoder


def encoder(length: int = 200) -> Encoder:
    return Encoder(byte_tokenizer(), None, max_seq_length=length, plain_completions=True)


def pair(number: int, more: str = "") -> Pair:
    prompt = f"Question {number}?"
    return Pair(Completion(prompt, f" good{more}"), Completion(prompt, " bad"), float(number))


def text_of(rows, number: int) -> tuple[str, str]:
    tokens, mask = rows.row(number)
    decode = byte_tokenizer().decode
    return decode(tokens.tolist()), decode(tokens[mask].tolist())


def test_a_pair_is_two_rows_side_by_side():
    encoded = encode_entries(encoder(), [pair(1), pair(2)])
    rows = encoded.rows
    assert (rows.group, rows.examples, len(rows)) == (2, 2, 4)
    assert encoded.source.tolist() == [0, 1]
    assert text_of(rows, 2)[1].startswith(" good")
    assert text_of(rows, 3)[1].startswith(" bad")
    assert text_of(rows, 2)[0].startswith("Question 2?")
    assert rows.labels.tolist() == [1.0, 0.0, 2.0, 0.0]
    assert rows.fingerprint != rows.grouped(1).fingerprint


def test_a_pair_with_a_lost_answer_is_dropped_as_a_whole():
    encoded = encode_entries(encoder(14), [pair(1), Pair(Completion("A long prompt 12", "x"), Completion("A", "y"))])
    assert encoded.source.tolist() == [0]
    assert encoded.dropped[1].startswith("chosen answer: no trained token")
    equal = Pair(Completion("Question?", " same start, good"), Completion("Question?", " same start, bad"))
    assert "the answers are equal" in encode_entries(encoder(16), [equal]).dropped[0]
    assert not encode_entries(encoder(60), [equal]).dropped


def test_a_rated_answer_is_followed_by_anothers_answer_to_its_prompt():
    rated = [Rated(Completion(f"Q{n}", f" answer {n}"), n % 2 == 0) for n in range(3)]
    rows = encode_entries(encoder(), rated).rows
    assert (rows.group, len(rows)) == (2, 6)
    assert rows.labels.tolist() == [1.0, 0, 0, 0, 1.0, 0]
    assert text_of(rows, 0)[0].startswith("Q0 answer 0")
    assert text_of(rows, 1)[0].startswith("Q0 answer 1")
    assert text_of(rows, 5)[0].startswith("Q2 answer 0")
    assert text_of(rows, 5)[1].startswith(" answer 0")


def test_the_other_answer_is_one_to_another_prompt():
    rated = [Rated(Completion(f"Q{n // 2}", f" answer {n}"), n % 2 == 0) for n in range(6)]
    rows = encode_entries(encoder(), rated).rows
    assert [text_of(rows, 2 * n + 1)[1].strip()[:8] for n in range(6)] == [f"answer {n}" for n in (2, 2, 4, 4, 0, 0)]
    same = encode_entries(encoder(), [Rated(Completion("Q", f" answer {n}"), True) for n in range(3)]).rows
    assert [text_of(same, 2 * n + 1)[1].strip()[:8] for n in range(3)] == [f"answer {n}" for n in (1, 2, 0)]


def test_only_the_rated_answers_count_as_trained():
    rated = [Rated(Completion(f"Q{n}", f" answer {n}"), n % 2 == 0) for n in range(3)]
    rows = encode_entries(encoder(), rated).rows
    own = sum(int(rows.row(number)[1].sum()) for number in (0, 2, 4))
    assert rows.supervised_tokens == own
    assert rows.supervised_tokens < rows.mask.sum()
    assert rows.select([1, 2]).supervised_tokens < own
    assert SplitReport.of(rows).tokens == sum(rows.lengths[::2])
    plan = BatchPlan(rows, batch_tokens=256, batch_size=3, seed=0)
    batch = plan.batch(0, 0)
    assert batch.supervised_tokens == own < batch.mask.sum()
    assert batch.take(np.arange(2), 64).supervised_tokens < own
    pairs = encode_entries(encoder(), [pair(1), pair(2)]).rows
    both = BatchPlan(pairs, batch_tokens=256, batch_size=2, seed=0).batch(0, 0)
    assert pairs.supervised_tokens == pairs.mask.sum() == both.supervised_tokens


def test_batches_keep_pairs_together():
    random = np.random.default_rng(0)
    rows = encode_entries(encoder(), [pair(n, "x" * int(random.integers(40))) for n in range(23)]).rows
    plan = BatchPlan(rows, batch_tokens=256, batch_size=None, seed=3)
    seen = []
    for index in range(len(plan)):
        batch = plan.batch(1, index)
        assert batch.group == 2
        assert len(batch.inputs) * batch.inputs.shape[1] <= 256
        assert (*batch.inputs.shape, len(batch.positions)) in plan.shapes
        for number in range(0, len(batch.numbers), 2):
            first, second = batch.numbers[number : number + 2]
            assert (first < 0 and second < 0) or (first % 2 == 0 and second == first + 1)
            assert batch.columns["labels"][number] == (rows.labels[first] if first >= 0 else 0)
        seen += [n for n in batch.numbers if n >= 0]
    assert sorted(seen) == list(range(46))
    small = BatchPlan(rows, batch_tokens=256, batch_size=3, seed=3)
    assert max(len(small.batch(0, i).inputs) for i in range(len(small))) == 6
    assert 0 <= plan.padding_fraction < 1


def test_selected_pairs_keep_their_labels():
    rows = encode_entries(encoder(), [pair(n) for n in range(4)]).rows.select([3, 1])
    assert rows.labels.tolist() == [3.0, 0.0, 1.0, 0.0]
    assert text_of(rows, 0)[0].startswith("Question 3?")


def write(path: Path, records: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_preference_data_is_loaded_reported_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    records = [{"prompt": f"Q{n}:", "chosen": f" yes {n}", "rejected": " no"} for n in range(40)]
    records += [{"prompt": "Q:", "chosen": "a", "rejected": "a"}, {"prompt": "Q:", "chosen": "a"}]
    file = write(tmp_path / "pairs.jsonl", records)
    settings = DataSettings(data=str(file), valid_fraction=0.1)
    splits = load_data(settings, byte_tokenizer(), 0, records="pairs")
    again = load_data(settings, byte_tokenizer(), 0, records="pairs")
    assert again.train.fingerprint == splits.train.fingerprint
    assert (again.train.group, splits.valid.group) == (2, 2)
    assert splits.train.examples + splits.valid.examples == 40
    report = splits.report.render()
    assert "pairs.jsonl line 41: the two answers are equal" in report
    assert "a preference pair needs rejected" in report
    assert f"{splits.train.examples} pairs" in report
    assert "rejected:" in report
    assert "⟦ no" in report
    assert again.report.render() == report


def test_answers_with_scores_give_one_pair_or_all(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    answers = [{"response": f"answer {score}", "overall_score": score} for score in (1, 3, 2)]
    file = write(tmp_path / "scored.jsonl", [{"instruction": f"Q{n}", "completions": answers} for n in range(3)])
    for pairs, examples in (("best", 3), ("all", 9)):
        settings = DataSettings(data=str(file), valid_fraction=0, chat_template="chatml", pairs=pairs)
        assert load_data(settings, byte_tokenizer(), 0, records="pairs").train.examples == examples


def test_ratings_of_one_kind_are_noted(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Q{n}:", "completion": f" a {n}", "label": True} for n in range(4)]
    for name, records, noted in (("good", rows, True), ("both", [*rows[:3], {**rows[3], "label": 0}], False)):
        settings = DataSettings(data=str(write(tmp_path / f"{name}.jsonl", records)), valid_fraction=0)
        splits, again = (load_data(settings, byte_tokenizer(), 0, records="rated") for _ in range(2))
        report = splits.report.render()
        assert ("no answer is rated bad" in report) == noted
        assert again.train.supervised_tokens == splits.train.supervised_tokens < splits.train.mask.sum()
        assert again.report.render() == report


def test_data_of_another_kind_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LORA_CACHE", str(tmp_path / "cache"))
    file = write(tmp_path / "chats.jsonl", [{"prompt": "Q:", "completion": "a"}] * 3)
    refuses("needs chosen and rejected", load_data, DataSettings(data=str(file)), byte_tokenizer(), 0, records="pairs")
    refuses("rated answer needs", load_data, DataSettings(data=str(file)), byte_tokenizer(), 0, records="rated")
