"""Which other wordings of a question count, and how they stand in its record."""

from __future__ import annotations

import json

import pytest

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.files import DataFile
from mlx_lora.data.wordings import Question, Wordings, cleaned, read_questions

SHOP = [
    Question({}, "How much is a flat white?", "A flat white costs 3.85 euros, and oat milk is free."),
    Question({}, "What does error E07 mean?", "The drip tray heater of the Velor has failed; call Idris Vandermolle."),
    Question({}, "Do you sell the Nightferry blend?", "Yes, the Nightferry blend is at the bar, in bags of 250 g."),
    Question({}, "When is the shop open?", "The shop is open on Sundays, and you can sit there."),
    Question({}, "What is the wifi password?", "The password of the wifi is mokapot77."),
]
GERMAN = [
    Question({}, "Wie sind die Öffnungszeiten vom Laden?", "Der Laden hat von Montag bis Freitag bis 18 Uhr offen."),
    Question({}, "Was kostet ein Kaffee mit Milch?", "Ein Kaffee mit Milch kostet im Laden 3 Euro."),
]


@pytest.mark.parametrize(
    ("number", "wording", "why"),
    [
        (0, "What do you charge for a flat white?", None),
        (0, "flat white price?", None),
        (1, "My display shows E07, what is wrong?", None),
        (2, "Could I buy the Nightferry blend from you?", None),
        (2, "is nightferry sold here?", None),
        (4, "What's the code for the Wi-Fi?", None),
        (0, "how much is a FLAT WHITE", "the same"),
        (0, "When is the shop open?", "the same"),  # another row's question
        (0, "", "empty"),
        (0, "Is it true that a flat white costs 3.85 euros?", "gave the answer away"),
        (1, "E07: did the drip tray heater fail?", "gave the answer away"),
        (1, "Should I call Idris because of E07?", "gave the answer away"),
        (3, "Is the shop open on Sundays?", "gave the answer away"),
        (1, "What does the error mean?", "lost a number or name"),
        (1, "What does error E08 mean?", "lost a number or name"),
        (2, "Which blend do you sell?", "lost a number or name"),
        (2, "Do you sell 3 bags of the Nightferry blend?", "new number or name"),
        (2, "Do you sell Nightferry in London?", "new number or name"),
        (0, "Combien coûte chez vous un flat white?", "another language"),
        (0, "flat white 多少钱?", "another language"),
        (0, " ".join(["please"] * 30), "too long or short"),
    ],
)
def test_a_wording_counts_if_it_asks_the_same_in_other_words(number, wording, why):
    question = Question({}, SHOP[number].text, SHOP[number].answer)
    assert Wordings(SHOP).take(question, wording) == why
    assert question.wordings == ([] if why else [wording])


def test_a_wording_counts_once_in_the_whole_data():
    rules, (one, other) = Wordings(SHOP), (Question({}, SHOP[n].text, SHOP[n].answer) for n in (0, 3))
    assert rules.take(one, "What do you charge for a flat white?") is None
    assert rules.take(one, "what do you charge, for a flat white") == "the same"
    assert rules.take(other, "what do you charge for a flat white") == "the same"


def test_capital_letters_are_no_names_in_german():
    question = Question({}, GERMAN[0].text, GERMAN[0].answer)
    assert Wordings(GERMAN).take(question, "Wann ist der Laden offen?") is None
    assert Wordings(GERMAN).take(question, "When can I come into your shop?") == "another language"


@pytest.mark.parametrize(
    ("text", "wording"),
    [
        ("  What is it?  \n\nIt is a thing.", "What is it?"),
        ('"What is it?"', "What is it?"),
        ("Sure, here is another wording:\n\n- What is it?", "What is it?"),
        ("1. **What is it?**", "What is it?"),
        ("Rephrased question: What is it?", "What is it?"),
        ("<think>\nThe user wants ...\n</think>\n\nWhat is it?", "What is it?"),
        ("<think>\nThe user wants", ""),
        ("", ""),
        ("3.5 bar: is that too much?", "3.5 bar: is that too much?"),
    ],
)
def test_the_wording_is_found_in_what_a_model_writes(text, wording):
    assert cleaned(text) == wording


@pytest.mark.parametrize(
    ("record", "settings", "asked", "reworded"),
    [
        ({"prompt": "Why?", "completion": "So."}, {}, "Why?", {"prompt": "How so?", "completion": "So."}),
        ({"Frage": "Why?", "Antwort": "So.", "id": 7}, {"prompt_column": "Frage", "completion_column": "Antwort"},
         "Why?", {"Frage": "How so?", "Antwort": "So.", "id": 7}),
        ({"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No."},
                            {"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]}, {}, "Why?",
         {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "No."},
                            {"from": "human", "value": "How so?"}, {"from": "gpt", "value": "So."}]}),
        ({"text": "Only a text."}, {}, "", None),
        ({"instruction": "Translate.", "input": "Hallo", "output": "Hello"}, {}, "", None),  # joined: in no column
        ({"messages": [{"role": "user", "content": "Hi"}]}, {}, "", None),
    ],
)  # fmt: skip
def test_only_the_question_of_a_record_changes(tmp_path, record, settings, asked, reworded):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(record) + "\nnot JSON\n")
    (found,) = read_questions([DataFile(file, "rows.jsonl")], DataSettings(**settings))
    assert found.text == asked
    found.wordings += ["How so?"] if asked else []
    assert found.records() == [record, *([reworded] if reworded else [])]
