"""Preference records of TRL, LLaMA-Factory, OpenAI, UltraFeedback and HH, as their own sets write them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from refusing import refuses

from mlx_lora.data.examples import Completion, Conversation, EmptyRecord, FormatError
from mlx_lora.data.preferences import parse_pairs, parse_rated

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
