"""Which other wordings of a question count, and which answers are right."""

from __future__ import annotations

import json

import pytest

from mlx_lora.config.settings import DataSettings
from mlx_lora.data.data_sets import DataFile
from mlx_lora.objectives.rephrase import Question, Wordings, cleaned, read_questions
from mlx_lora.trainer.ask import is_right, normalized

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


# Expected answer, given answer, question, and whether it is right.
CASES = [
    ("It costs 1,250 euros.", "1250 EUR", "How much is it?", True),
    ("It costs 1,250 euros.", "It costs 1.250 euros.", "How much is it?", True),
    ("It costs 1,250 euros.", "It costs 1,205 euros.", "How much is it?", False),
    ("3.50 a cup", "3.5 euros", "Price?", True),
    ("3,50 €", "3.50 euros", "Preis?", True),
    ("It closes at 18:45.", "At 18.45 h.", "When?", True),
    ("It closes at 18:45.", "At 6:45 pm", "When?", True),
    ("It closes at 18:45.", "At 6:45 p.m.", "When?", True),
    ("It closes at 18:45.", "At 6:45", "When?", False),
    ("It closes at 6 pm.", "It closes at 6 am.", "When?", False),
    ("It closes at 6 pm.", "18:00", "When?", True),
    ("We open from 9:00 to 18:00.", "From 9 to 18.", "When?", True),
    ("Wir öffnen um 9 Uhr.", "Um 9:00", "Wann öffnen Sie?", True),
    ("9 to 5", "9-5", "hours?", True),
    ("Order TH-4471.", "th4471", "Which part?", True),
    ("Order TH-4471.", "The part is TH 4471.", "Which part?", True),
    ("Order TH-4471.", "TH-44712", "Which part?", False),
    ("Order TH-4471.", "4471", "Which part?", False),
    ("Twelve weeks.", "12 weeks", "How long?", True),
    ("It takes 12 weeks.", "twelve weeks", "How long?", True),
    ("twenty-five days", "25", "How long?", True),
    ("two hundred grams", "200 g", "How much?", True),
    ("There are 200.", "two hundred", "How many?", True),
    ("The owner is Anton Weber.", "anton weber", "Who owns it?", True),
    ("The owner is Anton Weber.", "Anna Weber", "Who owns it?", False),
    ("The owner is José García.", "jose garcia", "Who?", True),
    ("It is Weber's shop.", "Weber", "Whose?", True),
    ("It is the Weber's shop.", "It's Weber’s.", "Whose?", True),
    ("The one on the left with a lid.", "the one on the left with a lid", "Which?", True),
    ("positive", "Positive.", "Label?", True),
    ("positive", "negative", "Label?", False),
    ("Yes.", "Yes, of course.", "Do you?", True),
    ("Yes.", "No.", "Do you?", False),
    ("No, returns take 14 days.", "Yes, within 14 days.", "Can I?", False),
    ("No, returns take 14 days.", "You have 14 days.", "Can I?", True),
    ('{"name": "Anna", "age": 3}', '```json\n{"age": 3, "name": "Anna"}\n```', "Extract", True),
    ('{"name": "Anna", "age": 3}', '{"age": 4, "name": "Anna"}', "Extract", False),
    ("[1, 2]", "Here: [1, 2]", "List", True),
    ("[1, 2]", "no list", "List", False),
    ("I would suggest to take a walk and think it over again for a while.", "x", "What to do?", None),
    ("Answer in a friendly way and thank the customer for the long wait.", "", "How?", None),
    ("In Wennick, near the tram.", "Near the tram in Wennick", "Where is the shop?", True),
    ("The Wennick shop opens at 9.", "At 9.", "When does the Wennick shop open?", True),
    ("The Wennick shop opens at 9.", "At 10.", "When does the Wennick shop open?", False),
    ("Am 3.5.2019.", "3.5.2019", "Wann?", True),
    ("Am 3.5.2019.", "4.5.2019", "Wann?", False),
    ("It is -18 degrees.", "-18", "How cold?", True),
    ("It is -18 degrees.", "18 degrees", "How cold?", False),
    ("1'250 Franken", "1250", "Preis?", True),
    ("1\u00a0250 Kč", "1250", "Cena?", True),
    ("1,250.50 dollars", "1250.5", "Price?", True),
    ("1.250,50 Euro", "1,250.50", "Preis?", True),
    ("营业时间是9点到18点。", "9点到18点", "几点开门？", True),
    ("营业时间是9点到18点。", "9点到17点", "几点开门？", False),
    ("可以退货", "可以退货。", "能退货吗？", True),
    ("可以退货", "不可以", "能退货吗？", False),
    ("您好，感谢您联系我们，我们会尽快为您处理这个问题。", "您好", "?", None),
    ("５公里", "5", "多远？", True),
    ("يفتح المتجر الساعة 9 صباحا", "الساعة 9", "متى؟", True),
    ("Cuesta 14,90 euros.", "14.90", "¿Cuánto cuesta?", True),
    ("Se llama Sofía Núñez.", "Sofia Nunez", "¿Cómo se llama?", True),
    ("El taller cierra a las 19:30.", "7:30 pm", "¿Cuándo cierra?", True),
    ("Der Chef heißt Jörg Groß.", "JÖRG GROSS", "Wie heißt der Chef?", True),
    ("5kg", "5 kg", "?", True),
    ("5 kg", "5kg", "?", True),
    ("the 3rd floor", "floor 3", "Which?", True),
    ("20%", "20 percent", "?", True),
    ("30-day returns", "30 days", "?", True),
    ("covid-19", "COVID 19", "?", True),
    ("Call 0301 2345.", "0301 2345", "?", True),
    ("Call 0301 2345.", "301 2345", "?", False),
    ("Version 2.1", "2.1", "?", True),
    ("blue", "Blue", "Color?", True),
    ("Paris.", "Paris", "Capital?", True),
    ("", "", "?", True),
    ("It comes with Two K82s grinders.", "two k82s", "?", True),
]


@pytest.mark.parametrize(("expected", "given", "question", "right"), CASES)
def test_right_or_not(expected, given, question, right):
    assert is_right(expected, given, question) is right
    if right is not None:
        assert is_right(expected, expected, question)


def test_texts_are_compared_without_case_space_and_punctuation():
    assert normalized("  In 30 days, Free!") == normalized("in 30 days free")
    assert normalized("3.5 kg") != normalized("35 kg")
    assert normalized("can't") != normalized("cant")
