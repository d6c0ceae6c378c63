"""Fields of the studio's page keep what one types: a plan that comes meanwhile never replaces it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import pytest
from studio_browser import Watched, open_studio
from studio_client import furnish, studio
from studio_stand_in import StandIn

from mlx_lora.config.fields import flag_of
from mlx_lora.config.settings import FIELDS
from mlx_lora.data.examples import MissingColumn
from mlx_lora.data.formats import parse_record
from mlx_lora.studio.web import fields_in, in_page_words, label_of, setting_groups

PROJECT = {"model": "Qwen/Qwen3-0.6B", "sets": [{"path": "/home/me/tutor.jsonl", "weight": 1}], "settings": {}}


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with StandIn(n_runs=1, running=False) as one:
        yield one


@pytest.fixture
def watched(browser, server) -> Iterator[Watched]:
    """Train, with its settings shown."""
    with open_studio(browser, server.url, project=PROJECT) as watched:
        watched.go("train")
        watched.page.get_by_text("Change settings").click()
        watched.page.locator("#set-learning_rate").wait_for()
        yield watched


def settings_of(page: Any) -> dict[str, Any]:
    """The settings that the page has kept."""
    return page.evaluate("JSON.parse(localStorage.getItem('mlx_lora studio project')).settings")


def kept_soon(page: Any, rate: float) -> None:
    """Wait until the page has kept a rate."""
    until = time.monotonic() + 20
    while settings_of(page).get("learning_rate") != rate:
        assert time.monotonic() < until, settings_of(page)
        page.wait_for_timeout(50)


def type_rate(watched: Watched, server: StandIn, delay_ms: int, rank: int) -> str:
    """Edit the rank, then type a rate while the plan of that edit is asked and answered; return what the field shows."""
    page = watched.page
    page.locator("#set-learning_rate").fill("")
    page.keyboard.press("Tab")
    page.locator("#set-rank").fill(str(rank))
    asked = len([path for path, _ in server.asked if path == "train/plan"])
    page.locator("#set-learning_rate").focus()  # leaving the rank asks for a plan
    page.keyboard.type("0.001", delay=delay_ms)
    page.wait_for_timeout(600)
    assert len([path for path, _ in server.asked if path == "train/plan"]) > asked, "no plan came while one typed"
    page.keyboard.press("Tab")
    return page.locator("#set-learning_rate").input_value()


def test_a_rate_is_what_one_types_while_the_plan_is_made_again(watched, server):
    assert type_rate(watched, server, 80, 8) == "0.001"
    assert settings_of(watched.page) == {"rank": 8, "learning_rate": 0.001}


@pytest.mark.slow
@pytest.mark.parametrize("delay_ms", [80, 250])
def test_a_rate_is_what_one_types_20_times(watched, server, delay_ms):
    shown = [type_rate(watched, server, delay_ms, 4 + turn) for turn in range(20)]
    assert shown == ["0.001"] * 20
    assert settings_of(watched.page)["learning_rate"] == 0.001


def test_what_is_not_complete_stays_is_told_and_stops_the_start(watched):
    page, field = watched.page, watched.page.locator("#set-learning_rate")
    start = page.get_by_role("button", name="Start training")
    start.and_(page.locator(":enabled")).wait_for()
    for text in ("0", "1e-", "0,001", "fast"):
        field.fill(text)
        page.keyboard.press("Tab")
        start.and_(page.locator(":disabled")).wait_for()
        assert field.input_value() == text
        assert "Learning rate" in page.locator("#why-not").inner_text()
        assert "learning_rate" not in settings_of(page)
    # Reset takes away what one typed, too.
    page.get_by_role("button", name="Set Learning rate back").click()
    start.and_(page.locator(":enabled")).wait_for()
    assert field.input_value() == ""
    field.fill("2e-3")
    page.keyboard.press("Enter")
    kept_soon(page, 0.002)
    # A pause is enough where the number is complete, and leaves what one types alone.
    field.press_sequentially("5")
    kept_soon(page, 2e-35)
    assert field.input_value() == "2e-35"


def refuse_rows(watched: Watched, refused: int, problem: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """Go to the data, whose rows are refused; return the settings of each preview that the page asks for."""
    asked = []
    counts = dict.fromkeys(("rows", "tokens", "trained_tokens", "cut", "doubled", "empty"), 0) | {"refused": refused}
    answer = {
        "total": 0, "forms": {}, "counts": counts, "histogram": [], "rows": [], "notes": [], "task": None, "problems": [problem],
        **more,
    }  # fmt: skip

    def preview(route: Any) -> None:
        asked.append(route.request.post_data_json["settings"])
        route.fulfill(json=answer)

    watched.page.route("**/api/data/preview", preview)
    watched.go("data")
    return asked


def test_other_columns_are_chosen_from_two_menus(browser, server):
    problem = {"file": "faq.csv", "line": 2, "message": "found “Column of the prompt”"}
    with open_studio(browser, server.url, project=PROJECT) as watched:
        page, asked = watched.page, refuse_rows(watched, 9, problem, set_rows=[0], columns=["Frage", "Antwort", "Nr"])
        page.get_by_label("Question", exact=True).select_option("Frage")
        assert page.get_by_text("Column of the prompt").locator("visible=true").count() == 0, "it is said once"
        page.get_by_label("Answer", exact=True).select_option("Antwort")
        while asked[-1] != {"prompt_column": "Frage", "completion_column": "Antwort"}:
            page.wait_for_timeout(50)
        assert asked[0] == {}


def test_a_table_with_other_columns_opens_the_fields_that_its_error_names(browser, server):
    with pytest.raises(MissingColumn) as error:
        parse_record({"frage": "Wann?", "antwort": "Um neun."})
    said = in_page_words(str(error.value))
    with open_studio(browser, server.url, project=PROJECT) as watched:
        page, asked = watched.page, refuse_rows(watched, 1, {"file": "/home/me/tutor.csv", "line": 2, "message": said})
        named = re.findall("“(.*?)”", said)
        assert named[:2] == [label_of("prompt_column"), label_of("completion_column")]
        for label in named:
            page.get_by_label(label, exact=True).wait_for()  # seen, so not in a folded part of the page
        assert "“Column of the prompt” frage" in said
        page.get_by_label(label_of("speaker"), exact=True).fill("Lena")
        page.keyboard.press("Tab")
        page.wait_for_function("document.querySelector('#speaker').value === 'Lena'")
        until = time.monotonic() + 20
        while asked[-1].get("speaker") != "Lena":  # a chat is read again with the name
            assert time.monotonic() < until, asked
            page.wait_for_timeout(50)


def test_the_figures_of_a_card_stay_inside_it(browser, server):
    with open_studio(browser, server.url, project=PROJECT) as watched:
        watched.page.set_viewport_size({"width": 1280, "height": 900})
        watched.go("train")
        watched.page.locator(".run-card dd").first.wait_for()
        room = "one => one.closest('.run-card').getBoundingClientRect().right - one.getBoundingClientRect().right"
        assert min(watched.page.locator(".run-card dd").evaluate_all(f"all => all.map({room})")) >= 8


# The page's words


def test_flags_of_settings_become_fields():
    said = in_page_words(
        "--iters and --epochs: both given; keep one; see `mlx-lora train --iters 3` and --no-mask-prompt"
    )
    assert said.startswith("“Steps” and “Passes over the data”: both given")
    assert "`mlx-lora train --iters 3`" in said
    assert said.endswith(f"“{label_of('mask_prompt')}” off")
    assert in_page_words("--push-to-hub x--iters") == "--push-to-hub x--iters", "no setting of a run"
    assert fields_in("--iters and --epochs: both; --iters, --no-such-thing") == ["iters", "epochs"]


def test_labels_are_unlike_each_other_and_help_names_no_flag():
    labels = {name: label_of(name) for name in FIELDS}
    assert len({label.lower() for label in labels.values()}) == len(labels)
    rows = [row for group in setting_groups() for row in group["settings"]]
    flags = {flag_of(name) for name in FIELDS}
    for row in rows:
        assert row["label"] == labels[row["name"]]
        assert not set(re.findall(r"--[a-z-]+", row["help"])) & flags, row["help"]
        assert "flag" not in row["help"], row["help"]


@pytest.fixture(scope="module")
def client_and_names(tmp_path_factory, tiny_folder, chats):
    home = tmp_path_factory.mktemp("words") / "home"
    names = furnish(home, tiny_folder, chats)
    with studio(home) as client:
        yield client, names


def test_what_is_wrong_names_the_fields_and_stands_at_them(client_and_names):
    client, (model, data) = client_and_names
    settings = {"model": model, "data": data, "iters": 3, "epochs": 2}
    plan = client.post("/api/train/plan", json={"settings": settings}).json()
    (problem,) = plan["problems"]
    assert "--" not in problem
    assert label_of("iters") in problem
    assert set(plan["said"]) == {"iters", "epochs"}
    assert "--iters 3" in plan["command"], "the command keeps its flags"
    refused = client.post("/api/train/start", json={"settings": settings, "name": "x"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == problem
