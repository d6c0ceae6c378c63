"""What a report says of labels that the held-out texts have, and of those that none of them has."""

from __future__ import annotations

from run_cli import holds

from mlx_lora.reports.run_report import class_rows, measured_words

MEASURED = {"precision": 0.5, "recall": 0.5, "f1": 0.5, "texts": 2, "predicted": 2}
ABSENT = {"precision": 0.0, "recall": 0.0, "f1": 0.0, "texts": 0, "predicted": 1}


def test_labels_without_texts_have_no_figures_and_come_last():
    rows = class_rows({"classes": {"absent": ABSENT, "seen": MEASURED}})
    assert [row["label"] for row in rows] == ["seen", "absent"]
    assert rows[0]["f1"] == "0.500"
    assert not any(digit in rows[1]["f1"] for digit in "0123456789")


def test_the_report_says_what_was_not_measured():
    confusion = [[0, 0], [1, 1]]
    (words,) = measured_words({"classes": {"absent": ABSENT, "seen": MEASURED}, "confusion": confusion})
    holds(words, "2 held-out texts", "absent")
    assert "seen" not in words
    assert "absent" in measured_words({"classes": {"absent": ABSENT, "seen": MEASURED}, "thresholds": {}})[0]
    assert "none of them" not in measured_words({"classes": {"seen": MEASURED}, "confusion": [[2]]})[0]
    assert measured_words(None) == measured_words({"classes": {"seen": MEASURED}}) == []
