"""The studio's page on the real server with much in it: a data set of five million tokens, and 200 runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from studio_browser import Watched, open_studio
from studio_client import write_run
from studio_real import PATIENCE_MS, asked, studio

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_runs_list")]

RECORDS, TOKENS = 25_000, 5_000_000
FIRST_PAINT_MS, LONGEST_MS, OPENINGS = 1000, 200, 5


def write_data(path: Path) -> Path:
    """Write records of about 200 tokens of the byte tokenizer each; some are long, some there twice."""
    with path.open("w") as file:
        for n in range(RECORDS):
            words = f"row {n - 1 if n % 97 == 0 and n else n}: " + "a line of some length, " * (
                30 if n % 61 == 0 else 8
            )
            file.write(json.dumps({"prompt": f"Say {words[:12]}", "completion": words}) + "\n")
    return path


def smooth(browser: Any, url: str, project: dict[str, Any], use: Callable[[Watched], None]) -> list[tuple[int, int]]:
    """Open the page and use it until one time is within the budgets, a few times at most: other work only adds to it.

    Returns:
        First contentful paint and longest task in ms, of each opening.
    """
    seen: list[tuple[int, int]] = []
    while len(seen) < OPENINGS and not any(paint < FIRST_PAINT_MS and task < LONGEST_MS for paint, task in seen):
        with open_studio(browser, url, project=project) as watched:
            watched.page.set_default_timeout(PATIENCE_MS)
            use(watched)
            found = watched.page.evaluate("seen")
            seen.append((found["paints"]["first-contentful-paint"], max(found["long"], default=0)))
    print("(first contentful paint, longest task) in ms:", seen)
    return seen


def test_five_million_tokens_are_turned_page_by_page(browser, tiny_folder, tmp_path):
    home = tmp_path / "home"
    (home / "data").mkdir(parents=True)
    data = write_data(home / "data" / "large.jsonl")
    with studio(home, tiny_folder.parent) as url:
        sets = [{"path": str(data), "weight": 1}]
        question = {"model": str(tiny_folder), "data": sets, "settings": {"max_seq_length": 512}}
        said = set()
        while (answer := asked(url, "data/preview", question))["task"]:
            task = next(one for one in asked(url, "tasks")["tasks"] if one["id"] == answer["task"]["id"])
            assert task["state"] in ("running", "done"), task
            said.add(task["message"].split(" ")[-1])
            time.sleep(0.3)
        assert said & {"read", "Encoding"}, "the page is told how far it is"
        assert answer["counts"]["rows"] == RECORDS
        assert answer["counts"]["tokens"] >= TOKENS
        assert answer["counts"]["cut"] > 0
        assert answer["counts"]["doubled"] > 0

        def turn(watched: Watched) -> None:
            page = watched.page
            page.locator("mark").first.wait_for()
            for number in range(2, 8):
                page.get_by_role("button", name="Next", exact=True).click()
                page.get_by_text(f"Page {number} of {RECORDS // 20:,}".replace(",", "")).wait_for()
                page.get_by_text(f"line {20 * (number - 1) + 1}").first.wait_for()
            page.get_by_role("radio", name="Doubled").check()
            page.locator(".data-row").first.wait_for()
            page.get_by_text("Page 1 of").wait_for()

        project = {"model": str(tiny_folder), "sets": sets, "settings": {"max_seq_length": 512}}
        seen = smooth(browser, url + "/#/data", project, turn)
    assert any(paint < FIRST_PAINT_MS and task < LONGEST_MS for paint, task in seen)


def test_200_real_run_folders_are_there_at_once(browser, tiny_folder, tmp_path):
    home = tmp_path / "home"
    for n in range(200):
        write_run(home / "runs" / f"run-{n:03}", steps=20, seed=n)
    with studio(home, tiny_folder.parent) as url:

        def sort(watched: Watched) -> None:
            page = watched.page
            page.get_by_text("200 of 200 runs").wait_for()
            assert page.locator("table.runs tbody tr").count() == 25
            for name in ("Loss", "Run", "Started"):
                page.get_by_role("button", name=name, exact=True).click()
            page.get_by_role("searchbox").fill("run-17")
            page.get_by_text("10 of 200 runs").wait_for()
            page.get_by_role("searchbox").fill("")
            page.get_by_role("button", name="Next", exact=True).click()
            page.get_by_text("Page 2 of 8").wait_for()

        seen = smooth(browser, url + "/#/runs", {}, sort)
    assert any(paint < FIRST_PAINT_MS and task < LONGEST_MS for paint, task in seen)
