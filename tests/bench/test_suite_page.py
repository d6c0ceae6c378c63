"""The benchmark report page: measured and predicted told apart, nothing of a result runs as markup, readable."""

from __future__ import annotations

import re

import pytest
from browser import look
from made_results import made_entry, made_result, write
from run_cli import run, succeeds

from mlx_lora.bench import results as bench_page
from mlx_lora.bench.results import read_results, write_page
from mlx_lora.bench.run import WORKLOADS
from mlx_lora.reports.charts import Bar, bar_chart

EVIL = "<script>alert(1)</script> & \"'"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp("page")
    mac = made_result(entries=[made_entry(one) for one in WORKLOADS[:2]])
    fast = made_result("Apple M4 Max", [made_entry(speed=3000.0)])
    fast["machine"]["gpu_cores"] = 40
    strange = made_result(EVIL, [{**made_entry(WORKLOADS[2]), "status": "failed", "reason": EVIL}])
    for name, content in {"a": mac, "b": fast, "c": strange}.items():
        write(tmp_path / "results" / f"{name}.json", content)
    (tmp_path / "results" / "d.json").write_text("{")
    results, problems = read_results([tmp_path / "results"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_page, "WORKLOADS", WORKLOADS[:4])  # each of the 26 takes half a second
        write_page(tmp_path / "report.html", results, problems)
        yield tmp_path / "report.html"


@pytest.mark.long
def test_measured_and_predicted_are_told_apart(page):
    text = page.read_text()
    assert text.count('<svg class="chart bars"') == 8
    assert text.count('<svg class="chart"') == 2
    measured, predicted = (
        re.findall(rf'<svg class="chart bars"[^>]*{kind} tokens per second.*?</svg>', text)
        for kind in ("measured", "predicted")
    )
    # Each kind has its own panel, so that a fast chip's prediction does not make a measured bar small.
    assert [one.count("bar s0 measured") for one in measured] == [2, 1]
    assert "predicted</title>" not in "".join(measured)
    # Who measured a chip has no prediction beside it; all others have.
    assert [one.count("bar s0 predicted") for one in predicted] == [18 - 2, 18 - 1]
    assert "M4 Max: " not in predicted[0]
    assert "M4 Max: " in predicted[1]
    assert "measured</title>" not in "".join(predicted)
    assert "nobody measured them" in text


def test_nothing_of_a_result_runs_and_nothing_comes_from_elsewhere(page):
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert not re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?!data:)[a-z/]", text)
    assert "d.json: not usable JSON" in text


def test_report_command(page, tmp_path):
    ran = succeeds("bench", "report", page.parent / "results", "--out", tmp_path / "mine.html")
    assert "3 results in" in ran.err
    assert (tmp_path / "mine.html").read_text() == page.read_text()
    result = write(tmp_path / "result.json", made_result())
    assert run("bench", "report", result, "--out", result).code == 2
    assert read_results([result])[0][0].content == made_result()
    bad = run("bench", "report", tmp_path / "nowhere")
    assert bad.code == 2
    assert len(bad.lines) == 1


def test_bars():
    svg = bar_chart("x", [Bar("a", 10, low=8, high=20), Bar("b" * 40, 5, predicted=True, words="5 of 9")], " GB")
    first, second = (float(width) for width in re.findall(r'<rect[^>]*width="([\d.]+)"', svg))
    assert first == pytest.approx(2 * second)
    assert svg.count("whisker") == 1
    assert "10 GB" in svg
    assert "5 of 9" in svg
    assert "b" * 40 in svg  # in the tooltip
    assert f">{'b' * 11}…{'b' * 6}<" in svg
    assert "nothing measured" in bar_chart("x", [])


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(page, width, dark):
    seen = look(page, width, dark)
    assert not seen.console
    assert seen.found["charts"] == 10  # those of a folded part too
    assert seen.found["lines"] >= 2 * 5
    assert seen.found["needed"] <= width == seen.found["width"]
    assert seen.found["outside"] == []
    assert seen.found["smallest"] >= 9
    assert seen.found["clipped"] == 0
    assert (seen.found["paper"] == "rgb(253, 253, 251)") is not dark
