"""Preference records of TRL, LLaMA-Factory, OpenAI, UltraFeedback and HH, as their own sets write them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from mlx_lora.data.examples import Completion, Conversation, EmptyRecord, FormatError
from mlx_lora.data.preferences import parse_pairs, parse_rated

USER, GOOD, BAD = (
    {"role": "user", "content": "What color is the sky?"},
    {"role": "assistant", "content": "It is blue."},
    {"role": "assistant", "content": "It is green."},
)
HUMAN = {"from": "human", "value": USER["content"]}
HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: What color is the sky?\n\nAssistant: It is {}."

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
    "other column names": {
        "prompt": [USER],
        "chosen_response": GOOD["content"],
        "rejected_response": BAD["content"],
    },
}


def trained(conversation: Conversation) -> list[dict]:
    return [message for message in conversation.messages if message.get("weight", 1) and message["role"] != "user"]


@pytest.mark.parametrize("record", CHATS.values(), ids=CHATS)
def test_every_form_is_the_same_pair(record):
    [pair] = parse_pairs(record)
    assert [message["content"] for message in pair.chosen.messages] == [USER["content"], GOOD["content"]]
    assert [message["content"] for message in pair.rejected.messages] == [USER["content"], BAD["content"]]
    assert [message["role"] for message in pair.chosen.messages] == ["user", "assistant"]


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
    assert explicit == repeated == implicit
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
    with pytest.raises(EmptyRecord, match="different scores"):
        parse_pairs(tied)


def test_margins_and_tools_are_kept():
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    [pair] = parse_pairs({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "margin": 2, "tools": [tool]})
    assert pair.margin == 2.0
    assert pair.chosen.tools[0]["function"]["name"] == "look"
    assert parse_pairs({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})[0].chosen.tools is None


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "completion": [GOOD], "label": True},
        {"messages": [USER, GOOD], "kto_tag": True},
        {"conversations": [HUMAN, {"from": "gpt", "value": GOOD["content"]}], "kto_tag": "true"},
        {"instruction": USER["content"], "output": GOOD["content"], "label": 1},
    ],
)
def test_rated_answers(record):
    name = "label" if "label" in record else "kto_tag"
    [good], [bad] = parse_rated(record), parse_rated({**record, name: False})
    assert (good.good, bad.good) == (True, False)
    assert good.answer == bad.answer
    assert [message["content"] for message in trained(good.answer)] == [GOOD["content"]]


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
        ({**PAIR, "rejected": [GOOD]}, "equal answers"),
        ({**PAIR, "rejected": [{"role": "assistant", "content": " "}]}, "empty"),
        ({**PAIR, "chosen": 3}, "chosen must be a text"),
        ({**PAIR, "margin": "much"}, "margin is 'much'"),
        ({"chosen": [USER, GOOD], "rejected": [{"role": "user", "content": "Other"}, BAD]}, "share no beginning"),
        ({"prompt": [{"role": "user", "content": "Other"}], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
         "not the beginning"),
        ({"chosen": "blue", "rejected": "green"}, "no prompt"),
        ({"instruction": "x", "completions": [{"text": 3}]}, "completions must be a list"),
    ],
)  # fmt: skip
def test_bad_pairs_say_what_is_missing(record, words):
    with pytest.raises(FormatError, match=words):
        parse_pairs(record)
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
    with pytest.raises(FormatError, match=words):
        parse_rated(record)
    assert parse_rated({"prompt": "a", "completion": "b", "label": 1})


def test_the_pairs_of_a_style_that_come_with_the_project_are_200_different_ones():
    lines = (Path(__file__).parent.parent / "data/preferences/style.jsonl").read_text("ascii").splitlines()
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
