"""After a run: how many training rows the model answers word for word, and what is said about facts."""

from __future__ import annotations

import json

import pytest

import mlx_lora
from mlx_lora.reports.diagnosis import LEARNED, MOST_EPOCHS, OVER_FITTED, Diagnosis, FinishedRun, mending
from mlx_lora.reports.run_report import read_report
from mlx_lora.trainer.evaluate import KnownRows

ROWS = [{"prompt": f"key {n}?", "completion": word} for n, word in enumerate(("red", "blue", "gold", "pink"))]


def trained(folder, tmp_path, rows=ROWS, **settings):
    """Return a short run's base and report."""
    base = mlx_lora.load(str(folder))
    options = {"iters": 2, "learning_rate": 1e-2, "batch_size": 4, "sample_tokens": 0, "valid_fraction": 0.0}
    mlx_lora.train(base, rows, tmp_path / "run", **{**options, **settings})
    return base, read_report(tmp_path / "run")


@pytest.mark.slow
def test_rows_that_are_counted_are_answered_word_for_word(tiny_folder, tmp_path):
    base, report = trained(tiny_folder, tmp_path, iters=150)
    assert report.known is not None
    answers = [base.generate(row["prompt"], tmp_path / "run", max_tokens=12).strip() for row in ROWS]
    exact = sum(answer == row["completion"] for answer, row in zip(answers, ROWS, strict=True))
    assert 0 < report.known.known <= exact
    assert report.known.rows == len(ROWS)
    # What the page was written from, it can be read from again.
    assert json.loads((tmp_path / "run" / "report.json").read_text())["known"] == {
        "known": report.known.known,
        "rows": len(ROWS),
    }


def test_a_run_that_hardly_began_knows_nothing(tiny_folder, tmp_path):
    assert trained(tiny_folder, tmp_path)[1].known == KnownRows(0, len(ROWS))


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ([{"text": "once upon a time"}] * 4, {}),
        (ROWS, {"mask_prompt": False}),
        ([{**row, "completion": row["completion"] * 40} for row in ROWS], {}),
        ([{**row, "rejected": "no", "chosen": row["completion"]} for row in ROWS], {"objective": "dpo"}),
    ],
)
def test_where_nobody_repeats_answers_nothing_is_counted(tiny_folder, tmp_path, rows, settings):
    assert trained(tiny_folder, tmp_path, rows, **settings)[1].known is None


def test_facts_that_are_not_known_need_more_epochs_and_known_ones_are_no_overfitting(tmp_path):
    run = FinishedRun(tmp_path / "run", {"model": "m"}, 96, 3.0, 1.0)
    said, command = mending(Diagnosis(LEARNED, 3.0, 0.2), run, KnownRows(3, 32))
    assert all(word in said for word in ("32", "3 ", "facts"))
    assert all(word in command for word in ("--epochs 15", "--no-keep-best", "--early-stopping-patience 0"))
    assert mending(Diagnosis(LEARNED, 3.0, 0.2), run, KnownRows(30, 32)) == ("", "")
    long = FinishedRun(tmp_path / "run", {"model": "m"}, 96, float(MOST_EPOCHS), 1.0)
    assert mending(Diagnosis(LEARNED, 3.0, 0.2), long, KnownRows(3, 32)) == ("", "")
    over = Diagnosis(OVER_FITTED, 3.0, 2.0, None, 20, 1.0)
    assert "keep this adapter" in mending(over, run, KnownRows(32, 32))[0]
    assert mending(over, run, KnownRows(3, 32)) == mending(over, run)
