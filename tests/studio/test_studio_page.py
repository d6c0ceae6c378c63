"""The studio's page in Chromium, over a stand-in for the server that has what no short run gives: 200 runs, an hour of numbers.

tests/studio/test_studio_loop.py drives the real server through the whole loop.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from studio_browser import Watched, open_studio
from studio_stand_in import HOSTILE, StandIn, hour

pytestmark = pytest.mark.slow

MODEL = "Qwen/Qwen3-0.6B"
SET = "/home/me/mlx-lora-studio/data/tutor.jsonl"
PROJECT = {"model": MODEL, "sets": [{"path": SET, "weight": 1}], "settings": {"rank": 32}, "preset": None}
PLACES = {
    "model": "Where the studio looked", "data": "What color is sunlight", "train": "tokens/s", "runs": "tutor-qwen3-0.6b-001",
    "runs/run-001": "What was forgotten", "runs/run-005": "Resume", "runs/compare/run-001,run-002": "Settings that differ", "talk": "Write a message",
}  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with StandIn() as one:
        yield one


@pytest.fixture
def studio(browser, server) -> Iterator[Watched]:
    with open_studio(browser, server.url, project=PROJECT) as watched:
        yield watched


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_axe_finds_nothing_serious_in_any_place(browser, server, dark):
    with open_studio(browser, server.url, dark, project=PROJECT) as watched:
        for place, until in PLACES.items():
            watched.go(place, until)
            assert watched.complaints() == [], place
        watched.go("train")
        watched.page.get_by_role("radio", name="New run").check()
        watched.page.get_by_text("Start training").wait_for()
        assert watched.complaints() == []
        watched.page.get_by_text("Change settings").click()
        watched.page.get_by_role("searchbox").fill("rate")
        assert watched.complaints() == []
        watched.go("talk", "Column B")
        watched.page.get_by_role("radio", name="Ship").check()
        watched.page.get_by_text("For which program").wait_for()
        assert watched.complaints() == []
        # The paired test: axe does find what is wrong.
        watched.page.evaluate(
            "document.querySelector('main').append(Object.assign(document.createElement('img'), {src: 'data:,'}))"
        )
        assert [one[0] for one in watched.complaints()] == ["image-alt"]


@pytest.mark.parametrize("width", [390, 768, 1280, 2560])
def test_nothing_is_wider_than_the_window(browser, server, width):
    with open_studio(browser, server.url, width=width, project=PROJECT) as watched:
        for place, until in PLACES.items():
            watched.go(place, until)
            assert watched.page.evaluate("document.documentElement.scrollWidth") <= width, place


def test_an_empty_studio_says_what_to_do(browser, server):
    with open_studio(browser, server.url, project={}) as watched:
        for place, words in {
            "model": "No model chosen", "data": "No data yet", "train": "Choose a model first", "talk": "Column A",
        }.items():  # fmt: skip
            watched.go(place)
            if place == "train":
                watched.page.get_by_text("Sample texts").wait_for()  # a run goes on: it is shown first
                watched.page.get_by_role("radio", name="New run").check()
            watched.page.get_by_text(words).first.wait_for()


def test_the_keyboard_alone_reaches_everything_and_sees_where_it_is(studio):
    page = studio.page
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    names = []
    for _ in range(7):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.textContent || document.activeElement.ariaLabel"))
        outline = page.evaluate("getComputedStyle(document.activeElement).outline")
        assert "solid 2px" in outline, (names[-1], outline)
    assert names[1:6] == ["Model", "Data", "Train", "Runs", "Talk & ship"]
    page.get_by_role("link", name="Runs").focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Runs", exact=True).wait_for()
    page.wait_for_function("document.activeElement.tagName === 'H1'")


def test_a_hostile_row_and_a_hostile_answer_are_text(studio):
    page = studio.page
    page.on("dialog", lambda dialog: pytest.fail(f"a script ran: {dialog.message}"))
    studio.go("data", HOSTILE)
    assert page.get_by_text(HOSTILE).count() == 1
    studio.go("talk", "Column B")
    page.get_by_label("Message", exact=True).fill("How do I boil an egg?")
    page.keyboard.press("Enter")
    page.get_by_text("tokens/s, first token").nth(1).wait_for()
    assert page.get_by_text(HOSTILE).count() == 2
    assert page.locator("main script, main img").count() == 0
    assert page.locator(".said strong").all_inner_texts() == ["seven", "seven"]


def test_each_column_has_its_own_conversation(studio, server):
    page = studio.page
    studio.go("talk", "Column B")
    for question in ("One?", "Two?"):
        page.get_by_label("Message", exact=True).fill(question)
        page.keyboard.press("Enter")
        page.get_by_text(question).wait_for()
        page.get_by_role("button", name="Stop", exact=True).and_(page.locator(":disabled")).wait_for()
    asked = [body for path, body in server.asked if path == "talk"][-1]
    assert [len(column["adapters"]) for column in asked["columns"]] == [0, 1]
    assert [one["role"] for one in asked["messages"]] == ["user", "assistant", "user"]
    assert page.get_by_label("Message", exact=True).input_value() == ""


def test_one_talks_on_the_base_that_an_adapter_was_trained_on(browser):
    runs = [{"name": "four", "bits": 4}, {"name": "plain"}, {"name": "old", "revision": "v1", "bits": 4}]
    adapters = [{"path": f"/runs/{one['name']}", "base": MODEL, "run": one["name"], **one} for one in runs]
    with (
        StandIn(answers={"adapters": {"adapters": adapters}}) as server,
        open_studio(browser, server.url, project=PROJECT) as watched,
    ):
        page = watched.page
        heard = []
        for place, at in (("talk", None), ("talk", 1), ("talk/old", None)):
            page.reload()
            watched.go(place, "Column B")
            if at is not None:
                page.get_by_label("Model", exact=True).select_option(index=at)
            page.get_by_label("Message", exact=True).fill("Why?")
            page.keyboard.press("Enter")
            page.get_by_role("button", name="Stop", exact=True).and_(page.locator(":disabled")).wait_for()
            body = [body for path, body in server.asked if path == "talk"][-1]
            heard.append((body["model"], body["revision"], body["bits"], body["columns"][1]["adapters"][0]["path"]))
        assert heard == [
            (MODEL, None, 4, "/runs/four"), (MODEL, None, None, "/runs/plain"), (MODEL, "v1", 4, "/runs/old"),
        ]  # fmt: skip
        assert page.get_by_label("Model", exact=True).locator("option").count() == 3


def test_a_plan_follows_the_settings(studio, server):
    page = studio.page
    studio.go("train")
    page.get_by_role("radio", name="New run").check()
    page.get_by_role("button", name="Start training").wait_for()
    before = page.locator(".plan .memory-ends").inner_text()
    page.get_by_text("Change settings").click()
    page.get_by_role("searchbox").fill("rank")
    page.locator("#set-rank").fill("128")
    page.keyboard.press("Tab")
    page.wait_for_function("text => document.querySelector('.plan .memory-ends').innerText !== text", arg=before)
    page.get_by_role("button", name="Set Rank back to 16").click()
    page.get_by_role("radio", name="Quick").check()
    held: list[Any] = []  # the answer waits
    page.route("**/api/train/start", lambda route: held.append(route))
    page.get_by_role("button", name="Start training").click()
    page.locator("button[aria-busy=true]:disabled", has_text="Starting").wait_for()
    held[0].continue_()
    page.get_by_text("Sample texts").wait_for()
    assert page.locator("button[aria-busy]").count() == 0
    started = [body for path, body in server.asked if path == "train/start"][-1]
    assert started["card"] == "quick", "the server knows the card's settings, which follow the data"
    assert started["settings"] == {"model": MODEL, "data": SET}


def test_cards_are_never_blank_and_show_the_plan_when_it_is_there(studio, server):
    page, held, opened = studio.page, list[Any](), list[bool]()
    page.route("**/api/train/plan", lambda route: route.continue_() if opened else held.append(route))
    studio.go("train")
    page.get_by_role("radio", name="New run").check()
    figures = page.locator(".run-card dd[data-figure=steps]")
    for number, words in enumerate(("about 118", "about 236", "about 472")):
        figures.nth(number).filter(has_text=words).wait_for()
    assert page.locator(".run-card dd[data-figure='learning rate']").all_inner_texts() == ["0.0005"] * 3
    opened.append(True)
    while held:
        held.pop().continue_()
    for number, words in enumerate(("120", "240", "480")):
        figures.nth(number).filter(has_text=re.compile(f"^{words}$")).wait_for()
    assert page.locator(".run-card .pending").count() == 0
    beyond = "cards => cards.filter(c => c.querySelector('dl').scrollWidth > c.querySelector('dl').clientWidth).length"
    assert page.locator(".run-card").evaluate_all(beyond) == 0, "figures stay inside their card"
    assert page.locator(".run-card dd[data-figure=time]").all_inner_texts() == ["5 min 30 s", "11 min", "22 min"]
    # What one sets beats the cards, and a rate that is far off is warned of beside its field and in the plan.
    page.get_by_text("Change settings").click()
    page.locator("#set-iters").fill("77")
    page.locator("#set-learning_rate").fill("1")
    page.keyboard.press("Tab")
    figures.nth(2).filter(has_text=re.compile("^77$")).wait_for()
    page.locator(".setting .field-warning", has_text="diverge").wait_for()
    page.locator(".plan .warned", has_text="diverge").wait_for()
    assert page.get_by_role("button", name="Start training").is_enabled()


def test_answers_stand_side_by_side_and_another_set_can_be_asked(studio, server):
    page = studio.page
    studio.go("runs/run-001", "Questions and answers")
    table = page.get_by_role("region", name="Questions and answers")
    assert table.get_by_role("row").count() == 9
    page.get_by_role("button", name="Show all 14").click()
    assert table.get_by_role("row").count() == 15
    new_words = table.get_by_role("row").nth(1)
    assert "in new words" in new_words.inner_text(), "they tell more than the words of the rows"
    new_words.get_by_role("button", name="wrong", exact=True).click()
    new_words.get_by_role("button", name="right", exact=True).click()  # it is right by itself: takes a tick back
    table.get_by_role("row").nth(3).get_by_role("button", name="right", exact=True).click()
    page.wait_for_timeout(300)
    ticks = [body for path, body in server.asked if path == "runs/run-001/tick"]
    assert ticks == [{"index": 10, "right": False}, {"index": 10, "right": None}, {"index": 12, "right": None}]
    assert table.get_by_text(HOSTILE).count() == 2, "as text"
    page.get_by_label("Questions from").select_option(label="tutor.jsonl")
    page.get_by_role("button", name="Ask again").click()
    page.locator(".button.busy", has_text="Asking").wait_for()
    page.get_by_text(f"mlx-lora evaluate --data {SET}").wait_for()
    assert ("runs/run-001/evaluation", {"data": SET}) in server.asked
    studio.go("runs/run-002", "Questions and answers")
    page.get_by_label("Questions from").locator("option", has_text="24 held-out rows").wait_for(state="attached")
    page.get_by_role("button", name="Ask both").click()
    page.get_by_text("mlx-lora evaluate --data held out").wait_for()
    studio.go("runs/run-000", "Progress")
    assert page.get_by_label("Questions from").count() == 0


def test_an_ended_run_begins_with_its_result_and_its_details_are_folded(studio):
    page = studio.page
    studio.go("runs/run-001", "Learned: 6 of 12 right")
    assert page.get_by_text("Held-out perplexity 9.3 to 5.1.").count() == 1
    page.get_by_role("region", name="Questions and answers").wait_for()
    assert page.locator(".chart, .log").count() == 0
    page.get_by_text("Curves, texts and log").click()
    page.locator(".chart canvas").first.wait_for()
    assert page.locator(".log").count() == 1


def test_runs_are_compared_by_their_answers_to_the_same_questions(studio):
    studio.go("runs/compare/run-001,run-002", "Answers to the same questions")
    table = studio.page.get_by_role("region", name="Answers side by side")
    studio.page.get_by_role("button", name="Show all 12").click()
    assert table.get_by_role("row").count() == 13
    assert table.get_by_text("Run run-002").count() == 12
    assert table.get_by_role("columnheader").last.get_by_text("6 of 12 right").count() == 1


def test_next_goes_to_a_new_run_though_another_goes_on(studio):
    studio.go("data", "Rows")
    studio.page.get_by_role("button", name="Next: train").click()
    studio.page.get_by_role("button", name="Start training").wait_for()
    assert studio.page.locator(".live").count() == 0


def test_on_a_phone_an_answer_has_most_of_the_screen(browser, server):
    with open_studio(browser, server.url, width=390, project=PROJECT) as watched:
        page = watched.page
        watched.go("talk", "base ·")
        page.get_by_label("Message", exact=True).fill("How do I boil an egg?")
        page.keyboard.press("Enter")
        page.get_by_text("tokens/s, first token").nth(1).wait_for()
        page.wait_for_timeout(300)
        taken = page.evaluate(
            "[...document.querySelectorAll('.ask, .sidebar')].reduce((sum, one) => sum + one.offsetHeight, 0) / innerHeight"
        )
        assert taken < 0.25, "the message's field and the places"
        assert page.locator(".toolbar:visible, .column-choice:visible").count() == 0


def test_pictures_are_asked_for_only_where_the_model_sees(browser):
    for sees in (True, False):
        with (
            StandIn(answers={"talk/model": {"sees": sees}}) as server,
            open_studio(browser, server.url, project=PROJECT) as watched,
        ):
            watched.go("talk", "Column B")
            watched.page.wait_for_timeout(300)
            assert watched.page.get_by_role("button", name="Add pictures").count() == sees


def test_a_model_of_several_names_stands_in_the_menu_once(browser):
    names = ("smollm2", "/models/small.gguf")
    adapters = [
        {"path": f"/runs/{n}", "name": str(n), "base": base, "file": "/models/small.gguf", "run": str(n)}
        for n, base in enumerate(names)
    ]
    with (
        StandIn(answers={"adapters": {"adapters": adapters}}) as server,
        open_studio(browser, server.url, project={**PROJECT, "model": None}) as watched,
    ):
        watched.go("talk", "Column B")
        assert watched.page.get_by_label("Model", exact=True).locator("option").count() == 1


def test_a_killed_run_says_so_and_goes_on_when_asked(studio, server):
    studio.go("runs/run-005", "The process ended without a message")
    studio.page.get_by_role("button", name="Resume").click()
    studio.page.get_by_role("button", name="Pause").wait_for()
    assert ("runs/run-005/resume", {}) in server.asked


def test_deleting_asks_first(browser):
    with StandIn(3) as server, open_studio(browser, server.url) as watched:
        page = watched.page
        watched.go("runs/run-001", "Notes")
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("dialog").wait_for()
        page.keyboard.press("Escape")
        page.get_by_role("dialog").wait_for(state="detached")
        assert len(server.runs) == 3
        page.get_by_role("button", name="Delete", exact=True).click()
        page.get_by_role("button", name="Delete the run").click()
        page.get_by_text("2 of 2 runs").wait_for()
        assert ("runs/run-001", {"confirm": "tutor-qwen3-0.6b-001"}) in server.asked


def test_an_hour_of_numbers_leaves_no_memory_behind(browser):
    """The clock is simulated: 3,600 reports, log lines and states, as of one a second, sent as fast as the page takes them."""
    with StandIn(3, hour()) as server, open_studio(browser, server.url, project=PROJECT) as watched:
        page = watched.page
        watched.go("train", "Loss")
        seen = []
        for step in (900, 1800, 2700, 3600):
            page.wait_for_function(
                "least => parseInt(document.querySelector('.live .tiles dd').innerText.replace(',', '')) >= least",
                arg=step, timeout=120_000,
            )  # fmt: skip
            page.wait_for_timeout(700)  # what was gathered is drawn
            seen.append(watched.memory())
        print("an hour, simulated: (heap bytes, DOM nodes) after each quarter:", seen, page.evaluate("seen.long"))
        heaps, nodes = zip(*seen, strict=True)
        assert heaps[-1] < heaps[0] + 2_000_000
        assert nodes[-1] <= nodes[0] * 1.1 + 50
        points = int(page.locator(".chart").first.get_attribute("aria-label").split(" points")[0].split()[-1])
        assert 900 < points <= 2000
        assert page.locator(".log").inner_text().count("\n") < 200
        assert (
            sum(task >= 200 for task in page.evaluate("seen.long")) <= 2
        )  # a machine that others use too stops now and then


def test_a_studio_with_a_key_asks_for_it(browser, server):
    watched = Watched(browser.new_page())
    page, given = watched.page, []
    page.add_init_script("window.seen = {forbidden: []}")

    def answer(route: Any) -> None:
        given.append(route.request.headers.get("authorization"))
        if given[-1] == "Bearer open sesame":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "a key is needed"}})

    page.route("**/api/**", answer)
    page.goto(server.url)
    for key in ("wrong", "open sesame"):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Open the studio").click()
        page.get_by_text("does not accept this key" if key == "wrong" else "On this disk").wait_for()
    assert page.evaluate("JSON.stringify({...localStorage, ...sessionStorage})").count("sesame") == 0
    page.close()
