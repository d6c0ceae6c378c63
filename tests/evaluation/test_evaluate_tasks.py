"""`evaluate --tasks` and `--metric` from the command line and in Python: scores, comparisons, the page."""

from __future__ import annotations

import json

import pytest
from browser import look
from conftest import tiny_model, write_folder
from make_adapters import make_adapter
from run_cli import one_line, run

import mlx_lora
from mlx_lora.reports.sweep_page import write_task_page

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    model = tiny_model(tie_word_embeddings=False)
    return write_folder(tmp_path_factory.mktemp("untied"), model, {"tie_word_embeddings": False})


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return [make_adapter(folder, root / name, rank=4, seed=seed) for name, seed in (("one", 1), ("two", 2))]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "questions.jsonl"
    lines = [{"prompt": f"{EVIL} {n}?", "completion": str(n)} for n in range(6)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture(scope="module")
def asked(folder, adapters, rows, tmp_path_factory):
    """One run of the command, with a function that likes long answers, a judge and a page."""
    root = tmp_path_factory.mktemp("asked")
    (root / "own.py").write_text("def letters(completions, **columns):\n    return [len(c) for c in completions]\n")
    page = root / "scores.html"
    ran = run(
        "evaluate", "--model", folder, "--data", rows, "--metric", "rouge_l", f"{root}/own.py:letters", "--adapter",
        f"one={adapters[0]}", f"two={adapters[1]}", "--max-tokens", 12, "--judge", folder, "--report", page, "--json",
        exactly=True,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    return json.loads(ran.out), page


def test_every_adapter_is_compared_with_the_base(asked):
    facts, _ = asked
    by_metric = {one["metric"]: one for one in facts["tasks"] if not one["metric"].startswith("judge")}
    assert set(by_metric) == {"rouge_l", "letters"}
    assert list(by_metric["letters"]["models"]) == ["base", "one", "two"]
    for one in by_metric.values():
        assert set(one["compared"]) == {"one", "two"}
        assert one["rows"] == 6
        for name, compared in one["compared"].items():
            difference = one["models"][name]["score"] - one["models"]["base"]["score"]
            assert compared["difference"] == pytest.approx(difference)
            assert compared["low"] <= difference <= compared["high"]
    assert [one["metric"] for one in facts["tasks"]][-2:] == [f"judge {facts['model'].rpartition('/')[2]}"] * 2
    assert any("against base" in note for note in facts["notes"])
    said = facts["answers"]["questions.jsonl"]
    assert len(said) == 6
    assert said[0]["changed"] >= said[-1]["changed"]
    assert len({said[0]["answers"][name] for name in ("base", "one", "two")}) > 1


def test_the_page(asked):
    _, page = asked
    text = page.read_text()
    assert EVIL not in text
    assert "questions.jsonl" in text
    for width in (1200, 390):
        seen = look(page, width)
        assert not seen.console
        assert seen.found["needed"] <= seen.found["width"]


def test_the_page_without_adapters(tmp_path):
    facts = {
        "model": "m", "notes": [], "answers": {},
        "tasks": [{"task": "t", "metric": "acc", "higher_is_better": True, "rows": 3, "compared": {},
                   "models": {"base": {"score": 0.5, "standard_error": None}}}],
    }  # fmt: skip
    write_task_page(tmp_path / "page.html", facts, "command", "device")
    assert "0.5" in (tmp_path / "page.html").read_text()


def test_in_python(folder, adapters, rows):
    found = mlx_lora.evaluate_tasks(
        folder, data=rows, metrics="json", adapters={"mine": adapters[0]}, limit=2, max_tokens=4
    )
    [one] = found["tasks"]
    assert (one["metric"], one["rows"], list(one["models"])) == ("json", 2, ["base", "mine"])


def test_plain_lines(folder, rows):
    ran = run("evaluate", "--model", folder, "--data", rows, "--metric", "exact_match,", "--max-tokens", 2)
    one_line(ran, "exact_match")
    ran = run("evaluate", "--model", folder, "--data", rows, "--metric", "exact_match", "--max-tokens", 2)
    assert ran.code == 0
    assert "questions.jsonl: exact_match of 6 rows" in ran.out
    assert "base" in ran.out


def test_names_that_mean_the_base_are_refused(folder, adapters, rows):
    given = ("--data", rows, "--metric", "json", "--adapter", f"base={adapters[0]}")
    one_line(run("evaluate", "--model", folder, *given), "base")


def test_help_and_other_uses_stay(folder):
    assert "--num-fewshot" in run("evaluate", "--tasks", "list", "--help").out
    assert "--forgetting" in run("evaluate", "--help").out
