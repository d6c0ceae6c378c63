"""Pairs and rated answers: from records of every form, as encoded rows, in batches, and without the prompt that full texts repeat."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from byte_tokenizer import byte_tokenizer
from refusing import refuses
from row_files import loaded, row_texts, write_rows

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.examples import Completion, Conversation, EmptyRecord, FormatError
from mlx_lora.data.load import load_eval_set
from mlx_lora.data.preferences import Pair, Rated, parse_pairs, parse_rated
from mlx_lora.data.read import encode_entries
from mlx_lora.data.report import SplitReport
from mlx_lora.data.sampler import BatchPlan
from mlx_lora.data.tokenize import Encoder

USER, GOOD, BAD = (
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "assistant", "content": "It is green."},
)
HUMAN = {"from": "human", "value": USER["content"]}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: What color is the sky?\n\nAssistant: It is {}."


def parts(turn: dict, weight: float) -> dict:
    return {**turn, "content": [{"type": "text", "value": turn["content"]}], "loss_weight": weight}


CHATS = {
    "TRL, explicit prompt": {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, implicit prompt": {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "UltraFeedback binarized": {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    "LLaMA-Factory, ShareGPT": {
        "conversations": [HUMAN],
        "chosen": {"from": "gpt", "value": GOOD["content"]},
        "rejected": {"from": "gpt", "value": BAD["content"]},
    },
    "LLaMA-Factory, Alpaca": {
        "instruction": USER["content"],
        "input": "",
        "chosen": GOOD["content"],
        "rejected": BAD["content"],
    },
    "OpenAI": {
        "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    },
    "UltraFeedback": {
        "instruction": USER["content"],
        "completions": [
            {"response": "It is gray.", "overall_score": 3.0},
            {"response": BAD["content"], "overall_score": 1.5},
            {"response": GOOD["content"], "overall_score": "8.0"},
        ],
    },
    "Intel's orca_dpo_pairs": {"question": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
    "LLaMA-Factory, turns of OpenAI": {"messages": [USER], "chosen": GOOD, "rejected": BAD},
    "LLaMA-Factory v1": {
        "chosen_messages": [parts(USER, 0.0), parts(GOOD, 1.0)],
        "rejected_messages": [parts(USER, 0.0), parts(BAD, 1.0)],
    },
    "UltraFeedback binarized, whole": {
        "prompt": USER["content"],
        "prompt_id": "ab12",
        "chosen": [USER, GOOD],
        "rejected": [USER, BAD],
        "messages": [USER, GOOD],
        "score_chosen": 8.0,
        "score_rejected": 2.5,
    },
    "Axolotl chat_template.default": {"conversation": [USER], "chosen": GOOD, "rejected": BAD},
    "Axolotl argilla_chat": {"chosen": [USER, GOOD], "rejected": [USER, BAD], "chosen-rating": 5.0},
    "Axolotl argilla": {
        "instruction": USER["content"],
        "chosen_response": GOOD["content"],
        "rejected_response": BAD["content"],
    },
    "Axolotl icr": {"system": "", "input": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
    "mlx-lm-lora, answers as objects": {
        "prompt": USER["content"],
        "chosen": {"messages": [GOOD]},
        "rejected": {"messages": [BAD]},
    },
    "scored answers after turns": {
        "prompt": [USER],
        "completions": [{"text": BAD["content"], "score": 1}, {"text": GOOD["content"], "score": 2}],
    },
    "Intel's first columns": {
        "system": "",
        "question": USER["content"],
        "chatgpt": GOOD["content"],
        "llama2-13b-chat": BAD["content"],
    },
    "other column names": {
        "prompt": [USER],
        "chosen_response": GOOD["content"],
        "rejected_response": BAD["content"],
    },
}


def trained(conversation: Conversation) -> list[dict]:
    return [message for message in conversation.messages if message.get("weight", 1) and message["role"] == "assistant"]


@pytest.mark.parametrize("record", CHATS.values(), ids=CHATS)
def test_every_form_is_the_same_pair(record):
    [pair] = parse_pairs(record)
    assert [message["content"] for message in pair.chosen.messages] == [USER["content"], GOOD["content"]]
    assert [message["content"] for message in pair.rejected.messages] == [USER["content"], BAD["content"]]
    assert [message["role"] for message in pair.chosen.messages] == ["user", "assistant"]


SYSTEM = "Be brief."
PLAIN = {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]}


@pytest.mark.parametrize(
    "record",
    [
        PLAIN,  # mlx-lm-lora, and Axolotl's prompt_pairs
        CHATS["Intel's orca_dpo_pairs"],
        CHATS["Axolotl icr"],
        CHATS["LLaMA-Factory, ShareGPT"],
        CHATS["Axolotl argilla_chat"],
        CHATS["UltraFeedback binarized"],
    ],
)
def test_a_system_column_is_the_first_turn(record):
    [pair] = parse_pairs({**record, "system": SYSTEM})
    for answer, last in ((pair.chosen, GOOD), (pair.rejected, BAD)):
        assert [message["role"] for message in answer.messages] == ["system", "user", "assistant"]
        assert [message["content"] for message in answer.messages] == [SYSTEM, USER["content"], last["content"]]
        assert [message["content"] for message in answer.messages if message.get("weight", 1)] == [last["content"]]
    assert parse_pairs({**record, "system": ""})[0] != pair


def test_an_alpaca_pair_has_an_input_and_a_history():
    record = {
        "instruction": "Translate.",
        "input": "Haus",
        "history": [["Hi", "Hello"]],
        "chosen": "house",
        "rejected": "h",
    }
    [pair] = parse_pairs(record)
    assert [message["content"] for message in pair.chosen.messages] == ["Hi", "Hello", "Translate.\nHaus", "house"]
    assert [message["content"] for message in trained(pair.chosen)] == ["house"]


def test_the_best_rank_is_one():
    answers = [{"answer": f"answer {rank}", "model": "m", "rank": rank} for rank in (3.0, 1.0, 7.0)]
    record = {"prompt": "\n\nHuman: Hi\n\nAssistant: ", "answers": answers, "num_responses": 7}
    [pair] = parse_pairs(record)
    assert (pair.chosen.completion, pair.rejected.completion) == ("answer 1.0", "answer 7.0")
    assert len(parse_pairs(record, all_pairs=True)) == 3
    assert [rated.good for rated in parse_rated(record)] == [True, False]


def test_equal_and_empty_answers_of_a_list_make_no_pair():
    texts = [("a", 3), ("a", 2), (" ", 9), ("b", 1)]
    record = {"prompt": "Q", "completions": [{"response": text, "overall_score": score} for text, score in texts]}
    pairs = parse_pairs(record, all_pairs=True)
    assert [(pair.chosen.completion, pair.rejected.completion, pair.margin) for pair in pairs] == [
        ("a", "b", 2),
        ("a", "b", 1),
    ]
    assert len(parse_pairs(record)) == 1


def test_what_is_not_read_of_a_record_is_named():
    record = {**CHATS["TRL, explicit prompt"], "chat_template_kwargs": {"enable_thinking": False}}
    assert parse_pairs(record)[0].chosen.unread == {"chat_template_kwargs"}
    assert parse_pairs(CHATS["TRL, explicit prompt"])[0].chosen.unread == frozenset()


def test_earlier_answers_are_context():
    earlier = {"role": "assistant", "content": "Hello."}
    context = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, earlier, USER]
    [pair] = parse_pairs({"chosen": [*context, GOOD], "rejected": [*context, BAD]})
    assert len(pair.chosen.messages) == 5
    assert [message["content"] for message in trained(pair.chosen)] == [GOOD["content"]]
    assert [message["content"] for message in trained(pair.rejected)] == [BAD["content"]]


def test_equal_first_answers_of_longer_dialogues_are_prompt_only_before_the_difference():
    """Both dialogues begin with the same answer: it is the prompt's, and what differs is the answer."""
    shared = [USER, {"role": "assistant", "content": "Guess."}]
    more = {"role": "user", "content": "Tell me."}
    [pair] = parse_pairs({"chosen": [*shared, more, GOOD], "rejected": [*shared, more, BAD]})
    assert [message["content"] for message in trained(pair.chosen)] == [GOOD["content"]]


def test_plain_texts():
    explicit = parse_pairs({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."})[0]
    repeated = parse_pairs({"prompt": "The sky is", "chosen": "The sky is blue.", "rejected": "The sky is green."})[0]
    implicit = parse_pairs({"chosen": "The sky is blue.", "rejected": "The sky is green."})[0]
    assert explicit == implicit
    assert (explicit.repeats, repeated.repeats, implicit.repeats) == (False, True, None)
    assert repeated.chosen == Completion("The sky is", "The sky is blue.")  # the whole set decides: full_texts.py
    assert explicit.chosen == Completion("The sky is", " blue.")
    assert explicit.rejected == Completion("The sky is", " green.")


def test_hh_dialogues_are_cut_where_the_last_answer_starts():
    [pair] = parse_pairs({"chosen": HH.format("blue"), "rejected": HH.format("green")})
    assert pair.chosen.prompt.endswith("sky?\n\nAssistant:")
    assert (pair.chosen.completion, pair.rejected.completion) == (" It is blue.", " It is green.")


def test_scored_answers_give_the_best_against_the_worst_or_all_pairs():
    record = CHATS["UltraFeedback"]
    assert parse_pairs(record)[0].margin == 6.5
    pairs = parse_pairs(record, all_pairs=True)
    assert [pair.margin for pair in pairs] == [5.0, 6.5, 1.5]
    tied = {**record, "completions": [{"response": text, "overall_score": 1} for text in "ab"]}
    refuses("different scores", parse_pairs, tied, kind=EmptyRecord)


def test_margins_and_tools_are_kept():
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    [pair] = parse_pairs({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "margin": 2, "tools": [tool]})
    assert pair.margin == 2.0
    assert parse_pairs({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "0.5"})[0].margin == 0.5  # of a table
    refuses(
        "must be a number",
        parse_pairs,
        {"prompt": "q", "chosen": "a", "rejected": "b", "margin": float("nan")},
        kind=FormatError,
    )  # it would make the loss one that is none
    assert pair.chosen.tools[0]["function"]["name"] == "look"
    assert parse_pairs({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})[0].chosen.tools is None


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"messages": [USER, GOOD], "kto_tag": True},
        {"conversations": [HUMAN, {"from": "gpt", "value": GOOD["content"]}], "kto_tag": "true"},
        {"instruction": USER["content"], "output": GOOD["content"], "label": 1},
        {"instruction": USER["content"], "completion": GOOD["content"], "label": True},
        {"question": USER["content"], "completion": GOOD["content"], "label": True},
        {"system": SYSTEM, "prompt": USER["content"], "completion": GOOD["content"], "label": True},
        {"completion": [USER, GOOD], "label": True, "rating": 4.5},
        {"prompt": USER["content"], "completion": [GOOD], "label": True},
    ],
)
def test_rated_answers(record):
    name = "label" if "label" in record else "kto_tag"
    [good], [bad] = parse_rated(record), parse_rated({**record, name: False})
    assert (good.good, bad.good) == (True, False)
    assert good.answer == bad.answer
    assert [message["content"] for message in trained(good.answer)] == [GOOD["content"]]
    assert [message["content"] for message in good.answer.messages][-2] == USER["content"]
    assert (good.answer.messages[0]["content"] == SYSTEM) == ("system" in record)


def test_a_pair_is_a_good_and_a_bad_answer():
    good, bad = parse_rated(CHATS["TRL, explicit prompt"])
    assert (good.good, bad.good) == (True, False)
    assert good.answer.messages[-1]["content"] == GOOD["content"]


PAIR = CHATS["TRL, explicit prompt"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": [USER], "chosen": [GOOD]}, "needs rejected"),
        ({"messages": [USER, GOOD]}, "needs chosen and rejected"),
        ({**PAIR, "rejected": [GOOD]}, "the two answers are equal"),
        ({**PAIR, "rejected": [{"role": "assistant", "content": " "}]}, "empty"),
        ({**PAIR, "chosen": 3}, "chosen must be a text"),
        ({**PAIR, "margin": "much"}, "margin is 'much'"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Other"}, BAD]}, "begin differently"),
        ({"prompt": [{"role": "user", "content": "Other"}], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
         "not the beginning"),
        ({"prompt": [{"role": "user", "content": "Other"}], "chosen": [GOOD], "rejected": [USER, BAD]}, "the chosen dialogue"),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [BAD]}, "the rejected dialogue"),
        ({"prompt": "Other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "not the beginning of the chosen"),
        ({"prompt": "Other", "chosen": HH.format("blue"), "rejected": HH.format("green")}, "not the beginning of the chosen"),
        ({"prompt": "a", "completion": "b", "label": True}, "needs chosen and rejected; .* --objective kto"),
        ({"prompt": "a", "completion": "b"}, "needs chosen and rejected; .* --objective sft"),
        ({**PAIR, "images": ["a.png"]}, "has images; only text"),
        ({"messages": ["hi"], "chosen": GOOD, "rejected": BAD}, "a turn is not an object"),
        ({**PAIR, "prompt": [{"role": None, "content": "hi"}]}, "expected role, content"),
        ({"chosen": "blue", "rejected": "green"}, "no prompt"),
        ({"instruction": "x", "completions": [{"text": 3}]}, "completions must be a list"),
    ],
)  # fmt: skip
def test_bad_pairs_say_what_is_missing(record, words):
    refuses(words, parse_pairs, record, kind=FormatError)
    assert parse_pairs(PAIR)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "completion": "b"}, "needs prompt, completion, label"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "true or false"),
        ({"text": "a", "label": 1}, "needs prompt, completion, label"),
    ],
)
def test_bad_ratings_say_what_is_missing(record, words):
    refuses(words, parse_rated, record, kind=FormatError)
    assert parse_rated({"prompt": "a", "completion": "b", "label": 1})


def test_the_pairs_of_a_style_that_come_with_the_project_are_200_different_ones():
    lines = (Path(__file__).parents[2] / "data/preferences/style.jsonl").read_text("ascii").splitlines()
    pairs = [pair for line in lines for pair in parse_pairs(json.loads(line))]
    assert len(pairs) == len({json.dumps(json.loads(line)["prompt"]) for line in lines}) == 200
    chosen, rejected = ([_words(getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    assert all(12 <= len(answer) <= 36 for answer in chosen)
    assert all(45 <= len(answer) <= 90 for answer in rejected)
    # No phrase decides a pair: what an answer begins or ends with is seldom seen twice.
    for words in (slice(0, 4), slice(-4, None)):
        assert max(Counter(tuple(answer[words]) for answer in rejected).values()) <= 6


def _words(answer):
    return (answer.completion if isinstance(answer, Completion) else answer.messages[-1]["content"]).split()


def encoded(entries, length: int = 200):
    """Encode pairs or rated answers; `length` is the most tokens of a row."""
    return encode_entries(Encoder(byte_tokenizer(), None, max_seq_length=length, plain_completions=True), entries)


def pair(number: int, more: str = "") -> Pair:
    prompt = f"Question {number}?"
    return Pair(Completion(prompt, f" good{more}"), Completion(prompt, " bad"), float(number))


def rated(count: int, prompts: int) -> list[Rated]:
    """Return answers to so many prompts, every second one good."""
    return [Rated(Completion(f"Q{n * prompts // count}", f" answer {n}"), n % 2 == 0) for n in range(count)]


def test_a_pair_is_two_rows_side_by_side():
    found = encoded([pair(1), pair(2)])
    rows = found.rows
    assert (rows.group, rows.examples, len(rows), found.source.tolist()) == (2, 2, 4, [0, 1])
    assert [text.removesuffix("<|im_end|>") for text in row_texts(rows, trained=True)] == [" good", " bad"] * 2
    assert row_texts(rows)[2] == "Question 2? good<|im_end|>"
    assert rows.labels.tolist() == [1.0, 0.0, 2.0, 0.0]
    assert rows.fingerprint != rows.grouped(1).fingerprint
    chosen = encoded([pair(n) for n in range(4)]).rows.select([3, 1])
    assert chosen.labels.tolist() == [3.0, 0.0, 1.0, 0.0]
    assert row_texts(chosen)[0].startswith("Question 3?")


def test_a_pair_with_a_lost_answer_is_dropped_as_a_whole():
    found = encoded([pair(1), Pair(Completion("A long prompt 12", "x"), Completion("A", "y"))], 14)
    assert found.source.tolist() == [0]
    assert found.dropped[1].startswith("chosen answer: no trained token")
    equal = Pair(Completion("Question?", " same start, good"), Completion("Question?", " same start, bad"))
    assert "the answers are equal" in encoded([equal], 16).dropped[0]
    assert not encoded([equal], 60).dropped


@pytest.mark.parametrize(("prompts", "others"), [(3, [1, 2, 0]), (3, [2, 2, 4, 4, 0, 0]), (1, [1, 2, 0])])
def test_a_rated_answer_is_followed_by_one_to_another_prompt(prompts, others):
    """Or by any other, if there is one prompt."""
    rows = encoded(rated(len(others), prompts)).rows
    assert (rows.group, len(rows)) == (2, 2 * len(others))
    assert rows.labels.tolist() == [value for n in range(len(others)) for value in (float(n % 2 == 0), 0.0)]
    texts = row_texts(rows)
    for n, other in enumerate(others):
        prompt = f"Q{n * prompts // len(others)}"
        assert texts[2 * n : 2 * n + 2] == [f"{prompt} answer {n}<|im_end|>", f"{prompt} answer {other}<|im_end|>"]


def test_only_the_rated_answers_count_as_trained():
    rows = encoded(rated(3, 3)).rows
    own = sum(int(rows.row(number)[1].sum()) for number in (0, 2, 4))
    assert rows.supervised_tokens == own < rows.mask.sum()
    assert rows.select([1, 2]).supervised_tokens < own
    assert SplitReport.of(rows).tokens == sum(rows.lengths[::2])
    batch = BatchPlan(rows, batch_tokens=256, batch_size=3, seed=0).batch(0, 0)
    assert batch.supervised_tokens == own < batch.mask.sum()
    assert batch.take(np.arange(2), 64).supervised_tokens < own
    pairs = encoded([pair(1), pair(2)]).rows
    both = BatchPlan(pairs, batch_tokens=256, batch_size=2, seed=0).batch(0, 0)
    assert pairs.supervised_tokens == pairs.mask.sum() == both.supervised_tokens


def test_batches_keep_pairs_together():
    random = np.random.default_rng(0)
    rows = encoded([pair(n, "x" * int(random.integers(40))) for n in range(23)]).rows
    plan = BatchPlan(rows, batch_tokens=256, batch_size=None, seed=3)
    seen = []
    for batch in (plan.batch(1, index) for index in range(len(plan))):
        assert batch.group == 2
        assert batch.inputs.size <= 256
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


def test_preference_data_is_loaded_reported_and_cached(tmp_path):
    rows = [{"prompt": f"Q{n}:", "chosen": f" yes {n}", "rejected": " no"} for n in range(40)]
    rows += [{"prompt": "Q:", "chosen": "a", "rejected": "a"}, {"prompt": "Q:", "chosen": "a"}]
    file = write_rows(tmp_path / "pairs.jsonl", rows)
    splits, again = (loaded(file, records="pairs", valid_fraction=0.1) for _ in range(2))
    assert again.train.fingerprint == splits.train.fingerprint
    assert (again.train.group, splits.valid.group) == (2, 2)
    assert splits.train.examples + splits.valid.examples == 40
    report = splits.report.render()
    for words in (
        "pairs.jsonl line 41: the two answers are equal", "a preference pair needs rejected",
        f"{splits.train.examples} pairs", "rejected:", "⟦ no",
    ):  # fmt: skip
        assert words in report
    assert again.report.render() == report


@pytest.mark.parametrize(("pairs", "examples"), [("best", 3), ("all", 9)])
def test_answers_with_scores_give_one_pair_or_all(tmp_path, pairs, examples):
    answers = [{"response": f"answer {score}", "overall_score": score} for score in (1, 3, 2)]
    rows = [{"instruction": f"Q{n}", "completions": answers} for n in range(3)]
    file = write_rows(tmp_path / "scored.jsonl", rows)
    assert loaded(file, records="pairs", chat_template="chatml", pairs=pairs).train.examples == examples


@pytest.mark.parametrize("last", [True, 0])
def test_ratings_of_one_kind_are_noted(tmp_path, last):
    rows = [{"prompt": f"Q{n}:", "completion": f" a {n}", "label": n < 3 or last} for n in range(4)]
    file = write_rows(tmp_path / "rated.jsonl", rows)
    splits, again = (loaded(file, records="rated") for _ in range(2))
    report = splits.report.render()
    assert ("no answer is rated bad" in report) == bool(last)
    assert again.train.supervised_tokens == splits.train.supervised_tokens < splits.train.mask.sum()
    assert again.report.render() == report


@pytest.mark.parametrize(
    ("records", "words"), [("pairs", "needs chosen and rejected"), ("rated", "rated answer needs")]
)
def test_data_of_another_kind_is_refused_in_one_line(tmp_path, records, words):
    refuses(
        words, loaded, write_rows(tmp_path / "chats.jsonl", [{"prompt": "Q:", "completion": "a"}] * 3), records=records
    )


# Answers that begin with their prompt: cut where a whole set has full texts, and left alone elsewhere.
GREETING = {"prompt": "Hi", "chosen": "Hi! How can I help you?", "rejected": "Hi."}
FULL, APART = (
    [
        {"prompt": f"Q{n} is", "chosen": f"{start.format(n)} good.", "rejected": f"{start.format(n)} bad."}
        for n in range(50)
    ]
    for start in ("Q{} is", "")
)


def noted(splits, *words):
    return [note for note in splits.report.notes if "begin with the prompt" in note and all(w in note for w in words)]


@pytest.mark.parametrize("records", ["pairs", "rated"])
def test_an_answer_that_greets_back_is_trained_whole(tmp_path, records):
    splits = loaded(write_rows(tmp_path / "d.jsonl", [*APART[:9], GREETING]), records=records)
    assert any(text.startswith("Hi! How can") for text in row_texts(splits.train, trained=True))
    assert noted(splits, "1 of 10 rows", "d.jsonl line 10")


@pytest.mark.parametrize("records", ["pairs", "rated"])
def test_a_set_of_full_texts_has_the_prompt_cut(tmp_path, records):
    splits, same, mixed = (
        loaded(write_rows(tmp_path / f"{name}.jsonl", rows), records=records)
        for name, rows in (("d", FULL[:40] + APART[40:41]), ("e", APART[:41]), ("f", FULL[:40] + APART[40:]))
    )
    assert splits.train.fingerprint == same.train.fingerprint
    assert noted(splits, "40 of 41 rows", "cut")
    assert not noted(same)
    assert any(text.startswith("Q7 is good.") for text in row_texts(mixed.train, trained=True))
    assert noted(mixed, "40 of 50 rows")


def test_each_set_decides_for_all_its_files(tmp_path):
    (tmp_path / "one").mkdir()
    for name, rows in (("one/train", APART[:20]), ("one/valid", [GREETING]), ("two", FULL[:20])):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    splits = loaded(f"{tmp_path / 'one'},{tmp_path / 'two.jsonl'}", records="pairs")
    assert row_texts(splits.valid, trained=True)[0].startswith("Hi! How can")
    assert not any(text.startswith("Q") for text in row_texts(splits.train, trained=True))
    assert noted(splits, "1 of 21 rows")
    assert noted(splits, "20 of 20 rows", "cut")


def test_an_evaluation_says_so_too(tmp_path, logged):
    settings = DataSettings(data=str(write_rows(tmp_path / "d.jsonl", FULL[:8])))
    for _ in range(2):  # the second time from the cache
        rows = load_eval_set(settings.data, settings, byte_tokenizer(), records="pairs")
    assert row_texts(rows, trained=True)[0].startswith(" good.")
    assert ["8 of 8 rows" in line for line in logged] == [True, True]
