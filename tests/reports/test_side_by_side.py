"""`evaluate` compares base and adapter on the same rows: losses, an interval, answers side by side, and what a stop leaves."""

from __future__ import annotations

import contextlib
import json
import math
import sys

import pytest
from resumed_runs import metrics
from run_cli import holds, one_line, run, succeeds

import mlx_lora
from mlx_lora.cli.evaluate import side_by_side
from mlx_lora.reports.run_report import shown_evaluation
from mlx_lora.utils.statistics import student_quantile


@pytest.fixture(scope="module")
def trained(tiny_folder, chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compared") / "a"
    words = ("--iters", 24, "--batch-size", 8, "--learning-rate", 2e-2, "--steps-per-eval", 6, "--sample-tokens", 8)
    return folder, succeeds("train", "--model", tiny_folder, "--data", chats, "--adapter-path", folder, *words)


@pytest.fixture
def words(tiny_folder, trained, chats):
    return ("evaluate", "--model", tiny_folder, "--adapter-path", trained[0], "--data", chats)


def test_a_run_says_what_became_of_it_in_terminal_page_and_facts(trained):
    folder, ran = trained
    facts = json.loads((folder / "report.json").read_text())
    found = facts["verdict"]
    assert found["name"] in ("learned", "memorized", "overfitted", "too few steps")
    assert found["headline"] in ran.err
    assert found["headline"] in (folder / "report.html").read_text()
    lines = (folder / "held_out_rows.jsonl").read_text().splitlines()
    vals = metrics(folder)
    held_out = {one["step"]: one["val_loss"] for one in vals if one["val_loss"] is not None}
    for line in map(json.loads, lines):
        assert sum(line["loss_sums"]) / sum(line["tokens"]) == pytest.approx(held_out[line["step"]], rel=1e-4)
    assert len(lines) == len(held_out) > 2
    assert found["change"]["rows"] == len(json.loads(lines[0])["tokens"])
    # What the row itself answers is beside what the model wrote.
    assert facts["samples"][0]["expected"].startswith("abc")


def test_base_and_adapter_are_measured_in_one_call(words, tiny_folder, chats):
    both = json.loads(run(*words, "--json").out)
    alone = json.loads(run("evaluate", "--model", tiny_folder, "--data", chats, "--json").out)
    assert both["base_loss"] == pytest.approx(alone["loss"], rel=1e-6)
    assert both["loss"] < both["base_loss"]
    assert both["base_perplexity"] == pytest.approx(math.exp(both["base_loss"]))
    assert both["change"]["change"] == pytest.approx(both["loss"] - both["base_loss"])
    assert both["change"]["low"] < both["change"]["change"] < both["change"]["high"] < 0
    assert (both["partial"], both["rows"], both["supervised_tokens"]) == (False, 40, alone["supervised_tokens"])
    assert "examples" not in both  # texts take long: a script gets none unless it asks
    assert "base_loss" not in alone
    shown = run(*words).out
    assert all(f"{both[name]:.4f}" in shown for name in ("loss", "base_loss"))
    assert "95% interval" in shown


@pytest.mark.long
def test_answers_stand_side_by_side(words, tiny_folder, trained, chats, tmp_path):
    found = json.loads(run(*words, "--show", 3, "--json").out)
    assert [one["question"].startswith("Say") for one in found["examples"]] == [True] * 3
    for one in found["examples"]:
        assert set(one) == {"question", "expected", "base", "adapter", "base_right", "right"}
        assert set(one["expected"]) == set("abc")
        assert one["right"] == (one["adapter"] == one["expected"])
    right, base = (sum(one[name] for one in found["examples"]) for name in ("right", "base_right"))
    assert found["right"] == {"right": right, "of": 3, "base": base, "fell": False}
    text = run(*words, "--show", 3).out
    assert all(one["expected"] in text for one in found["examples"])
    ours = mlx_lora.evaluate(tiny_folder, chats, trained[0], show=3)
    assert ours["examples"] == found["examples"]
    few = tmp_path / "few.jsonl"
    few.write_text("".join(chats.read_text().splitlines(keepends=True)[:5]))
    everything = json.loads(run(*words[:-1], few, "--show", 400, "--json").out)["examples"]
    assert len(everything) == 5
    base_only = json.loads(run("evaluate", "--model", tiny_folder, "--data", chats, "--show", 2, "--json").out)
    assert [set(one) for one in base_only["examples"]] == [{"question", "expected", "base", "base_right"}] * 2
    assert base_only["right"]["of"] == 2


def test_answers_are_marked_where_anybody_can_tell():
    nine = "one " * 9
    long = {"question": "q", "expected": nine, "base": "x", "adapter": nine, "right": None, "base_right": None}
    short = {"question": "q", "expected": "Yes.", "base": "No", "adapter": "yes", "right": True, "base_right": False}
    facts = {"rows": 3, "data": "d", "loss": 1.0, "examples": [long, short, {**long, "ticked": False}]}
    lines = side_by_side(shown_evaluation(facts))
    assert [line.split()[0] for line in lines if line.endswith("(right)")] == ["adapter"]
    assert [line.split()[0] for line in lines if line.endswith("(not right)")] == ["base", "adapter"]
    holds(lines[-2], "2 questions", "base 0, adapter 1")
    assert not any("right" in line for line in side_by_side(shown_evaluation({**facts, "examples": [long]})))


class Stop:
    """Says that a stop was asked for from the n-th question on."""

    def __init__(self, after: int):
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.fixture
def stopped_after(monkeypatch):
    command = sys.modules["mlx_lora.cli.evaluate"]  # as an attribute of the package, it is the function

    def begin(count: int) -> None:
        monkeypatch.setattr(command, "interrupt_flag", lambda words: contextlib.nullcontext(Stop(count)))

    return begin


def test_a_stopped_measurement_prints_what_it_has(words, stopped_after):
    stopped_after(1)
    ran = run(*words, "--batch-tokens", 256, "--json")
    found = json.loads(ran.out)
    assert ran.code == 130
    assert found["partial"] is True
    assert 0 < found["rows"] < 40
    assert found["change"]["rows"] == found["rows"]  # both models saw the same rows
    stopped_after(1)
    plain = run(*words, "--batch-tokens", 256)
    assert plain.code == 130
    assert f"{found['loss']:.4f}" in plain.out
    stopped_after(0)
    nothing = run(*words)
    assert (nothing.code, nothing.out) == (130, "")
    stopped_after(10**6)
    assert run(*words, "--json").code == 0


def test_a_stopped_forgetting_test_prints_what_it_has(words, stopped_after):
    stopped_after(4)  # asked before the first set, before its batch, after it, and before the second set
    ran = run(*words, "--forgetting", "--json")
    found = json.loads(ran.out)
    assert ran.code == 130
    assert found["partial"] is True
    assert next(iter(found["sets"])) == "task"
    assert len(found["sets"]) < 3
    stopped_after(0)
    assert run(*words, "--forgetting").code == 130


def test_what_cannot_be_shown_is_refused(words, tiny_folder, tmp_path):
    one_line(run(*words, "--show", 2, "--objective", "dpo"), "--show 2", "dpo")
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "Once upon a time."}\n' * 3)
    one_line(run("evaluate", "--model", tiny_folder, "--data", text, "--show", 2), "plain text")
    assert run("evaluate", "--model", tiny_folder, "--data", text).code == 0


@pytest.mark.parametrize(
    ("freedom", "confidence", "quantile"),
    [
        (1, 0.95, 12.7062), (1.5, 0.95, 6.0167), (2.7, 0.95, 3.3921), (11, 0.95, 2.2010), (1000, 0.95, 1.9623),
        (4, 1 - 0.05 / 8, 5.2611), (30, 0.999, 3.6460),
    ],
)  # fmt: skip
def test_students_quantile(freedom, confidence, quantile):
    assert student_quantile(freedom, confidence) == pytest.approx(quantile, rel=1e-3)


@pytest.mark.long
def test_rows_that_chose_the_adapter_widen_the_interval_and_others_do_not(tiny_folder, chats, tmp_path):
    adapter, model = ("--adapter-path", tmp_path / "a"), ("--model", tiny_folder)
    chosen_by = ("--iters", 4, "--valid-fraction", 0.3, "--keep-best", "--steps-per-eval", 1, "--save-every", 1)
    assert run("train", *model, *adapter, "--data", chats, *chosen_by).code == 0
    report, held_out = tmp_path / "a" / "report.json", ("evaluate", *model, *adapter, "--json")
    facts = json.loads(report.read_text())
    assert facts["verdict"]["change"]["choices"] == 4
    chosen, others = (json.loads(run(*held_out, *more).out)["change"] for more in ((), ("--data", chats)))
    assert [one["choices"] for one in (chosen, others)] == [4, 1]
    facts["verdict"]["change"]["choices"] = 1
    report.write_text(json.dumps(facts))
    plain = json.loads(run(*held_out).out)["change"]
    assert chosen["change"] == pytest.approx(plain["change"])
    assert chosen["high"] - chosen["low"] > 1.2 * (plain["high"] - plain["low"])
    facts["verdict"]["change"]["choices"] = 4
    report.write_text(json.dumps(facts))
    few = ("--forgetting", "--general-text", chats, "--general-chat", chats)
    forgetting = json.loads(run(*held_out, *few).out)["sets"]["task"]["adapters"]["a"]
    assert forgetting["change_reach"] == pytest.approx((chosen["high"] - chosen["low"]) / 2, rel=1e-2)
    report.write_text('{"verdict": []}')
    assert json.loads(run(*held_out).out)["change"]["choices"] == 1
