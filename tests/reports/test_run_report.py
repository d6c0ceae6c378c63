"""report.html: right numbers, nothing of the data runs as markup, no network, and readable in a browser."""

from __future__ import annotations

import json
import math
import re
import sys

import numpy as np
import pytest
from browser import look
from make_adapters import loaded
from run_cli import holds, lacks, run, succeeds

from mlx_lora.adapters.inject import inject, select_targets
from mlx_lora.data.dataset import EncodedSet
from mlx_lora.reports.charts import MOST_POINTS, Series, line_chart, number, ticks
from mlx_lora.reports.run_report import RunReport, Sample, charts, elapsed_s, tiles, verdict, without_untrained_accuracy
from mlx_lora.trainer import callbacks as report_page
from mlx_lora.trainer.callbacks import greedy_text, held_out_prompts, whole_words
from mlx_lora.trainer.gradient_checkpointing import apply_checkpointing

EVIL = "<script>alert(1)</script> & \"'"


def record(step: int, loss: float | None, val_loss: float | None = None, elapsed: float | None = None) -> dict:
    return {
        "step": step, "loss": loss, "val_loss": val_loss, "learning_rate": 1e-4, "grad_norm": 0.5,
        "supervised_tokens_per_s": 100.0 + step, "tokens_per_s": 150.0, "supervised_tokens": 0 if loss is None else 10,
        "peak_memory_bytes": 2 * 10**9, "process_peak_bytes": 3 * 10**9, "skipped_steps": 1, "elapsed_s": elapsed or step * 2.0,
    }  # fmt: skip


RECORDS = [record(0, None, 4.0), *(record(n, 4 - n / 10) for n in range(1, 11)), record(10, None, 3.0)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in RECORDS) + '{"step": 11, "lo')
    (tmp_path / "run.yaml").write_text(f"model: {json.dumps(EVIL)}\nalpha: null\n")
    split = {"rows": 9, "tokens": 90, "supervised_tokens": 50, "median_length": 10, "max_length": 12}
    data = {
        "data": EVIL, "rows_read": 10, "splits": {"train": split}, "valid_source": "held out", "template": "none",
        "truncated": 0, "duplicates": 0, "empty": 0, "dropped": 1, "notes": [EVIL], "example": [(EVIL, True), (EVIL, False)],
    }  # fmt: skip
    RunReport(EVIL, EVIL, EVIL, EVIL, EVIL, data, 2_500_000_000, [Sample(EVIL, EVIL, EVIL)]).write(tmp_path)
    return tmp_path


def test_the_page_has_its_charts_and_nothing_from_elsewhere(folder):
    page = (folder / "report.html").read_text()
    assert page.count('<svg class="chart"') == 6  # the losses are drawn in two shapes
    assert len(re.findall("<polyline", page)) == 1 + 1 + 2 + 3 + 1 + 1, "two validations are no line"
    assert page.count('r="5"') == 2 * 2
    assert "held-out perplexity 54.6 to 20.1, 63% lower" in re.search("<h1.*?</h1>", page)[0]
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)[a-z/]", page)
    assert "dashed" in page


def test_tiles_are_the_metrics():
    shown = dict(tiles(RECORDS))
    wanted = {
        "steps": "10",
        "held-out loss": "4.000 → 3.000",
        "trained tokens": "100",
        "trained tokens/s, median": "106",
        "peak memory, MLX": "2.00 GB",
        "training loss": "3.900 → 3.000",
        "time": "20s",
    }
    assert {name: shown[name] for name in wanted} == wanted
    assert len(shown) == 8
    assert dict(tiles([one for one in RECORDS if one["val_loss"] is None]))["held-out loss"] == "not measured"
    assert tiles([]) == [("steps", "0")]
    of_three = dict(tiles([record(n, 1.0) for n in (1, 10, 30)]))  # the first is left out, and two have a middle
    assert of_three["trained tokens/s, median"] == "120"


def test_a_page_of_pairs_shows_both_answers_and_no_accuracy_of_rounding(tmp_path):
    found = {"margin": -1e-9, "accuracy": 0.0, "chosen_rewards": 0.0, "rejected_rewards": 0.0}
    later = {**found, "margin": 2.0, "accuracy": 0.75}
    records = [
        {**record(0, None, 0.69), **found}, {**record(1, 0.6), **later}, {**record(2, None, 0.5), **later},
        {**record(3, None, 0.4), **later, "accuracy": 1.0},
    ]  # fmt: skip
    own, other = {"objective": "dpo"}, {"objective": "dpo", "reference_adapter": "folder"}
    found = verdict(without_untrained_accuracy(records, own), own)
    assert found.headline == "Held-out accuracy 75% to 100%, reward margin 0.00 to 2.00"
    for settings in (other, {"objective": "orpo"}):
        assert "accuracy 0% to 100%," in verdict(without_untrained_accuracy(records, settings), settings).headline
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    (tmp_path / "run.yaml").write_text(json.dumps(own))
    split = {"rows": 9, "tokens": 90, "supervised_tokens": 50, "median_length": 10, "max_length": 12}
    data = {
        "data": "pairs", "rows_read": 10, "splits": {"train": split}, "valid_source": "file", "template": "none",
        "truncated": 0, "duplicates": 0, "empty": 0, "dropped": 1, "notes": [], "example": [("Good", True)],
        "rejected": [("Bad", True)], "records": "pairs",
    }  # fmt: skip
    RunReport("", "", "", "", "", data).write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    holds(page, "<mark>Good</mark>", "<mark>Bad</mark>", "<th>pairs</th>")
    assert page.count('<svg class="chart"') == 9
    assert "Loss per pair" in page
    lowest = re.search(r"Margin of rewards.*?</svg>", page, re.DOTALL)[0]
    assert ">0</text>" in lowest
    assert ">-" not in lowest
    rated = [{k: v for k, v in one.items() if k != "accuracy"} | {"divergence": 0.5} for one in records]
    titles = [chart["title"] for chart in charts(rated, None)]
    assert {"Loss per rated answer", "Divergence from the reference"} <= set(titles)
    assert "Pairs preferred as labeled" not in titles


def test_time_counts_every_part_of_a_resumed_run():
    assert elapsed_s([record(n, 1.0, elapsed=float(n)) for n in (1, 5, 9)]) == 9
    assert elapsed_s([record(n, 1.0, elapsed=s) for n, s in ((1, 4.0), (5, 20.0), (6, 3.0), (9, 12.0))]) == 32


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (3.2, 3.9), (1e-5, 2e-4), (0, 123456), (-3, 5), (7, 7), (0, 0), (-2, -2)]
)
def test_ticks_are_round_and_reach_over(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 8
    assert found[0] <= low + 1e-12
    assert found[-1] >= high - 1e-12
    step = found[1] - found[0]
    assert round(step / 10 ** math.floor(math.log10(step) + 1e-9), 6) in (1, 2, 5)


def test_long_and_broken_series():
    long = line_chart("x", [Series("a", [(n, n) for n in range(10_001)])])
    assert len(long.split('points="')[1].split('"')[0].split()) <= MOST_POINTS
    gap = line_chart("x", [Series("a", [(0, 1), (1, 2), (2, math.nan), (3, 1), (4, 2)])])
    assert gap.count("<polyline") == 2
    assert "nothing recorded" in line_chart("x", [Series("a", [(0, math.nan)]), Series("b", [])])
    lacks(line_chart("x", [Series("a", [(3, 1)])]), "<polyline", "NaN")
    assert [number(v) for v in (0, 1234.5, 0.25, 2e-5)] == ["0", "1,234", "0.25", "2.0e-5"]


def test_texts_of_the_run_before_are_kept(folder, tmp_path):
    facts = json.loads((folder / "report.json").read_text())
    report = RunReport("", "", "", "", "", facts["data"])
    old = {key: facts["samples"][0][key] for key in ("prompt", "before", "after")}  # as an earlier version wrote it
    (tmp_path / "report.json").write_text(json.dumps({**facts, "samples": [old]}))
    assert report.goes_on(folder, 5)
    assert report.samples == [Sample(EVIL, EVIL, EVIL)]
    assert not RunReport("", "", "", "", "", {}).goes_on(folder / "nowhere", 5)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(folder, width, dark):
    seen = look(folder / "report.html", width, dark)
    assert not seen.console
    wanted = {"charts": 5, "lines": 8, "width": width, "outside": [], "clipped": 0}
    assert {name: seen.found[name] for name in wanted} == wanted
    assert seen.found["needed"] <= width
    assert seen.found["smallest"] >= 9
    light = "rgb(253, 253, 251)"
    assert (seen.found["paper"] == light) is not dark


@pytest.mark.long
def test_a_run_leaves_a_page_with_texts_before_and_after(tiny_folder, chats, tmp_path):
    words = ("train", "--model", tiny_folder, "--data", chats, "--adapter-path", tmp_path / "a", "--iters", 12)
    words += ("--learning-rate", 2e-2, "--batch-tokens", 384, "--save-every", 5, "--dtype", "bfloat16")
    ran = succeeds(*words, "--sample-tokens", 12)
    # The base is described as it was loaded: an adapter on it is not the base's memory, nor its dtype.
    described = next(line for line in ran.lines if line.startswith("Base: ")).removeprefix("Base: ")
    assert json.loads((tmp_path / "a" / "report.json").read_text())["base"] == described
    (sample,) = json.loads((tmp_path / "a" / "report.json").read_text())["samples"]
    assert sample["before"] != sample["after"]
    assert "Say" in sample["prompt"]
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count('<svg class="chart"') == 6
    talk = re.search(r'<section class="talk">.*?</section>', page, re.DOTALL)[0]
    assert '<span class="role">User</span><div class="said">Say' in talk
    assert "im_start" in sample["prompt"]
    assert "im_start" not in talk
    # The end of the run tells the text, the report and the commands that come next.
    end = ran.lines[ran.lines.index("One text, before and after training:") :]
    assert end[1].split() == ["User", *sample["prompt"].split("user\n")[1].split("<|im_end|>")[0].split()]
    assert f"Report: {tmp_path / 'a' / 'report.html'}" in end
    assert [line.split()[1] for line in end[end.index("What to do next:") + 1 :]] == [
        "chat", "generate", "evaluate", "export", "serve",
    ]  # fmt: skip
    assert "learning_rate" in page
    # Going on: the text from before the first step is still that; without texts, the page has none.
    assert run(*words, "--sample-tokens", 12, "--resume", "--iters", 14).code == 0
    (again,) = json.loads((tmp_path / "a" / "report.json").read_text())["samples"]
    assert again["before"] == sample["before"]
    plain = tmp_path / "b"
    assert run(*words, "--adapter-path", plain, "--sample-tokens", 0).code == 0
    assert "Before and after" not in (plain / "report.html").read_text()
    first = tmp_path / "a" / "checkpoints" / "step-000010" / "adapters.safetensors"
    assert first.read_bytes() == (plain / "checkpoints" / "step-000010" / "adapters.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["none", "block", "selective"])
def test_a_checkpointed_model_generates_as_any_other(mode, tiny_folder):
    base, prompt = loaded(tiny_folder), [5, 6, 7]
    inject(base.model, select_targets(base.model).paths, 4, 2.0)
    plain = greedy_text(base, prompt, 8)
    apply_checkpointing(base.model, mode)
    assert greedy_text(base, prompt, 8) == plain


def test_the_beginning_is_what_comes_before_the_first_trained_token():
    row, other = np.arange(100, 130), np.arange(5)
    mask = np.zeros(30, bool)
    mask[20:] = True

    def first(*rows):
        return held_out_prompts(EncodedSet.from_rows(rows), 1)[0][1]

    assert first((row, mask)) == list(range(100, 120))
    assert first((row, np.arange(30) > 0)) == list(range(100, 124))
    assert first((other, np.arange(5) > 0)) == [0, 1, 2, 3]
    long = np.arange(4000)
    assert first((long[:1000], long[:1000] > 900)) == list(range(901))  # whole, with its system text and tools
    assert first((long, long > 3900)) == list(range(3901 - 2048, 3901))


def test_the_beginnings_are_of_typical_rows_and_differ():
    def row(n, length):
        return np.full(length, n), np.arange(length) > 2

    rows = [row(n, length) for n, length in ((1, 9), (2, 4), (3, 6), (3, 6), (4, 30))]
    found = held_out_prompts(EncodedSet.from_rows(rows), 3)
    assert [tokens[0] for _, tokens in found] == [3, 1, 2]
    assert len(held_out_prompts(EncodedSet.from_rows(rows), 9)) == 4


def test_plain_text_is_cut_where_a_word_begins():
    rows = EncodedSet.from_rows([(np.arange(100, 130), np.arange(30) > 0)])
    assert held_out_prompts(rows, 1, lambda before, token: token == before + 1 == 118) == [(0, list(range(100, 118)))]
    assert held_out_prompts(rows, 1, lambda before, token: token < 110) == [(0, list(range(100, 124)))]  # none in reach


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("O rose, thou ar", "O rose, thou ..."),
        ("O rose.", "O rose."),
        ("O rose. And", "O rose."),
        ("rose", "rose ..."),
        ("O rose,", "O rose, ..."),
        ("", " ..."),
        ("玫瑰很", "玫瑰很 ..."),
    ],
)
def test_a_text_that_was_cut_ends_with_a_whole_word(text, shown):
    assert whole_words(text) == shown


def test_steps_on_an_axis_are_whole():
    assert ticks(1, 3, 6) == [1, 1.5, 2, 2.5, 3]
    assert ticks(1, 3, 6, whole=True) == [1, 2, 3]
    assert ticks(0, 40, 6, whole=True) == ticks(0, 40, 6)
    for first, halves in ((1, False), (1.25, True)):
        drawn = line_chart("loss", [Series("loss", [(first, 40.0), (2, 30.0), (3, 35.0)])], "", True)
        assert (">1.5<" in drawn) == halves


def test_a_notebooks_own_command_is_no_command_of_the_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3", "-m", "mlx_lora.train", "--data", "a b"])
    assert report_page._command().endswith("train --data 'a b'")
    monkeypatch.setattr(report_page, "in_notebook", lambda: True)
    assert report_page._command() == ""
    monkeypatch.setattr(report_page, "in_notebook", lambda: False)
    monkeypatch.setattr(sys, "argv", [""])
    assert report_page._command() == ""
