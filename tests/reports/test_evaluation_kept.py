"""What `evaluate` measured stays in the run's folder and on pages, and says which rows the run has seen."""

from __future__ import annotations

import json
import re
import shutil
import sys

import numpy as np
import pytest
from browser import look
from byte_tokenizer import byte_tokenizer
from resumed_runs import metrics
from run_cli import one_line, passed, run, succeeds

from mlx_lora.data.dataset import EncodedSet
from mlx_lora.data.notes import seen_rows
from mlx_lora.reports.run_report import keep_evaluation, read_evaluation, shown_evaluation, write_evaluation_page
from mlx_lora.trainer.checkpoint import locked

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def made(tiny_folder, chats, tmp_path_factory):
    """A run's folder, and its data."""
    room = tmp_path_factory.mktemp("kept")
    data = room / "rows.jsonl"
    data.write_text(chats.read_text())
    words = ("--iters", 8, "--batch-size", 8, "--learning-rate", 2e-2, "--steps-per-eval", 8, "--sample-tokens", 4)
    succeeds("train", "--model", tiny_folder, "--data", data, "--adapter-path", room / "a", *words)
    return room / "a", data


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made[0], tmp_path / "a")
    return tmp_path / "a"


@pytest.fixture
def evaluate(tiny_folder, folder):
    return lambda *words: run("evaluate", "--model", tiny_folder, "--adapter-path", folder, *words)


def written(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_results_stay_in_the_runs_folder_and_on_its_page(evaluate, folder, chats):
    before = (folder / "report.html").read_text()
    facts = (folder / "report.json").read_text()
    printed = json.loads(evaluate("--data", chats, "--show", 3, "--json").out)
    kept = json.loads((folder / "evaluation.json").read_text())
    assert {name: kept[name] for name in printed} == printed
    assert len(kept["examples"]) == 3
    assert (kept["held_out"], len(kept["date"])) == (False, len("2026-11-28T06:00:00+00:00"))
    assert read_evaluation(folder) == kept
    page = (folder / "report.html").read_text()
    assert "Questions and answers" not in before
    for text in ("Questions and answers", kept["examples"][0]["expected"], f"{kept['base_loss']:.4f}"):
        assert text in page
    # The rest of the page, and report.json, are as the run left them: most of these rows repeat training rows.
    rest = re.sub(r"<h2>Questions and answers.*?(?=<h2>)", "", page, flags=re.S)
    here = re.compile(r"/[^\s<\"]*/a(?=/run\.yaml|-2)")  # the folder is a copy of the run's, and a command names it
    assert here.sub("", rest).split() == here.sub("", before).split()
    assert here.sub("", (folder / "report.json").read_text()) == here.sub("", facts)
    # A measurement without questions leaves those that were asked.
    assert evaluate("--data", chats).code == 0
    assert read_evaluation(folder) == kept


def test_results_of_another_adapter_are_not_shown(evaluate, folder, chats):
    evaluate("--data", chats, "--show", 1)
    assert read_evaluation(folder)["rows"] == 40
    weights = (folder / "adapters.safetensors").read_bytes()
    (folder / "adapters.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert read_evaluation(folder) is None
    (folder / "adapters.safetensors").write_bytes(weights)
    assert read_evaluation(folder)
    (folder / "evaluation.json").write_text('{"adapter": 1')
    assert read_evaluation(folder) is None


def test_a_run_begun_anew_takes_earlier_results_away(evaluate, folder, tiny_folder, chats):
    evaluate("--data", chats, "--show", 1)
    assert (folder / "evaluation.json").exists()
    succeeds(
        "train", "--model", tiny_folder, "--data", chats, "--adapter-path", folder, "--force", "--iters", 1,
        "--batch-size", 8, "--val-batches", 0, "--sample-tokens", 0,
    )  # fmt: skip
    assert not (folder / "evaluation.json").exists()


def test_a_run_that_goes_on_keeps_its_folder_to_itself(evaluate, folder, chats):
    with locked(folder):
        ran = evaluate("--data", chats)
    assert ran.code == 0
    assert str(folder) in ran.err
    assert not (folder / "evaluation.json").exists()


def test_a_page_of_its_own(evaluate, folder, tiny_folder, chats, tmp_path):
    page = tmp_path / "answers.html"
    passed(evaluate("--data", chats, "--report", page))
    text = page.read_text()
    kept = read_evaluation(folder)
    assert len(kept["examples"]) == 5, "a page shows some answers unless one says how many"
    assert all(
        one["expected"] in text and f"{kept[name]:.4f}" in text
        for one, name in zip(kept["examples"], ("loss", "base_loss") * 3, strict=False)
    )
    assert text.count("<th>") == 4
    one_line(evaluate("--data", chats, "--report", tmp_path / "no" / "page.html"), "--report", "page.html")
    one_line(evaluate("--data", chats, "--objective", "dpo", "--report", page), "--report")
    before = chats.read_bytes()
    one_line(evaluate("--data", chats, "--report", chats), ".html")
    assert chats.read_bytes() == before
    succeeds("evaluate", "--model", tiny_folder, "--data", chats, "--show", 1, "--report", tmp_path / "base.html")
    assert (tmp_path / "base.html").read_text().count("<th>") == 3


@pytest.mark.long
def test_texts_on_pages_are_text_and_fit(tmp_path):
    example = {
        "question": EVIL,
        "expected": EVIL,
        "base": EVIL,
        "adapter": "x" * 400,
        "base_right": False,
        "right": True,
    }
    facts = {
        "loss": 1.0, "base_loss": 2.0, "change": {"change": -1.0, "low": None, "high": None, "rows": 2}, "rows": 2, "data": EVIL,
        "model": EVIL, "adapter_path": EVIL, "partial": True, "examples": [example, {**example, "right": None, "base_right": None}],
        "near_training": {"rows": 1, "exact": 0, "of_rows": 2, "example": EVIL},
    }  # fmt: skip
    assert shown_evaluation(facts)["rows"][0]["said"] == [(EVIL, False), ("x" * 400, True)]
    path = tmp_path / "page.html"
    write_evaluation_page(path, facts, f"mlx-lora evaluate {EVIL}", EVIL)
    page = path.read_text()
    assert "<script" not in page
    assert (page.count("✓"), page.count("✗")) == (1, 1), "only answers are marked of which anybody can tell"
    seen = look(path, 390)
    assert seen.found["needed"] <= seen.found["width"]
    assert not seen.console


def test_the_rows_that_a_run_held_out_are_measured_without_data(evaluate, made, folder, tiny_folder, tmp_path):
    found = json.loads(evaluate("--show", 50, "--json").out)
    facts = json.loads((folder / "report.json").read_text())["data"]["splits"]
    assert found["rows"] == facts["valid"]["rows"] == len(found["examples"])
    assert found["supervised_tokens"] == facts["valid"]["supervised_tokens"]
    assert found["near_training"]["exact"] == 0
    assert read_evaluation(folder)["held_out"] is True
    last = metrics(folder)[-1]
    assert found["loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    one_line(evaluate("--max-seq-length", 64), "--max-seq-length", "--data")
    one_line(run("evaluate", "--model", tiny_folder), "--data")
    config = (folder / "run.yaml").read_text()
    other = tmp_path / "other.jsonl"
    other.write_text("".join(made[1].read_text().splitlines(keepends=True)[:30]))
    (folder / "run.yaml").write_text(config.replace(str(made[1]), str(other)))
    one_line(evaluate(), "changed", "--data")
    (folder / "run.yaml").write_text(config.replace(str(made[1]), str(tmp_path / "gone.jsonl")))
    one_line(evaluate(), "--data")
    one_line(evaluate("--forgetting"), "--data")


def test_rows_that_the_run_has_seen_are_counted(evaluate, made, tmp_path):
    lines = [json.loads(line) for line in made[1].read_text().splitlines()]
    same = evaluate("--data", made[1], "--json")
    near = json.loads(same.out)["near_training"]
    assert (near["of_rows"], near["rows"]) == (40, near["exact"])
    assert 0 < near["exact"] < 40, "held-out rows are not training rows"
    assert f"{near['rows']} of 40 rows" in same.err
    assert near["example"] in [one["instruction"] for one in lines]
    others = [
        {"instruction": f"Which color has the {thing}?", "output": "It is a fine dark blue."}
        for thing in ("sky", "sea", "inkwell")
    ]
    new = evaluate("--data", written(tmp_path / "new.jsonl", others), "--json")
    assert json.loads(new.out)["near_training"] == {"rows": 0, "exact": 0, "of_rows": 3, "example": ""}
    assert "of 3 rows" not in new.err


def test_nothing_is_said_of_training_rows_that_are_gone(tiny_folder, folder, evaluate, made, chats, tmp_path):
    config = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(config.replace(str(made[1]), str(tmp_path / "gone.jsonl")))
    ran = evaluate("--data", chats, "--json")
    assert (ran.code, json.loads(ran.out)["near_training"]) == (0, None)
    assert "memory" not in ran.err
    (folder / "run.yaml").unlink()
    (folder / "evaluation.json").unlink()
    ran = evaluate("--data", chats, "--json")
    assert (json.loads(ran.out)["near_training"], ran.err) == (None, "")
    assert not (folder / "evaluation.json").exists(), "no run's folder"


def rows_of(pairs: list[tuple[str, str]]) -> EncodedSet:
    tokenizer = byte_tokenizer()
    parts = [[tokenizer.encode(text, add_special_tokens=False) for text in pair] for pair in pairs]
    return EncodedSet.from_rows(
        [(np.array(ask + say, np.int32), np.array([False] * len(ask) + [True] * len(say))) for ask, say in parts]
    )


def test_near_rows_are_seen_and_other_answers_are_not():
    told = "Our shop closes at a quarter to seven on every working day of the week."
    asked = "When does your little shop in the old town close on working days?"
    trained = [
        (f"What is number {n * n} of the long list?", f"It is the letter {chr(65 + n)} of {n + 7}.") for n in range(20)
    ]
    trained += [(asked, told), (asked, told)]
    measured = [
        (asked, told),
        (asked, told),
        (f"Hello! {asked}", told),
        (asked, "I do not know that, please call us tomorrow morning instead."),
    ]
    found = seen_rows(rows_of(measured), rows_of(trained), byte_tokenizer())
    assert (found.rows, found.exact, found.of_rows) == (3, 2, 4)
    assert asked[:40] in found.example
    assert found.words().startswith("3 of 4 rows")
    assert seen_rows(rows_of(measured[3:]), rows_of(trained), byte_tokenizer()).words() == ""


def test_plain_text_on_a_terminal_is_measured_without_questions(tiny_folder, tmp_path, monkeypatch):
    text = written(tmp_path / "text.jsonl", [{"text": "Once upon a time."}] * 3)
    command = sys.modules["mlx_lora.cli.evaluate"]

    class Terminal:
        def __getattr__(self, name):
            return getattr(sys.stdout, name)

        def isatty(self):
            return True

    monkeypatch.setattr(command, "sys", type("Sys", (), {"stdout": Terminal()}))
    ran = run("evaluate", "--model", tiny_folder, "--data", text)
    assert (ran.code, "loss" in ran.out) == (0, True), ran.err


def test_a_folder_that_cannot_be_written_is_a_note(evaluate, folder, chats, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys.modules["mlx_lora.cli.evaluate"], "keep_evaluation", full)
    ran = evaluate("--data", chats, "--json")
    assert (ran.code, "No space left" in ran.err) == (0, True)
    monkeypatch.undo()
    keep_evaluation(folder, json.loads(ran.out))
    assert read_evaluation(folder)["loss"] == json.loads(ran.out)["loss"]
